"""A record: the msgpack description of one backup; stored, exported and imported in one form (pure).

A record is self-contained: with the packs it names (through ``root``), it alone restores its
backup. A keyed digest covers every field, so one flipped bit is refused. Field by field in
docs/format.md, "Record".
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from backupfs.errors import InvalidRecord
from backupfs.format import codec, tree
from backupfs.format.config import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.format.names import BACKUP_NAME, check_volume_name
from backupfs.types import BLOB_ID_SIZE, IMAGE_SIZE_MAX, BlobId, Buffer, ObjectName, ceil_div

VERSION = 1
RECORD_SIZE_MAX = 1 << 20
METADATA_SIZE_MAX = 256 << 10
# What a program on the way may not recurse into is no metadata: it could be taken here, and fail there.
METADATA_DEPTH_MAX = 64
DESCRIPTION_SIZE_MAX = 4096  # of each field of it
RECORDS_PREFIX = "records/"
# Modification times that records and drafts hold: from 1677 to 2262.
TIME_NS_MIN, TIME_NS_MAX = -(1 << 63), (1 << 63) - 1
KIND_FULL = "full"
KIND_INCREMENTAL = "incremental"

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Cinder's descriptive fields; free text that backupfs keeps and never interprets."""

    display_name: str | None = None
    display_description: str | None = None
    availability_zone: str | None = None
    user_id: str | None = None
    project_id: str | None = None
    container: str | None = None
    snapshot_id: str | None = None
    service: str | None = None


