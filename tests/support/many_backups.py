"""More backups than anybody makes in a test: of the content of one, by writing their records."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from backupfs.format.ids import IdScheme
from backupfs.format.names import backup_name
from backupfs.format.record import encode_record
from backupfs.service import Record


def further_backups(folder: Path, first: Record, count: int, *, start: int = 1) -> list[Record]:
    """``count`` backups a minute apart, after ``first`` of a repository in ``folder``, in order.

    ``start``: of the numbers that make their ids and times.
    """
    made = []
    for number in range(start, start + count):
        moment = first.data_timestamp + timedelta(minutes=number)
        record = replace(
            first,
            backup_id=str(uuid.UUID(int=number)),
            name=backup_name(moment, ()),
            data_timestamp=moment,
        )
        write_record(folder, record)
        made.append(record)
    return made


def write_record(folder: Path, record: Record) -> Path:
    """Put a record where it belongs, as whoever copies it in by hand; it gets a new inode."""
    path = folder / record.object_name
    temporary = path.with_name(".new")
    temporary.write_bytes(encode_record(record, IdScheme()))
    temporary.replace(path)
    return path
