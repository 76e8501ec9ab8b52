"""The file of an index: opened by all processes of a host, and believed only as far as it may be.

It is never synced while it is in use. After a restart of the host it is believed only if the last who
had it open has synced it and said so; else, and where it cannot be read, it is thrown away.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from backupfs.errors import StorageUnavailable
from backupfs.storage.local import sync_folder

log = logging.getLogger(__name__)

VERSION = 3
# Address space, not memory or disk: the file grows as entries come.
MAP_SIZES = (1 << 40, 1 << 36, 1 << 32)
READERS_MAX = 1024
# Locked by all processes that have the index open.
USERS_NAME = "users"

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


def open_index_file(folder: Path) -> tuple[Any, int]:
    """The library's environment, and the descriptor that counts this process as a user of it.

    Raises: StorageUnavailable (the folder cannot be used).
    """
    with contextlib.ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            users = os.open(folder / USERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, users)
            is_ready = False
            while not is_ready:
                if _is_only_user(users):
                    _make_ready(folder)
                fcntl.flock(users, fcntl.LOCK_SH)
                is_ready = _is_of_this_boot(folder)  # else who was about to do it has died
            environment = _environment(folder)
            environment.reader_check()  # gives back the places of readers that were killed
        except (OSError, lmdb.Error) as error:
            why = error.strerror if isinstance(error, OSError) else error
            reason = f"its index cannot be kept in {str(folder)!r}: {why}"
            raise StorageUnavailable(
                reason=f"{reason} (XDG_CACHE_HOME chooses another place)"
            ) from error
        undo.pop_all()
        return environment, users


def close_index_file(folder: Path, environment: Any, users: int) -> None:
    """Give up what ``open_index_file`` gave; the last user makes the file last."""
    # Only a lasting file may be believed after the next boot: see _survived_boot.
    with contextlib.suppress(lmdb.Error, OSError):
        if _is_only_user(users):
            environment.sync(True)
            last = environment.info()["last_txnid"]
            _clean_mark(folder).write_text(str(last))
    environment.close()
    os.close(users)


def _is_only_user(users: int) -> bool:
    """Whether no other process has the index open; then none can, until this one shares the lock."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_ready(folder: Path) -> None:
    if not _survived_boot(folder):
        _discard(folder)
    try:
        environment = _environment(folder)
        is_whole = _is_whole(folder, environment)
        environment.close()
    except lmdb.Error:
        is_whole = False
    if not is_whole:
        log.warning("the index in %s cannot be read and is made anew", folder)
        _discard(folder)
    # Before anything is written: what a power cut leaves of later pages must not pass as clean.
    _clean_mark(folder).unlink(missing_ok=True)
    sync_folder(folder)
    _boot_file(folder).write_text(_boot_id())


def _environment(folder: Path) -> Any:
    for map_size in MAP_SIZES:
        try:
            return lmdb.open(
                str(index_path(folder)),
                map_size=map_size,
                max_dbs=16,
                max_readers=READERS_MAX,
                subdir=False,
                sync=False,
                metasync=False,
                readahead=False,
            )
        except (lmdb.MemoryError, MemoryError):
            log.info("no address space for an index of %d bytes", map_size)
    raise StorageUnavailable(reason="no address space for the index")


def _is_whole(folder: Path, environment: Any) -> bool:
    """Whether the file has all its pages: looking at one that was cut off would end the process."""
    size = index_path(folder).stat().st_size
    pages = environment.info()["last_pgno"] + 1
    return bool(size >= pages * environment.stat()["psize"])


def _survived_boot(folder: Path) -> bool:
    """Whether the index can be believed: same boot of the host, or closed and synced before it."""
    if _boot_id() and _is_of_this_boot(folder):
        return True
    try:
        environment = _environment(folder)
        try:
            return str(environment.info()["last_txnid"]) == _clean_mark(folder).read_text()
        finally:
            environment.close()
    except (OSError, lmdb.Error):
        return False


def _is_of_this_boot(folder: Path) -> bool:
    try:
        return _boot_file(folder).read_text() == _boot_id()
    except FileNotFoundError:
        return False


def _discard(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != USERS_NAME:
            path.unlink(missing_ok=True)


def index_path(folder: Path) -> Path:
    """The file itself, below the index's folder."""
    return folder / f"index-{VERSION}"


def _clean_mark(folder: Path) -> Path:
    return folder / f"clean-{VERSION}"


def _boot_file(folder: Path) -> Path:
    return folder / f"boot-{VERSION}"


def _boot_id() -> str:
    """What names this boot of the host; empty where the host does not say."""
    try:
        return BOOT_ID_FILE.read_text().strip()
    except OSError:
        return ""
