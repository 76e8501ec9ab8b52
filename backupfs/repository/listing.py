"""Which of several copies of a blob the index lists, as one of its transactions sees and decides it.

Of a chunk that one pack holds whole and another as a difference it is the whole one, whichever came
first: so no two differences are ever found to be to each other. A copy that is damaged, or a difference
whose base is absent or damaged, gives way to one that can be read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backupfs.format.blob import DIFFERENCES_MAX
from backupfs.format.pack import PackEntry
from backupfs.types import BLOB_ID_SIZE, BlobId, PackId

KEY_SIZE = 16
LOCATION = struct.Struct("<III")  # pack number, offset, size; the base of a difference follows
LISTED_SIZES = (LOCATION.size, LOCATION.size + BLOB_ID_SIZE)


def listed_value(number: int, entry: PackEntry) -> bytes:
    """What the index keeps of a blob: its place in pack ``number``, and its base."""
    return LOCATION.pack(number, entry.offset, entry.size) + (entry.base or b"")


def base_in(value: bytes) -> BlobId | None:
    """The chunk that the blob listed by ``value`` is a difference to."""
    return BlobId(bytes(value[LOCATION.size :])) if len(value) > LOCATION.size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """Those of the index that say what is listed."""

    blobs: Any  # the first bytes of a blob's id -> its place
    damaged: Any  # whole blob id -> b""
    suspects: Any  # pack id -> b""


class Listing:
    """What is listed, in one transaction; ``known`` are the packs that are there, by number."""

    def __init__(self, transaction: Any, databases: Databases, known: Mapping[int, PackId]) -> None:
        self._transaction = transaction
        self._databases = databases
        self._known = known

    def value(self, blob_id: BlobId) -> bytes | None:
        """Where a blob is listed; None where it counts as absent."""
        value: bytes | None = self._transaction.get(blob_id[:KEY_SIZE], db=self._databases.blobs)
        if value is None or LOCATION.unpack_from(value)[0] not in self._known:
            return None
        return value

    def pack_of(self, blob_id: BlobId) -> PackId | None:
        """The pack that a blob is listed in."""
        value = self.value(blob_id)
        return None if value is None else self._known[LOCATION.unpack_from(value)[0]]

    def is_damaged(self, blob_id: BlobId) -> bool:
        return self._transaction.get(blob_id, db=self._databases.damaged) is not None

    def stands(self, blob_id: BlobId, value: bytes) -> bool:
        """Whether what is listed by ``value`` can be read: neither it nor a base of it is damaged or
        absent."""
        return not self.is_damaged(blob_id) and self.stands_on(value)

    def stands_on(self, value: bytes) -> bool:
        """The same of its bases only."""
        for _ in range(DIFFERENCES_MAX + 1):
            base = base_in(value)
            if base is None:
                return True
            below = self.value(base)
            if below is None or self.is_damaged(base):
                return False
            value = below
        return False

    def to_be_listed(self, entries: Iterable[PackEntry]) -> tuple[list[PackEntry], bool]:
        """Those of a new pack's entries, sorted by id, that count from now on; and whether a
        difference meets another copy of its chunk: either may be the one that can be read."""
        listed: list[PackEntry] = []
        is_in_doubt = False
        for entry in entries:
            if entry.base is not None:
                value = self.value(entry.blob_id)
                if value is not None:
                    is_in_doubt |= base_in(value) != entry.base
                    if base_in(value) is None and not self.is_damaged(entry.blob_id):
                        continue
            if listed and listed[-1].blob_id == entry.blob_id:
                is_in_doubt |= listed[-1].base != entry.base
            listed.append(entry)
        return listed, is_in_doubt

    def fill(self, number: int, entry: PackEntry, *, is_spoilt: bool) -> bool:
        """List the copy in pack ``number``, if it is the better one; whether the blob can be read now.

        ``is_spoilt``: a damaged copy was met in the pack, so it fills in only for what is absent.
        """
        before = self.value(entry.blob_id)
        place = listed_value(number, entry)
        stands = before is not None and self.stands(entry.blob_id, before)
        is_good = not is_spoilt and self.stands_on(place)
        is_whole_at_last = entry.base is None and before is not None and base_in(before) is not None
        if before is None or (is_good and (is_whole_at_last or not stands) and place != before):
            if before is not None:
                self.note_healed([entry])
            self._transaction.put(entry.blob_id[:KEY_SIZE], place, db=self._databases.blobs)
            stands = self.stands(entry.blob_id, place)
        return stands

    def note_healed(self, entries: Iterable[PackEntry]) -> None:
        """These blobs get a new place: what was damaged of them is no more, but for the copy."""
        for entry in entries:
            if self._transaction.delete(entry.blob_id, db=self._databases.damaged):
                pack_id = self.pack_of(entry.blob_id)
                if pack_id is not None:
                    self._transaction.put(pack_id, b"", db=self._databases.suspects)
