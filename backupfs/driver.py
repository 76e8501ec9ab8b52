"""Cinder's words for the verbs: the methods of its backup driver, without Cinder.

Translates and nothing else: a backup given as a mapping (or an object with such attributes) into
the arguments of a verb, an open volume into a source or a target, metadata into JSON text. What the
verbs promise holds here too, and so do their errors. Methods may be called from several threads.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

from backupfs.ambient import Ambient
from backupfs.copying import never
from backupfs.errors import (
    BackupNotFound,
    InvalidMetadata,
    InvalidName,
    InvalidOption,
    InvalidRecord,
)
from backupfs.format.names import check_volume_name
from backupfs.format.record import (
    DESCRIPTION_SIZE_MAX,
    canonical_backup_id,
    decode_record,
)
from backupfs.openvolume import VolumeFile, VolumeSource, VolumeTarget
from backupfs.service import Description, ImageSource, ImageTarget, Record, Service

# The form of the JSON text that ``get_metadata`` writes; 1 is the same with fewer keys.
METADATA_VERSION = 2
METADATA_VERSIONS = (1, 2)

# Where a backup of an encrypted volume keeps, beside the volume's metadata, which key is its own.
ENCRYPTION_KEY_ID = "backup-encryption-key-id"

# The key of an exported record that ``import_record`` reads; all others are for people.
RECORD_KEY = "record"


class BackupDriver:
    """Backups of volumes in the repository at ``location``. Use as a context manager.

    A ``backup`` needs ``id`` (a UUID) and, to be made, ``volume_id``; what else Cinder's backups
    have is used where it is there.
    """

    def __init__(
        self,
        location: str,
        *,
        ambient: Ambient | None = None,
        compression_level: int | None = None,
        lock_seconds_max: float | None = None,
    ) -> None:
        """Options as of ``Service.open``.

        Raises: RepositoryNotFound, InvalidOption, CorruptObject, UnsupportedFormat, StorageError.
        """
        self.service = Service.open(
            location,
            ambient=ambient,
            compression_level=compression_level,
            lock_seconds_max=lock_seconds_max,
        )

    def close(self) -> None:
        """End all threads; everything that was acknowledged is durable."""
        self.service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- metadata --------------------------------------------------------------------------------

    def get_metadata(self, volume_id: str) -> str:
        """The volume's metadata as the text of a JSON object, its ``version`` always 2.

        Raises: InvalidName, CorruptObject, StorageError.
        """
        metadata = self.service.get_metadata(_volume_name(volume_id))
        return json.dumps({**metadata, "version": METADATA_VERSION}, sort_keys=True)

    def put_metadata(self, volume_id: str, json_metadata: str | bytes) -> None:
        """Replace the volume's metadata; durable on return.

        ``version`` says how to read the text (1, 2 or absent) and is not kept with the metadata.

        Raises: InvalidName, InvalidMetadata, StorageError.
        """
        self.service.put_metadata(_volume_name(volume_id), _parse_metadata(json_metadata))

    # -- backing up and restoring ----------------------------------------------------------------

    def backup(self, backup: Any, volume_file: VolumeFile, backup_metadata: bool = False) -> None:
        """Back up all bytes of ``volume_file``, from its start to its end; durable on return.

        Incremental if ``parent_id`` names a backup that is here and has as many bytes; otherwise
        full, and recorded without a parent. With ``backup_metadata`` the volume's metadata go into
        the backup. Descriptive fields are cut to what a record holds.

        Raises:
            InvalidName, InvalidOption, InvalidRecord, ImageTooLarge, BackupExists, StorageError:
                there is no backup.
            SourceFailed: the same, as ``volume_file`` failed; the cause is chained.
        """
        source = VolumeSource(volume_file, str(_field(backup, "volume_id")))
        take(self.service, backup, source, with_metadata=backup_metadata)

    def restore(self, backup: Any, volume_id: str, volume_file: VolumeFile) -> None:
        """Write the backup's image over the start of ``volume_file``, zeros included; durable on
        return where the file has a descriptor. What lies behind the image is not touched.

        Metadata in the backup, if any, then replace those of ``volume_id``.

        Raises:
            BackupNotFound, InvalidName: nothing was written.
            DamageError, TargetFailed, StorageError: the volume is not complete.
        """
        volume = _volume_name(volume_id)
        record = give(self.service, backup, VolumeTarget(volume_file, volume))
        if record.metadata:
            self.service.put_metadata(volume, record.metadata)

    def delete_backup(self, backup: Any) -> None:
        """Delete a backup; one that is gone, or was never completed, is no error.

        Raises: StorageError.
        """
        record = _find(self.service, backup)
        if record is not None:
            with suppress(BackupNotFound):
                self.service.delete(record)

    # -- records ---------------------------------------------------------------------------------

    def export_record(self, backup: Any) -> dict[str, Any]:
        """What ``import_record`` needs, of types that JSON has.

        Raises: BackupNotFound, CorruptObject, StorageError.
        """
        record = _existing(self.service, backup)
        return {
            RECORD_KEY: base64.b64encode(self.service.export_record(record)).decode(),
            "id": record.backup_id,
            "repository_id": record.repository_id,
            "volume": record.volume,
            "name": record.name,
            "size": record.size,
            "kind": record.kind,
            "parent_id": record.parent_id,
            "created_at": record.created_at.isoformat(),
            "data_timestamp": record.data_timestamp.isoformat(),
        }

    def import_record(self, backup: Any, driver_info: Mapping[str, Any]) -> None:
        """Take a backup in whose data are in the repository; its parent need not be there.

        The same again is success. Nothing changes on failure.

        Raises:
            InvalidRecord: damaged, or not the record of ``backup``.
            ForeignRecord, MissingData, BackupExists, StorageError
        """
        expected = canonical_backup_id(str(_field(backup, "id")))
        if not isinstance(driver_info, Mapping) or driver_info.get("id", expected) != expected:
            raise InvalidRecord(reason=f"it is not the record of backup {expected}")
        data = _record_bytes(driver_info)
        # Before anything is taken in: an altered ``driver_info`` has parts of different backups.
        if decode_record(data, self.service.repository.ids).backup_id != expected:
            raise InvalidRecord(reason=f"it is not the record of backup {expected}")
        self.service.import_record(data)


# -- with any source or target ---------------------------------------------------------------------


def take(
    service: Service,
    backup: Any,
    source: ImageSource,
    *,
    with_metadata: bool = False,
    metadata: dict[str, Any] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Record:
    """Make ``backup`` from ``source``; ``metadata``, if given, go into it in place of those kept,
    with the id of the key of an encrypted volume's backup.

    Raises: what ``BackupDriver.backup`` does; Cancelled.
    """
    key_id = _field(backup, "encryption_key_id")
    if metadata is not None and key_id:
        # Cinder makes a key for each backup and has its id in its database alone.
        metadata = {**metadata, ENCRYPTION_KEY_ID: str(key_id)}
    return service.backup(
        source,
        volume=_volume_name(_field(backup, "volume_id")),
        parent=_backup_id(_field(backup, "parent_id")),
        backup_id=str(_field(backup, "id")),
        data_timestamp=_moment(_field(backup, "data_timestamp")),
        description=_description(backup),
        with_metadata=with_metadata,
        metadata=metadata,
        cancelled=cancelled,
    )


def give(service: Service, backup: Any, target: ImageTarget) -> Record:
    """Write the image of ``backup`` to ``target``; nobody's metadata change.

    Raises: BackupNotFound, DamageError, TargetFailed, StorageError.
    """
    record = _existing(service, backup)
    service.restore(record, target)
    return record


def _existing(service: Service, backup: Any) -> Record:
    record = _find(service, backup)
    if record is None:
        raise BackupNotFound(selector=_field(backup, "id"))
    return record


def _find(service: Service, backup: Any) -> Record | None:
    """The backup as it is now, whoever changed the repository; None where there is none."""
    backup_id = _backup_id(_field(backup, "id"))
    if backup_id is None:
        return None
    service.refresh()
    with suppress(BackupNotFound):
        return service.resolve(backup_id)
    return None


# -- fields of a backup ----------------------------------------------------------------------------


def _field(backup: Any, name: str) -> Any:
    return backup.get(name) if isinstance(backup, Mapping) else getattr(backup, name, None)


def _backup_id(value: Any) -> str | None:
    """A backup's id in the form backupfs keeps; None for what cannot be the id of any."""
    with suppress(InvalidRecord):
        return canonical_backup_id(str(value))
    return None


