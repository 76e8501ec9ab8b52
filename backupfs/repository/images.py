"""Images as trees of ids: reading one, changing one by copy-on-write, walking one.

A tree is named by its root and height. ``TreeEditor`` starts from any root (a hole for a new
image), holds only the nodes it changed, a bounded number of them, and stores those when it is
flushed: the cost of a change does not depend on the size of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from backupfs.errors import DamageError, StorageUnavailable
from backupfs.format import tree
from backupfs.format.tree import FANOUT, HOLE_NODE
from backupfs.repository.blobs import BlobReader
from backupfs.repository.chunks import ChunkStore
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import BLOB_ID_SIZE, HOLE, BlobId, ceil_div


@dataclass(frozen=True, slots=True)
class Root:
    """A whole image's content: the id of its topmost node and how many levels of nodes it has."""

    root: BlobId
    height: int


EMPTY = Root(HOLE, 1)

# Told of a node that cannot be read: its id, its level, the first chunk below it, and why.
OnDamage = Callable[[BlobId, int, int, DamageError | StorageUnavailable], None]


def leaf_ids(reader: BlobReader, root: Root, first: int, count: int) -> list[BlobId]:
    """Ids of ``count`` chunks from chunk ``first``; beyond the tree, and in holes, ``HOLE``.

    Raises: DamageError, StorageError.
    """
    ids: list[BlobId] = []
    while len(ids) < count:
        chunk_index = first + len(ids)
        node = _leaf(reader.node, root, chunk_index)
        start = chunk_index % FANOUT
        stop = min(FANOUT, start + count - len(ids))
        ids.extend(tree.node_entry(node, place) for place in range(start, stop))
    return ids


def cached_leaf_ids(reader: BlobReader, root: Root, first: int, count: int) -> list[BlobId] | None:
    """The same from memory alone; None where that is not enough. Never waits."""
    try:
        ids: list[BlobId] = []
        while len(ids) < count:
            chunk_index = first + len(ids)
            node = _leaf(partial(_cached, reader), root, chunk_index)
            start = chunk_index % FANOUT
            stop = min(FANOUT, start + count - len(ids))
            ids.extend(tree.node_entry(node, place) for place in range(start, stop))
    except _NotCached:
        return None
    return ids


class _NotCached(Exception):
    pass


def _cached(reader: BlobReader, blob_id: BlobId, level: int) -> bytes:
    data = reader.cached_node(blob_id, level)
    if data is None:
        raise _NotCached
    return data


def _leaf(read: Callable[[BlobId, int], bytes], root: Root, chunk_index: int) -> bytes:
    """The level-1 node above a chunk."""
    if chunk_index >= tree.span(root.height):
        return HOLE_NODE
    blob_id = root.root
    for level in range(root.height, 1, -1):
        if blob_id == HOLE:
            return HOLE_NODE
        blob_id = tree.node_entry(read(blob_id, level), tree.slot(chunk_index, level=level))
    return read(blob_id, 1)


def walk(
    reader: BlobReader,
    root: Root,
    *,
    enter: Callable[[BlobId, int], bool],
    on_damage: OnDamage | None = None,
) -> Iterator[tuple[int, Sequence[BlobId]]]:
    """(index of the first chunk, ids of its leaf's chunks) of each leaf node entered.

    ``enter(node_id, level)`` says whether to look below a node. A node that cannot be read raises
    its DamageError, or is told to ``on_damage(id, level, first chunk below, error)`` and left out;
    one that the disk cannot read, StorageUnavailable, likewise.
    """
    stack = [(root.root, root.height, 0)]
    while stack:
        blob_id, level, first = stack.pop()
        if blob_id == HOLE or not enter(blob_id, level):
            continue
        try:
            entries = tree.node_entries(reader.node(blob_id, level))
        except (DamageError, StorageUnavailable) as error:
            wants = isinstance(error, StorageUnavailable) and is_want_of_resources(error)
            if on_damage is None or wants:
                raise
            on_damage(blob_id, level, first, error)
            continue
        if level == 1:
            yield first, entries
        else:
            stack.extend(_below(entries, level, first))


def leaf_places(reader: BlobReader, root: Root) -> Iterator[int]:
    """Index of the first chunk of each leaf node that is no hole, in order; the leaves are not read.

    Raises: DamageError, StorageError.
    """
    stack = [(root.root, root.height, 0)]
    while stack:
        blob_id, level, first = stack.pop()
        if blob_id == HOLE:
            continue
        if level == 1:
            yield first
        else:
            stack.extend(_below(tree.node_entries(reader.node(blob_id, level)), level, first))


def _below(entries: Sequence[BlobId], level: int, first: int) -> list[tuple[BlobId, int, int]]:
    """What a node's entries lead to, as (id, level, first chunk), without holes, the first one last."""
    width = tree.span(level - 1)
    return [
        (entry, level - 1, first + place * width)
        for place, entry in reversed(list(enumerate(entries)))
        if entry != HOLE
    ]


