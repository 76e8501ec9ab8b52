"""Turns plain chunks and nodes into ids, storing what the repository does not have yet.

A batch of about 1 MiB at a time: zero test, hash, one look-up for the whole batch, one compression
call for what is new, one hand-over to the packer. What is new but much like what lay at its place
before is stored as its difference. Never relies on a condemned pack (gc may delete it) nor on a
blob known to be damaged (storing it again heals it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from backupfs.errors import BackupfsError, StorageUnavailable
from backupfs.format.blob import DIFFERENCES_MAX, BlobEncoder
from backupfs.format.ids import IdScheme
from backupfs.repository.avoided import Avoided
from backupfs.repository.blobs import BlobReader
from backupfs.repository.differences import Differences
from backupfs.repository.index import BlobLocation, Index
from backupfs.repository.packer import NewBlob, Packer
from backupfs.repository.workers import Share
from backupfs.types import HOLE, BlobId, Buffer

BATCH_SIZE = 1 << 20  # bytes of plain data in one batch
# Changed nodes that all images being written may hold in memory, 4 KiB each.
CHANGED_NODES_MAX = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """What became of one batch."""

    ids: list[BlobId]  # of each piece, in order
    added_size: int  # bytes that the repository grew by


# Ids of what lay before where these chunks of a batch lie, by their numbers; holes where nothing did.
FindEarlier = Callable[[Sequence[int]], Sequence[BlobId]]


class ChunkStore:
    """Stores chunks and nodes of one repository. Thread-safe."""

    def __init__(
        self,
        *,
        ids: IdScheme,
        index: Index,
        packer: Packer,
        chunk_size: int,
        compression_level: int,
        avoided: Avoided,
        reader: BlobReader,
        with_differences: bool,
    ) -> None:
        self.chunk_size = chunk_size
        self.batch_count = max(1, BATCH_SIZE // chunk_size)
        self.node_share = Share(CHANGED_NODES_MAX)
        self._ids = ids
        self._index = index
        self._packer = packer
        self._encoder = BlobEncoder(compression_level=compression_level)
        self._zeros = bytes(chunk_size)
        self._avoided = avoided
        self._differences = (
            Differences(encoder=self._encoder, reader=reader, find_usable=self._find_usable)
            if with_differences
            else None
        )

    @property
    def failures(self) -> int:
        """See ``Packer.failures``."""
        return self._packer.failures

    def store_chunks(
        self, chunks: Sequence[Buffer], *, find_earlier: FindEarlier | None = None
    ) -> StoredBatch:
        """Ids of whole chunks, new ones handed to the packer; durable after ``seal``.

        ``find_earlier`` is asked only where something is new. Waits while the packer is full.
        Raises: StorageError, and what ``find_earlier`` does.
        """
        ids = [self._chunk_id(chunk) for chunk in chunks]
        return self._store(chunks, ids, level=0, find_earlier=find_earlier)

    def store_nodes(self, nodes: Sequence[bytes], *, level: int) -> StoredBatch:
        """The same for nodes of one level."""
        ids = [self._ids.node_id(node, level=level) for node in nodes]
        return self._store(nodes, ids, level=level)

    def seal(self, *, since: int) -> None:
        """Wait until all that was stored before is durable. Raises: StorageError."""
        self._packer.seal(since=since)

    def check(self, *, since: int) -> None:
        """Raise if anything stored since ``failures`` was ``since`` may be lost."""
        self._packer.check(since=since)

    def _chunk_id(self, chunk: Buffer) -> BlobId:
        # Comparing with zeros ends at the first other byte; hashing 64 KiB takes 15 us.
        if self._zeros.startswith(chunk):
            return HOLE
        return self._ids.chunk_id(chunk)

    def _store(
        self,
        plains: Sequence[Buffer],
        ids: list[BlobId],
        *,
        level: int,
        find_earlier: FindEarlier | None = None,
    ) -> StoredBatch:
        wanted = {
            blob_id: plain for blob_id, plain in zip(ids, plains, strict=True) if blob_id != HOLE
        }
        listed = self._listed(wanted)
        located = self._usable(listed)
        missing = self._packer.claim([blob_id for blob_id in wanted if blob_id not in located])
        if not missing:
            return StoredBatch(ids=ids, added_size=0)
        new = [(blob_id, plain) for blob_id, plain in wanted.items() if blob_id in missing]
        try:
            # Of damage another process may have found more than this one has heard of.
            known = listed.keys() | self._avoided.blobs | self._index.unusable(wanted)
            blobs = self._encode(new, ids, level, known, find_earlier)
            self._packer.append(blobs)
        except BaseException as error:  # claimed blobs that never come must not be relied on
            reason = (
                error
                if isinstance(error, BackupfsError)
                else StorageUnavailable(reason=f"compression failed: {error}")
            )
            self._packer.abandon(missing, reason)
            raise
        return StoredBatch(ids=ids, added_size=sum(len(blob.data) for blob in blobs))

    def _find_usable(self, blob_ids: Iterable[BlobId]) -> dict[BlobId, BlobLocation]:
        """Where those blobs lie that may be relied on: with them, if they are differences, their bases."""
        return self._usable(self._listed(blob_ids))

    def _listed(self, blob_ids: Iterable[BlobId]) -> dict[BlobId, BlobLocation]:
        blob_ids = list(blob_ids)
        places = zip(blob_ids, self._index.find_usable(blob_ids), strict=True)
        return {blob_id: location for blob_id, location in places if location is not None}

    def _usable(
        self, listed: dict[BlobId, BlobLocation], differences_max: int = DIFFERENCES_MAX
    ) -> dict[BlobId, BlobLocation]:
        found = {
            blob_id: location
            for blob_id, location in listed.items()
            if self._avoided.allows(blob_id, location)
        }
        bases = {location.base for location in found.values() if location.base is not None}
        if not bases:
            return found
        usable = self._usable(self._listed(bases), differences_max - 1) if differences_max else {}
        return {
            blob_id: location
            for blob_id, location in found.items()
            if location.base is None or location.base in usable
        }

    def _encode(
        self,
        new: list[tuple[BlobId, Buffer]],
        ids: list[BlobId],
        level: int,
        known: Set[BlobId],
        find_earlier: FindEarlier | None,
    ) -> list[NewBlob]:
        blobs: dict[BlobId, bytes] = {}
        if self._differences is not None and find_earlier is not None:
            # What is known, and stored again as it is damaged, or its pack or its base condemned, is
            # stored whole: others may differ from it, and of two differences either may lose its base.
            fresh = [(blob_id, plain) for blob_id, plain in new if blob_id not in known]
            if fresh:
                earlier = find_earlier([ids.index(blob_id) for blob_id, _ in fresh])
                by_id = dict(zip((blob_id for blob_id, _ in fresh), earlier, strict=True))
                blobs = self._differences.encode(fresh, by_id)
        whole = [(blob_id, plain) for blob_id, plain in new if blob_id not in blobs]
        encoded = self._encoder.encode_many(
            [plain for _, plain in whole], [blob_id for blob_id, _ in whole], level=level
        )
        blobs |= zip((blob_id for blob_id, _ in whole), encoded, strict=True)
        return [NewBlob(blob_id=blob_id, level=level, data=blobs[blob_id]) for blob_id, _ in new]
