"""Records as objects: put one (the commit of a backup), read one, list all, delete one."""

from __future__ import annotations

from collections.abc import Iterator

from backupfs.errors import CorruptObject, InvalidRecord, ObjectNotFound, StorageUnavailable
from backupfs.format.config import RepositoryConfig
from backupfs.format.ids import IdScheme
from backupfs.format.record import (
    RECORD_SIZE_MAX,
    RECORDS_PREFIX,
    Record,
    backup_id_of,
    decode_record,
    encode_record,
    record_name,
)
from backupfs.storage.base import Storage
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import ObjectName

# One record that is damaged, or that the disk cannot read, is not all of them.
UnreadableError = CorruptObject | StorageUnavailable
UNREADABLE = (CorruptObject, StorageUnavailable)


def as_damage(name: ObjectName, error: UnreadableError) -> CorruptObject:
    """Why an object cannot be read, as damage of that object."""
    return CorruptObject(name=name, reason=error.reason)


class RecordStore:
    """The records of one repository."""

    def __init__(self, storage: Storage, ids: IdScheme, config: RepositoryConfig) -> None:
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

    def get(self, backup_id: str) -> Record:
        """Raises: ObjectNotFound, CorruptObject, StorageError."""
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
        return record

    def exists(self, backup_id: str) -> bool:
        """Whether there is a record of that id, readable or not."""
        try:
            self.get(backup_id)
        except ObjectNotFound:
            return False
        except (CorruptObject, StorageUnavailable):
            pass
        return True

    def ids(self) -> set[str]:
        """Ids of the backups whose records exist."""
        return set(self._listed())

    def delete(self, backup_id: str) -> None:
        """Delete a backup; durable on return. Absent already: no error."""
        self._storage.delete(record_name(backup_id))

    def get_all(self) -> tuple[dict[str, Record], dict[ObjectName, UnreadableError]]:
        """Every readable record by id, and by object what is wrong with each of the others."""
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
