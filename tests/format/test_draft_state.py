"""Draft states: what a daemon that starts again believes of a staged file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from golden_values import CHUNK_SIZE, DRAFT_STATE
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.errors import CorruptObject
from backupfs.format import codec
from backupfs.format.draft_state import (
    STATE_SIZE_MAX,
    DraftState,
    decode_draft_state,
    encode_draft_state,
)
from backupfs.format.ids import IdScheme
from backupfs.format.names import check_path
from backupfs.types import IMAGE_SIZE_MAX

IDS = IdScheme()


def decode(data: bytes, *, chunk_size: int = CHUNK_SIZE) -> DraftState:
    return decode_draft_state(data, "drafts/host/x.msgpack", IDS, chunk_size=chunk_size)


def sealed(**changed: Any) -> bytes:
    """DRAFT_STATE with fields changed or added, and a digest that is right."""
    value = codec.decode(encode_draft_state(DRAFT_STATE, IDS), size_max=STATE_SIZE_MAX)
    del value["digest"]
    value.update(changed)
    value["digest"] = IDS.digest("state", codec.encode(value))
    return codec.encode(value)


@given(
    st.fixed_dictionaries(
        {
            "name": st.text(min_size=1, max_size=40).filter(lambda name: not check_path(name)),
            "data_count": st.integers(0, 1 << 40),
            "mode": st.integers(0, 0o7777),
            "uid": st.integers(0, (1 << 32) - 1),
            "mtime_ns": st.integers(-(1 << 63), (1 << 63) - 1),
            "written": st.booleans(),
            "changed": st.booleans(),
            "interrupted": st.booleans(),
            "held": st.text(max_size=40),
            "published_id": st.none() | st.uuids().map(str),
        }
    )
)
@settings(max_examples=50, deadline=None)
def test_a_state_comes_back_as_it_was(changed):
    state = dataclasses.replace(DRAFT_STATE, **changed)

    assert decode(encode_draft_state(state, IDS)) == state


def test_every_flipped_bit_is_refused():
    data = bytearray(encode_draft_state(DRAFT_STATE, IDS))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(CorruptObject):
                decode(data)
            data[position] ^= 1 << bit

    assert decode(data) == DRAFT_STATE


def test_a_state_cut_anywhere_is_refused():
    data = encode_draft_state(DRAFT_STATE, IDS)
    for size in range(len(data)):
        with pytest.raises(CorruptObject):
            decode(data[:size])


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"extra": 1},
        {"id": "../../x"},
        {"id": "FFEEDDCCBBAA99887766554433221100"},
        {"name": 5},
        *({"name": name} for name in ("", "..", ".", "a/../b", "/a", "a//b", "a/", "a\0b")),
        {"name": "a" * 256},
        {"size": -1},
        {"size": IMAGE_SIZE_MAX + 1},
        {"height": 2},
        {"root": bytes(31)},
        {"data_count": -1},
        {"mode": 0o10000},
        {"uid": 1 << 32},
        {"mtime_ns": None},
        {"written": 1},
        {"held": None},
        {"held": "x" * 4097},
        {"next_id": "../../x"},
        {"published_id": 5},
        {"published_id": "x"},
        {"changed_at": "2026-11-22T14:25:07"},
        {"filler": bytes(STATE_SIZE_MAX)},
    ],
    ids=lambda changed: repr(changed)[:50],
)
def test_what_cannot_be_is_refused(changed):
    with pytest.raises(CorruptObject) as caught:
        decode(sealed(**changed))
    assert caught.value.name == "drafts/host/x.msgpack"


def test_a_state_of_a_repository_with_other_chunks_is_refused():
    state = dataclasses.replace(DRAFT_STATE, size=200 * CHUNK_SIZE, height=2)
    data = encode_draft_state(state, IDS)

    assert decode(data) == state
    with pytest.raises(CorruptObject, match="tree"):
        decode(data, chunk_size=4 << 20)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_garbage_is_no_state(data):
    with pytest.raises(CorruptObject):
        decode(data)
