"""Reads blobs and proves them: locate, fetch, decompress, hash again, compare with the id.

Nothing leaves here unproven. What was proven is kept in two small caches, of chunks and of nodes.
Neighbours in a pack are fetched in one ranged read. A difference is read after its base.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from backupfs.errors import (
    CorruptBlob,
    DamageError,
    MissingBlob,
    ObjectNotFound,
    StorageUnavailable,
)
from backupfs.format import blob as blob_format
from backupfs.format.blob import DIFFERENCES_MAX, LEVEL_MAX, FindBase
from backupfs.format.ids import IdScheme
from backupfs.format.pack import PackEntry, pack_name
from backupfs.format.tree import HOLE_NODE
from backupfs.repository.avoided import Avoided
from backupfs.repository.byte_cache import ByteCache
from backupfs.repository.index import BlobLocation
from backupfs.repository.packer import Packer
from backupfs.storage.base import Storage
from backupfs.types import HOLE, BlobId, PackId

log = logging.getLogger(__name__)

CHUNK_CACHE_SIZE = 32 << 20
NODE_CACHE_COUNT = 2048  # of 4 KiB
RANGE_SIZE_MAX = 4 << 20  # bytes fetched in one read
GAP_SIZE_MAX = 32 << 10  # bytes between two blobs that are read along rather than asked around
PLACES_MAX = 4  # where one blob is looked for before it counts as damaged: gc may move it again


class Refresh(Protocol):
    """Brings the index in line with the packs. With ``is_known``, of damage met before, it may
    spare itself the work where that was done a moment ago."""

    def __call__(self, *, is_known: bool) -> None: ...


class Locator(Protocol):
    """Where blobs lie, as far as a reader asks; see ``Index``."""

    def find(self, blob_id: BlobId) -> BlobLocation | None: ...
    def find_many(self, blob_ids: Sequence[BlobId]) -> list[BlobLocation | None]: ...
    def is_damaged(self, blob_id: BlobId) -> bool: ...
    def mark_damaged(self, blob_ids: Iterable[BlobId]) -> None: ...
    def damaged(self) -> frozenset[BlobId]: ...


class BlobReader:
    """Proven plain bytes by blob id. Thread-safe."""

    def __init__(
        self,
        *,
        storage: Storage,
        ids: IdScheme,
        index: Locator,
        chunk_size: int,
        avoided: Avoided,
        refresh: Refresh,
    ) -> None:
        self._storage = storage
        self._ids = ids
        self._index = index
        self._packer: Packer | None = None
        self._avoided = avoided
        self._refresh = refresh
        self.zeros = bytes(chunk_size)
        self._chunks = ByteCache(max(1, CHUNK_CACHE_SIZE // chunk_size))
        self._nodes = ByteCache(NODE_CACHE_COUNT)

    def attach(self, packer: Packer) -> None:
        """Also read what this process is writing."""
        self._packer = packer

    def node(self, blob_id: BlobId, level: int) -> bytes:
        """A node's bytes. Raises: DamageError, StorageError."""
        if blob_id == HOLE:
            return HOLE_NODE
        data = self._nodes.get(node_key(blob_id, level))
        if data is None:
            data = self._fetch([blob_id], level)[0]
            self._nodes.put(node_key(blob_id, level), data)
        return data

    def nodes(self, blob_ids: Sequence[BlobId], level: int) -> list[bytes]:
        """Nodes of one level, in order; neighbours in a pack are read at once.

        Raises: DamageError, StorageError; the first of them for all.
        """
        found = {blob_id: self.cached_node(blob_id, level) for blob_id in blob_ids}
        missing = [blob_id for blob_id, data in found.items() if data is None]
        for blob_id, fetched in zip(missing, self._fetch(missing, level), strict=True):
            self._nodes.put(node_key(blob_id, level), fetched)
            found[blob_id] = fetched
        return [data for blob_id in blob_ids if (data := found[blob_id]) is not None]

    def cached_node(self, blob_id: BlobId, level: int) -> bytes | None:
        """A node's bytes if they are in memory."""
        return HOLE_NODE if blob_id == HOLE else self._nodes.get(node_key(blob_id, level))

    def keep_node(self, blob_id: BlobId, level: int, data: bytes) -> None:
        """Put a node just written into the cache."""
        self._nodes.put(node_key(blob_id, level), data)

    def chunks(self, blob_ids: Sequence[BlobId]) -> list[bytes]:
        """The chunks of ``blob_ids``, in order; holes are zeros.

        Raises:
            DamageError: one of them cannot be proven; StorageError: or not be fetched.
        """
        found: list[bytes | None] = [self.cached_chunk(blob_id) for blob_id in blob_ids]
        missing = list(
            dict.fromkeys(
                blob_id for blob_id, data in zip(blob_ids, found, strict=True) if data is None
            )
        )
        if not missing:
            return [data for data in found if data is not None]
        fetched = dict(zip(missing, self._fetch(missing, 0), strict=True))
        for blob_id, data in fetched.items():
            self._chunks.put(blob_id, data)
        return [
            fetched[blob_id] if data is None else data
            for blob_id, data in zip(blob_ids, found, strict=True)
        ]

    def each_chunk(self, blob_ids: Iterable[BlobId]) -> Iterator[tuple[BlobId, bytes]]:
        """Each chunk once, in no order and past the cache; no holes.

        Raises: as ``chunks``.
        """
        yield from self._fetch_each(list(set(blob_ids) - {HOLE}), 0, DIFFERENCES_MAX)

    def locate(self, blob_ids: Iterable[BlobId]) -> dict[BlobId, BlobLocation] | None:
        """Where these chunks lie, and what they differ from; None where one is in no known pack, or
        where more differences follow each other than are read."""
        places: dict[BlobId, BlobLocation] = {}
        wanted = set(blob_ids) - {HOLE}
        for _ in range(DIFFERENCES_MAX + 1):
            for blob_id, place in zip(wanted, self._index.find_many(list(wanted)), strict=True):
                if place is None:
                    return None
                places[blob_id] = place
            wanted = {place.base for place in places.values() if place.base} - places.keys()
        return None if wanted else places

    def cached_chunk(self, blob_id: BlobId) -> bytes | None:
        """A chunk if it is in memory; never waits."""
        return self.zeros if blob_id == HOLE else self._chunks.get(blob_id)

    def keep_chunk(self, blob_id: BlobId, data: bytes) -> None:
        """Put a chunk that was proven elsewhere into the cache."""
        self._chunks.put(blob_id, data)

    def raw_at(self, pack_id: PackId, entry: PackEntry) -> bytes:
        """Header and payload of the blob that ``entry`` lists, proven past all caches.

        Raises: DamageError, StorageError.
        """
        location = BlobLocation(
            pack_id=pack_id, offset=entry.offset, size=entry.size, base=entry.base
        )
        try:
            data = self._storage.get_range(pack_name(pack_id), entry.offset, entry.size)
        except ObjectNotFound:
            raise MissingBlob(blob_id=entry.blob_id.hex()) from None
        self._prove(data, entry.blob_id, entry.level, location, self.base)
        return data

    def base(self, blob_id: BlobId) -> bytes:
        """The bytes of a chunk that another one is a difference to, for ``blob_format.decode``.

        Raises: BadBlobError (it cannot be read either), StorageError.
        """
        return self._base(blob_id, DIFFERENCES_MAX)

    def _base(self, blob_id: BlobId, differences_max: int) -> bytes:
        data = self.cached_chunk(blob_id)
        if data is None:
            if not differences_max:
                raise blob_format.BadBlobError("a difference to a difference, and so on")
            try:
                data = self._fetch([blob_id], 0, differences_max - 1)[0]
            except DamageError as error:
                reason = f"the chunk that it differs from cannot be read: {error}"
                raise blob_format.BadBlobError(reason) from error
            self._chunks.put(blob_id, data)
        return data

    def note_damage(self, blob_ids: Iterable[BlobId]) -> None:
        """Blobs that cannot be read: no writer relies on them, and no cache hides it."""
        blob_ids = list(blob_ids)
        for blob_id in blob_ids:
            self._chunks.drop(blob_id)
            for level in range(1, LEVEL_MAX + 1):
                self._nodes.drop(node_key(blob_id, level))
        try:
            self._index.mark_damaged(blob_ids)
            self._avoided.blobs = self._index.damaged()
        except StorageUnavailable as error:  # this process knows, at least
            log.warning("%s", error)
            self._avoided.blobs |= frozenset(blob_ids)

    def _fetch(
        self, blob_ids: list[BlobId], level: int, differences_max: int = DIFFERENCES_MAX
    ) -> list[bytes]:
        """Plain bytes of each blob, proven, in order."""
        results = dict(self._fetch_each(blob_ids, level, differences_max))
        return [results[blob_id] for blob_id in blob_ids]

    def _fetch_each(
        self, blob_ids: list[BlobId], level: int, differences_max: int
    ) -> Iterator[tuple[BlobId, bytes]]:
        """The same one after the other, in the order in which they lie."""
        located: list[tuple[BlobLocation, BlobId]] = []
        locations = self._index.find_many(blob_ids)
        find_base = self._fetch_bases(locations, differences_max)
        for blob_id, location in zip(blob_ids, locations, strict=True):
            # Pending first: the index may still name an older, damaged copy.
            data = self._packer.read_pending(blob_id) if self._packer else None
            if data is not None:
                yield blob_id, self._prove(data, blob_id, level, None, find_base)
            elif location is not None:
                located.append((location, blob_id))
            else:
                yield blob_id, self._fetch_again(blob_id, level, None, None, find_base)
        for run in _runs(located):
            yield from self._fetch_run(run, level, find_base)

    def _fetch_bases(
        self, locations: Sequence[BlobLocation | None], differences_max: int
    ) -> FindBase:
        """Bring what the blobs there differ from into the cache, in one go; who gives it out."""
        bases = {place.base for place in locations if place is not None and place.base is not None}
        missing = [blob_id for blob_id in bases if self.cached_chunk(blob_id) is None]
        if len(missing) > 1 and differences_max:
            with contextlib.suppress(DamageError):  # each is tried by itself then
                fetched = self._fetch(missing, 0, differences_max - 1)
                for blob_id, data in zip(missing, fetched, strict=True):
                    self._chunks.put(blob_id, data)
        return partial(self._base, differences_max=differences_max)

    def _fetch_run(
        self, run: list[tuple[BlobLocation, BlobId]], level: int, find_base: FindBase
    ) -> Iterator[tuple[BlobId, bytes]]:
        first, last = run[0][0], run[-1][0]
        size = last.offset + last.size - first.offset
        try:
            data = memoryview(self._storage.get_range(pack_name(first.pack_id), first.offset, size))
        except ObjectNotFound:
            data = memoryview(b"")
        for location, blob_id in run:
            start = location.offset - first.offset
            piece = data[start : start + location.size]
            try:
                plain = self._prove(piece, blob_id, level, location, find_base)
            except CorruptBlob as damage:
                plain = self._fetch_again(blob_id, level, location, damage, find_base)
            yield blob_id, plain

    def _fetch_again(
        self,
        blob_id: BlobId,
        level: int,
        tried: BlobLocation | None,
        damage: CorruptBlob | None,
        find_base: FindBase,
    ) -> bytes:
        """A blob that is not, or not whole, where it was looked for (None: nowhere known).

        gc may have moved it since, or it lies in a pack of another process that was not taken in
        yet. Only what is in neither case is damage.
        """
        was_absent = False
        for _ in range(PLACES_MAX):
            # Pending before index: what is pending no longer is in the index already.
            data = self._packer.read_pending(blob_id) if self._packer else None
            if data is not None:
                return self._prove(data, blob_id, level, None, find_base)
            location = self._index.find(blob_id)
            if location is None or location == tried:
                is_known = self._index.is_damaged(blob_id)
                self._refresh(is_known=is_known)
                location = self._index.find(blob_id)
                if location is not None and location == tried:
                    self.note_damage([blob_id])
                    self._refresh(is_known=is_known)  # which may find another copy now
                    location = self._index.find(blob_id)
            if location is None and not was_absent:
                # While gc moved it, the listing may have had neither its old pack nor its new one.
                was_absent = True
                continue
            if location is None:
                damage = None
                break
            if location == tried:
                break
            tried = location
            try:
                data = self._read_at(location)
                return self._prove(data, blob_id, level, location, find_base)
            except CorruptBlob as error:
                damage = error
        self.note_damage([blob_id])
        raise damage or MissingBlob(blob_id=blob_id.hex())

    def _read_at(self, location: BlobLocation) -> bytes:
        """The bytes of a location; none where its pack is gone, which no proof passes."""
        try:
            name = pack_name(location.pack_id)
            return self._storage.get_range(name, location.offset, location.size)
        except ObjectNotFound:
            return b""

    def _prove(
        self,
        data: bytes | memoryview,
        blob_id: BlobId,
        level: int,
        location: BlobLocation | None,
        find_base: FindBase,
    ) -> bytes:
        try:
            plain = blob_format.decode(
                data, expected=blob_id, level=level, ids=self._ids, find_base=find_base
            )
            if location is not None:
                blob_format.check_listed_base(data, location.base)
            if level == 0 and len(plain) != len(self.zeros):
                raise blob_format.BadBlobError("a chunk of another size")
            return plain
        except blob_format.BadBlobError as error:
            if self._is_of_another_level(data, blob_id, level, find_base):
                raise MissingBlob(blob_id=blob_id.hex()) from error
            raise CorruptBlob(
                blob_id=blob_id.hex(),
                pack_id=location.pack_id.hex() if location else "still open",
                offset=location.offset if location else 0,
                reason=str(error),
            ) from error

    def _is_of_another_level(
        self, data: bytes | memoryview, blob_id: BlobId, level: int, find_base: FindBase
    ) -> bool:
        """Whether a whole blob was asked for as what it is not, as forged trees do: no two levels
        have an id in common, so it is not damaged, and there is no such blob as was asked for."""
        try:
            header = blob_format.unpack_header(data)
            if header.level != level:
                blob_format.decode(
                    data,
                    expected=blob_id,
                    level=header.level,
                    ids=self._ids,
                    find_base=find_base,
                )
                return True
        except blob_format.BadBlobError:
            pass
        return False


def node_key(blob_id: BlobId, level: int) -> bytes:
    """What tells a node from one with the same id at another level: only one of them exists, and a
    forged tree may ask for the other."""
    return blob_id + bytes((level,))


def _runs(
    located: list[tuple[BlobLocation, BlobId]],
) -> list[list[tuple[BlobLocation, BlobId]]]:
    """Groups of blobs that one ranged read of one pack brings in."""
    located.sort(key=lambda item: (item[0].pack_id, item[0].offset))
    runs: list[list[tuple[BlobLocation, BlobId]]] = []
    for location, blob_id in located:
        if runs and _joins(runs[-1], location):
            runs[-1].append((location, blob_id))
        else:
            runs.append([(location, blob_id)])
    return runs


def _joins(run: list[tuple[BlobLocation, BlobId]], location: BlobLocation) -> bool:
    first, last = run[0][0], run[-1][0]
    return (
        location.pack_id == last.pack_id
        and location.offset - (last.offset + last.size) <= GAP_SIZE_MAX
        and location.offset + location.size - first.offset <= RANGE_SIZE_MAX
    )
