"""Trees of ids: changed by copy-on-write, as a dictionary of chunks would be."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.parts import Parts

from backupfs.errors import DamageError, MissingBlob
from backupfs.format import tree
from backupfs.format.tree import FANOUT, HOLE_NODE, NODE_SIZE
from backupfs.repository.blobs import BlobReader
from backupfs.repository.chunks import StoredBatch
from backupfs.repository.images import (
    EMPTY,
    Root,
    TreeEditor,
    cached_leaf_ids,
    leaf_ids,
    walk,
)
from backupfs.repository.workers import Share
from backupfs.types import HOLE, BlobId

# Every edge of a node, of two levels and of three, and places in between.
PLACES = sorted(
    {
        place + step
        for place in (0, FANOUT, 2 * FANOUT, FANOUT**2, 3 * FANOUT**2, FANOUT**3)
        for step in (-2, -1, 0, 1, 2, 77)
        if place + step >= 0
    }
)


class NodesInMemory:
    """Reader and store of nodes at once, in a dictionary; says which nodes were stored."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[BlobId, int], bytes] = {}
        self.stored_count = 0
        self.node_share = Share(2048)

    def node(self, blob_id: BlobId, level: int) -> bytes:
        if blob_id == HOLE:
            return HOLE_NODE
        try:
            return self.nodes[blob_id, level]
        except KeyError:
            raise MissingBlob(blob_id=blob_id.hex()) from None

    cached_node = None

    def keep_node(self, blob_id: BlobId, level: int, data: bytes) -> None:
        pass

    def store_nodes(self, nodes, *, level: int) -> StoredBatch:
        ids = []
        for node in nodes:
            assert len(node) == NODE_SIZE
            assert node != HOLE_NODE, "holes are never stored"
            blob_id = BlobId(hash_of(node, level))
            ids.append(blob_id)
            self.nodes[blob_id, level] = bytes(node)
        self.stored_count += len(ids)
        return StoredBatch(ids=ids, added_size=len(ids) * NODE_SIZE)


def hash_of(node: bytes, level: int) -> bytes:
    return hashlib.sha256(level.to_bytes(1, "little") + node).digest()


def chunk_id(number: int) -> BlobId:
    return BlobId(number.to_bytes(32, "little")) if number else HOLE


def editor(memory: NodesInMemory, root: Root = EMPTY, data_count: int = 0) -> TreeEditor:
    return TreeEditor(memory, memory, root, data_count)  # type: ignore[arg-type]


class EditedTree(RuleBasedStateMachine):
    """A tree under random changes agrees with a dictionary, at every moment and when reopened."""

    @initialize(dirty_max=st.sampled_from([1, 3, 2048]))
    def start(self, dirty_max: int) -> None:
        self.memory = NodesInMemory()
        self.editor = editor(self.memory)
        self.chunks: dict[int, BlobId] = {}
        self.count = 0  # chunks of the image, holes among them
        self.saved: list[tuple[Root, dict[int, BlobId], int, int]] = []
        self.memory.node_share = Share(dirty_max)

    @rule(
        changes=st.lists(
            st.tuples(st.sampled_from(PLACES), st.integers(0, 5)), min_size=1, max_size=6
        )
    )
    def put(self, changes: list[tuple[int, int]]) -> None:
        self.editor.put([(place, chunk_id(number)) for place, number in changes])
        self.chunks |= {place: chunk_id(number) for place, number in changes}
        self.count = max(self.count, *(place + 1 for place, _number in changes))

    @rule(count=st.sampled_from(PLACES))
    def cut(self, count: int) -> None:
        self.editor.cut(count)
        self.chunks = {place: name for place, name in self.chunks.items() if place < count}
        self.count = min(self.count, count)

    @rule(room=st.integers(0, 2))
    def flush(self, room: int) -> None:
        height = tree.height(self.count, chunk_size=1) + room
        self.editor.fit(height)
        root = self.editor.flush()
        assert root.height == height
        self.saved.append((root, dict(self.chunks), self.count, self.editor.data_count))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        root, chunks, count, data_count = data.draw(st.sampled_from(self.saved))
        self.editor = editor(self.memory, root, data_count)
        self.chunks, self.count = dict(chunks), count

    @rule(first=st.sampled_from(PLACES), count=st.integers(1, 2 * FANOUT))
    def read(self, first: int, count: int) -> None:
        expected = [self.chunks.get(place, HOLE) for place in range(first, first + count)]
        assert self.editor.ids(first, count) == expected

    @invariant()
    def every_place_reads_as_put(self) -> None:
        if not hasattr(self, "editor"):
            return
        for place in PLACES:
            assert self.editor.ids(place, 1) == [self.chunks.get(place, HOLE)]
        data_count = sum(name != HOLE for name in self.chunks.values())
        assert self.editor.data_count == data_count

    @invariant()
    def saved_trees_never_change(self) -> None:
        for root, chunks, _count, _data_count in getattr(self, "saved", [])[-3:]:
            found = {
                first + place: name
                for first, names in walk(self.memory, root, enter=lambda _id, _level: True)
                for place, name in enumerate(names)
                if name != HOLE
            }
            assert found == {place: name for place, name in chunks.items() if name != HOLE}


