"""Files, devices and streams of this host that a backup reads.

They skip the holes of files, are read in aligned pieces, and tell when they were changed under the
reader. Nothing here knows of repositories.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

from backupfs.errors import Cancelled, SourceFailed
from backupfs.storage.oserrors import failing_as
from backupfs.types import Buffer

READ_SIZE = 1 << 20
STREAM_NAME = "standard input"
STREAM_WORD = "-"  # stands for standard input where a file is asked for

# How long a silent stream may keep a cancelled reader waiting.
POLL_MILLISECONDS = 200


class HostSource(ABC):
    """An image that the host can read: an ``ImageSource`` over a descriptor that it owns.

    ``mtime_ns`` and ``mode`` are the file's as it was opened; None for what is no regular file.
    ``was_changed`` tells, once ``extents`` is used up, that the file was changed while we read.
    """

    def __init__(self, descriptor: int, *, name: str) -> None:
        self.name = name
        self.size_hint: int | None = None
        self.mtime_ns: int | None = None
        self.mode: int | None = None
        self.was_changed = False
        self._descriptor = descriptor

    @abstractmethod
    def extents(self) -> Iterator[tuple[int, Buffer]]:
        """(offset, data) in ascending order, each piece within ``READ_SIZE`` bytes of alignment.

        Raises:
            SourceFailed: it could not be read to the end as it was when opened.
        """

    @abstractmethod
    def size(self) -> int:
        """The image's bytes, holes included."""

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, Buffer]]:
        offset = start
        while offset < end:
            # Up to the next multiple, so that pieces and the repository's chunks share borders.
            size = min(end - offset, READ_SIZE - offset % READ_SIZE)
            with failing_as(SourceFailed, self.name):
                data = os.pread(self._descriptor, size, offset)
            if not data:
                raise SourceFailed(name=self.name, reason=f"it ends at byte {offset}, before {end}")
            yield offset, data
            offset += len(data)


class FileSource(HostSource):
    """A regular file: holes are skipped.

    One that grows or shrinks while it is read fails, and so does one with more bytes than it says.
    """

    def __init__(self, descriptor: int, *, name: str) -> None:
        super().__init__(descriptor, name=name)
        found = os.fstat(descriptor)
        self._size = self.size_hint = found.st_size
        self.mtime_ns = found.st_mtime_ns
        self._ctime_ns = found.st_ctime_ns
        self.mode = stat.S_IMODE(found.st_mode)

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        end = 0
        while (start := self._next_data(end)) is not None:
            end = self._next_hole(start)
            yield from self._pieces(start, end)
        self._check_unchanged()

    def size(self) -> int:
        return self._size

    def _next_data(self, offset: int) -> int | None:
        """Where data go on at or after ``offset``; None where only a hole is left."""
        if offset >= self._size:
            return None
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            return self._without_holes(error, offset)
        return start if start < self._size else None

    def _next_hole(self, offset: int) -> int:
        try:
            end = os.lseek(self._descriptor, offset, os.SEEK_HOLE)
        except OSError as error:
            return self._without_holes(error, self._size)
        return min(end, self._size)

    def _without_holes(self, error: OSError, offset: int) -> int:
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            return offset  # a file system that cannot tell: everything is data
        raise SourceFailed(name=self.name, reason=error.strerror) from error

    def _check_unchanged(self) -> None:
        with failing_as(SourceFailed, self.name):
            behind = os.pread(self._descriptor, 1, self._size)
            found = os.fstat(self._descriptor)
        if found.st_size != self._size:
            reason = f"its size changed from {self._size} to {found.st_size} bytes meanwhile"
            raise SourceFailed(name=self.name, reason=reason)
        if behind:
            # Files of procfs, and of some FUSE, say 0 and have bytes: they are no image of 0 bytes.
            reason = f"it goes on behind the {self._size} bytes that it says it has"
            raise SourceFailed(name=self.name, reason=reason)
        # Who puts the modification time back (touch -r) cannot put this one back. Reading leaves it
        # alone; a new mode, owner or link does not, and is taken for a change rather than overlooked.
        self.was_changed = (found.st_mtime_ns, found.st_ctime_ns) != (self.mtime_ns, self._ctime_ns)


class DeviceSource(HostSource):
    """A block device, read from its start to its end: devices do not tell their holes."""

    def __init__(self, descriptor: int, *, name: str) -> None:
        super().__init__(descriptor, name=name)
        with failing_as(SourceFailed, name):
            self._size = self.size_hint = os.lseek(descriptor, 0, os.SEEK_END)

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        yield from self._pieces(0, self._size)

    def size(self) -> int:
        return self._size


class StreamSource(HostSource):
    """A pipe or the like: its size is known once it has ended, and an empty one fails.

    ``cancelled`` is asked while the stream is silent, so that a writer that hangs, or never
    comes, holds nobody up.
    """

    def __init__(self, descriptor: int, *, name: str, cancelled: Callable[[], bool]) -> None:
        super().__init__(descriptor, name=name)
        self._size = 0
        self._cancelled = cancelled

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        while piece := self._gather():
            offset, self._size = self._size, self._size + len(piece)
            yield offset, piece
        if not self._size:
            # A writer that failed looks just like this; nothing was meant to be kept.
            raise SourceFailed(name=self.name, reason="it ended without a single byte")

    def size(self) -> int:
        return self._size

    def _gather(self) -> bytes:
        parts, missing = [], READ_SIZE
        while missing and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        with failing_as(SourceFailed, self.name):
            while True:
                self._wait()
                # Another reader of a named pipe may have been faster.
                with contextlib.suppress(BlockingIOError):
                    return os.read(self._descriptor, size)

    def _wait(self) -> None:
        """Until there are bytes, or all writers are gone; a pipe that never had one is waited for."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not poll.poll(POLL_MILLISECONDS):
            if self._cancelled():
                raise Cancelled(what=f"reading {self.name}")


def open_source(path: str, *, cancelled: Callable[[], bool] = lambda: False) -> HostSource:
    """Open what ``path`` names for reading; ``-`` is standard input. The caller closes it.

    Raises:
        SourceFailed: it is not there, not readable, or nothing that has an image.
    """
    name = STREAM_NAME if path == STREAM_WORD else path
    with failing_as(SourceFailed, name):
        if path == STREAM_WORD:
            descriptor = fcntl.fcntl(sys.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _not_waiting(path))
    try:
        return _source_over(descriptor, name, cancelled)
    except BaseException:  # an interruption too: nobody else knows the descriptor
        os.close(descriptor)
        raise


def _not_waiting(path: str) -> int:
    """The flag with which open(2) does not wait for the first writer of a named pipe.

    A stream's reader waits for it, and can be cancelled. Anything else is opened without: a file
    that is leased would refuse, and a drive without a medium would not.
    """
    return os.O_NONBLOCK if stat.S_ISFIFO(os.stat(path).st_mode) else 0


def _source_over(descriptor: int, name: str, cancelled: Callable[[], bool]) -> HostSource:
    mode = os.fstat(descriptor).st_mode
    # A file on standard input that somebody has read from already goes on where they stopped.
    if stat.S_ISREG(mode) and os.lseek(descriptor, 0, os.SEEK_CUR) == 0:
        return FileSource(descriptor, name=name)
    if stat.S_ISBLK(mode):
        return DeviceSource(descriptor, name=name)
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return StreamSource(descriptor, name=name, cancelled=cancelled)
    what = "a folder" if stat.S_ISDIR(mode) else "a character device"
    raise SourceFailed(name=name, reason=f"it is {what}, not a file or block device")
