"""Hostile bytes: what a decoder is given by a disk that lies, a careless copy, or an enemy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from backupfs.format import codec

PIECE_SIZE_MAX = 64
# What an item of msgpack announces: lengths of 8, 16 and 32 bits for bytes, text, lists and maps.
ANNOUNCED = [
    form.to_bytes(1, "big") + length.to_bytes(size, "big")
    for forms, size in (
        ((0xC4, 0xD9), 1),
        ((0xC5, 0xDA, 0xDC, 0xDE), 2),
        ((0xC6, 0xDB, 0xDD, 0xDF), 4),
    )
    for form in forms
    for length in (0, 1, 1 << (8 * size - 1), (1 << 8 * size) - 1)
]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 1 << 30, (1 << 31) - 1, (1 << 32) - 1]
NUMBERS += [(1 << 63) - 1, (1 << 64) - 1]


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of ``valid`` with some bytes flipped, cut, doubled, inserted, or taken from another."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, PIECE_SIZE_MAX))
        change = draw(
            st.sampled_from(
                ("flip", "insert", "delete", "cut", "double", "splice", "announce", "number")
            )
        )
        if change == "flip" and place < len(data):
            data[place] ^= draw(st.integers(1, 255))
        elif change == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=PIECE_SIZE_MAX))
        elif change == "delete":
            del data[place : place + size]
        elif change == "cut":
            del data[place:]
        elif change == "double":
            data[place:place] = data[place : place + size]
        elif change == "splice":
            other = draw(st.sampled_from(valid))
            start = draw(st.integers(0, len(other)))
            data[place : place + size] = other[start : start + size]
        elif change == "announce":
            data[place : place + size] = draw(st.sampled_from(ANNOUNCED))
        elif change == "number":
            number = draw(st.sampled_from(NUMBERS))
            width = draw(st.sampled_from((1, 2, 4, 8)))
            order = draw(st.sampled_from(("little", "big")))
            data[place : place + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, order)
    return bytes(data)


def hostile_bytes(valid: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Anything at all, and what was valid before it was changed."""
    return st.binary(max_size=400) | mutated(valid) | mutated(valid)


# Text that is a trap for something on the way.
TRAPS = [
    *(
        "",
        ".",
        "..",
        "../x",
        "/",
        "a/../b",
        "a//b",
        "a/",
        "a\0b",
        "\0",
        "\n",
        "a\nb",
        "\x1b[2J",
        "\x7f",
    ),
    *(
        "latest.img",
        "metadata.json",
        "2026-11-22T142503Z.img",
        "2026-11-22T142503Z-2.img",
        "config",
    ),
    *(
        "e\u0301",
        "\u00e9",
        "\ufeff",
        "\u202e",
        "\u0130",
        "x" * 255,
        "x" * 256,
        "x" * 4097,
        "é" * 128,
    ),
    *("{}", "[]", "null", "1e999", "NaN", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":1}', "[" * 5000),
    *('{"a": ' * 5000, '{"a": ' * 70 + "1" + "}" * 70, '{"b": 1, "a": 1}', "9" * 5000),
    *("%s", "{0}", "{name}", "--", "-rf", "~", "$HOME", "`id`", "*", "?", "\\", "'", '"'),
    *("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999+00:00", "2026-11-22T14:25:03"),
    *("0001-01-01T00:00:00+23:59", "2026-02-30T00:00:00+00:00", "2026-11-22T14:25:03Z"),
    "0b0e4f2c-1111-4222-8333-444455556666",
]

hostile_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.sampled_from(TRAPS)
    | st.text(max_size=40)
    | st.binary(max_size=80)
    | st.sampled_from([bytes(16), bytes(31), bytes(32), bytes(33), b"\xff" * 32]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def forged(
    draw: st.DrawFn, valid: Sequence[bytes], digest: Callable[[bytes], bytes] | None
) -> bytes:
    """A map whose digest is right, if it has one, and whose fields say something else."""
    value = codec.decode(draw(st.sampled_from(valid)), size_max=64 << 20)
    value.pop("digest", None)
    for key in draw(st.lists(st.sampled_from(list(value)), max_size=3)):
        if draw(st.integers(0, 9)):
            value[key] = draw(hostile_values)
        else:
            value.pop(key, None)
    if not draw(st.integers(0, 9)):
        value[draw(st.text(max_size=10))] = draw(hostile_values)
    if digest is not None:
        value["digest"] = digest(codec.encode(value))
    return codec.encode(value)


def peak_of(act: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while ``act`` ran."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
