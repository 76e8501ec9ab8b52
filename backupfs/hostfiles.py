"""Files, devices and streams of this host: what a backup reads and where a restore writes.

Sources skip the holes of files, read in aligned pieces, and tell when they were changed under the
reader. Targets never show a file that is not whole: a new file stands under a temporary name until
``finish``, and goes away again if that is never reached. Nothing here knows of repositories.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

from backupfs.ambient import Ambient
from backupfs.errors import (
    BackupfsError,
    Busy,
    Cancelled,
    SourceFailed,
    TargetExists,
    TargetFailed,
)
from backupfs.types import Buffer

READ_SIZE = 1 << 20
STREAM_NAME = "standard input"
STREAM_WORD = "-"  # stands for standard input where a file is asked for

# How long a silent stream may keep a cancelled reader waiting.
POLL_MILLISECONDS = 200

# A restored image of unknown origin may hold secrets: its owner's alone, until someone says more.
FILE_MODE_DEFAULT = 0o600

# What link(2) says where the file system has no hard links.
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextmanager
def _failing_as(failure: type[BackupfsError], name: str) -> Iterator[None]:
    """Turn the system's errors about ``name`` into ours."""
    try:
        yield
    except OSError as error:
        raise failure(name=name, reason=error.strerror or str(error)) from error


# -- sources -----------------------------------------------------------------------------------


class HostSource(ABC):
    """An image that the host can read: an ``ImageSource`` over a descriptor that it owns.

    ``mtime_ns`` and ``mode`` are the file's as it was opened; None for what is no regular file.
    ``was_changed`` tells, once ``extents`` is used up, that somebody wrote while we read.
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
            with _failing_as(SourceFailed, self.name):
                data = os.pread(self._descriptor, size, offset)
            if not data:
                raise SourceFailed(name=self.name, reason=f"it ends at byte {offset}, before {end}")
            yield offset, data
            offset += len(data)


class FileSource(HostSource):
    """A regular file: holes are skipped; one that grows or shrinks while it is read fails."""

    def __init__(self, descriptor: int, *, name: str) -> None:
        super().__init__(descriptor, name=name)
        found = os.fstat(descriptor)
        self._size = self.size_hint = found.st_size
        self.mtime_ns = found.st_mtime_ns
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
        found = os.fstat(self._descriptor)
        if found.st_size != self._size:
            reason = f"its size changed from {self._size} to {found.st_size} bytes meanwhile"
            raise SourceFailed(name=self.name, reason=reason)
        self.was_changed = found.st_mtime_ns != self.mtime_ns


class DeviceSource(HostSource):
    """A block device, read from its start to its end: devices do not tell their holes."""

    def __init__(self, descriptor: int, *, name: str) -> None:
        super().__init__(descriptor, name=name)
        with _failing_as(SourceFailed, name):
            self._size = self.size_hint = os.lseek(descriptor, 0, os.SEEK_END)

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        yield from self._pieces(0, self._size)

    def size(self) -> int:
        return self._size


class StreamSource(HostSource):
    """A pipe or the like: its size is known once it has ended, and an empty one fails.

    ``cancelled`` is asked while the stream is silent, so that a writer that hangs holds nobody up.
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
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        with _failing_as(SourceFailed, self.name):
            while not poll.poll(POLL_MILLISECONDS):
                if self._cancelled():
                    raise Cancelled(what=f"reading {self.name}")
            return os.read(self._descriptor, size)


def open_source(path: str, *, cancelled: Callable[[], bool] = lambda: False) -> HostSource:
    """Open what ``path`` names for reading; ``-`` is standard input. The caller closes it.

    Raises:
        SourceFailed: it is not there, not readable, or nothing that has an image.
    """
    name = STREAM_NAME if path == STREAM_WORD else path
    with _failing_as(SourceFailed, name):
        if path == STREAM_WORD:
            descriptor = fcntl.fcntl(sys.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _source_over(descriptor, name, cancelled)
    except BaseException:  # an interruption too: nobody else knows the descriptor
        os.close(descriptor)
        raise


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


# -- targets -----------------------------------------------------------------------------------


class HostTarget(ABC):
    """Where the host can put an image: an ``ImageTarget`` to be used in a ``with`` statement.

    Leaving the statement before ``finish`` was reached gives up what was written.
    """

    def __init__(self, descriptor: int, *, name: str) -> None:
        self.name = name
        self.is_partial = False  # something was overwritten, and the image is not whole
        self._descriptor = descriptor

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``. Raises: TargetFailed."""
        view = memoryview(data)
        with _failing_as(TargetFailed, self.name):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset, view = offset + written, view[written:]

    @abstractmethod
    def write_hole(self, offset: int, size: int) -> None:
        """Make ``size`` bytes at ``offset`` read as zeros. Raises: TargetFailed."""

    @abstractmethod
    def finish(self, size: int) -> None:
        """Make all that was written durable, as an image of ``size`` bytes. Raises: TargetFailed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._descriptor)


