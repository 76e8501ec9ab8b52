"""Pieces: a chunk is its base with what changed put in, whatever changed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.format import pieces
from backupfs.format.pieces import PIECE_SIZE

COUNT = 32
SIZE = COUNT * PIECE_SIZE
BASE = random.Random(1).randbytes(SIZE)

maps = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(bytes)


def with_changes(changed: bytes) -> bytes:
    """The base with one byte changed in each of those pieces."""
    chunk = bytearray(BASE)
    for number in range(COUNT):
        if changed[number]:
            chunk[number * PIECE_SIZE + number * 16] ^= 1
    return bytes(chunk)


@given(maps)
def test_what_changed_is_found_and_put_into_the_base_again(changed):
    chunk = with_changes(changed)

    assert pieces.find_changed(chunk, BASE) == changed
    picked = pieces.pick(chunk, changed)
    assert len(picked) == PIECE_SIZE * sum(changed)
    assert pieces.put(BASE, changed, picked) == chunk


@given(maps)
def test_any_buffer_is_taken(changed):
    chunk = memoryview(bytearray(with_changes(changed)))

    assert pieces.find_changed(chunk, memoryview(BASE)) == changed
    picked = pieces.pick(chunk, changed)
    assert pieces.put(memoryview(BASE), changed, memoryview(picked)) == chunk


@given(maps)
def test_a_map_is_read_as_it_was_stored(changed):
    stored = pieces.pack_map(changed)

    assert len(stored) == pieces.map_size(SIZE)
    assert pieces.unpack_map(stored) == changed
    assert pieces.unpack_map(memoryview(stored)) == changed


def test_the_first_piece_has_the_highest_bit_of_the_first_byte():
    assert pieces.pack_map(bytes([1, *[0] * 13, 1, 1])) == b"\x80\x03"


@pytest.mark.parametrize("size", [0, 1, PIECE_SIZE, 4095, SIZE + PIECE_SIZE])
def test_sizes_that_no_chunk_has_are_refused(size):
    with pytest.raises(ValueError, match="no pieces"):
        pieces.map_size(size)
