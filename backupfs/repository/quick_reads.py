"""Reads of one chunk for who must not wait, as the event loop of a mount must not.

The way to a thread and back costs as much as the disk and the proof of a chunk. All that is needed
here is in memory: the nodes, the chunk's place, a descriptor of its pack. The pack is read without
waiting (RWF_NOWAIT, preadv2(2)): what the system has in its cache comes at once; what it has not
it begins to read, and the caller tries again a little later, for as long as it likes.

All that is unusual is declined and left to ``BlobReader``: what is not known yet or has moved, what
is damaged, or is stored in a way that needs other blobs. So damage has one judge, and nothing
leaves here that was not proven.
"""

from __future__ import annotations

import os

from backupfs.errors import DamageError
from backupfs.format import blob as blob_format
from backupfs.format import tree
from backupfs.format.blob import HEADER, METHOD_RAW, METHOD_ZSTD, BadBlobError
from backupfs.format.ids import IdScheme
from backupfs.format.pack import pack_name
from backupfs.format.tree import FANOUT
from backupfs.repository.blobs import BlobReader
from backupfs.repository.images import Root
from backupfs.repository.index import Index
from backupfs.repository.places import Places
from backupfs.storage.local import LocalStorage
from backupfs.types import HOLE, BlobId

# Decompressing and proving more takes longer than a way to a thread, and is left to one.
CHUNK_SIZE_MAX = 128 << 10
LEARN_LEAVES_MAX = 64
PARENTS_MAX = 1024
_ALONE = -1_000_000  # misses below a node with a damaged leaf: each leaf is learnt by itself


class QuickReads:
    """Used by one thread; only ``learn`` is for others."""

    def __init__(
        self, *, storage: LocalStorage, ids: IdScheme, index: Index, reader: BlobReader
    ) -> None:
        self._storage = storage
        self._ids = ids
        self._reader = reader
        self._places = Places(index)
        self._chunk_size = len(reader.zeros)
        self._buffer = memoryview(bytearray(HEADER.size + min(self._chunk_size, CHUNK_SIZE_MAX)))
        self._misses: dict[BlobId, int] = {}  # by parent of leaves, how often one was not known

    def begin(self, root: Root, chunk_index: int) -> bytes | QuickRead | None:
        """A chunk if it is in memory, else a read of it to be tried; None: not one for here.

        Never waits. The caller closes the read.
        """
        leaf_id, blob_id = self._descend(root, chunk_index)
        if blob_id is None:
            return None
        chunk = self._reader.cached_chunk(blob_id)
        if chunk is not None or self._chunk_size > CHUNK_SIZE_MAX:
            return chunk
        place = self._places.find(leaf_id, chunk_index % FANOUT)
        if place is None:
            return None
        pack_id, offset, size = place
        file = self._storage.borrow_open(pack_name(pack_id)) if size <= len(self._buffer) else None
        if file is None:
            return None
        return QuickRead(self, file, self._buffer[:size], offset, leaf_id, blob_id)

    def is_known(self, root: Root, chunk_index: int) -> bool:
        """Whether all is in memory that ``learn`` would bring there. Never waits."""
        leaf_id, blob_id = self._descend(root, chunk_index)
        return blob_id is not None and (leaf_id == HOLE or self._places.knows(leaf_id))

    def learn(self, root: Root, chunk_index: int) -> None:
        """Bring into memory what ``begin`` needs for a chunk, and for those around it.

        The more often that was wanted below one node, the more of it is learnt: who reads here and
        there in one part of an image will come to the rest of it too. In a thread; waits.

        Raises: DamageError, StorageError.
        """
        parent_id, leaf_ids = self._leaves_around(root, chunk_index)
        new = [leaf_id for leaf_id in leaf_ids if not self._places.knows(leaf_id)]
        if len(self._misses) > PARENTS_MAX:
            self._misses.clear()
        self._misses[parent_id] = self._misses.get(parent_id, 0) + 1
        try:
            leaves = self._reader.nodes(new, 1)
        except DamageError:
            self._misses[parent_id] = _ALONE  # one that cannot be read must not cost the others
            raise
        for leaf_id, leaf in zip(new, leaves, strict=True):
            self._places.learn(leaf_id, leaf)

    def prove(self, data: memoryview, leaf_id: BlobId, blob_id: BlobId) -> bytes | None:
        """The chunk in ``data``; None, and its place is forgotten, where it is not there."""
        try:
            if blob_format.unpack_header(data).method not in (METHOD_RAW, METHOD_ZSTD):
                return None
            plain = blob_format.decode(data, expected=blob_id, level=0, ids=self._ids)
        except BadBlobError:
            plain = b""
        if len(plain) != self._chunk_size:
            self._places.forget(leaf_id)
            return None
        self._reader.keep_chunk(blob_id, plain)
        return plain

    def _descend(self, root: Root, chunk_index: int) -> tuple[BlobId, BlobId | None]:
        """A chunk's leaf and its id, as far as the nodes are in memory."""
        blob_id = root.root
        if chunk_index >= tree.span(root.height):
            return HOLE, None
        for level in range(root.height, 0, -1):
            leaf_id = blob_id
            node = self._reader.cached_node(blob_id, level)
            if node is None:
                return leaf_id, None
            blob_id = tree.node_entry(node, tree.slot(chunk_index, level=level))
        return leaf_id, blob_id

    def _leaves_around(self, root: Root, chunk_index: int) -> tuple[BlobId, list[BlobId]]:
        """The node above a chunk's leaf, and the ids of that leaf and some beside it."""
        if chunk_index >= tree.span(root.height):
            return HOLE, []
        if root.height == 1:
            return root.root, [root.root]
        parent_id = root.root
        for level in range(root.height, 2, -1):
            node = self._reader.node(parent_id, level)
            parent_id = tree.node_entry(node, tree.slot(chunk_index, level=level))
        leaf_ids = tree.node_entries(self._reader.node(parent_id, 2))
        count = min(4 ** max(0, self._misses.get(parent_id, 0)), LEARN_LEAVES_MAX)
        start = tree.slot(chunk_index, level=2) // count * count
        return parent_id, [leaf for leaf in leaf_ids[start : start + count] if leaf != HOLE]


class QuickRead:
    """A chunk that is being read from its pack; to be closed."""

    __slots__ = ("_blob_id", "_buffers", "_file", "_leaf_id", "_offset", "_reads", "_size", "chunk")

    def __init__(
        self,
        reads: QuickReads,
        file: int,
        buffer: memoryview,
        offset: int,
        leaf_id: BlobId,
        blob_id: BlobId,
    ) -> None:
        self._reads = reads
        self._file = file
        self._buffers = [buffer]  # of all reads: what is in it counts within one call only
        self._size = len(buffer)
        self._offset = offset
        self._leaf_id = leaf_id
        self._blob_id = blob_id
        self.chunk: bytes | None = None  # None after success of ``attempt``: left to ``BlobReader``

    def attempt(self) -> bool:
        """Whether ``chunk`` is known now; if not, the system has begun to read. Never waits."""
        try:
            count = os.preadv(self._file, self._buffers, self._offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:  # of a file system that cannot; or of the disk, and reading tells why
            return True
        if count < self._size:
            # A part was there. Or the pack is too short: then it stays so, and the caller gives up.
            return False
        self.chunk = self._reads.prove(self._buffers[0], self._leaf_id, self._blob_id)
        return True

    def close(self) -> None:
        os.close(self._file)
