"""Makes a backup of content that is durable: builds its record and writes it.

The record is the commit: before it exists there is no backup, once it exists the backup is
complete. A short lock per repository keeps two publishers from choosing one name.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from backupfs.catalogue import Catalogue
from backupfs.errors import BackupExists, ObjectExists, StorageUnavailable
from backupfs.format.names import backup_name, stamp_of
from backupfs.format.record import KIND_FULL, KIND_INCREMENTAL, Description, Record
from backupfs.repository.repository import Repository
from backupfs.staging.draft import Content
from backupfs.storage.locks import FileLock, held_lock

log = logging.getLogger(__name__)

# Stands for the volume's latest backup where a parent is asked for.
LATEST = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a new backup is to be, beside its content."""

    volume: str
    parent: str | None = LATEST  # LATEST, the id of a backup, or None for a full one
    backup_id: str
    data_timestamp: datetime
    source_mtime_ns: int | None = None
    source_mode: int | None = None
    stored_bytes: int
    metadata: dict[str, Any] | None = None
    description: Description = field(default_factory=Description)


def publish(
    repository: Repository, catalogue: Catalogue, content: Content, publication: Publication
) -> Record:
    """Make the backup; it exists and survives a power cut when this returns.

    Raises:
        BackupExists: the id is taken by a backup with other content, or by one that is damaged.
        InvalidRecord: it cannot be described; there is no backup.
        LockTimeout, StorageFull, StorageReadOnly: there is no backup.
        StorageUnavailable: unknown whether there is one; the same id again finds out.
    """
    ambient = repository.ambient
    with publishing(repository):
        catalogue.refresh()
        earlier = catalogue.get(publication.backup_id)
        if earlier is not None:
            same = (earlier.volume, earlier.root, earlier.size)
            if same == (publication.volume, content.root.root, content.size):
                make_lasting(repository, earlier)
                return earlier
            raise BackupExists(backup_id=publication.backup_id)
        parent = find_parent(catalogue, publication)
        if parent is not None and parent.size != content.size:
            parent = None
        volume = publication.volume
        moment = publication.data_timestamp.astimezone(UTC).replace(microsecond=0)
        taken = catalogue.names_of_second(volume, moment)
        record = Record(
            backup_id=publication.backup_id,
            repository_id=repository.config.repository_id,
            volume=volume,
            name=backup_name(moment, taken),
            size=content.size,
            chunk_size=repository.config.chunk_size,
            root=content.root.root,
            height=content.root.height,
            kind=KIND_INCREMENTAL if parent else KIND_FULL,
            parent_id=parent.backup_id if parent else None,
            created_at=ambient.now(),
            data_timestamp=moment,
            source_mtime_ns=publication.source_mtime_ns,
            source_mode=publication.source_mode,
            # The last chunk of an image may reach past its end.
            data_size=min(content.size, content.data_count * repository.config.chunk_size),
            stored_bytes=publication.stored_bytes,
            host=ambient.host_name(),
            metadata=publication.metadata,
            description=publication.description,
        )
        try:
            repository.records.put(record)
        except ObjectExists as error:  # one that cannot be read, or it would have been found
            raise BackupExists(backup_id=record.backup_id) from error
    catalogue.add(record)
    _warn_of_the_future(catalogue, record, ambient.now())
    return record


def _warn_of_the_future(catalogue: Catalogue, record: Record, now: datetime) -> None:
    latest = catalogue.latest(record.volume)
    if latest is not None and latest.data_timestamp > max(now, record.data_timestamp):
        log.warning(
            "the latest backup of volume %r is dated %s, which is to come: a clock was ahead",
            record.volume,
            stamp_of(latest.data_timestamp),
        )


def make_lasting(repository: Repository, record: Record) -> None:
    """Who wrote the record may have died, or failed, before it was durable; now it is.

    Raises: StorageUnavailable.
    """
    if repository.storage.make_lasting([record.object_name]):
        reason = f"backup {record.backup_id} is there, but the disk does not say that it stays"
        raise StorageUnavailable(reason=reason)


def find_parent(catalogue: Catalogue, publication: Publication) -> Record | None:
    """The backup that a new one is meant to be taken over, whatever its size; None where it is gone."""
    if publication.parent is None:
        return None
    if publication.parent == LATEST:
        return catalogue.latest(publication.volume)
    return catalogue.get(publication.parent)


def publishing(repository: Repository) -> AbstractContextManager[FileLock]:
    """Hold what keeps others from making, or taking in, a backup of the same name."""
    return held_lock(
        repository.folder / "locks" / "publish",
        repository.ambient,
        what="publishing a backup",
        seconds_max=repository.lock_seconds_max,
    )
