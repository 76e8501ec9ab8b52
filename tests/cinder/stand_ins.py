"""What stands in for volumes in tests of the Cinder driver, and what looks at the process."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30


def image(size: int, *, seed: int = 0, holes: bool = True) -> bytes:
    """Data that do not compress, with a hole in the middle and one at the end."""
    data = bytearray(random.Random(seed).randbytes(size))
    if holes:
        data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
        data[-size // 8 :] = bytes(size - (size - size // 8))
    return bytes(data)


class Wrapper:
    """A volume as libraries of storage systems give it: no descriptor, ``write`` says nothing."""

    def __init__(self, path: Path, *, read_size_max: int = 1 << 30) -> None:
        self._file = path.open("r+b")
        self._read_size_max = read_size_max
        self.on_read: Callable[[int], None] = lambda _offset: None
        self.on_write: Callable[[int], None] = lambda _offset: None

    def read(self, size: int) -> bytes:
        self.on_read(self._file.tell())
        return self._file.read(min(size, self._read_size_max))

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.on_write(self._file.tell())
        self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> None:
        self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        raise OSError("fileno() not supported by a wrapper")


class FakeRbdImage:
    """What os-brick's wrapper asks of an image of librbd, over a file."""

    name = "volume"

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)
        self.flushes = 0

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        assert offset + size <= self.size(), "librbd fails where one reads beyond the end"
        return os.pread(self._file.fileno(), size, offset)

    def write(self, data: bytes, offset: int) -> int:
        assert type(data) is bytes, "librbd takes nothing else"
        assert offset + len(data) <= self.size(), "librbd fails where one writes beyond the end"
        return os.pwrite(self._file.fileno(), data, offset)

    def flush(self) -> None:
        self.flushes += 1

    def require_not_closed(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class Pulse:
    """A thread of the service that beats as its heartbeats do, and how long it was kept from it."""

    def __init__(self, interval: float = 0.05) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._longest_pause = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def was_kept_waiting(self) -> bool:
        """Whether one pause took most of the time: then the service stood still for an operation.

        A share of the time, not seconds, as both grow on a machine that is busy.
        """
        return self._longest_pause > self._seconds / 2

    def _beat(self) -> None:
        started = last = time.monotonic()
        while not self._stop.is_set():
            time.sleep(self._interval)
            now = time.monotonic()
            self._longest_pause = max(self._longest_pause, now - last)
            last = now
        self._seconds = last - started


def eventually(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def workers_alive(service: int | None = None) -> list[int]:
    """Worker processes that a service, or this process, has started and that have not ended."""
    children = children_of(service or os.getpid())
    return [child for child, words in children.items() if b"backupfs.worker" in words]


def processes_left() -> dict[int, list[bytes]]:
    """Workers of this process that have not ended, and children whose end nobody has noted."""
    children = children_of(os.getpid())
    return {
        child: words
        for child, words in children.items()
        if words == [b""] or b"backupfs.worker" in words
    }


def children_of(parent: int) -> dict[int, list[bytes]]:
    """A process's children and their command lines, which are empty after their end."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if parent == int((entry / "stat").read_text().rpartition(")")[2].split()[1]):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
    return found


def is_alive(process: int) -> bool:
    """Whether a process, of whomever, has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def sockets_open() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            link = os.readlink(entry)
            if link.startswith("socket:"):
                found.add(link)
    return found