_NO_DESCRIPTION = Description()
_DESCRIPTION_KEYS = tuple(Description.__dataclass_fields__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One backup. All times are aware and in UTC; all sizes are bytes."""

    backup_id: str  # a UUID, lower case
    repository_id: str
    volume: str
    name: str  # of its file in the mount: "2026-11-22T142503Z.img", "…Z-2.img"
    size: int
    chunk_size: int
    root: BlobId
    height: int
    kind: str  # "full" or "incremental"
    parent_id: str | None  # provenance only: the parent may be gone
    created_at: datetime
    data_timestamp: datetime  # when the data were taken, to the second
    source_mtime_ns: int | None  # modification time of what was copied, if it was told
    source_mode: int | None  # permission bits of what was copied, if they were told
    data_size: int  # bytes of chunks that are no holes; at most ``size``
    stored_bytes: int  # bytes this backup added to the repository
    host: str
    metadata: dict[str, Any] | None = None  # the volume's, if it went into the backup
    description: Description = field(default_factory=Description)

    @property
    def object_name(self) -> ObjectName:
        return record_name(self.backup_id)


def record_name(backup_id: str) -> ObjectName:
    """The object that holds a backup's record."""
    return ObjectName(f"{RECORDS_PREFIX}{backup_id}.msgpack")


def backup_id_of(name: str) -> str | None:
    """The backup whose record an object of that name is; None for other objects."""
    stem = name.removeprefix(RECORDS_PREFIX).removesuffix(".msgpack")
    return stem if is_backup_id(stem) and name == record_name(stem) else None


def is_backup_id(text: str) -> bool:
    """Whether ``text`` is written as backup ids are: a UUID in lower case."""
    return _UUID.fullmatch(text) is not None


def canonical_backup_id(text: str) -> str:
    """A caller's UUID in the form backupfs keeps.

    Raises:
        InvalidRecord: it is no UUID.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise InvalidRecord(reason=f"backup id {text!r} is no UUID") from error


def storable_time(moment_ns: int) -> int:
    """The nearest modification time that can be kept, as other file systems have it."""
    return max(TIME_NS_MIN, min(moment_ns, TIME_NS_MAX))


def encode_record(record: Record, ids: IdScheme) -> bytes:
    """The record's bytes, its digest as the last key."""
    value = {
        "version": VERSION,
        "id": record.backup_id,
        "repository_id": record.repository_id,
        "volume": record.volume,
        "name": record.name,
        "size": record.size,
        "chunk_size": record.chunk_size,
        "root": record.root,
        "height": record.height,
        "kind": record.kind,
        "parent_id": record.parent_id,
        "created_at": record.created_at.isoformat(),
        "data_timestamp": record.data_timestamp.isoformat(),
        "source_mtime_ns": record.source_mtime_ns,
        "source_mode": record.source_mode,
        "data_size": record.data_size,
        "stored_bytes": record.stored_bytes,
        "host": record.host,
        "metadata": None if record.metadata is None else metadata_text(record.metadata),
        "description": {key: getattr(record.description, key) for key in _DESCRIPTION_KEYS},
    }
    value["digest"] = ids.digest("record", codec.encode(value))
    return codec.encode(value)


def decode_record(data: Buffer, ids: IdScheme) -> Record:
    """Read a record, wherever it comes from.

    Raises:
        InvalidRecord: damaged, too large, of an unknown version, or not possible.
    """
    return _decode_common(data, ids) or _decode_checked(data, ids)


def _decode_common(data: Buffer, ids: IdScheme) -> Record | None:
    """The record that is encoded as just these bytes; None where there is none, or they are many.

    One comparison proves all: form, version, order, that no field is too many, and the digest.
    """
    try:
        record = _from_fields(codec.Fields(codec.decode_small(data)))
        return record if encode_record(record, ids) == bytes(data) else None
    except (codec.UndecodableError, ValueError, TypeError, OverflowError):
        return None


def _decode_checked(data: Buffer, ids: IdScheme) -> Record:
    """Check step by step, to say what is wrong; what is read is proven before it is understood."""
    try:
        value = codec.decode(data, size_max=RECORD_SIZE_MAX)
        fields = codec.Fields(value)
        version = fields.integer("version")
        if version != VERSION:
            raise codec.UndecodableError(f"version {version} is unknown")
        digest = fields.raw("digest", size=DIGEST_SIZE)
        body = {key: item for key, item in value.items() if key != "digest"}
        if ids.digest("record", codec.encode(body)) != digest:
            raise codec.UndecodableError("its digest does not match: it is damaged")
        record = _from_fields(fields)
        if encode_record(record, ids) != bytes(data):
            raise codec.UndecodableError("it has fields that do not belong there")
    except (codec.UndecodableError, ValueError, TypeError, OverflowError) as error:
        raise InvalidRecord(reason=str(error)) from error
    return record


def decode_proven(data: Buffer) -> Record:
    """The same for bytes that ``decode_record`` has taken before, and are proven to be the same.

    Raises: KeyError, TypeError, ValueError (they are not).
    """
    value = codec.decode_own(data)
    metadata, description = value["metadata"], value["description"]
    return Record(
        backup_id=value["id"],
        # Records have most of these in common.
        repository_id=sys.intern(value["repository_id"]),
        volume=sys.intern(value["volume"]),
        name=value["name"],
        size=value["size"],
        chunk_size=value["chunk_size"],
        root=BlobId(value["root"]),
        height=value["height"],
        kind=sys.intern(value["kind"]),
        parent_id=value["parent_id"],
        created_at=datetime.fromisoformat(value["created_at"]),
        data_timestamp=datetime.fromisoformat(value["data_timestamp"]),
        source_mtime_ns=value["source_mtime_ns"],
        source_mode=value["source_mode"],
        data_size=value["data_size"],
        stored_bytes=value["stored_bytes"],
        host=sys.intern(value["host"]),
        metadata=None if metadata is None else json.loads(metadata),
        description=Description(**description) if any(description.values()) else _NO_DESCRIPTION,
    )


def _from_fields(fields: codec.Fields) -> Record:
    size = fields.integer("size", high=IMAGE_SIZE_MAX)
    chunk_size = fields.integer("chunk_size", low=CHUNK_SIZE_MIN, high=CHUNK_SIZE_MAX)
    height = fields.integer("height", low=1, high=16)
    backup_id = fields.text("id", size_max=36)
    kind = fields.text("kind", size_max=16)
    volume = fields.text("volume", size_max=4096)
    name = fields.text("name", size_max=64)
    repository_id = fields.text("repository_id", size_max=36)
    parent_id = fields.optional_text("parent_id", size_max=36)
    for text in (backup_id, repository_id, parent_id):
        if text is not None and not is_backup_id(text):
            raise codec.UndecodableError("an id in it is no UUID")
    if chunk_size & (chunk_size - 1) or height != tree.height(size, chunk_size=chunk_size):
        raise codec.UndecodableError("its tree does not fit its size")
    if kind not in (KIND_FULL, KIND_INCREMENTAL) or not BACKUP_NAME.fullmatch(name):
        raise codec.UndecodableError("its kind or name is unknown")
    problem = check_volume_name(volume)
    if problem:
        raise codec.UndecodableError(f"its volume's name: {problem}")
    metadata = fields.optional_text("metadata", size_max=METADATA_SIZE_MAX)
    return Record(
        backup_id=backup_id,
        repository_id=repository_id,
        volume=volume,
        name=name,
        size=size,
        chunk_size=chunk_size,
        root=BlobId(fields.raw("root", size=BLOB_ID_SIZE)),
        height=height,
        kind=kind,
        parent_id=parent_id,
        created_at=fields.moment("created_at"),
        data_timestamp=fields.moment("data_timestamp"),
        source_mtime_ns=fields.optional_integer(
            "source_mtime_ns", low=TIME_NS_MIN, high=TIME_NS_MAX
        ),
        source_mode=fields.optional_integer("source_mode", low=0, high=0o7777),
        # Records of before it was cut to the image's end count whole chunks.
        data_size=fields.integer("data_size", high=ceil_div(size, chunk_size) * chunk_size),
        stored_bytes=fields.integer("stored_bytes"),
        host=fields.text("host", size_max=255),
        metadata=None if metadata is None else decode_metadata(metadata),
        description=_description(fields.mapping("description")),
    )


def metadata_text(metadata: dict[str, Any]) -> str:
    """Metadata in the one spelling it is kept in. Raises: TypeError, ValueError."""
    # Not a number and infinities are no JSON, though Python writes and reads them.
    return json.dumps(metadata, sort_keys=True, allow_nan=False)


def decode_metadata(text: str) -> dict[str, Any]:
    """Metadata from the text it is kept as. Raises: UndecodableError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise codec.UndecodableError("its metadata is no JSON, or nested too deeply") from error
    if not isinstance(value, dict):
        raise codec.UndecodableError("its metadata is no object")
    if is_deeper(value, METADATA_DEPTH_MAX):
        raise codec.UndecodableError("its metadata is nested too deeply")
    try:
        is_spelled_so = metadata_text(value) == text
    except ValueError:
        is_spelled_so = False
    if not is_spelled_so:
        raise codec.UndecodableError("its metadata is spelled in another way than it should be")
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested more than so many levels deep."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    if not levels:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(is_deeper(item, levels - 1) for item in items)


def _description(value: dict[str, Any]) -> Description:
    fields = codec.Fields(value)
    if value.keys() != set(_DESCRIPTION_KEYS):
        raise codec.UndecodableError("its description has other fields than it should")
    return Description(
        **{key: fields.optional_text(key, size_max=DESCRIPTION_SIZE_MAX) for key in value}
    )
