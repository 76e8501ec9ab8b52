"""Cinder's words for the verbs: the methods of its backup driver, without Cinder.

Translates and nothing else: a backup given as a mapping (or an object with such attributes) into
the arguments of a verb, an open volume into a source or a target, metadata into JSON text. What the
verbs promise holds here too, and so do their errors. Methods may be called from several threads.
"""

from __future__ import annotations

import base64
import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Protocol, Self

from backupfs.ambient import Ambient
from backupfs.errors import (
    BackupfsError,
    BackupNotFound,
    InvalidMetadata,
    InvalidName,
    InvalidOption,
    InvalidRecord,
    SourceFailed,
    TargetFailed,
)
from backupfs.format.names import check_volume_name
from backupfs.format.record import DESCRIPTION_SIZE_MAX, canonical_backup_id
from backupfs.service import Description, Record, Service
from backupfs.types import Buffer

# What is asked of a volume at a time.
READ_SIZE = 1 << 20
ZEROS = bytes(READ_SIZE)

# The form of the JSON text that ``get_metadata`` writes; 1 is the same with fewer keys.
METADATA_VERSION = 2
METADATA_VERSIONS = (1, 2)

# The key of an exported record that ``import_record`` reads; all others are for people.
RECORD_KEY = "record"


class VolumeFile(Protocol):
    """An open volume, at least; ``fileno`` is used too where there is one that works."""

    def read(self, size: int, /) -> Any:
        """Up to ``size`` bytes; none of them means the end."""

    def write(self, data: bytes, /) -> Any:
        """How many bytes were taken; None says all of them."""

    def seek(self, offset: int, /) -> Any: ...

    def flush(self) -> Any: ...


class BackupDriver:
    """Backups of volumes in the repository at ``location``. Use as a context manager.

    A ``backup`` needs ``id`` (a UUID) and, to be made, ``volume_id``; what else Cinder's backups
    have is used where it is there.
    """

    def __init__(self, location: str, *, ambient: Ambient | None = None) -> None:
        """Raises: RepositoryNotFound, CorruptObject, UnsupportedFormat, StorageError."""
        self.service = Service.open(location, ambient=ambient)

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
        volume = _volume_name(_field(backup, "volume_id"))
        self.service.backup(
            _VolumeSource(volume_file, volume),
            volume=volume,
            parent=_backup_id(_field(backup, "parent_id")),
            backup_id=str(_field(backup, "id")),
            data_timestamp=_moment(_field(backup, "data_timestamp")),
            description=_description(backup),
            with_metadata=backup_metadata,
        )

    def restore(self, backup: Any, volume_id: str, volume_file: VolumeFile) -> None:
        """Write the backup's image over the start of ``volume_file``, zeros included; durable on
        return where the file has a descriptor. What lies behind the image is not touched.

        Metadata in the backup, if any, then replace those of ``volume_id``.

        Raises:
            BackupNotFound, InvalidName: nothing was written.
            DamageError, TargetFailed, StorageError: the volume is not complete.
        """
        volume = _volume_name(volume_id)
        record = self._existing(backup)
        self.service.restore(record, _VolumeTarget(volume_file, volume))
        if record.metadata:
            self.service.put_metadata(volume, record.metadata)

    def delete_backup(self, backup: Any) -> None:
        """Delete a backup; one that is gone, or was never completed, is no error.

        Raises: StorageError.
        """
        record = self._find(backup)
        if record is not None:
            with suppress(BackupNotFound):
                self.service.delete(record)

    # -- records ---------------------------------------------------------------------------------

    def export_record(self, backup: Any) -> dict[str, Any]:
        """What ``import_record`` needs, of types that JSON has. Raises: BackupNotFound."""
        record = self._existing(backup)
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
        outcome = self.service.import_record(_record_bytes(driver_info))
        if outcome.record.backup_id != expected:
            # Only an altered ``driver_info`` comes here: its parts are of different backups.
            if not outcome.already_there:
                self.service.delete(outcome.record)
            raise InvalidRecord(reason=f"it is not the record of backup {expected}")

    # -- helpers ---------------------------------------------------------------------------------

    def _existing(self, backup: Any) -> Record:
        record = self._find(backup)
        if record is None:
            raise BackupNotFound(selector=_field(backup, "id"))
        return record

    def _find(self, backup: Any) -> Record | None:
        """The backup as it is now, whoever changed the repository; None where there is none."""
        backup_id = _backup_id(_field(backup, "id"))
        if backup_id is None:
            return None
        self.service.refresh()
        with suppress(BackupNotFound):
            return self.service.resolve(backup_id)
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


# -- open volumes ----------------------------------------------------------------------------------


@contextmanager
def _failing_as(failure: type[BackupfsError], name: str) -> Iterator[None]:
    """Turn whatever a volume's file raises into our error; the cause stays chained."""
    try:
        yield
    except Exception as error:  # each storage system's library has errors of its own
        raise failure(name=name, reason=f"{type(error).__name__}: {error}") from error


class _VolumeSource:
    """The image in an open volume, read from 0 until nothing more comes."""

    def __init__(self, file: VolumeFile, name: str) -> None:
        self.name = name
        self.size_hint: int | None = None
        self._file = file
        self._size = 0

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        with _failing_as(SourceFailed, self.name):
            self._file.seek(0)
        while piece := self._gather():
            offset, self._size = self._size, self._size + len(piece)
            if piece != ZEROS:
                yield offset, piece

    def size(self) -> int:
        return self._size

    def _gather(self) -> bytes:
        """The next piece: whole, however short the reads are, so that chunks stay whole."""
        parts, missing = [], READ_SIZE
        while missing > 0 and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        with _failing_as(SourceFailed, self.name):
            data = self._file.read(size)
            if not isinstance(data, Buffer):
                # None is said by a file that has nothing yet: to take it for the end would cut.
                raise TypeError(f"read gave {type(data).__name__}, not bytes")
            return bytes(data)


class _VolumeTarget:
    """An open volume, written from 0 on; it may be full of other data."""

    def __init__(self, file: VolumeFile, name: str) -> None:
        self.name = name
        self._file = file
        self._position: int | None = None  # in the file; None: not known yet

    def write(self, offset: int, data: Buffer) -> None:
        with _failing_as(TargetFailed, self.name):
            if offset != self._position:
                self._file.seek(offset)
            rest = bytes(data)  # some wrappers take nothing else
            while rest:
                taken = self._file.write(rest)
                if taken == 0:
                    raise OSError("it takes no more bytes")
                rest = b"" if taken is None else rest[taken:]
            self._position = offset + len(data)

    def write_hole(self, offset: int, size: int) -> None:
        end = offset + size
        while offset < end:
            self.write(offset, ZEROS[: end - offset])
            offset += min(READ_SIZE, end - offset)

    def finish(self, size: int) -> None:
        with _failing_as(TargetFailed, self.name):
            self._file.flush()
            descriptor = self._descriptor()
            if descriptor is not None:
                _sync(descriptor)

    def _descriptor(self) -> int | None:
        try:
            descriptor = self._file.fileno()  # type: ignore[attr-defined]  # not all have one
        except Exception:  # nor do those without one agree on how to say so
            return None
        return descriptor if isinstance(descriptor, int) else None


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what can never be synced: a pipe, a character device
            raise