class FileTarget(HostTarget):
    """A new, sparse file, which appears under its name when it is whole and durable.

    With ``force`` it replaces a file of that name and takes over its owner and mode; the old one
    stays until that moment.
    """

    def __init__(self, path: str, *, force: bool = False, mode: int | None = None) -> None:
        """Raises: TargetExists, TargetFailed."""
        # A link is followed: the image it leads to is replaced, not the link.
        self._path = os.path.realpath(path)
        self._force = force
        if os.path.isdir(self._path):
            raise TargetFailed(name=path, reason="it is a folder; give the file's name")
        if not force and os.path.lexists(self._path):
            raise TargetExists(path=path)
        # Not made from the file's name, which may have all the bytes that a name can have.
        temporary_name = f".backupfs-{Ambient().new_uuid()}.part"
        self._temporary = os.path.join(os.path.dirname(self._path), temporary_name)
        self._finished = False
        with _failing_as(TargetFailed, path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            allowed = FILE_MODE_DEFAULT if mode is None else mode & 0o666
            super().__init__(os.open(self._temporary, flags, allowed), name=path)

    def write_hole(self, offset: int, size: int) -> None:
        """Nothing to do: what is never written in a new file is a hole."""

    def finish(self, size: int) -> None:
        with _failing_as(TargetFailed, self.name):
            os.ftruncate(self._descriptor, size)
            if self._force:
                self._resemble_replaced()
            os.fsync(self._descriptor)
            self._appear()
            self._finished = True
            _sync_folder(os.path.dirname(self._path))

    def __exit__(self, *_exception: object) -> None:
        super().__exit__()
        if not self._finished:
            with suppress(OSError):
                os.unlink(self._temporary)

    def _resemble_replaced(self) -> None:
        """Give the new file owner and mode of the one in its place, as far as we may."""
        with suppress(FileNotFoundError):
            replaced = os.stat(self._path)
            with suppress(PermissionError):
                os.fchown(self._descriptor, replaced.st_uid, replaced.st_gid)
            with suppress(PermissionError):
                os.fchmod(self._descriptor, stat.S_IMODE(replaced.st_mode))

    def _appear(self) -> None:
        if self._force:
            os.replace(self._temporary, self._path)
            return
        try:
            # Unlike a rename, a link refuses to replace what came there meanwhile.
            os.link(self._temporary, self._path)
            os.unlink(self._temporary)
        except FileExistsError as error:
            raise TargetExists(path=self.name) from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if os.path.lexists(self._path):
                raise TargetExists(path=self.name) from error
            os.rename(self._temporary, self._path)


class DeviceTarget(HostTarget):
    """A block device nobody else uses: written in full, zeros included; what is behind the image stays."""

    def __init__(self, path: str, *, size: int) -> None:
        """Nothing is written yet. Raises: Busy, TargetFailed (also if it has less than ``size`` bytes)."""
        try:
            # O_EXCL without O_CREAT: refused for a device that is mounted or part of another.
            descriptor = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Busy(what=repr(path), holder="a mount or another device") from error
            raise TargetFailed(name=path, reason=error.strerror) from error
        super().__init__(descriptor, name=path)
        try:
            self._check(size)
        except BaseException:  # the caller gets no target that it could close
            os.close(descriptor)
            raise

    def write(self, offset: int, data: Buffer) -> None:
        self.is_partial = True
        super().write(offset, data)

    def write_hole(self, offset: int, size: int) -> None:
        zeros = bytes(min(size, READ_SIZE))
        end = offset + size
        while offset < end:
            piece = zeros[: end - offset]
            self.write(offset, piece)
            offset += len(piece)

    def finish(self, size: int) -> None:
        with _failing_as(TargetFailed, self.name):
            os.fsync(self._descriptor)
        self.is_partial = False

    def _check(self, size: int) -> None:
        if not stat.S_ISBLK(os.fstat(self._descriptor).st_mode):
            raise TargetFailed(name=self.name, reason="it is no block device any more")
        with _failing_as(TargetFailed, self.name):
            room = os.lseek(self._descriptor, 0, os.SEEK_END)
        if room < size:
            reason = f"the device has {room} bytes, the image {size}; nothing was written"
            raise TargetFailed(name=self.name, reason=reason)


def open_target(
    path: str, *, size: int, force: bool = False, mode: int | None = None
) -> HostTarget:
    """A target for an image of ``size`` bytes: a block device if ``path`` is one, else a file.

    ``mode`` is for a new file, less the umask.

    Raises:
        TargetExists: a file is there, and ``force`` is not given.
        TargetFailed: it cannot be written, or not hold the image.
        Busy: the device is in use.
    """
    try:
        found = os.stat(path).st_mode
    except OSError:
        return FileTarget(path, force=force, mode=mode)
    if stat.S_ISBLK(found):
        return DeviceTarget(path, size=size)
    if not stat.S_ISREG(found) and not stat.S_ISDIR(found):
        raise TargetFailed(name=path, reason="it is neither a file nor a block device")
    return FileTarget(path, force=force, mode=mode)


def _sync_folder(path: str) -> None:
    """Make the names in a folder durable, where we may read it and its file system can do that."""
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
