"""A repository in a local folder: temporary name, write, fsync, link, fsync of the folder.

The spool folder lies in the repository's folder too, so that a finished pack is taken in by a link
instead of a copy. Listings leave out what begins with a dot: temporary names do.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import CorruptObject, ObjectExists, ObjectNotFound, StorageUnavailable
from backupfs.storage.base import ObjectInfo, SpooledFile
from backupfs.storage.oserrors import is_wanting, reading_error, storage_error, translated
from backupfs.storage.ownership import give_folder, make_file
from backupfs.types import Buffer, ObjectName

log = logging.getLogger(__name__)

# What tells whether a file is the one it was, and unchanged: inode number, size, and the times, in
# nanoseconds, when its content and its inode were changed.
Stamp = tuple[int, int, int, int]

OPEN_FILES_MAX = 1024  # kept open for reading, if the process may have four times as many
COMPARE_SIZE = 1 << 20
TEMPORARY_AGE_MAX = 24 * 3600.0  # seconds after which a temporary file has no living writer
# A folder changed more recently than this may change again without a new time stamp.
SETTLED_NS = 2_000_000_000

# Links are refused by some file systems (FAT, some network ones); there a rename must do.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS, errno.ENOENT}
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class LocalStorage:
    """Objects as files below ``folder``."""

    def __init__(self, folder: Path, ambient: Ambient) -> None:
        self._ambient = ambient
        self.location = str(folder)
        self.folder = folder
        self._open_files: OrderedDict[str, int] = OrderedDict()
        self._open_files_max = open_files_max()
        # Made or found, and synced by this process: that one is there does not say that it stays.
        self._durable_folders: set[Path] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files kept open for reading."""
        with self._lock:
            self._close_all()

    def put_new(self, name: ObjectName, data: Buffer | SpooledFile) -> None:
        with translated():
            target = self.folder / name
            self._make_folder(target.parent)
            if isinstance(data, SpooledFile):
                self._take_in(data.path, target)
            else:
                self._take_in(self._write_temporary(target, data), target)

    def replace(self, name: ObjectName, data: Buffer) -> None:
        """Have ``data`` in place of an object that is damaged: there is always the one or the other.

        Raises: StorageError.
        """
        with translated():
            replace_file(self.folder / name, data, token=self._ambient.random_bytes(8).hex())

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        try:
            with open(self.folder / name, "rb", opener=_open_file) as file:
                data = file.read(size_max + 1) or b""  # None of a pipe whose writer is silent
        except FileNotFoundError as error:
            raise ObjectNotFound(name=name) from error
        except OSError as error:
            raise reading_error(error) from error
        if len(data) > size_max:
            raise CorruptObject(name=name, reason=f"it is larger than {size_max} bytes")
        return data

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        try:
            return self._read(name, offset, size)
        except FileNotFoundError as error:
            raise ObjectNotFound(name=name) from error
        except OSError as error:
            raise reading_error(error) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with translated():
            yield from self._walk(self.folder / prefix.rstrip("/"), prefix)

    def delete(self, name: ObjectName) -> None:
        path = self.folder / name
        with self._lock:
            file = self._open_files.pop(name, None)
            if file is not None:
                os.close(file)
        with translated(), contextlib.suppress(FileNotFoundError):
            path.unlink(missing_ok=True)
            # Also where it is gone: who removed it may not have come to this.
            sync_folder(path.parent)

    def borrow_open(self, name: ObjectName) -> int | None:
        """A descriptor of the caller's own, if the object is kept open for reading. Never waits."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            file = self._open_files.get(name)
            return None if file is None else os.dup(file)
        except OSError:  # no descriptor is left
            return None
        finally:
            self._lock.release()

    def close_deleted(self) -> None:
        """Give up files kept open for reading that somebody deleted: until then they take room."""
        with self._lock:
            for name in [name for name, file in self._open_files.items() if not _has_name(file)]:
                os.close(self._open_files.pop(name))

    def make_lasting(self, names: Iterable[ObjectName]) -> set[ObjectName]:
        """Have these objects survive a power cut, also if who puts them has not come to that yet.

        Returns those of which that cannot be said, as the disk fails. Where a file system cannot sync
        its folders at all nobody is told otherwise. Raises: StorageUnavailable (want of resources).
        """
        above = {name: self._folders_of(name) for name in names}
        failed = {
            folder for folder in sorted(set().union(*above.values())) if not _is_synced(folder)
        }
        return {name for name, folders in above.items() if folders & failed}

    def _folders_of(self, name: ObjectName) -> set[Path]:
        parents = (self.folder / name).parents
        return {folder for folder in parents if folder.is_relative_to(self.folder)}

    def names(self, prefix: str) -> set[str]:
        """The names in one folder, without those that ``list`` leaves out; nothing is looked at."""
        with translated():
            try:
                return {name for name in os.listdir(self.folder / prefix) if name[0] != "."}
            except FileNotFoundError:
                return set()

    def stamp(self, name: ObjectName) -> Stamp | None:
        """Equal to an earlier answer only if the object is the same file, with the same bytes, as
        far as the file system knows. None: it cannot be told."""
        try:
            status = os.stat(f"{self.location}/{name}")
        except OSError:
            return None
        return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def change_mark(self, prefix: str) -> int | None:
        """Equal to an earlier answer only if nothing was put to or deleted from the folder since.

        None: it changed so recently that its time stamp does not tell; look again.
        """
        try:
            changed_ns = (self.folder / prefix).stat().st_mtime_ns
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise storage_error(error) from error
        age_ns = int(self._ambient.now().timestamp() * 1e9) - changed_ns
        return changed_ns if age_ns > SETTLED_NS else None

    def clean_temporary(self) -> None:
        """Remove temporary files that no living writer can still hold."""
        oldest = self._ambient.now().timestamp() - TEMPORARY_AGE_MAX
        with translated():
            for folder, _folders, names in os.walk(self.folder):
                for name in names:
                    if name.startswith(".") and name.endswith(".tmp"):
                        _remove_older(Path(folder, name), oldest)

    def _write_temporary(self, target: Path, data: Buffer) -> Path:
        temporary = target.with_name(
            f".{target.name[:64]}.{self._ambient.random_bytes(8).hex()}.tmp"
        )
        file = make_file(temporary)
        try:
            write_all(file, data)
            os.fsync(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return temporary

    def _take_in(self, source: Path, target: Path) -> None:
        """Give a synced file its final name, or find that the same bytes are there already."""
        try:
            os.link(source, target)
        except FileExistsError:
            try:
                is_same = same_bytes(source, target)
            except FileNotFoundError:  # deleted since: its name was used all the same
                is_same = False
            if not is_same:
                source.unlink(missing_ok=True)
                raise ObjectExists(name=str(target.relative_to(self.folder))) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                source.unlink(missing_ok=True)
                raise
            source.rename(target)
        source.unlink(missing_ok=True)
        sync_folder(target.parent)

    def _make_folder(self, folder: Path) -> None:
        if folder in self._durable_folders and folder.is_dir():
            return
        if not self.folder.is_dir():
            raise StorageUnavailable(reason=f"the folder {self.location!r} is gone")
        if folder != self.folder:
            make_folders(folder)
        self._durable_folders.add(folder)

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
                    continue
                try:
                    size = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue
                yield ObjectInfo(name=ObjectName(f"{prefix}{entry.name}"), size=size)

    def _read(self, name: str, offset: int, size: int) -> bytes:
        file = self._borrow(name)
        try:
            return read_all(file, offset, size)
        finally:
            os.close(file)

    def _borrow(self, name: str) -> int:
        """A descriptor of the caller's own; opening by name is spared where it was read before."""
        with self._lock:
            try:
                return os.dup(self._opened(name))
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS or not self._open_files:
                    raise
                self._close_all()  # those kept open are the first to give way
                return os.dup(self._opened(name))

    def _opened(self, name: str) -> int:
        file = self._open_files.get(name)
        if file is None:
            file = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            self._open_files[name] = file
            if len(self._open_files) > self._open_files_max:
                os.close(self._open_files.popitem(last=False)[1])
        else:
            self._open_files.move_to_end(name)
        return file

    def _close_all(self) -> None:
        while self._open_files:
            os.close(self._open_files.popitem()[1])


