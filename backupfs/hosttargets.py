"""Files and devices of this host that a restore writes.

A file that is not whole is never shown: a new one stands under a temporary name until ``finish``, and
goes away again if that is never reached. Nothing here knows of repositories.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Self

from backupfs.ambient import Ambient
from backupfs.errors import Busy, TargetExists, TargetFailed
from backupfs.storage.oserrors import failing_as
from backupfs.types import Buffer

# A restored image of unknown origin may hold secrets: its owner's alone, until someone says more.
FILE_MODE_DEFAULT = 0o600

ZEROS_SIZE = 1 << 20  # written at once where a device can make no holes
WRITE_OUT_SIZE = 32 << 20  # bytes after which the system is told to bring them to the disk

PROCESS_STATUS = Path("/proc/self/status")

# What link(2) says where the file system has no hard links.
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class HostTarget(ABC):
    """Where the host can put an image: an ``ImageTarget`` to be used in a ``with`` statement.

    Leaving the statement before ``finish`` was reached gives up what was written.
    """

    def __init__(self, descriptor: int, *, name: str) -> None:
        self.name = name
        self._has_written = False
        self._finished = False
        self._descriptor = descriptor
        self._written_out = 0  # the offset up to which the system was told so

    @property
    def is_partial(self) -> bool:
        """Something was overwritten, and the image is not whole."""
        return False

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``. Raises: TargetFailed."""
        view = memoryview(data)
        with failing_as(TargetFailed, self.name):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                self._has_written = True
                offset, view = offset + written, view[written:]
        if offset - self._written_out >= WRITE_OUT_SIZE:
            self._write_out(offset)

    def _write_out(self, end: int) -> None:
        """Have the disk work while the next chunks are read, rather than only in the last sync.

        What is not needed any more the system begins to write at once, and does not wait until it is
        done (so does Linux, mm/fadvise.c). Only advice: of what goes wrong the sync will tell.
        """
        with suppress(OSError):
            size = end - self._written_out
            os.posix_fadvise(self._descriptor, self._written_out, size, os.POSIX_FADV_DONTNEED)
        self._written_out = end

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
        if os.path.basename(path) in ("", os.curdir, os.pardir):
            raise TargetFailed(name=path, reason="it names a folder; give the file's name")
        # A link is followed: the image it leads to is replaced, not the link.
        self._path = os.path.realpath(path)
        self._force = force
        _check_is_file(path)
        if not force and os.path.lexists(self._path):
            raise TargetExists(path=path)
        # Not made from the file's name, which may have all the bytes that a name can have.
        temporary_name = f".backupfs-{Ambient().new_uuid()}.part"
        self._temporary = os.path.join(os.path.dirname(self._path), temporary_name)
        self._mode = FILE_MODE_DEFAULT if mode is None else mode & 0o666
        with failing_as(TargetFailed, path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            # Until it is whole it is its owner's alone: what it replaces may be so, too.
            super().__init__(os.open(self._temporary, flags, FILE_MODE_DEFAULT), name=path)

    def write_hole(self, offset: int, size: int) -> None:
        """Nothing to do: what is never written in a new file is a hole."""

    def finish(self, size: int) -> None:
        with failing_as(TargetFailed, self.name):
            os.ftruncate(self._descriptor, size)
            self._open_up()
            os.fsync(self._descriptor)
            self._appear()
            self._finished = True
            _sync_folder(os.path.dirname(self._path))

    def __exit__(self, *_exception: object) -> None:
        super().__exit__()
        if not self._finished:
            with suppress(OSError):
                os.unlink(self._temporary)

    def _open_up(self) -> None:
        """Give the file the mode of a new one, or owner and mode of the replaced one, as far as we may."""
        replaced = None
        if self._force:
            with suppress(FileNotFoundError):
                replaced = os.stat(self._path)
        # Some file systems have no owners and modes to change.
        with suppress(OSError):
            if replaced is not None:
                os.fchown(self._descriptor, replaced.st_uid, replaced.st_gid)
        with suppress(OSError):
            new_mode = self._mode & ~_umask()
            mode = new_mode if replaced is None else stat.S_IMODE(replaced.st_mode)
            os.fchmod(self._descriptor, mode)

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

    @property
    def is_partial(self) -> bool:
        return self._has_written and not self._finished

    def write_hole(self, offset: int, size: int) -> None:
        zeros = bytes(min(size, ZEROS_SIZE))
        end = offset + size
        while offset < end:
            piece = zeros[: end - offset]
            self.write(offset, piece)
            offset += len(piece)

    def finish(self, size: int) -> None:
        with failing_as(TargetFailed, self.name):
            os.fsync(self._descriptor)
        self._finished = True

    def _check(self, size: int) -> None:
        if not stat.S_ISBLK(os.fstat(self._descriptor).st_mode):
            raise TargetFailed(name=self.name, reason="it is no block device any more")
        with failing_as(TargetFailed, self.name):
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
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        is_device = False
    return DeviceTarget(path, size=size) if is_device else FileTarget(path, force=force, mode=mode)


def _check_is_file(path: str) -> None:
    """Refuse what is there and is no regular file. Raises: TargetFailed."""
    try:
        found = os.stat(path).st_mode
    except OSError:
        return
    if stat.S_ISDIR(found):
        raise TargetFailed(name=path, reason="it names a folder; give the file's name")
    if not stat.S_ISREG(found):
        raise TargetFailed(name=path, reason="it is no regular file")


def check_lies_outside(path: str, folder: Path) -> None:
    """Refuse a target in the folder of a repository, whatever links and mounts lead there.

    Raises: TargetFailed.
    """
    for parent in Path(os.path.realpath(path)).parents:
        with suppress(
            OSError
        ):  # one that is not there, or not ours to see, is no repository in use
            if parent.samefile(folder):
                reason = "it lies in the repository; name a place outside it"
                raise TargetFailed(name=path, reason=reason)


def _umask() -> int:
    """This process's; one that hides all from others where the system does not tell.

    umask(2) tells it only by changing it, for files that other threads make meanwhile as well.
    """
    with suppress(OSError):
        for line in PROCESS_STATUS.read_bytes().splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o077


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