TestEditedTree = EditedTree.TestCase
TestEditedTree.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_a_change_stores_one_node_a_level():
    memory = NodesInMemory()
    big = editor(memory)
    big.put([(place, chunk_id(place + 1)) for place in range(FANOUT**2)])
    big.fit(3)
    root = big.flush()
    memory.stored_count = 0

    changed = editor(memory, root, big.data_count)
    changed.put([(5000, chunk_id(1))])
    changed.flush()

    assert memory.stored_count == 3
    assert changed.added_size == 3 * NODE_SIZE


def test_equal_content_has_one_root_however_it_came_about():
    memory = NodesInMemory()
    straight, detour = editor(memory), editor(memory)
    straight.put([(place, chunk_id(7)) for place in (0, 300)])
    detour.put([(20000, chunk_id(3))])
    detour.put([(300, chunk_id(1)), (5, chunk_id(2))])
    detour.flush()
    detour.cut(301)
    detour.put([(300, chunk_id(7)), (5, HOLE), (0, chunk_id(7))])
    for each in (straight, detour):
        each.fit(2)

    assert straight.flush() == detour.flush()


def test_an_image_of_zeros_is_a_hole_of_any_height():
    memory = NodesInMemory()
    zeros = editor(memory)
    zeros.put([(3, chunk_id(1))])
    zeros.put([(3, HOLE)])
    zeros.fit(4)

    assert zeros.flush() == Root(HOLE, 4)
    assert zeros.data_count == 0
    assert memory.stored_count == 0


# -- over a repository -------------------------------------------------------------------------


def stored_tree(parts: Parts, places: list[int]) -> Root:
    made = TreeEditor(parts.reader, parts.store, EMPTY, 0)
    made.put([(place, chunk_id(place + 1)) for place in places])
    root = made.flush()
    parts.packer.seal(since=parts.packer.failures)
    return root


def reader_without_caches(parts: Parts) -> BlobReader:
    return BlobReader(
        storage=parts.storage,
        ids=parts.ids,
        index=parts.index,
        chunk_size=parts.store.chunk_size,
        avoided=parts.avoided,
        refresh=lambda *, is_known: None,
    )


def test_leaves_are_read_from_the_packs_and_then_from_memory(parts):
    places = [0, 1, 127, 128, 500, FANOUT**2 + 5]
    root = stored_tree(parts, places)
    reader = reader_without_caches(parts)
    expected = [
        chunk_id(place + 1) if place in places else HOLE for place in range(FANOUT**2 + 200)
    ]

    assert cached_leaf_ids(reader, root, 0, 10) is None
    assert leaf_ids(reader, root, 0, len(expected)) == expected
    assert cached_leaf_ids(reader, root, 0, len(expected)) == expected
    assert leaf_ids(reader, root, FANOUT**3, 3) == [HOLE] * 3


def test_walking_leaves_out_what_is_not_to_be_entered(parts):
    root = stored_tree(parts, [0, 200, 400])
    entered: list[tuple[BlobId, int]] = []

    def only_the_top(blob_id: BlobId, level: int) -> bool:
        entered.append((blob_id, level))
        return level == root.height

    assert list(walk(parts.reader, root, enter=only_the_top)) == []
    assert [level for _blob_id, level in entered] == [2, 1, 1, 1]


def test_a_node_that_cannot_be_read_is_told_and_the_rest_is_walked(parts):
    root = stored_tree(parts, [0, 200, 400])
    missing = tree.node_entry(parts.reader.node(root.root, 2), 1)
    reader = reader_without_caches(parts)
    real = reader.node

    def damaged(blob_id: BlobId, level: int) -> bytes:
        if blob_id == missing:
            raise MissingBlob(blob_id=blob_id.hex())
        return real(blob_id, level)

    reader.node = damaged  # type: ignore[method-assign]
    told: list[tuple[BlobId, int, int]] = []

    firsts = [
        first
        for first, _ids in walk(
            reader,
            root,
            enter=lambda _id, _level: True,
            on_damage=lambda blob_id, level, first, _error: told.append((blob_id, level, first)),
        )
    ]

    assert firsts == [0, 3 * FANOUT]
    assert told == [(missing, 1, FANOUT)]
    with pytest.raises(DamageError):
        list(walk(reader, root, enter=lambda _id, _level: True))


@given(st.lists(st.integers(0, FANOUT**2 * 2), max_size=20, unique=True))
@settings(max_examples=25, deadline=None)
def test_walking_names_every_chunk_once_in_order(places):
    memory = NodesInMemory()
    made = editor(memory)
    made.put([(place, chunk_id(place + 1)) for place in places])
    root = made.flush()

    found = [
        first + place
        for first, names in walk(memory, root, enter=lambda _id, _level: True)
        for place, name in enumerate(names)
        if name != HOLE
    ]

    assert found == sorted(places)


def test_many_editors_together_hold_no_more_nodes_than_one():
    memory = NodesInMemory()
    editors = [editor(memory) for _ in range(16)]

    for place in range(1000):
        for number, one in enumerate(editors, 1):
            one.put([(place * FANOUT, chunk_id(number))])

    assert sum(len(one._dirty) for one in editors) <= 2048 + len(editors)
    for one in editors[1:]:
        one.flush()
    assert memory.node_share.part() == 2048, "those that hold nothing leave it to the others"
    editors[0].give_up()
    for place in range(1000):
        editors[1].put([(place * FANOUT, chunk_id(place + 1))])
    assert len(editors[1]._dirty) == 1000
