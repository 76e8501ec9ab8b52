"""Marking: which blobs a set of roots reaches, and where they lie. A difference reaches its base.

Memory is bounded by four bytes for each blob reached and one small entry for each node: what is
kept of a blob is its offset in its pack.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from backupfs.errors import CorruptObject
from backupfs.format.blob import DIFFERENCES_MAX
from backupfs.format.draft_state import STATE_SIZE_MAX, decode_draft_state
from backupfs.format.ids import IdScheme
from backupfs.repository.blobs import BlobReader, node_key
from backupfs.repository.images import OnDamage, Root, walk
from backupfs.repository.index import BlobLocation, Index
from backupfs.storage.oserrors import translated
from backupfs.types import HOLE, BlobId, PackId

COMPACT_COUNT_MIN = 1 << 14
LOOKS = 2
DRAFTS = "drafts"
DRAFT_SUFFIX = ".msgpack"


class Reached:
    """Where the blobs lie that were reached: offsets by pack."""

    def __init__(self) -> None:
        self._offsets: dict[PackId, array[int]] = {}
        self._compacted: dict[PackId, int] = {}
        self.missing: set[BlobId] = set()  # reached, but listed in no pack

    def add(self, pack_id: PackId, offset: int) -> None:
        offsets = self._offsets.get(pack_id)
        if offsets is None:
            offsets = self._offsets[pack_id] = array("I")
        offsets.append(offset)
        # Images share most blobs, so the same offsets come again and again.
        if len(offsets) > 2 * self._compacted.get(pack_id, 0) + COMPACT_COUNT_MIN:
            self._offsets[pack_id] = array("I", sorted(set(offsets)))
            self._compacted[pack_id] = len(self._offsets[pack_id])

    def offsets(self, pack_id: PackId) -> set[int]:
        """Offsets of the blobs reached in a pack; empty where there are none."""
        return set(self._offsets.get(pack_id, ()))

    def packs(self) -> set[PackId]:
        return set(self._offsets)


class Marker:
    """Marks from roots; what several roots share is walked once."""

    def __init__(self, reader: BlobReader, index: Index) -> None:
        self._reader = reader
        self._index = index
        self._entered: set[bytes] = set()
        self.reached = Reached()

    def mark(self, roots: Iterable[Root], on_damage: OnDamage | None = None) -> None:
        """Mark all that ``roots`` reach.

        Raises:
            DamageError: a node cannot be read, so what lies below it is unknown; with
                ``on_damage`` that is told instead (see ``images.walk``).
            StorageError
        """
        for root in roots:
            for _first, ids in walk(self._reader, root, enter=self._enter, on_damage=on_damage):
                self._locate([blob_id for blob_id in ids if blob_id != HOLE])

    def look_again(self, refresh: Callable[[], object]) -> None:
        """Look for what is missing once more, and again, after ``refresh``; what is missing then is in
        no pack. It may be new, of another host's, and while a gc moves blobs a listing may have
        neither the pack they were in nor the one they are in."""
        for _ in range(LOOKS):
            missing = self.reached.missing
            if not missing:
                return
            refresh()
            self.reached.missing = set()
            self._locate(sorted(missing))

    def _enter(self, blob_id: BlobId, level: int) -> bool:
        # With its level: a forged tree that has it in another place must not hide what it reaches.
        key = node_key(blob_id, level)[16:]
        if key in self._entered:
            return False
        self._entered.add(key)
        self._locate([blob_id])
        return True

    def _locate(self, blob_ids: Sequence[BlobId]) -> None:
        for blob_id, location in with_bases(self._index, blob_ids):
            if location is None:
                self.reached.missing.add(blob_id)
            else:
                self.reached.add(location.pack_id, location.offset)


def with_bases(
    index: Index, blob_ids: Sequence[BlobId]
) -> Iterator[tuple[BlobId, BlobLocation | None]]:
    """Where blobs lie, and then where those lie that they are differences to."""
    for _ in range(DIFFERENCES_MAX + 1):
        found = list(zip(blob_ids, index.find_many(blob_ids), strict=True))
        yield from found
        bases = {place.base for _, place in found if place is not None and place.base is not None}
        if not bases:
            return
        blob_ids = list(bases)


def draft_roots(folder: Path, ids: IdScheme, *, chunk_size: int) -> set[Root]:
    """Roots of all drafts kept in the repository's folder, whichever host keeps them.

    Raises:
        CorruptObject: a draft's state cannot be read, so what it reaches is unknown.
    """
    roots = set()
    with translated():
        for path in sorted((folder / DRAFTS).glob(f"*/*{DRAFT_SUFFIX}")):
            try:
                with path.open("rb") as file:
                    data = file.read(STATE_SIZE_MAX + 1)
            except FileNotFoundError:
                continue  # removed since it was listed
            name = str(path.relative_to(folder))
            if len(data) > STATE_SIZE_MAX:
                raise CorruptObject(name=name, reason="it is too large")
            state = decode_draft_state(data, name, ids, chunk_size=chunk_size)
            roots.add(Root(state.root, state.height))
    return roots
