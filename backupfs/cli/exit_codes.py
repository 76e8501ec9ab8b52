"""Which error ends the process with which code: one row for every error that can be raised."""

from __future__ import annotations

from backupfs import errors

DONE = 0
FAILED = 1
WRONG_USAGE = 2
DAMAGE_FOUND = 3
INTERRUPTED = 130  # what shells give a process ended by SIGINT

EXIT_CODES: dict[type[errors.BackupfsError], int] = {
    errors.InvalidName: WRONG_USAGE,
    errors.InvalidOption: WRONG_USAGE,
    errors.VolumeNamed: WRONG_USAGE,
    errors.InvalidMetadata: FAILED,
    errors.ImageTooLarge: FAILED,
    errors.ImageTooSmall: FAILED,
    errors.NothingToPublish: FAILED,
    errors.Cancelled: INTERRUPTED,
    errors.RepositoryNotFound: FAILED,
    errors.BackupNotFound: FAILED,
    errors.VolumeNotFound: FAILED,
    errors.DraftNotFound: FAILED,
    errors.ObjectNotFound: FAILED,
    errors.RepositoryExists: FAILED,
    errors.BackupExists: FAILED,
    errors.AmbiguousBackup: FAILED,
    errors.NameTaken: FAILED,
    errors.TargetExists: FAILED,
    errors.ObjectExists: FAILED,
    errors.Busy: FAILED,
    errors.CorruptBlob: DAMAGE_FOUND,
    errors.MissingBlob: DAMAGE_FOUND,
    errors.CorruptObject: DAMAGE_FOUND,
    errors.InvalidRecord: FAILED,
    errors.ForeignRecord: FAILED,
    errors.MissingData: FAILED,
    errors.UnsupportedFormat: FAILED,
    errors.StorageFull: FAILED,
    errors.StorageUnavailable: FAILED,
    errors.StorageReadOnly: FAILED,
    errors.SourceFailed: FAILED,
    errors.TargetFailed: FAILED,
    errors.MountFailed: FAILED,
    errors.UnmountFailed: FAILED,
    errors.LockTimeout: FAILED,
}


def exit_code(error: errors.BackupfsError) -> int:
    """The code for an error, of a leaf or of a class above leaves."""
    for ancestor in type(error).__mro__:
        if ancestor in EXIT_CODES:
            return EXIT_CODES[ancestor]
    return DAMAGE_FOUND if isinstance(error, errors.DamageError) else FAILED
