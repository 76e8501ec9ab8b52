"""The one canonical form: what is encoded decodes, and nothing else does; claims cost nothing."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.format import codec
from backupfs.format.codec import Fields, UndecodableError

SIZE_MAX = 1 << 20

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=8,
)
maps = st.dictionaries(st.text(max_size=10), values, max_size=6)


def refusal(data: bytes, *, size_max: int = SIZE_MAX) -> str:
    with pytest.raises(UndecodableError) as caught:
        codec.decode(data, size_max=size_max)
    return str(caught.value)


@given(maps)
@settings(max_examples=100, deadline=None)
def test_what_is_encoded_decodes_to_the_same(value):
    decoded = codec.decode(codec.encode(value), size_max=SIZE_MAX)

    assert decoded == value
    assert list(decoded) == list(value)


@pytest.mark.parametrize("length", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_every_form_of_length_decodes(length):
    value = {
        "text": "a" * length,
        "bytes": bytes(length),
        "list": [None] * length,
        "map": {str(number): 1 for number in range(min(length, 4096))},
    }

    assert codec.decode(codec.encode(value), size_max=SIZE_MAX) == value


@pytest.mark.parametrize("power", range(64))
def test_every_form_of_number_decodes(power):
    value = {"a": (1 << power) - 1, "b": 1 << power, "c": -(1 << power), "d": math.ldexp(1, power)}

    assert codec.decode(codec.encode(value), size_max=SIZE_MAX) == value


@given(maps, st.data())
@settings(max_examples=60, deadline=None)
def test_no_beginning_of_an_encoding_decodes(value, data):
    encoded = codec.encode(value)
    cut = data.draw(st.integers(0, len(encoded) - 1))

    refusal(encoded[:cut])


@given(maps, st.binary(min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_nothing_may_follow(value, more):
    refusal(codec.encode(value) + more)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x82\xa1a" + tail))
@settings(max_examples=500, deadline=None)
def test_garbage_is_refused_or_is_canonical(data):
    try:
        value = codec.decode(data, size_max=SIZE_MAX)
    except UndecodableError:
        return
    assert codec.encode(value) == data


@given(maps, st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_refused_or_gives_another_canonical_map(value, data):
    encoded = bytearray(codec.encode(value))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))

    try:
        decoded = codec.decode(encoded, size_max=SIZE_MAX)
    except UndecodableError:
        return
    assert codec.encode(decoded) == encoded


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1a\xcc\x05",  # 5 as 8 bits
        b"\x81\xa1a\xcf" + bytes(7) + b"\x05",  # 5 as 64 bits
        b"\x81\xa1a\xd0\x05",  # 5 as signed
        b"\x81\xa1a\xd9\x01b",  # one letter with a long length
        b"\x81\xa1a\xc5\x00\x01b",  # one byte with a long length
        b"\x81\xa1a\xdc\x00\x00",  # an empty list with a long length
        b"\xde\x00\x01\xa1a\x05",  # a map with a long length
        b"\x82\xa1a\x05\xa1a\x05",  # a key twice
        b"\x81\xa1a\xca" + struct.pack(">f", 1.0),  # a number of 32 bits
        b"\x81\xa1a\xc7\x00\x05",  # an empty extension
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",  # a time stamp
        b"\x81\xa1a\xc1",  # never used
        b"\x81\xa1a\xa1\xff",  # text that is no UTF-8
        b"\x81\xa1a\xa3\xed\xa0\x80",  # half a surrogate pair
        b"\x81\x05\x05",  # a number as key
        b"\x81\xc4\x01a\x05",  # bytes as key
        b"\x81\xc0\x05",  # nothing as key
        b"\x90",  # a list
        b"\xa1a",  # text
        b"\xc0",
        b"",
    ],
)
def test_anything_but_one_canonical_map_with_text_keys_is_refused(data):
    refusal(data)


def test_bytes_beyond_the_bound_are_not_looked_at():
    encoded = codec.encode({"a": bytes(100)})

    assert codec.decode(encoded, size_max=len(encoded)) == {"a": bytes(100)}
    assert "more than" in refusal(encoded, size_max=len(encoded) - 1)


def announced(form: int, length: int) -> bytes:
    """The head of an item that announces ``length``, in 32 bits."""
    return bytes([form]) + length.to_bytes(4, "big")


TEXT, BYTES, LIST, MAP = 0xDB, 0xC6, 0xDD, 0xDF


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(announced(MAP, 0xFFFFFFFF), id="a map of four thousand million"),
        pytest.param(b"\x81" + announced(TEXT, 0xFFFFFFFF), id="a text of 4 GiB"),
        pytest.param(b"\x81\xa1a" + announced(BYTES, 0x7FFFFFFF), id="bytes of 2 GiB"),
        pytest.param(b"\x81\xa1a" + announced(LIST, 0xFFFFFFFF), id="a long list"),
        pytest.param(b"\x81\xa1a" + announced(LIST, 1 << 19) * 1000, id="long lists in lists"),
        pytest.param(b"\x81\xa1a" + announced(MAP, 1 << 18) * 1000, id="long maps in maps"),
        pytest.param(
            (b"\x81\xa1a" + announced(LIST, 1 << 16)) * 1000 + b"\x80" * 500_000,
            id="many long lists over a million bytes",
        ),
        pytest.param(
            b"\x81\xa1a" + announced(LIST, SIZE_MAX - 20) + b"\x80" * (SIZE_MAX - 20),
            id="a million empty maps",
        ),
        pytest.param(
            b"\x81\xa1a" + announced(LIST, SIZE_MAX - 20) + b"\x90" * (SIZE_MAX - 20),
            id="a million empty lists",
        ),
        pytest.param(b"\x81\xa1a" + b"\x91" * (SIZE_MAX - 4) + b"\xc0", id="a million deep"),
        pytest.param(b"\x81\xa1a" * (SIZE_MAX // 3), id="maps in maps in maps"),
        pytest.param(b"\x81\xa1a" + b"\x91" * 60_000 + b"\xc0", id="as deep as counted"),
    ],
)
def test_what_bytes_announce_costs_neither_memory_nor_time(data):
    assert len(data) <= SIZE_MAX
    tracemalloc.start()
    started = time.process_time()
    try:
        refusal(data)
        elapsed = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 8 << 20
    assert elapsed < 5


def test_a_dense_list_costs_a_small_multiple_of_its_bytes():
    length = 1 << 17
    data = b"\x81\xa1a" + announced(LIST, length) + b"\x01" * length
    tracemalloc.start()
    try:
        codec.decode(data, size_max=SIZE_MAX)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 20 * length


# -- typed reading -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({}, lambda fields: fields.text("a")),
        ({"a": None}, lambda fields: fields.text("a")),
        ({"a": b"x"}, lambda fields: fields.text("a")),
        ({"a": "xy"}, lambda fields: fields.text("a", size_max=1)),
        ({"a": "é"}, lambda fields: fields.text("a", size_max=1)),
        ({"a": ""}, lambda fields: fields.text("a", empty=False)),
        ({"a": 5}, lambda fields: fields.optional_text("a")),
        ({"a": True}, lambda fields: fields.integer("a")),
        ({"a": -1}, lambda fields: fields.integer("a")),
        ({"a": 1 << 63}, lambda fields: fields.integer("a")),
        ({"a": 9}, lambda fields: fields.integer("a", low=10, high=20)),
        ({"a": 1.0}, lambda fields: fields.integer("a")),
        ({"a": "1"}, lambda fields: fields.integer("a")),
        ({"a": 21}, lambda fields: fields.optional_integer("a", low=10, high=20)),
        ({"a": False}, lambda fields: fields.optional_integer("a", low=0)),
        ({"a": 1}, lambda fields: fields.flag("a")),
        ({}, lambda fields: fields.flag("a")),
        ({"a": b"x"}, lambda fields: fields.raw("a", size=2)),
        ({"a": "xy"}, lambda fields: fields.raw("a", size=2)),
        ({"a": []}, lambda fields: fields.mapping("a")),
        ({"a": [1, 2]}, lambda fields: fields.sequence("a", length_max=1)),
        ({"a": {}}, lambda fields: fields.sequence("a", length_max=1)),
        ({"a": 5}, lambda fields: fields.moment("a")),
        ({"a": ""}, lambda fields: fields.moment("a")),
        ({"a": "2026-11-22T14:25:03"}, lambda fields: fields.moment("a")),
        ({"a": "2026-11-22T14:25:03+00:00" + " " * 50}, lambda fields: fields.moment("a")),
        ({"a": "0001-01-01T00:00:00+01:00"}, lambda fields: fields.moment("a")),
    ],
)
def test_a_field_of_another_kind_or_size_is_refused_by_name(value, read):
    with pytest.raises(UndecodableError, match="'a'"):
        read(Fields(value))


def test_fields_within_bounds_are_given_as_they_are():
    fields = Fields({"t": "é", "i": -5, "f": True, "r": b"xy", "m": {"k": 1}, "s": [1], "n": None})

    assert fields.text("t", size_max=2) == "é"
    assert fields.integer("i", low=-5, high=-5) == -5
    assert fields.flag("f") is True
    assert fields.raw("r", size=2) == b"xy"
    assert fields.mapping("m") == {"k": 1}
    assert fields.sequence("s", length_max=1) == [1]
    assert fields.optional_text("n") is None and fields.optional_text("absent") is None
    assert fields.optional_integer("n", low=0) is None
    moment = Fields({"a": "2026-11-22T15:25:03+01:00"}).moment("a")
    assert moment == datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)
    assert moment.tzinfo is UTC
    assert fields.keys() == ["t", "i", "f", "r", "m", "s", "n"]


def test_many_small_maps_and_lists_are_taken_where_they_carry_something():
    """An acknowledgement of gc's plan lists a root and its height for each draft there is."""
    value = {"roots": [[bytes(32), 3]] * 100_000}

    assert codec.decode(codec.encode(value), size_max=16 << 20) == value


# -- small maps, whose form the caller checks ---------------------------------------------------


def test_a_small_map_without_lists_decodes_in_any_form():
    assert codec.decode_small(codec.encode({"a": 1, "b": {"c": None}})) == {
        "a": 1,
        "b": {"c": None},
    }
    assert codec.decode_small(b"\xde\0\x01\xa1a\x01") == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(codec.encode({"a": [1]}), id="a list"),
        pytest.param(b"\x81\xa1a" + b"\xdd\x00\x0f\xff\xff" * 500, id="lists that claim much"),
        pytest.param(b"\x81\xa1a" * 1000, id="maps in maps"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map that claims much"),
        pytest.param(b"\x81\xa1a\xdb\xff\xff\xff\xff", id="a text that claims much"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x01", id="a number"),
        pytest.param(codec.encode({"a": "x" * codec.SMALL_SIZE}), id="more than small"),
    ],
)
def test_what_is_no_small_map_is_refused_and_costs_little(data):
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError):
            codec.decode_small(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20