def _open_file(path: str, flags: int) -> int:
    """Without waiting: what somebody put here may be a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def open_files_max() -> int:
    """How many files one storage keeps open, by the limit of this process as it is now."""
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return OPEN_FILES_MAX
    return max(1, min(OPEN_FILES_MAX, limit // 4))


def _has_name(file: int) -> bool:
    try:
        return os.fstat(file).st_nlink > 0
    except OSError:  # of a disk that is gone: looking again opens it again, or says so
        return False


def _is_synced(folder: Path) -> bool:
    try:
        sync_folder(folder)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return True
        if is_wanting(error):
            raise storage_error(error) from error
        log.warning("%s cannot be synced: %s", folder, error.strerror)
        return False
    return True


def replace_file(path: Path, data: Buffer, *, token: str) -> None:
    """Give a file new content, all or nothing; durable on return. Raises: OSError.

    ``token`` keeps the temporary names of two callers apart.
    """
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    file = make_file(temporary)
    try:
        write_all(file, data)
        os.fsync(file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    sync_folder(path.parent)


def write_all(file: int, data: Buffer) -> None:
    """Write every byte: one call may take only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_all(file: int, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset``, fewer only at the file's end."""
    data = os.pread(file, size, offset)
    if len(data) in (0, size):
        return data
    parts = [data]
    missing = size - len(data)
    while missing:
        data = os.pread(file, missing, offset + size - missing)
        if not data:
            break
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _remove_older(path: Path, oldest: float) -> None:
    # Its writer may finish, and take it away, at any moment.
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < oldest:
            path.unlink()


def keep_as(source: Path, target: Path) -> None:
    """Give a file a second name; it loses the first where there are no links. Raises: OSError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        source.rename(target)


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two files hold the same. Raises: OSError."""
    with first.open("rb") as one, second.open("rb") as other:
        while True:
            left, right = one.read(COMPARE_SIZE), other.read(COMPARE_SIZE)
            if left != right:
                return False
            if not left:
                return True


def make_folders(folder: Path, *, mode: int = 0o777, is_private: bool = False) -> None:
    """Make a folder, and what is missing above it; its name is durable on return. Raises: OSError.

    Made by root it is for the owner of what lies above, unless it ``is_private``.
    """
    if not folder.parent.is_dir():
        make_folders(folder.parent, is_private=is_private)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=mode)
        if not is_private:
            give_folder(folder)
    # Also where it is there: who made it may not have come to this.
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
