"""The index: where each blob lies. A cache on this host, rebuilt from the packs at any time.

LMDB, shared by all processes of the host (see ``index_file``). Keys are the
first 16 bytes of a blob's id (the whole id stands in the blob's header and is checked there);
values name a pack by a number that is never used twice, and of a difference its base. Entries of a
pack that is gone stay behind and count as absent, as their number is no longer known.

Of several copies of a blob one is listed (see ``listing``). It may come to be of no use, by damage, or
as its pack goes, or its base, while another could be read. Whatever may lead to that leaves a mark
(see ``gaps``), by which all packs are gone through once.

Which blobs are damaged, and which packs a damaged copy was met in, survives ``clear``: what was healed
is not to be undone by an index made anew.

Nothing here is synced to the disk: after a crash of the host the index is thrown away and rebuilt.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from backupfs.errors import StorageUnavailable
from backupfs.format.pack import PackEntry
from backupfs.repository.index_file import close_index_file, index_path, open_index_file
from backupfs.repository.listing import (
    KEY_SIZE,
    LISTED_SIZES,
    LOCATION,
    Databases,
    Listing,
    base_in,
    listed_value,
)
from backupfs.repository.mapped import mapped_size, unmap_pages
from backupfs.types import BlobId, PackId

NUMBER = struct.Struct(">I")  # big-endian, so that numbers sort
# What may be mapped of it and of all other files (some 14 MiB are the program) before it is unmapped.
# Below that, which is 45 GiB of unique data, nothing is; beyond, each look-up takes some 4 us more, as
# it maps its pages again, 64 KiB at once.
MAPPED_SIZE_MAX = 96 << 20
LOOKUPS_BETWEEN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLocation:
    """Where a blob lies. Holds: offset + size <= size of the pack without its footer."""

    pack_id: PackId
    offset: int  # bytes from the start of the pack
    size: int  # bytes as stored, with the blob's header
    base: BlobId | None = None  # the chunk that it is a difference to


class Index:
    """The index of one repository. Thread-safe; ``close`` once per ``open``."""

    def __init__(self, folder: Path, environment: Any, users: int) -> None:
        self._folder = folder
        self._environment = environment
        self._users = users  # a descriptor that holds the lock of all who have the index open
        self._blobs = environment.open_db(b"blobs")
        self._packs = environment.open_db(b"packs")  # number -> pack id
        self._numbers = environment.open_db(b"numbers")  # pack id -> number
        self._damaged = environment.open_db(b"damaged")  # whole blob id -> b""
        self._suspects = environment.open_db(b"suspects")  # pack id -> b""
        self._spoilt = environment.open_db(
            b"spoilt"
        )  # pack id -> b"": a damaged copy was met in it
        self._fleeting = environment.open_db(b"fleeting")  # pack id -> b"": see ``note_fleeting``
        self._meta = environment.open_db(b"meta")
        self._listed = Databases(blobs=self._blobs, damaged=self._damaged, suspects=self._suspects)
        self.lookup_count = 0  # blobs asked for by this process, for who measures
        self._lock = threading.Lock()
        self._generation = -1
        self._pack_ids: dict[int, PackId] = {}

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Open or make the index in ``folder``, a folder of this host.

        Raises:
            StorageUnavailable: the folder cannot be used.
        """
        return _open_shared(folder)

    def close(self) -> None:
        """Give the index up; the last holder in this process closes it."""
        _close_shared(self)

    def find_many(self, blob_ids: Sequence[BlobId]) -> list[BlobLocation | None]:
        """Where each blob lies, or None; in order."""
        return self._find(blob_ids, with_damaged=True)

    def find_usable(self, blob_ids: Sequence[BlobId]) -> list[BlobLocation | None]:
        """The same for who means to rely on it: None also where a blob is marked as damaged, or lies in
        a pack of which nobody can say that it stays."""
        return self._find(blob_ids, with_damaged=False)

    def _find(self, blob_ids: Sequence[BlobId], *, with_damaged: bool) -> list[BlobLocation | None]:
        self._count_lookups(len(blob_ids))
        with self._reading() as transaction:
            pack_ids = self._known_packs(transaction)
            found = [transaction.get(blob_id[:KEY_SIZE], db=self._blobs) for blob_id in blob_ids]
            if not with_damaged and transaction.stat(self._damaged)["entries"]:
                for place, blob_id in enumerate(blob_ids):
                    if transaction.get(blob_id, db=self._damaged) is not None:
                        found[place] = None
            fleeting = set() if with_damaged else self._fleeting_packs(transaction)
        locations: list[BlobLocation | None] = []
        for value in found:
            location = None
            if value is not None and len(value) in LISTED_SIZES:
                number, offset, size = LOCATION.unpack_from(value)
                pack_id = pack_ids.get(number)
                if pack_id is not None and pack_id not in fleeting:
                    location = BlobLocation(
                        pack_id=pack_id, offset=offset, size=size, base=base_in(value)
                    )
            locations.append(location)
        return locations

    def unusable(self, blob_ids: Iterable[BlobId]) -> set[BlobId]:
        """Those that ``find_usable`` keeps back: they are named here, and nobody may rely on them."""
        with self._reading() as transaction:
            has_damaged = transaction.stat(self._damaged)["entries"]
            fleeting = self._fleeting_packs(transaction)
            if not has_damaged and not fleeting:
                return set()
            listing = self._listing(transaction)
            return {
                blob_id
                for blob_id in blob_ids
                if listing.is_damaged(blob_id) or listing.pack_of(blob_id) in fleeting
            }

    def find_packed(self, blob_ids: Sequence[BlobId]) -> list[bytes | None]:
        """The same as it is stored, a ``LOCATION`` each, at a quarter of the cost; None for a
        difference too."""
        self._count_lookups(len(blob_ids))
        with self._reading() as transaction:
            self._known_packs(transaction)
            get, blobs = transaction.get, self._blobs
            values = [get(blob_id[:KEY_SIZE], None, blobs) for blob_id in blob_ids]
        return [
            value if value is not None and len(value) == LOCATION.size else None for value in values
        ]

    def known_pack(self, number: int) -> PackId | None:
        """The pack that a ``LOCATION`` names, as of the last look-up of this process. Never waits."""
        return self._pack_ids.get(number)

    def find(self, blob_id: BlobId) -> BlobLocation | None:
        """Where a blob lies, or None."""
        return self.find_many([blob_id])[0]

    def add_pack(self, pack_id: PackId, entries: Iterable[PackEntry]) -> None:
        """Take in a durable pack; of a blob known elsewhere the new place counts from now on, but for
        a difference where the whole chunk is known. A difference to something else leaves gaps."""
        # Of two copies in one pack the later one counts.
        ordered = sorted(entries, key=lambda entry: (entry.blob_id, entry.base is None))
        with self._writing() as transaction:
            if transaction.get(pack_id, db=self._numbers) is not None:
                return
            number = self._next_number(transaction)
            transaction.put(NUMBER.pack(number), pack_id, db=self._packs)
            transaction.put(pack_id, NUMBER.pack(number), db=self._numbers)
            listing = self._listing(transaction)
            listed, is_in_doubt = listing.to_be_listed(ordered)
            is_spoilt = transaction.get(pack_id, db=self._spoilt) is not None
            if is_spoilt or transaction.get(pack_id, db=self._fleeting) is not None:
                listed = [entry for entry in listed if listing.value(entry.blob_id) is None]
            elif transaction.stat(self._damaged)["entries"]:
                listing.note_healed(listed)
            transaction.cursor(db=self._blobs).putmulti(
                [(entry.blob_id[:KEY_SIZE], listed_value(number, entry)) for entry in listed]
            )
            generation = self._bump_generation(transaction)
            if is_in_doubt:
                transaction.put(b"gaps", generation, db=self._meta)
        self._limit_mapped()

    def _count_lookups(self, count: int) -> None:
        with self._lock:
            before = self.lookup_count
            self.lookup_count += count
            is_due = before // LOOKUPS_BETWEEN != self.lookup_count // LOOKUPS_BETWEEN
        if is_due:
            self._limit_mapped()

    def _limit_mapped(self) -> None:
        """Have the pages that were looked at not count as this process's memory for ever."""
        if mapped_size() > MAPPED_SIZE_MAX:
            unmap_pages(index_path(self._folder))

    def forget_packs(self, pack_ids: Iterable[PackId], *, leaves_gaps: bool = False) -> None:
        """Take packs out that are gone; what lay in them counts as absent.

        ``leaves_gaps``: packs that stay may hold copies of it; see ``gaps``.
        """
        pack_ids = list(pack_ids)
        if not pack_ids:
            return
        with self._writing() as transaction:
            for pack_id in pack_ids:
                number = transaction.pop(pack_id, db=self._numbers)
                if number is not None:
                    transaction.delete(number, db=self._packs)
                transaction.delete(pack_id, db=self._suspects)
                transaction.delete(pack_id, db=self._spoilt)
                transaction.delete(pack_id, db=self._fleeting)
            generation = self._bump_generation(transaction)
            if leaves_gaps:
                transaction.put(b"gaps", generation, db=self._meta)

    def note_fleeting(self, asked: Set[PackId], fleeting: Set[PackId]) -> None:
        """Of the packs ``asked`` for, those in ``fleeting`` are there, but may be gone after a power
        cut: their names could not be made durable. They can be read, and nobody relies on them."""
        if not fleeting and not self.fleeting() & asked:
            return
        with self._writing() as transaction:
            for pack_id in asked - fleeting:
                transaction.delete(pack_id, db=self._fleeting)
            for pack_id in fleeting:
                transaction.put(pack_id, b"", db=self._fleeting)

    def fleeting(self) -> set[PackId]:
        """Packs of which nobody can say that they stay; empty but for bad luck."""
        with self._reading() as transaction:
            return self._fleeting_packs(transaction)

    def _fleeting_packs(self, transaction: Any) -> set[PackId]:
        if not transaction.stat(self._fleeting)["entries"]:
            return set()
        with transaction.cursor(db=self._fleeting) as cursor:
            return {PackId(bytes(pack_id)) for pack_id in cursor.iternext(values=False)}

    def gaps(self) -> bytes | None:
        """None, or a mark that blobs may count as absent, or be listed where they cannot be read, of
        which some pack has a good copy."""
        with self._reading() as transaction:
            mark: bytes | None = transaction.get(b"gaps", db=self._meta)
            return mark

    def fill_gaps(self, pack_id: PackId, entries: Iterable[PackEntry]) -> list[PackEntry]:
        """Take in those blobs of a known pack that count as absent, are damaged, or are differences with
        a base that is absent or damaged, where the pack's copy is better.

        Returns those that still cannot be read: to be tried again when their bases are listed.
        """
        waiting = []
        with self._writing() as transaction:
            number = transaction.get(pack_id, db=self._numbers)
            if number is None:
                return []
            listing = self._listing(transaction)
            is_spoilt = transaction.get(pack_id, db=self._spoilt) is not None
            for entry in entries:
                if not listing.fill(NUMBER.unpack(number)[0], entry, is_spoilt=is_spoilt):
                    waiting.append(entry)
        return waiting

    def close_gaps(self, mark: bytes) -> None:
        """All packs were gone through since ``gaps`` gave ``mark``."""
        with self._writing() as transaction:
            if transaction.get(b"gaps", db=self._meta) == mark:
                transaction.delete(b"gaps", db=self._meta)

    def pack_ids(self) -> set[PackId]:
        """The packs taken in and not forgotten."""
        with self._reading() as transaction:
            return set(self._known_packs(transaction).values())

    def mark_damaged(self, blob_ids: Iterable[BlobId]) -> None:
        """Remember that these blobs cannot be read, so that the next writer stores them again.

        Another pack may hold a copy, of them or of what is a difference to them: this leaves gaps.
        """
        new = [blob_id for blob_id in blob_ids if not self.is_damaged(blob_id)]
        if not new:
            return
        with self._writing() as transaction:
            listing = self._listing(transaction)
            for blob_id in new:
                transaction.put(blob_id, b"", db=self._damaged)
                pack_id = listing.pack_of(blob_id)
                if pack_id is not None:
                    transaction.put(pack_id, b"", db=self._spoilt)
            transaction.put(b"gaps", self._bump_generation(transaction), db=self._meta)

    def is_damaged(self, blob_id: BlobId) -> bool:
        """Whether a blob is marked as damaged."""
        with self._reading() as transaction:
            return transaction.get(blob_id, db=self._damaged) is not None

    def damaged(self) -> frozenset[BlobId]:
        """The blobs marked as damaged and not stored again since; empty but for bad luck."""
        with self._reading() as transaction:
            if not transaction.stat(self._damaged)["entries"]:
                return frozenset()
            with transaction.cursor(db=self._damaged) as cursor:
                return frozenset(BlobId(bytes(key)) for key in cursor.iternext(values=False))

    def suspects(self) -> set[PackId]:
        """Packs with a damaged copy of a blob that is whole in another pack."""
        with (
            self._reading() as transaction,
            transaction.cursor(db=self._suspects) as cursor,
        ):
            return {PackId(bytes(pack_id)) for pack_id in cursor.iternext(values=False)}

    def entry_count(self) -> int:
        """Blobs listed, those of packs that are gone among them."""
        with self._reading() as transaction:
            return int(transaction.stat(self._blobs)["entries"])

    def clear(self) -> None:
        """Forget all that packs say, which are the truth; not what was found of damage in them."""
        with self._writing() as transaction:
            for database in self._databases():
                transaction.drop(database, delete=False)
            self._bump_generation(transaction)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        """A transaction that reads. Raises: StorageUnavailable."""
        try:
            with self._environment.begin() as transaction:
                yield transaction
        except (lmdb.Error, struct.error) as error:
            reason = f"index in {str(self._folder)!r}: {error} (it is a cache: remove it)"
            raise StorageUnavailable(reason=reason) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that writes. Raises: StorageUnavailable."""
        try:
            with self._environment.begin(write=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise StorageUnavailable(reason=f"index in {str(self._folder)!r}: {error}") from error

    def _known_packs(self, transaction: Any) -> dict[int, PackId]:
        """Number -> pack id as of ``transaction``; read again only when it has changed."""
        generation = int(transaction.get(b"generation", b"0", db=self._meta))
        with self._lock:
            if generation != self._generation:
                with transaction.cursor(db=self._packs) as cursor:
                    self._pack_ids = {
                        NUMBER.unpack(number)[0]: PackId(bytes(pack_id))
                        for number, pack_id in cursor
                    }
                self._generation = generation
            return self._pack_ids

    def _listing(self, transaction: Any) -> Listing:
        return Listing(transaction, self._listed, self._known_packs(transaction))

    def _databases(self) -> tuple[Any, ...]:
        """All but what must survive ``clear``."""
        return (self._blobs, self._packs, self._numbers)

    def _next_number(self, transaction: Any) -> int:
        number = int(transaction.get(b"next_number", b"1", db=self._meta))
        transaction.put(b"next_number", str(number + 1).encode(), db=self._meta)
        return number

    def _bump_generation(self, transaction: Any) -> bytes:
        generation = int(transaction.get(b"generation", b"0", db=self._meta)) + 1
        encoded = str(generation).encode()
        transaction.put(b"generation", encoded, db=self._meta)
        return encoded


# One environment per folder and process: the library forbids a second.
_shared: dict[Path, tuple[Index, int]] = {}
_shared_lock = threading.Lock()


def _open_shared(folder: Path) -> Index:
    with _shared_lock:
        index, holders = _shared.get(folder, (None, 0))
        if index is None:
            index = Index(folder, *open_index_file(folder))
        _shared[folder] = (index, holders + 1)
        return index


def _close_shared(index: Index) -> None:
    with _shared_lock:
        _, holders = _shared[index._folder]
        if holders > 1:
            _shared[index._folder] = (index, holders - 1)
            return
        del _shared[index._folder]
        close_index_file(index._folder, index._environment, index._users)
