"""Records as objects: put one (the commit of a backup), read one or many, delete one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator

from backupfs.errors import CorruptObject, InvalidRecord, ObjectNotFound, StorageUnavailable
from backupfs.format.config import RepositoryConfig
from backupfs.format.ids import IdScheme
from backupfs.format.record import (
    RECORD_SIZE_MAX,
    RECORDS_PREFIX,
    Record,
    backup_id_of,
    decode_proven,
    decode_record,
    encode_record,
    record_name,
)
from backupfs.repository.record_cache import BLOCK_LENGTH_MAX, KeptRecord, RecordCache
from backupfs.storage.local import LocalStorage
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import ObjectName

# One record that is damaged, or that the disk cannot read, is not all of them.
UnreadableError = CorruptObject | StorageUnavailable
UNREADABLE = (CorruptObject, StorageUnavailable)

# To read fewer takes no longer than to look what is kept of them, and to keep them.
CACHED_COUNT_MIN = 32
# Records kept that are of no use any more, beside those that are: beyond so many all are forgotten.
USELESS_COUNT_MAX = 1000


def as_damage(name: ObjectName, error: UnreadableError) -> CorruptObject:
    """Why an object cannot be read, as damage of that object."""
    return CorruptObject(name=name, reason=error.reason)


class RecordStore:
    """The records of one repository."""

    def __init__(self, storage: LocalStorage, ids: IdScheme, config: RepositoryConfig) -> None:
        self._storage = storage
        self._id_scheme = ids
        self._config = config

    def put(self, record: Record) -> None:
        """Publish a backup: when this returns it exists and survives a power cut.

        What ``record.root`` reaches must be durable already.

        Raises:
            InvalidRecord: it could not be read again; nothing was written.
            StorageError, ObjectExists
        """
        data = encode_record(record, self._id_scheme)
        if decode_record(data, self._id_scheme) != record:
            raise InvalidRecord(reason="it would not be read again as it is")
        self._storage.put_new(record.object_name, data)

    def replace(self, record: Record) -> None:
        """Write a record in place of its damaged one: a crash leaves the one or the other.

        Raises: StorageError.
        """
        self._storage.replace(record.object_name, encode_record(record, self._id_scheme))

    def get(self, backup_id: str) -> Record:
        """Raises: ObjectNotFound, CorruptObject, StorageError."""
        return self.get_with_data(backup_id)[0]

    def get_with_data(self, backup_id: str) -> tuple[Record, bytes]:
        """The same, and its bytes as they are stored."""
        name = record_name(backup_id)
        data = self._storage.get(name, size_max=RECORD_SIZE_MAX)
        try:
            record = decode_record(data, self._id_scheme)
        except InvalidRecord as error:
            raise CorruptObject(name=name, reason=error.reason) from error
        if record.backup_id != backup_id:
            raise CorruptObject(name=name, reason="it is the record of another backup")
        # Copied in by hand. With chunks of another size it would be read wrong.
        if record.repository_id != self._config.repository_id:
            raise CorruptObject(name=name, reason=f"it is of repository {record.repository_id}")
        if record.chunk_size != self._config.chunk_size:
            raise CorruptObject(name=name, reason=f"its chunks have {record.chunk_size} bytes")
        return record, data

    def exists(self, backup_id: str) -> bool:
        """Whether there is a record of that id, readable or not."""
        try:
            self.get(backup_id)
        except ObjectNotFound:
            return False
        except (CorruptObject, StorageUnavailable):
            pass
        return True

    def delete(self, backup_id: str) -> None:
        """Delete a backup; durable on return. Absent already: no error."""
        self._storage.delete(record_name(backup_id))

    def get_all(self) -> tuple[dict[str, Record], dict[ObjectName, UnreadableError]]:
        """Every readable record by id, as the disk has it now, and by object what is wrong with each
        of the others. Raises: StorageError."""
        records: dict[str, Record] = {}
        unreadable: dict[ObjectName, UnreadableError] = {}
        for backup_id in self._listed():
            try:
                records[backup_id] = self.get(backup_id)
            except ObjectNotFound:
                continue  # deleted since it was listed
            except UNREADABLE as error:
                if isinstance(error, StorageUnavailable) and is_want_of_resources(error):
                    raise
                unreadable[record_name(backup_id)] = error
        return records, unreadable

    def _listed(self) -> Iterator[str]:
        for info in self._storage.list(RECORDS_PREFIX):
            backup_id = backup_id_of(info.name)
            if backup_id is not None:
                yield backup_id


class RecordLoader:
    """Reads the records that a catalogue does not know; many at once by what was kept of them."""

    def __init__(
        self, records: RecordStore, storage: LocalStorage, cache: RecordCache | None
    ) -> None:
        self._records = records
        self._storage = storage
        self._cache = cache

    def load(
        self, backup_ids: Collection[str]
    ) -> tuple[dict[str, Record], dict[str, UnreadableError]]:
        """Those of these records that exist: the readable ones, and what is wrong with the others.

        Raises: StorageError.
        """
        if len(backup_ids) < CACHED_COUNT_MIN or self._cache is None:
            return self._load(backup_ids, None)
        with _uncollected():
            return self._load(backup_ids, self._cache)

    def _load(
        self, backup_ids: Collection[str], cache: RecordCache | None
    ) -> tuple[dict[str, Record], dict[str, UnreadableError]]:
        records = {} if cache is None else self._kept(cache, set(backup_ids))
        unreadable: dict[str, UnreadableError] = {}
        fresh: list[KeptRecord] = []
        for backup_id in backup_ids:
            if backup_id in records:
                continue
            # Before it is read: should it be another file by then, the stamp is not that one's.
            stamp = None if cache is None else self._storage.stamp(record_name(backup_id))
            try:
                records[backup_id], data = self._records.get_with_data(backup_id)
            except ObjectNotFound:
                continue  # deleted since it was listed
            except UNREADABLE as error:
                unreadable[backup_id] = error
                continue
            if cache is not None and stamp is not None:
                fresh.append(KeptRecord(backup_id, stamp, data))
                if len(fresh) == BLOCK_LENGTH_MAX:
                    cache.add(fresh)
                    fresh.clear()
        if cache is not None and len(fresh) >= CACHED_COUNT_MIN:
            cache.add(fresh)
        return records, unreadable

    def _kept(self, cache: RecordCache, backup_ids: set[str]) -> dict[str, Record]:
        """Those of these records that are kept, and have not changed since."""
        records: dict[str, Record] = {}
        useless_count = 0
        for kept in cache.read():
            is_of_use = kept.backup_id in backup_ids and kept.backup_id not in records
            if is_of_use and self._storage.stamp(record_name(kept.backup_id)) == kept.stamp:
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    records[kept.backup_id] = decode_proven(kept.data)
                    continue
            useless_count += 1
        if useless_count > len(records) + USELESS_COUNT_MAX:
            cache.clear()
        return records


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python does not look for garbage meanwhile: of many new objects that all stay it makes its
    rounds again and again, a third of the time. At worst, beside another thread, it does look."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
