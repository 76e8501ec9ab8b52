"""Takes a backup in from its record: every check before, one write at the end."""

from __future__ import annotations

from backupfs.catalogue import Catalogue
from backupfs.errors import (
    BackupExists,
    CorruptObject,
    DamageError,
    ForeignRecord,
    InvalidRecord,
    MissingData,
    ObjectExists,
    ObjectNotFound,
)
from backupfs.format.record import Record, decode_record
from backupfs.repository.images import Root
from backupfs.repository.marking import Marker
from backupfs.repository.repository import Repository
from backupfs.repository.sessions import gc_lock_path
from backupfs.staging.publish import publishing
from backupfs.storage.locks import held_lock


def import_record(repository: Repository, catalogue: Catalogue, data: bytes) -> tuple[Record, bool]:
    """The backup that ``data`` describes, and whether it was there already; durable on return.

    Raises:
        InvalidRecord: damaged, of an unknown version, or impossible.
        ForeignRecord: of another repository.
        BackupExists: the id, or the name in its volume, is taken by another backup.
        MissingData: this repository has not, or no longer, all of its data.
        LockTimeout: a gc is running; try again when it has ended.
        StorageError
    """
    record = decode_record(data, repository.ids)
    _check_fits(repository, record)
    # gc waits meanwhile: what is reachable now is so until the record says that it is needed.
    with held_lock(
        gc_lock_path(repository.folder),
        repository.ambient,
        what="gc to end, or an import",
        seconds_max=repository.lock_seconds_max,
    ):
        catalogue.refresh()
        is_reachable = catalogue.get(record.backup_id) is None
        if is_reachable:
            # Of a large image this takes minutes: nobody who publishes is to wait for it.
            repository.refresh_index()
            repository.check_packs_stay()
            _check_reachable(repository, record)
        with publishing(repository):
            catalogue.refresh()
            earlier = catalogue.get(record.backup_id)
            if earlier is not None:
                if earlier != record:
                    raise BackupExists(backup_id=record.backup_id)
                _put(repository, record)  # known from memory, perhaps
                return record, True
            other = catalogue.by_name(record.volume, record.name)
            if other is not None:
                raise BackupExists(backup_id=other.backup_id)
            if not is_reachable:  # it was there, and was deleted just now
                _check_reachable(repository, record)
            _put(repository, record)
    catalogue.add(record)
    return record, False


def _put(repository: Repository, record: Record) -> None:
    """Write the record, in place of a damaged one of the same backup. Where it is there already, it is
    durable then, whether or not who wrote it came to that."""
    try:
        repository.records.put(record)
    except ObjectExists:
        try:
            stored = repository.records.get(record.backup_id)
        except CorruptObject:
            repository.records.replace(record)
        except ObjectNotFound:  # deleted just now
            repository.records.put(record)
        else:
            if stored != record:
                raise


def _check_fits(repository: Repository, record: Record) -> None:
    config = repository.config
    if record.repository_id != config.repository_id:
        raise ForeignRecord(theirs=record.repository_id, ours=config.repository_id)
    if record.chunk_size != config.chunk_size:
        raise InvalidRecord(reason=f"its chunks have {record.chunk_size} bytes")


def _check_reachable(repository: Repository, record: Record) -> None:
    """Raise unless every chunk and node is in a pack that exists; their bytes are not compared."""
    marker = Marker(repository.reader, repository.index)
    try:
        marker.mark([Root(record.root, record.height)])
        marker.look_again(repository.refresh_index)
    except DamageError as error:
        raise MissingData(backup_id=record.backup_id, missing=str(error)) from error
    missing = len(marker.reached.missing)
    if missing:
        raise MissingData(backup_id=record.backup_id, missing=f"{missing} blobs are missing")
