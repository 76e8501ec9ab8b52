"""The volumes and backups that exist, in memory, made from the records.

The records are the truth; ``refresh`` takes in what other processes published or deleted. Those
who show the catalogue to someone subscribe and are told of every change.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from backupfs.errors import CorruptObject
from backupfs.format.names import order_of, stamp_of
from backupfs.format.record import RECORDS_PREFIX, Record, backup_id_of, record_name
from backupfs.repository.records import RecordLoader, as_damage
from backupfs.storage.local import LocalStorage

log = logging.getLogger(__name__)

Key = TypeVar("Key", str, tuple[str, str])


@dataclass(frozen=True, slots=True)
class Change:
    """Backups that came and went."""

    added: tuple[Record, ...] = ()
    removed: tuple[Record, ...] = ()


def _order(record: Record) -> tuple[str, int, str]:
    return (*order_of(record.name), record.backup_id)


class Catalogue:
    """All backups of one repository by id, and by volume in order of time. Thread-safe."""

    def __init__(self, loader: RecordLoader, storage: LocalStorage) -> None:
        self._loader = loader
        self._storage = storage
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._by_id: dict[str, Record] = {}
        self._by_volume: dict[str, list[Record]] = {}
        self._by_name: dict[
            tuple[str, str], list[Record]
        ] = {}  # by volume and name; hardly ever two
        self._unreadable: dict[str, CorruptObject] = {}
        self._mark: int | None = None
        self._subscribers: list[Callable[[Change], None]] = []

    def subscribe(self, callback: Callable[[Change], None]) -> None:
        """Have ``callback`` called at each change, in order, by whichever thread made it.

        It must be quick and take no lock that is held while the catalogue is asked.
        """
        self._subscribers.append(callback)

    def refresh(self) -> None:
        """Take in what other processes did. Raises: StorageError."""
        with self._refreshing:  # one after the other, or an older listing would undo a newer one
            self._refresh()

    def _refresh(self) -> None:
        mark = self._storage.change_mark(RECORDS_PREFIX)
        with self._lock:
            if mark is not None and mark == self._mark:
                return
            known = {record_name(backup_id) for backup_id in self._by_id}
        # By name alone, as this is done several times after each change: a name is used once.
        listed = {f"{RECORDS_PREFIX}{name}" for name in self._storage.names(RECORDS_PREFIX)}
        new = {backup_id for name in listed - known if (backup_id := backup_id_of(name))}
        gone = {backup_id for name in known - listed if (backup_id := backup_id_of(name))}
        records, unreadable = self._loader.load(new)
        with self._lock:
            # Published by this process since the listing: neither known then nor listed.
            removed = [self._by_id[backup_id] for backup_id in gone if backup_id in self._by_id]
            added = [record for record in records.values() if record.backup_id not in self._by_id]
            self._insert(added)
            for record in removed:
                self._remove(record)
            for backup_id in unreadable.keys() - self._unreadable.keys():
                log.error("%s", unreadable[backup_id])
            self._unreadable = {
                backup_id: as_damage(record_name(backup_id), error)
                for backup_id, error in unreadable.items()
                if backup_id not in self._by_id
            }
            # One that could not be read may be readable at the next look.
            self._mark = None if self._unreadable else mark
            self._tell(Change(tuple(added), tuple(removed)))

    def current(self, backup_id: str) -> Record | None:
        """The same as ``get``, as the disk has it now; waits for I/O.

        An id may have been used again since the last look, for other content. A record that was known
        and cannot be read now is as it was. Raises: CorruptObject, StorageError.
        """
        with self._refreshing:
            records, unreadable = self._loader.load([backup_id])
            with self._lock:
                before, now = self._by_id.get(backup_id), records.get(backup_id)
                if backup_id in unreadable:
                    if before is None:
                        raise as_damage(record_name(backup_id), unreadable[backup_id])
                    return before
                if now != before:
                    if before is not None:
                        self._remove(before)
                        self._tell(Change(removed=(before,)))
                    if now is not None:
                        self._unreadable.pop(backup_id, None)
                        self._insert([now])
                        self._tell(Change(added=(now,)))
                return now

    def add(self, record: Record) -> None:
        """A backup was published by this process."""
        with self._lock:
            if record.backup_id in self._by_id:
                return
            self._unreadable.pop(record.backup_id, None)
            self._insert([record])
            self._tell(Change(added=(record,)))

    def remove(self, record: Record) -> None:
        """A backup was deleted by this process."""
        with self._lock:
            if record.backup_id not in self._by_id:
                return
            self._remove(self._by_id[record.backup_id])
            self._tell(Change(removed=(record,)))

    def get(self, backup_id: str) -> Record | None:
        with self._lock:
            return self._by_id.get(backup_id)

    def all(self) -> list[Record]:
        """Every backup, by volume, then by time."""
        with self._lock:
            return [
                record for volume in sorted(self._by_volume) for record in self._by_volume[volume]
            ]

    def ids_starting_with(self, prefix: str) -> list[str]:
        with self._lock:
            return [backup_id for backup_id in self._by_id if backup_id.startswith(prefix)]

    def volumes(self) -> list[str]:
        """Names of the volumes that have backups, sorted."""
        with self._lock:
            return sorted(self._by_volume)

    def backups(self, volume: str) -> list[Record]:
        """A volume's backups, oldest first."""
        with self._lock:
            return list(self._by_volume.get(volume, ()))

    def names_of_second(self, volume: str, moment: datetime) -> list[str]:
        """The names of a volume's backups of that second."""
        stamp = stamp_of(moment)
        with self._lock:
            backups = self._by_volume.get(volume, [])
            names = []
            for place in range(
                bisect.bisect_left(backups, (stamp, 0, ""), key=_order), len(backups)
            ):
                if order_of(backups[place].name)[0] != stamp:
                    break
                names.append(backups[place].name)
            return names

    def latest(self, volume: str) -> Record | None:
        with self._lock:
            backups = self._by_volume.get(volume)
            return backups[-1] if backups else None

    def by_name(self, volume: str, name: str) -> Record | None:
        """The backup of ``volume`` whose file is called ``name``."""
        with self._lock:
            named = self._by_name.get((volume, name))
            return named[0] if named else None

    def unreadable(self) -> list[CorruptObject]:
        """What is wrong with records that could not be read."""
        with self._lock:
            return list(self._unreadable.values())

    def _insert(self, records: Sequence[Record]) -> None:
        for record in records:
            self._by_id[record.backup_id] = record
        _put(self._by_volume, [(record.volume, record) for record in records])
        _put(self._by_name, [((record.volume, record.name), record) for record in records])

    def _remove(self, record: Record) -> None:
        del self._by_id[record.backup_id]
        _take(self._by_volume, record.volume, record)
        _take(self._by_name, (record.volume, record.name), record)

    def _tell(self, change: Change) -> None:
        if change.added or change.removed:
            for callback in self._subscribers:
                try:
                    callback(change)
                except Exception:  # the change has happened, whatever those who show it make of it
                    log.exception("a change of the catalogue was not followed")


def _put(table: dict[Key, list[Record]], keyed: Sequence[tuple[Key, Record]]) -> None:
    places: dict[Key, int] = {}
    for key, record in keyed:
        found = table.setdefault(key, [])
        places[key] = places.get(key, 0) + 1
        found.append(record)
    for key, added_count in places.items():
        if added_count == 1:
            found = table[key]
            bisect.insort(found, found.pop(), key=_order)
        else:
            table[key].sort(key=_order)


def _take(table: dict[Key, list[Record]], key: Key, record: Record) -> None:
    records = table[key]
    del records[bisect.bisect_left(records, _order(record), key=_order)]
    if not records:
        del table[key]
