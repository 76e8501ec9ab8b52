"""The calls of this process that change files below one folder, passed through a test's hands.

Functions of ``os``, and ``io.open`` for what ``pathlib`` writes, are replaced while ``watched_calls``
is entered. What only reads is left alone. One call at a time: the order seen is the order done.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call; paths are relative to the folder, "" for itself."""

    kind: str  # open, write, truncate, sync, link, unlink, rename, mkdir, rmdir
    path: str
    target: str = ""  # the new name, of link and rename
    opened: int = 0  # which open it is, or goes through
    is_folder: bool = False  # what is opened or synced
    cuts: bool = False  # an open that makes the file empty
    offset: int = 0  # of a write
    data: bytes = b""  # of a write
    size: int = 0  # of a truncate

    def __str__(self) -> str:
        more = f" -> {self.target}" if self.target else ""
        size = f" ({len(self.data)} bytes at {self.offset})" if self.kind == "write" else ""
        return f"{self.kind} {self.path or '.'}{more}{size}"


# Gets the call and what carries it out; returns what the call returns. A write may be given fewer
# bytes to carry out than the call has.
Handler = Callable[[Call, Callable[..., Any]], Any]


@contextmanager
def watched_calls(folder: Path, handler: Handler) -> Iterator[None]:
    """Pass the calls that change something below ``folder`` to ``handler``."""
    watcher = _Watcher(folder, handler)
    with (
        mock.patch.multiple(os, **watcher.functions()),
        mock.patch.object(io, "open", watcher.io_open),
    ):
        yield


@dataclass(slots=True)
class _Opened:
    number: int
    path: str
    is_folder: bool
    place: int = 0  # where the next write goes


