"""What a program that uses the mount is told: an errno for every error of ours."""

from __future__ import annotations

import errno

from backupfs import errors

# By class; an error counts as the nearest of its ancestors that is listed.
ERRNO_OF: dict[type[errors.BackupfsError], int] = {
    errors.BackupfsError: errno.EIO,
    errors.RequestError: errno.EINVAL,
    errors.InvalidName: errno.EINVAL,
    errors.InvalidOption: errno.EINVAL,
    errors.VolumeNamed: errno.EINVAL,
    errors.InvalidMetadata: errno.EINVAL,
    errors.ImageTooLarge: errno.EFBIG,
    errors.ImageTooSmall: errno.EINVAL,
    errors.NothingToPublish: errno.EINVAL,
    errors.Cancelled: errno.EINTR,
    errors.NotFound: errno.ENOENT,
    errors.RepositoryNotFound: errno.ENOENT,
    errors.BackupNotFound: errno.ENOENT,
    errors.VolumeNotFound: errno.ENOENT,
    errors.DraftNotFound: errno.ENOENT,
    errors.ObjectNotFound: errno.EIO,
    errors.Conflict: errno.EEXIST,
    errors.RepositoryExists: errno.EEXIST,
    errors.BackupExists: errno.EEXIST,
    errors.AmbiguousBackup: errno.EEXIST,
    errors.NameTaken: errno.EEXIST,
    errors.TargetExists: errno.EEXIST,
    errors.ObjectExists: errno.EEXIST,
    errors.Busy: errno.EBUSY,
    errors.DamageError: errno.EIO,
    errors.CorruptBlob: errno.EIO,
    errors.MissingBlob: errno.EIO,
    errors.CorruptObject: errno.EIO,
    errors.InvalidRecord: errno.EINVAL,
    errors.ForeignRecord: errno.EINVAL,
    errors.MissingData: errno.ENODATA,
    errors.UnsupportedFormat: errno.EINVAL,
    errors.StorageError: errno.EIO,
    errors.StorageFull: errno.ENOSPC,
    errors.StorageUnavailable: errno.EIO,
    errors.StorageReadOnly: errno.EROFS,
    errors.SourceFailed: errno.EIO,
    errors.TargetFailed: errno.EIO,
    errors.MountFailed: errno.EIO,
    errors.UnmountFailed: errno.EIO,
    errors.LockTimeout: errno.EBUSY,
}


def errno_of(error: errors.BackupfsError) -> int:
    """The errno that stands for ``error``."""
    for kind in type(error).__mro__:
        if kind in ERRNO_OF:
            return ERRNO_OF[kind]
    return errno.EIO
