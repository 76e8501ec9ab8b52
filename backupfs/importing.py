"""Takes a backup in from its record: every check before, one write at the end."""

from __future__ import annotations

from backupfs.catalogue import Catalogue
from backupfs.errors import BackupExists, DamageError, ForeignRecord, InvalidRecord, MissingData
from backupfs.format.record import Record, decode_record
from backupfs.repository.images import Root, walk
from backupfs.repository.repository import Repository
from backupfs.types import HOLE

GC_POLL_SECONDS = 0.1


def import_record(repository: Repository, catalogue: Catalogue, data: bytes) -> tuple[Record, bool]:
    """The backup that ``data`` describes, and whether it was there already; durable on return.

    Raises:
        InvalidRecord: damaged, of an unknown version, or impossible.
        ForeignRecord: of another repository.
        BackupExists: the id, or the name in its volume, is taken by another backup.
        MissingData: this repository has not, or no longer, all of its data.
        StorageError
    """
    record = decode_record(data, repository.ids)
    _check_fits(repository, record)
    catalogue.refresh()
    earlier = catalogue.get(record.backup_id)
    if earlier is not None:
        if earlier != record:
            raise BackupExists(backup_id=record.backup_id)
        return record, True
    other = catalogue.by_name(record.volume, record.name)
    if other is not None:
        raise BackupExists(backup_id=other.backup_id)
    session = repository.writer().session
    with session.holding(Root(record.root, record.height)):
        _check_reachable(repository, record)
        repository.records.put(record)
    catalogue.add(record)
    return record, False


def _check_fits(repository: Repository, record: Record) -> None:
    config = repository.config
    if record.repository_id != config.repository_id:
        raise ForeignRecord(theirs=record.repository_id, ours=config.repository_id)
    if record.chunk_size != config.chunk_size:
        raise InvalidRecord(reason=f"its chunks have {record.chunk_size} bytes")


def _check_reachable(repository: Repository, record: Record) -> None:
    """Raise unless every blob is there and gc does not mean to delete it."""
    ambient = repository.ambient
    started = ambient.monotonic()
    repository.refresh_index()
    while True:
        missing, condemned = _count_unreachable(repository, record)
        if missing:
            raise MissingData(backup_id=record.backup_id, missing=f"{missing} blobs are missing")
        if not condemned:
            return
        if ambient.monotonic() - started > repository.lock_seconds_max:
            raise MissingData(
                backup_id=record.backup_id, missing=f"gc is deleting {condemned} blobs of it"
            )
        # gc marks again before it deletes, and now sees the root that our session holds; or it
        # has seen its plan through, and they are gone.
        ambient.sleep(GC_POLL_SECONDS)
        repository.refresh_index()


def _count_unreachable(repository: Repository, record: Record) -> tuple[int, int]:
    missing = condemned = 0
    entered = set()

    def enter(blob_id: bytes, _level: int) -> bool:
        new = blob_id not in entered
        entered.add(blob_id)
        return new

    try:
        leaves = walk(repository.reader, Root(record.root, record.height), enter=enter)
        for _first, ids in leaves:
            wanted = [blob_id for blob_id in ids if blob_id != HOLE]
            for location in repository.index.find_many(wanted):
                if location is None:
                    missing += 1
                elif location.pack_id in repository.avoided.packs:
                    condemned += 1
    except DamageError as error:
        raise MissingData(backup_id=record.backup_id, missing=str(error)) from error
    return missing, condemned
