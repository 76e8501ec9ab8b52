"""The shape of trees: heights, spans and places, at every boundary there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.format import blob, tree
from backupfs.format.config import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN
from backupfs.format.tree import FANOUT, HOLE_NODE, NODE_SIZE
from backupfs.types import HOLE, IMAGE_SIZE_MAX, BlobId

CHUNK_SIZE = 64 << 10
BLOB_IDS = st.binary(min_size=32, max_size=32).map(BlobId)


@pytest.mark.parametrize(
    ("chunk_count", "height"),
    [
        (0, 1),
        (1, 1),
        (127, 1),
        (128, 1),
        (129, 2),
        (128**2 - 1, 2),
        (128**2, 2),
        (128**2 + 1, 3),
        (128**3, 3),
        (128**3 + 1, 4),
        (128**4, 4),
        (128**4 + 1, 5),
    ],
)
def test_height_is_the_least_that_spans_the_image(chunk_count, height):
    size = chunk_count * CHUNK_SIZE

    assert tree.height(size, chunk_size=CHUNK_SIZE) == height
    assert tree.chunk_count(size, chunk_size=CHUNK_SIZE) == chunk_count
    if chunk_count:
        assert tree.height(size - 1, chunk_size=CHUNK_SIZE) == height
        assert tree.chunk_count(size - 1, chunk_size=CHUNK_SIZE) == chunk_count


def test_the_largest_image_fits_the_levels_of_blobs():
    heights = {
        chunk_size: tree.height(IMAGE_SIZE_MAX, chunk_size=chunk_size)
        for chunk_size in (CHUNK_SIZE_MIN, CHUNK_SIZE, CHUNK_SIZE_MAX)
    }

    assert heights == {CHUNK_SIZE_MIN: 6, CHUNK_SIZE: 5, CHUNK_SIZE_MAX: 4}
    assert max(heights.values()) <= blob.LEVEL_MAX


@given(st.integers(0, IMAGE_SIZE_MAX), st.integers(14, 22))
def test_every_image_is_spanned_and_no_level_is_idle(size, power):
    chunk_size = 1 << power
    height = tree.height(size, chunk_size=chunk_size)
    chunk_count = tree.chunk_count(size, chunk_size=chunk_size)

    assert (chunk_count - 1) * chunk_size < size or size == chunk_count == 0
    assert size <= chunk_count * chunk_size
    assert chunk_count <= tree.span(height)
    assert height == 1 or chunk_count > tree.span(height - 1)


def test_spans_are_powers_of_the_fan_out():
    assert [tree.span(level) for level in range(4)] == [1, 128, 16384, 2097152]


@pytest.mark.parametrize(
    ("chunk_index", "slots", "node_indexes"),
    [
        (0, [0, 0, 0], [0, 0, 0]),
        (1, [1, 0, 0], [0, 0, 0]),
        (127, [127, 0, 0], [0, 0, 0]),
        (128, [0, 1, 0], [1, 0, 0]),
        (129, [1, 1, 0], [1, 0, 0]),
        (128**2 - 1, [127, 127, 0], [127, 0, 0]),
        (128**2, [0, 0, 1], [128, 1, 0]),
        (128**2 + 129, [1, 1, 1], [129, 1, 0]),
        (128**3 - 1, [127, 127, 127], [16383, 127, 0]),
        (128**3, [0, 0, 0], [16384, 128, 1]),
    ],
)
def test_places_on_the_way_to_a_chunk(chunk_index, slots, node_indexes):
    levels = (1, 2, 3)

    assert [tree.slot(chunk_index, level=level) for level in levels] == slots
    assert [tree.node_index(chunk_index, level=level) for level in levels] == node_indexes


@given(st.integers(0, (1 << 36) - 1))
def test_the_slots_on_the_way_name_the_chunk(chunk_index):
    height = 6

    slots = [tree.slot(chunk_index, level=level) for level in range(1, height + 1)]

    assert all(0 <= slot < FANOUT for slot in slots)
    assert sum(slot * tree.span(level) for level, slot in enumerate(slots)) == chunk_index
    for level in range(1, height):
        below = tree.node_index(chunk_index, level=level)
        assert below == tree.node_index(chunk_index, level=level + 1) * FANOUT + slots[level]


@given(st.lists(st.just(HOLE) | BLOB_IDS, max_size=FANOUT))
def test_a_node_gives_back_its_entries_and_holes_after_them(entries):
    node = tree.encode_node(entries)

    assert len(node) == NODE_SIZE
    whole = entries + [HOLE] * (FANOUT - len(entries))
    assert tree.node_entries(node) == whole
    assert [tree.node_entry(memoryview(node), index) for index in range(FANOUT)] == whole
    assert tree.data_count(node) == sum(entry != HOLE for entry in entries)


def test_a_node_of_holes_is_the_hole_node():
    assert tree.encode_node([]) == tree.encode_node([HOLE] * FANOUT) == HOLE_NODE
    assert tree.data_count(HOLE_NODE) == 0


def test_more_entries_than_a_node_has_are_our_own_mistake():
    with pytest.raises(AssertionError):
        tree.encode_node([HOLE] * (FANOUT + 1))


def test_an_id_that_straddles_two_holes_is_not_one():
    """Counting must go by places: zeros in the middle of two ids look like a hole to a search."""
    half = BlobId(b"\1" * 16 + bytes(16))
    other = BlobId(bytes(16) + b"\1" * 16)

    assert tree.data_count(tree.encode_node([half, other])) == 2