class _Watcher:
    def __init__(self, folder: Path, handler: Handler) -> None:
        self._root = os.path.abspath(folder)
        self._handler = handler
        self._lock = threading.RLock()
        self._opened: dict[int, _Opened] = {}
        self._number = 0
        self._os = {name: getattr(os, name) for name in self.functions()}
        self._io_open = io.open

    def functions(self) -> dict[str, Callable[..., Any]]:
        names = (
            *("open", "close", "write", "writev", "pwrite", "ftruncate", "fsync"),
            *("link", "unlink", "rename", "replace", "mkdir", "rmdir"),
        )
        return {name: getattr(self, name) for name in names}

    # -- files -----------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._name(path, dir_fd)
        act = self._os["open"]
        is_changing = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC)
        is_folder = name is not None and Path(self._root, name).is_dir()
        if name is None or not (is_changing or is_folder):
            return int(act(path, flags, mode, dir_fd=dir_fd))
        with self._lock:
            call = Call(
                kind="open",
                path=name,
                opened=self._next_number(),
                is_folder=is_folder,
                cuts=bool(flags & os.O_TRUNC),
            )
            file = int(self._handler(call, lambda: act(path, flags, mode, dir_fd=dir_fd)))
            self._opened[file] = _Opened(call.opened, name, is_folder)
            return file

    def close(self, file: int) -> None:
        with self._lock:
            self._opened.pop(file, None)
            self._os["close"](file)

    def write(self, file: int, data: Any) -> int:
        return self._write(file, bytes(data), None, lambda part: self._os["write"](file, part))

    def writev(self, file: int, parts: Any) -> int:
        return self._write(file, b"".join(parts), None, lambda part: self._os["write"](file, part))

    def pwrite(self, file: int, data: Any, offset: int) -> int:
        act = self._os["pwrite"]
        return self._write(file, bytes(data), offset, lambda part: act(file, part, offset))

    def _write(
        self, file: int, data: bytes, offset: int | None, act: Callable[[bytes], int]
    ) -> int:
        with self._lock:
            opened = self._opened.get(file)
            if opened is None:
                return act(data)
            call = Call(
                kind="write",
                path=opened.path,
                opened=opened.number,
                offset=opened.place if offset is None else offset,
                data=data,
            )
            written = int(self._handler(call, lambda size=None: act(data[:size])))
            if offset is None:
                opened.place += written
            return written

    def ftruncate(self, file: int, size: int) -> None:
        def act() -> None:
            self._os["ftruncate"](file, size)

        with self._lock:
            opened = self._opened.get(file)
            if opened is None:
                act()
                return
            call = Call(kind="truncate", path=opened.path, opened=opened.number, size=size)
            self._handler(call, act)

    def fsync(self, file: int) -> None:
        def act() -> None:
            self._os["fsync"](file)

        with self._lock:
            opened = self._opened.get(file)
            if opened is None:
                act()
                return
            call = Call(
                kind="sync", path=opened.path, opened=opened.number, is_folder=opened.is_folder
            )
            self._handler(call, act)

    def io_open(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        name = None if isinstance(file, int) else self._name(file, None)
        if name is None or not set(mode) & set("wxa+"):
            return self._io_open(file, mode, *rest, **named)
        assert set(mode) <= set("wbt"), f"opening {name!r} as {mode!r} is not watched"
        with self._lock:
            call = Call(kind="open", path=name, opened=self._next_number(), cuts=True)
            opened = self._handler(call, lambda: self._io_open(file, mode, *rest, **named))
            return _WrittenFile(opened, call, self._handler, self._lock)

    # -- names -----------------------------------------------------------------------------------

    def link(self, source: Any, target: Any, **named: Any) -> None:
        self._two_names("link", source, target, **named)

    def rename(self, source: Any, target: Any, **named: Any) -> None:
        self._two_names("rename", source, target, **named)

    def replace(self, source: Any, target: Any, **named: Any) -> None:
        self._two_names("rename", source, target, **named)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._one_name("unlink", path, dir_fd=dir_fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._one_name("mkdir", path, mode, dir_fd=dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._one_name("rmdir", path, dir_fd=dir_fd)

    def _one_name(self, kind: str, path: Any, *rest: Any, dir_fd: int | None) -> None:
        name = self._name(path, dir_fd)
        with self._lock:
            if name is None:
                self._os[kind](path, *rest, dir_fd=dir_fd)
                return
            call = Call(kind=kind, path=name)
            self._handler(call, lambda: self._os[kind](path, *rest, dir_fd=dir_fd))

    def _two_names(self, kind: str, source: Any, target: Any, **named: Any) -> None:
        names = self._name(source, None), self._name(target, None)
        with self._lock:
            if names[1] is None:
                self._os[kind](source, target, **named)
                return
            assert names[0] is not None, "from elsewhere into the watched folder"
            call = Call(kind=kind, path=names[0], target=names[1])
            self._handler(call, lambda: self._os[kind](source, target, **named))

    def _name(self, path: Any, folder: int | None) -> str | None:
        """Relative to the watched folder; None where it lies elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if folder is not None:
            opened = self._opened.get(folder)
            return None if opened is None else f"{opened.path}/{text}".lstrip("/")
        text = os.path.abspath(text)
        if text == self._root:
            return ""
        return text.removeprefix(f"{self._root}/") if text.startswith(f"{self._root}/") else None

    def _next_number(self) -> int:
        self._number += 1
        return self._number


class _WrittenFile:
    """A file object that passes its writes on, each one done when ``write`` returns."""

    def __init__(self, file: Any, call: Call, handler: Handler, lock: Any) -> None:
        self._file = file
        self._call = call
        self._handler = handler
        self._lock = lock
        self._place = 0

    def __enter__(self) -> _WrittenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        raw = data.encode() if isinstance(data, str) else bytes(data)

        def act(size: int | None = None) -> int:
            self._file.write(data[:size])
            self._file.flush()
            return len(raw[:size])

        with self._lock:
            call = Call(
                kind="write",
                path=self._call.path,
                opened=self._call.opened,
                offset=self._place,
                data=raw,
            )
            self._place += self._handler(call, act)
            return len(data)

    def close(self) -> None:
        self._file.close()
