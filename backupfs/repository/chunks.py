"""Turns plain chunks and nodes into ids, storing what the repository does not have yet.

A batch of about 1 MiB at a time: zero test, hash, one look-up for the whole batch, one compression
call for what is new, one hand-over to the packer. Never relies on a condemned pack (gc may delete
it) nor on a blob known to be damaged (storing it again heals it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backupfs.errors import BackupfsError, StorageUnavailable
from backupfs.format.blob import BlobEncoder
from backupfs.format.ids import IdScheme
from backupfs.repository.index import BlobLocation, Index
from backupfs.repository.packer import NewBlob, Packer
from backupfs.types import HOLE, BlobId, Buffer, PackId

BATCH_SIZE = 1 << 20  # bytes of plain data in one batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """What became of one batch."""

    ids: list[BlobId]  # of each piece, in order
    added_size: int  # bytes that the repository grew by


class Avoided:
    """Blobs and packs that no writer may rely on. Replaced whole, so reading needs no lock."""

    def __init__(self) -> None:
        self.packs: frozenset[PackId] = frozenset()
        self.blobs: frozenset[BlobId] = frozenset()

    def allows(self, blob_id: BlobId, location: BlobLocation) -> bool:
        return location.pack_id not in self.packs and blob_id not in self.blobs


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
    ) -> None:
        self.chunk_size = chunk_size
        self.batch_count = max(1, BATCH_SIZE // chunk_size)
        self._ids = ids
        self._index = index
        self._packer = packer
        self._encoder = BlobEncoder(compression_level=compression_level)
        self._zeros = bytes(chunk_size)
        self._avoided = avoided

    @property
    def failures(self) -> int:
        """See ``Packer.failures``."""
        return self._packer.failures

    def store_chunks(self, chunks: Sequence[Buffer]) -> StoredBatch:
        """Ids of whole chunks, new ones handed to the packer; durable after ``seal``.

        Waits while the packer is full. Raises: StorageError.
        """
        ids = [self._chunk_id(chunk) for chunk in chunks]
        return self._store(chunks, ids, level=0)

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

    def _store(self, plains: Sequence[Buffer], ids: list[BlobId], *, level: int) -> StoredBatch:
        wanted = {
            blob_id: plain for blob_id, plain in zip(ids, plains, strict=True) if blob_id != HOLE
        }
        missing = self._packer.claim(self._not_indexed(list(wanted)))
        if not missing:
            return StoredBatch(ids=ids, added_size=0)
        return StoredBatch(ids=ids, added_size=self._append(missing, wanted, level))

    def _not_indexed(self, blob_ids: list[BlobId]) -> list[BlobId]:
        locations = self._index.find_usable(blob_ids)
        return [
            blob_id
            for blob_id, location in zip(blob_ids, locations, strict=True)
            if location is None or not self._avoided.allows(blob_id, location)
        ]

    def _append(self, missing: set[BlobId], wanted: dict[BlobId, Buffer], level: int) -> int:
        ordered = [blob_id for blob_id in wanted if blob_id in missing]
        try:
            blobs = self._encoder.encode_many(
                [wanted[blob_id] for blob_id in ordered], ordered, level=level
            )
        except BaseException as error:  # claimed blobs that never come must not be relied on
            reason = (
                error
                if isinstance(error, BackupfsError)
                else StorageUnavailable(reason=f"compression failed: {error}")
            )
            self._packer.abandon(missing, reason)
            raise
        self._packer.append(
            [
                NewBlob(blob_id=blob_id, level=level, data=data)
                for blob_id, data in zip(ordered, blobs, strict=True)
            ]
        )
        return sum(map(len, blobs))
