"""Where the chunks of leaves that were read lately lie: answers of the index, kept in memory.

For who must not wait for a disk: the index is a file, and a look-up may have to read it. A place is
a hint. What is read there is proven like all else, and who finds other bytes there forgets it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from backupfs.format import tree
from backupfs.repository.index import Index
from backupfs.repository.listing import LOCATION
from backupfs.types import BlobId, PackId

LEAVES_MAX = 2048  # of 128 places, 12 bytes each
# Of a chunk that is nowhere, or kept as a difference, or a hole. No pack has the number 0.
_UNKNOWN = bytes(LOCATION.size)

# A pack, and offset and size of a blob in it.
Place = tuple[PackId, int, int]


class Places:
    """Places of chunks that are stored whole, by the leaf, the node of level 1, above them. Thread-safe."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._leaves: OrderedDict[BlobId, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def learn(self, leaf_id: BlobId, leaf: bytes) -> None:
        """Ask the index for all chunks of a leaf. Raises: StorageUnavailable."""
        values = self._index.find_packed(tree.node_entries(leaf))
        packed = b"".join(_UNKNOWN if value is None else value for value in values)
        with self._lock:
            self._leaves[leaf_id] = packed
            while len(self._leaves) > LEAVES_MAX:
                self._leaves.popitem(last=False)

    def forget(self, leaf_id: BlobId) -> None:
        """What was learnt of a leaf is not so any more."""
        with self._lock:
            self._leaves.pop(leaf_id, None)

    def knows(self, leaf_id: BlobId) -> bool:
        """Whether ``find`` may have answers for a leaf. Never waits."""
        return leaf_id in self._leaves

    def find(self, leaf_id: BlobId, slot: int) -> Place | None:
        """Where chunk ``slot`` of a leaf lies, if that is in memory. Never waits."""
        packed = self._leaves.get(leaf_id)
        if packed is None:
            return None
        number, offset, size = LOCATION.unpack_from(packed, slot * LOCATION.size)
        if not number:
            return None
        pack_id = self._index.known_pack(number)
        if pack_id is None:  # the pack is gone: what lay in it has another place now
            self.forget(leaf_id)
            return None
        return pack_id, offset, size
