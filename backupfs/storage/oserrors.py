"""Errors of the operating system as errors of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from backupfs.errors import (
    BackupfsError,
    StorageError,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WANTING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def storage_error(error: OSError) -> StorageError:
    """The error of ours that an ``OSError`` of the repository's folder amounts to."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.filename:
        reason = f"{reason}: {os.fspath(error.filename)!r}"
    if error.errno in _FULL:
        return StorageFull(reason=reason)
    if error.errno in _READ_ONLY:
        return StorageReadOnly(reason=reason)
    return StorageUnavailable(reason=reason)


def reading_error(error: OSError) -> StorageUnavailable:
    """The same of an object that was to be read: nothing was to be written."""
    return StorageUnavailable(reason=storage_error(error).reason)


def is_want_of_resources(error: StorageUnavailable) -> bool:
    """Whether this process, or its host, ran out of something: that says nothing of the disk."""
    return isinstance(error.__cause__, OSError) and is_wanting(error.__cause__)


def is_wanting(error: OSError) -> bool:
    """The same of the system's own error."""
    return error.errno in _WANTING


@contextmanager
def translated() -> Iterator[None]:
    """Turns an ``OSError`` of the block into ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error


@contextmanager
def failing_as(failure: type[BackupfsError], name: str) -> Iterator[None]:
    """Turn the system's errors about ``name``, which is no object of a repository, into ``failure``."""
    try:
        yield
    except OSError as error:
        raise failure(name=name, reason=error.strerror or str(error)) from error
