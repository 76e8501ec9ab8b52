"""Locks that die with their process: who is writing, who collects garbage, who keeps drafts.

A lock is a file of this host's view of the repository, held with flock(2): the kernel gives it up
when its process ends, in whatever way, so no lock is ever stale and none is broken by force.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import LockTimeout
from backupfs.storage.oserrors import translated
from backupfs.storage.ownership import give_folder, make_file

HOLDER_SIZE_MAX = 1024
POLL_SECONDS = 0.005


class FileLock:
    """An exclusive lock held by this process; ``release`` or the process's end gives it up."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file: int | None = file

    def describe(self, holder: str) -> None:
        """Leave word of who holds the lock; without room for it the lock is held all the same."""
        if self._file is not None:
            # A full disk must stop neither gc, which is the way out, nor a mount.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, holder.encode()[:HOLDER_SIZE_MAX], 0)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; with ``remove`` its file goes first, so nobody finds it unheld."""
        if self._file is None:
            return
        file, self._file = self._file, None
        # A disk that has failed must not keep anybody from giving it up.
        with contextlib.suppress(OSError):
            if remove:
                self.path.unlink()
        os.close(file)


def try_lock(path: Path) -> FileLock | None:
    """Take the lock at ``path``, made if absent; None where another holds it."""
    with translated():
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            give_folder(path.parent)
        while True:
            file = _open_lock(path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_taken = not _is_only_looked_at(file)
                os.close(file)
                if is_taken:
                    return None
                continue
            if _is_still(file, path):
                return FileLock(path, file)
            os.close(file)  # its last holder removed it between our open and lock


def _open_lock(path: Path) -> int:
    """Open the file of a lock, made if absent."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                return make_file(path, access=os.O_RDWR)


@contextlib.contextmanager
def held_lock(path: Path, ambient: Ambient, *, what: str, seconds_max: float) -> Iterator[FileLock]:
    """Hold the lock at ``path`` for the block, once whoever has it gives it up.

    Raises:
        LockTimeout: that took too long; ``what`` says what the lock is for.
    """
    started = ambient.monotonic()
    while (lock := try_lock(path)) is None:
        if ambient.monotonic() - started > seconds_max:
            raise LockTimeout(seconds=seconds_max, what=what, holder=holder(path))
        ambient.sleep(POLL_SECONDS)
    lock.describe(f"process {ambient.process_id()}: {what}")
    try:
        yield lock
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether some living process holds the lock at ``path``; taking it is not disturbed."""
    with translated():
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False


def holder(path: Path) -> str:
    """What the holder of a lock left as word of itself."""
    try:
        return path.read_text(errors="replace")[:HOLDER_SIZE_MAX] or "another process"
    except OSError:
        return "another process"


def _is_only_looked_at(file: int) -> bool:
    """Whether those in the way only ask ``is_held``, which shares the lock for a moment."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(file)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