def _volume_name(volume_id: Any) -> str:
    problem = check_volume_name(volume_id) if isinstance(volume_id, str) else "it is no text"
    if problem:
        raise InvalidName(name=volume_id, reason=problem)
    return str(volume_id)


def _moment(value: Any) -> datetime | None:
    """A time given as such or as ISO 8601 text, in UTC; one without a zone is UTC already."""
    if value is None:
        return None
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidOption(option="data_timestamp", reason=f"{value!r} is no time") from error


def _description(backup: Any) -> Description:
    return Description(
        **{name: _text(_field(backup, name)) for name in Description.__dataclass_fields__}
    )


def _text(value: Any) -> str | None:
    """Descriptive text, cut: a long or odd label is no reason to be without a backup."""
    if value is None:
        return None
    encoded = str(value).encode(errors="replace")[:DESCRIPTION_SIZE_MAX]
    return encoded.decode(errors="ignore")


def _parse_metadata(json_metadata: str | bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(json_metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMetadata(reason=f"it is no JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise InvalidMetadata(reason="it must be a JSON object")
    version = metadata.pop("version", METADATA_VERSION)
    if type(version) is not int or version not in METADATA_VERSIONS:
        raise InvalidMetadata(reason=f"its version {version!r} is unknown")
    return metadata


def _record_bytes(driver_info: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(driver_info[RECORD_KEY], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRecord(reason=f"field {RECORD_KEY!r} is no base64 text") from error
