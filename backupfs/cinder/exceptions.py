"""Which exception Cinder gets for which error: one row for every error that can be raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cinder import exception

from backupfs import errors

# Cinder keeps the first 255 characters of why a backup failed; the reason is often at the end.
MESSAGE_SIZE_MAX = 255

# About the backup that was asked for, or about the repository or the volume.
BACKUP = exception.InvalidBackup
DRIVER = exception.BackupDriverException

EXCEPTIONS: dict[type[errors.BackupfsError], Any] = {
    errors.InvalidName: BACKUP,
    errors.InvalidOption: DRIVER,
    errors.VolumeNamed: BACKUP,
    errors.InvalidMetadata: BACKUP,
    errors.ImageTooLarge: BACKUP,
    errors.ImageTooSmall: BACKUP,
    errors.NothingToPublish: BACKUP,
    errors.Cancelled: DRIVER,
    errors.RepositoryNotFound: DRIVER,
    errors.BackupNotFound: BACKUP,
    errors.VolumeNotFound: BACKUP,
    errors.DraftNotFound: BACKUP,
    errors.ObjectNotFound: DRIVER,
    errors.RepositoryExists: DRIVER,
    errors.BackupExists: BACKUP,
    errors.AmbiguousBackup: BACKUP,
    errors.NameTaken: BACKUP,
    errors.TargetExists: DRIVER,
    errors.ObjectExists: DRIVER,
    errors.Busy: DRIVER,
    errors.CorruptBlob: BACKUP,
    errors.MissingBlob: BACKUP,
    errors.CorruptObject: DRIVER,
    errors.InvalidRecord: BACKUP,
    errors.ForeignRecord: BACKUP,
    errors.MissingData: BACKUP,
    errors.UnsupportedFormat: DRIVER,
    errors.StorageFull: DRIVER,
    errors.StorageUnavailable: DRIVER,
    errors.StorageReadOnly: DRIVER,
    errors.SourceFailed: DRIVER,
    errors.TargetFailed: DRIVER,
    errors.MountFailed: DRIVER,
    errors.UnmountFailed: DRIVER,
    errors.LockTimeout: DRIVER,
}


def cinder_exception(error: errors.BackupfsError) -> Exception:
    """What Cinder gets for ``error``; its message fits where Cinder keeps it."""
    kind = next((EXCEPTIONS[kind] for kind in type(error).__mro__ if kind in EXCEPTIONS), DRIVER)
    reason = str(error)
    excess = len(str(kind(reason=reason))) - MESSAGE_SIZE_MAX
    if excess > 0:
        # The middle goes: the start says what happened, the end most often why.
        kept = len(reason) - excess - 1
        reason = f"{reason[: kept - kept // 2]}…{reason[len(reason) - kept // 2 :]}"
    translation: Exception = kind(reason=reason)
    return translation


@contextmanager
def translated() -> Iterator[None]:
    """Turns our errors in the block into Cinder's exceptions."""
    try:
        yield
    except errors.BackupfsError as error:
        raise cinder_exception(error) from error
