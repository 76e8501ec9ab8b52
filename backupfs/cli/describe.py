"""Values as people read them in tables, and as scripts read them in JSON (pure).

Tables have sizes in units and times as backups' names have them, JSON has bytes and RFC 3339.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any

from backupfs.cli.escaping import printable
from backupfs.format.record import Record

SHORT_ID_SIZE = 8  # characters of a backup id that tables show; commands take any unique prefix


def human_size(size: int) -> str:
    """Bytes in the largest unit that leaves a number of at least one: "1.5 GiB"."""
    if size < 1024:
        return f"{size} B"
    amount = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        amount /= 1024
        # Just under the border, "1024.0 KiB" would be printed: that is the next unit's turn.
        if amount < 1023.95 or unit == "EiB":
            break
    return f"{amount:.1f} {unit}"


def compact_time(moment: datetime | None) -> str:
    """A time for a table, in UTC and as backups' names have it; "-" for none."""
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H%M%SZ")


def rfc3339(moment: datetime) -> str:
    """A time for JSON, in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def counted(count: int, noun: str) -> str:
    """ "1 backup", "2 backups"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def label(record: Record) -> str:
    """A backup as ``VOLUME@TIMESTAMP``, which commands take as well; printable."""
    return f"{printable(record.volume)}@{stamp(record)}"


def stamp(record: Record) -> str:
    """The name of a backup's file without its suffix."""
    return record.name.removesuffix(".img")


def short_id(record: Record) -> str:
    return record.backup_id[:SHORT_ID_SIZE]


def record_summary(record: Record) -> dict[str, Any]:
    """A backup as an element of a JSON list."""
    return {
        "id": record.backup_id,
        "volume": record.volume,
        "name": record.name,
        "created_at": rfc3339(record.created_at),
        "data_timestamp": rfc3339(record.data_timestamp),
        "size": record.size,
        "data_size": record.data_size,
        "stored_bytes": record.stored_bytes,
        "kind": record.kind,
        "parent_id": record.parent_id,
        "host": record.host,
    }


def record_details(record: Record) -> dict[str, Any]:
    """Everything a record says, as a JSON object."""
    return {
        **record_summary(record),
        "repository_id": record.repository_id,
        "chunk_size": record.chunk_size,
        "root": record.root.hex(),
        "height": record.height,
        "source_mtime_ns": record.source_mtime_ns,
        "source_mode": None if record.source_mode is None else f"{record.source_mode:04o}",
        "metadata": record.metadata,
        "description": asdict(record.description),
    }


def as_json(value: Any) -> Any:
    """Reports of the service as JSON values: records as summaries, times as text."""
    if isinstance(value, Record):
        return record_summary(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
