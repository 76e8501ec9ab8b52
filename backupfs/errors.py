"""Every error that backupfs raises on purpose: one tree.

An error carries fields; its sentence is made from them, in one line that names the thing and, where
there is one, the way out. Three tables translate the leaves for the outside: errno
(``fuse/errno_table.py``), exit code (``cli/exit_codes.py``) and the exception of the driver's caller.
A test holds that every leaf is in each table.
"""

from __future__ import annotations

from typing import Any, ClassVar


def _rebuilt(kind: type[BackupfsError], fields: dict[str, Any]) -> BackupfsError:
    return kind(**fields)


class BackupfsError(Exception):
    """Root of the tree. ``template`` is the sentence, formatted with the fields."""

    template: ClassVar[str] = "backupfs failed"

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.fields = fields

    def __str__(self) -> str:
        # One line, whatever a name or a reason from outside holds.
        return self.template.format(**self.fields).replace("\n", "\\n").replace("\r", "\\r")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.fields)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


# -- asked for something that cannot be --------------------------------------------------------


class RequestError(BackupfsError):
    """The request itself is wrong; nothing was changed."""


class InvalidName(RequestError):
    template = "{name!r} is not a name backupfs can keep: {reason}"


class InvalidOption(RequestError):
    template = "option {option!r}: {reason}"


class VolumeNamed(RequestError):
    template = "{selector!r} is a volume: name its backups, like '{selector}@latest'"


class InvalidMetadata(RequestError):
    template = "not usable as a volume's metadata: {reason}"


class ImageTooLarge(RequestError):
    template = "an image of {size} bytes is larger than backupfs keeps ({limit} bytes)"


class ImageTooSmall(RequestError):
    template = "{name!r} has {size} bytes, fewer than the {size_min} it must have"


class NothingToPublish(RequestError):
    template = "{name!r} cannot be published: {reason}"


class Cancelled(RequestError):
    template = "cancelled: {what}"


# -- not there, or there already ---------------------------------------------------------------


class NotFound(BackupfsError):
    """What was named does not exist."""


class RepositoryNotFound(NotFound):
    template = "no backupfs repository at {location!r} (make one with 'backupfs init')"


class BackupNotFound(NotFound):
    template = "no backup {selector!r} (see 'backupfs list')"


class VolumeNotFound(NotFound):
    template = "no volume {volume!r} (see 'backupfs list')"


class DraftNotFound(NotFound):
    template = "nothing is staged under {name!r} (see 'backupfs drafts')"


class ObjectNotFound(NotFound):
    template = "no object {name!r} in the repository"


class Conflict(BackupfsError):
    """What was asked for is in the way of what exists; nothing was changed."""


class RepositoryExists(Conflict):
    template = "{location!r} is not an absent or empty folder: nothing was changed"


class BackupExists(Conflict):
    template = "a backup {backup_id} with other content is there already"


class AmbiguousBackup(Conflict):
    template = "{selector!r} stands for {count} backups; give more of it"


class NameTaken(Conflict):
    template = "volume {volume!r} is staged as {staged!r} already"


class TargetExists(Conflict):
    template = "{path!r} exists; give --force to overwrite it"


class ObjectExists(Conflict):
    template = "an object {name!r} with other content exists already"


class Busy(Conflict):
    template = "{what} is in use by {holder}"


# -- damaged or foreign bytes ------------------------------------------------------------------


class DamageError(BackupfsError):
    """Bytes that were stored are gone or not what they were."""


class CorruptBlob(DamageError):
    template = "blob {blob_id} in pack {pack_id} at offset {offset} is damaged: {reason}"


class MissingBlob(DamageError):
    template = "blob {blob_id} is not in any pack of the repository"


class CorruptObject(DamageError):
    template = "object {name!r} is damaged: {reason}"


class InvalidRecord(BackupfsError):
    """A record that this repository does not take; nothing was changed."""

    template = "not a record backupfs can take: {reason}"


class ForeignRecord(InvalidRecord):
    template = "the record is of repository {theirs}, this is {ours}"


class MissingData(BackupfsError):
    template = "the data of backup {backup_id} are not in this repository ({missing})"


class UnsupportedFormat(BackupfsError):
    template = "{name!r} needs {feature}, which this version of backupfs does not know"


# -- the world below ---------------------------------------------------------------------------


class StorageError(BackupfsError):
    """The storage did not do what was asked."""


class StorageFull(StorageError):
    template = "no space left in the repository's storage ({reason})"


class StorageUnavailable(StorageError):
    template = "the repository's storage failed: {reason}"


class StorageReadOnly(StorageError):
    template = "the repository cannot be written to: {reason}"


class SourceFailed(StorageError):
    template = "reading {name!r} failed: {reason}"


class TargetFailed(StorageError):
    template = "writing {name!r} failed: {reason}"


class MountFailed(StorageError):
    template = "cannot mount {mountpoint!r}: {reason}"


class UnmountFailed(StorageError):
    template = "cannot unmount {mountpoint!r}: {reason}"


class LockTimeout(StorageError):
    template = "waited {seconds:.0f} s for {what}, held by {holder}"