class TreeEditor:
    """A tree being changed. Not thread-safe; its owner serialises.

    Holds: a node in ``_dirty`` counts instead of what its parent, changed or not, says of it.
    """

    def __init__(self, reader: BlobReader, store: ChunkStore, root: Root, data_count: int) -> None:
        self._reader = reader
        self._store = store
        self._root = root.root
        self._height = root.height
        self._dirty: dict[tuple[int, int], bytearray] = {}
        self._has_share = False  # of the nodes that all editors together may hold
        self.data_count = data_count  # chunks that are no holes
        self.added_size = 0  # bytes of nodes stored by this editor

    def ids(self, first: int, count: int) -> list[BlobId]:
        """Ids of ``count`` chunks from chunk ``first``. Raises: DamageError, StorageError."""
        ids: list[BlobId] = []
        while len(ids) < count:
            chunk_index = first + len(ids)
            node = self._node(1, chunk_index // FANOUT)
            start = chunk_index % FANOUT
            stop = min(FANOUT, start + count - len(ids))
            ids.extend(tree.node_entry(node, place) for place in range(start, stop))
        return ids

    def put(self, changes: Sequence[tuple[int, BlobId]]) -> None:
        """Set ids of chunks: (chunk index, id) in any order. Raises: DamageError, StorageError."""
        for chunk_index, blob_id in changes:
            while chunk_index >= tree.span(self._height):
                self._grow()
            node = self._changed(1, chunk_index // FANOUT)
            start = chunk_index % FANOUT * BLOB_ID_SIZE
            was_data = any(node[start : start + BLOB_ID_SIZE])
            self.data_count += (blob_id != HOLE) - was_data
            node[start : start + BLOB_ID_SIZE] = blob_id
        self._take_share()
        if len(self._dirty) > self._store.node_share.part():
            self._store_dirty()  # in the middle of an image
            self._take_share()

    def cut(self, chunk_count: int) -> None:
        """Turn all chunks from ``chunk_count`` on into holes. Raises: DamageError, StorageError."""
        if chunk_count == 0:
            self._root, self.data_count = HOLE, 0
            self._dirty.clear()
        elif chunk_count < tree.span(self._height):
            self._store_dirty()  # so that parents name their children, and counting is simple
            self.data_count -= self._count_data(self._root, self._height, 0, chunk_count)
            for level in range(1, self._height + 1):
                self._cut_level(level, chunk_count)
        self._take_share()

    def fit(self, height: int) -> None:
        """Give the tree another height; what does not fit is cut off already."""
        while self._height > height:
            self._shrink()
        while self._height < height:
            self._grow()

    def flush(self) -> Root:
        """Store all changed nodes; the tree as it now is. Durable after the store's ``seal``.

        Raises: StorageError.
        """
        self._store_dirty()
        self._take_share()
        return Root(self._root, self._height)

    def give_up(self) -> None:
        """Forget what was changed; nobody uses this any more."""
        self._dirty.clear()
        self._take_share()

    def _take_share(self) -> None:
        """Take part in what may be held, or leave it to the others, as there is something or not."""
        if bool(self._dirty) == self._has_share:
            return
        self._has_share = bool(self._dirty)
        if self._has_share:
            self._store.node_share.join()
        else:
            self._store.node_share.leave()

    def _node(self, level: int, index: int) -> bytes | bytearray:
        dirty = self._dirty.get((level, index))
        if dirty is not None:
            return dirty
        return self._reader.node(self._id(level, index), level)

    def _id(self, level: int, index: int) -> BlobId:
        """Id of an unchanged node."""
        if level > self._height or index >= FANOUT ** (self._height - level):
            return HOLE
        if level == self._height:
            return self._root
        return tree.node_entry(self._node(level + 1, index // FANOUT), index % FANOUT)

    def _changed(self, level: int, index: int) -> bytearray:
        node = self._dirty.get((level, index))
        if node is None:
            node = bytearray(self._reader.node(self._id(level, index), level))
            self._dirty[level, index] = node
        return node

    def _grow(self) -> None:
        old = self._root
        self._height += 1
        self._root = HOLE
        if old != HOLE:
            self._dirty[self._height, 0] = bytearray(tree.encode_node([old]))

    def _shrink(self) -> None:
        self._root = tree.node_entry(self._node(self._height, 0), 0)
        self._dirty.pop((self._height, 0), None)
        self._height -= 1

    def _cut_level(self, level: int, chunk_count: int) -> None:
        index = tree.node_index(chunk_count - 1, level=level)
        first_cut = ceil_div(chunk_count, tree.span(level - 1)) - index * FANOUT
        start = first_cut * BLOB_ID_SIZE
        if any(self._node(level, index)[start:]):
            changed = self._changed(level, index)
            changed[start:] = bytes(len(changed) - start)

    def _count_data(self, blob_id: BlobId, level: int, first: int, chunk_count: int) -> int:
        """Chunks with data from ``chunk_count`` on below a node whose first chunk is ``first``."""
        if blob_id == HOLE or first + tree.span(level) <= chunk_count:
            return 0
        if level == 0:
            return 1
        width = tree.span(level - 1)
        entries = tree.node_entries(self._reader.node(blob_id, level))
        return sum(
            self._count_data(entry, level - 1, first + place * width, chunk_count)
            for place, entry in enumerate(entries)
        )

    def _store_dirty(self) -> None:
        for level in range(1, self._height + 1):
            indexes = sorted(index for dirty_level, index in self._dirty if dirty_level == level)
            nodes = [bytes(self._dirty[level, index]) for index in indexes]
            for index, blob_id in zip(indexes, self._store_nodes(nodes, level), strict=True):
                if level == self._height:
                    self._root = blob_id
                else:
                    start = index % FANOUT * BLOB_ID_SIZE
                    self._changed(level + 1, index // FANOUT)[start : start + BLOB_ID_SIZE] = (
                        blob_id
                    )
                del self._dirty[level, index]

    def _store_nodes(self, nodes: list[bytes], level: int) -> list[BlobId]:
        full = [node for node in nodes if node != HOLE_NODE]
        ids: list[BlobId] = []
        for start in range(0, len(full), 256):
            part = full[start : start + 256]
            batch = self._store.store_nodes(part, level=level)
            self.added_size += batch.added_size
            for blob_id, node in zip(batch.ids, part, strict=True):
                self._reader.keep_node(blob_id, level, node)
            ids.extend(batch.ids)
        stored = iter(ids)
        return [HOLE if node == HOLE_NODE else next(stored) for node in nodes]
