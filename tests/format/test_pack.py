"""Packs: the footer lists what lies in the pack it ends, or it is refused."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.format import blob, pack
from backupfs.format.ids import IdScheme
from backupfs.format.pack import ENTRY, TAIL, TAIL_SIZE, BadPackError, PackEntry
from backupfs.types import BlobId, PackId

IDS = IdScheme()
PACK_ID = PackId(b"p" * 16)
OTHER_PACK_ID = PackId(b"p" * 15 + b"q")


def entries_of(sizes: list[tuple[int, int]]) -> list[PackEntry]:
    """Entries that lie one after the other, from (size, level) of each."""
    entries, offset = [], 0
    for size, level in sizes:
        blob_id = IDS.blob_id(offset.to_bytes(8, "little"), level=level)
        entries.append(PackEntry(blob_id=blob_id, offset=offset, size=size, level=level))
        offset += size
    return entries


ENTRIES = entries_of([(52, 0), (1000, 0), (4148, 1), (4148, 7)])
BLOBS_SIZE = 52 + 1000 + 4148 + 4148
FOOTER = pack.encode_footer(PACK_ID, ENTRIES, blobs_size=BLOBS_SIZE, ids=IDS)
PACK_SIZE = BLOBS_SIZE + len(FOOTER)


def decode(data: bytes, *, pack_id: PackId = PACK_ID, size: int = PACK_SIZE) -> list[PackEntry]:
    return pack.decode_footer(pack_id, data, pack_size=size, ids=IDS)


def forge(
    *listed: tuple[int, int, int],
    blobs_size: int = 10_000,
    magic: bytes = pack.MAGIC,
    version: int = 1,
    reserved: int = 0,
    entry_count: int | None = None,
) -> bytes:
    """A footer of (offset, size, level) as an attacker would make it: its digest is right."""
    footer = b"".join(ENTRY.pack(b"i" * 32, *values) for values in listed)
    count = len(listed) if entry_count is None else entry_count
    footer += TAIL.pack(magic, version, reserved, count, blobs_size)
    return footer + IDS.digest("pack", footer + PACK_ID)


def refusal(data: bytes, *, size: int) -> str:
    with pytest.raises(BadPackError) as caught:
        decode(data, size=size)
    return str(caught.value)


# -- round trip --------------------------------------------------------------------------------


blob_sizes = st.integers(blob.HEADER.size, blob.HEADER.size + blob.PLAIN_SIZE_MAX)


@given(st.lists(st.tuples(blob_sizes, st.integers(0, blob.LEVEL_MAX)), max_size=100))
@settings(max_examples=100, deadline=None)
def test_a_footer_lists_what_was_written(sizes):
    entries = entries_of(sizes)
    blobs_size = sum(size for size, _level in sizes)

    footer = pack.encode_footer(PACK_ID, entries, blobs_size=blobs_size, ids=IDS)

    assert decode(footer, size=blobs_size + len(footer)) == entries
    assert pack.footer_size(footer[-TAIL_SIZE:]) == len(footer)


@given(st.lists(st.tuples(blob_sizes, st.booleans()), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_a_footer_names_the_bases_of_differences(sizes):
    entries = [
        replace(entry, base=BlobId(bytes([number + 1]) * 32) if is_difference else None)
        for number, (entry, (_, is_difference)) in enumerate(
            zip(entries_of([(size, 0) for size, _ in sizes]), sizes, strict=True)
        )
    ]
    blobs_size = sum(size for size, _ in sizes)

    footer = pack.encode_footer(PACK_ID, entries, blobs_size=blobs_size, ids=IDS)

    assert decode(footer, size=blobs_size + len(footer)) == entries
    assert pack.footer_size(footer[-TAIL_SIZE:]) == len(footer)
    listed = sum(entry.listed_size for entry in entries)
    assert listed + TAIL_SIZE <= len(footer), "gc counts no more than listing takes"


@pytest.mark.parametrize(
    "changed", [{"level": 1}, {"base": ENTRIES[0].blob_id}], ids=["of a node", "to itself"]
)
def test_a_footer_that_lists_an_impossible_difference_is_refused(changed):
    chunk = replace(ENTRIES[0], offset=0, level=0, base=BlobId(b"b" * 32))
    entry = replace(chunk, **changed)
    footer = pack.encode_footer(PACK_ID, [entry], blobs_size=entry.size, ids=IDS)

    assert "impossible" in refusal(footer, size=entry.size + len(footer))


def test_an_empty_pack_lists_nothing():
    footer = pack.encode_footer(PACK_ID, [], blobs_size=0, ids=IDS)

    assert len(footer) == TAIL_SIZE
    assert decode(footer, size=TAIL_SIZE) == []


def test_a_footer_decodes_from_any_buffer():
    assert decode(memoryview(FOOTER)) == decode(bytearray(FOOTER)) == ENTRIES


# -- damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused():
    data = bytearray(FOOTER)
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            refusal(data, size=PACK_SIZE)
            data[position] ^= 1 << bit

    assert decode(data) == ENTRIES


def test_a_footer_cut_anywhere_is_refused():
    for size in range(len(FOOTER)):
        refusal(FOOTER[:size], size=PACK_SIZE - len(FOOTER) + size)
        refusal(FOOTER[len(FOOTER) - size :], size=PACK_SIZE)


def test_a_pack_cut_anywhere_is_refused():
    """As a reader meets it: it takes the last bytes for the tail, then what they say."""
    whole = bytes(range(256)) * 37
    whole = whole[:BLOBS_SIZE] + FOOTER
    for size in range(len(whole)):
        data = whole[:size]
        with pytest.raises(BadPackError):
            footer_size = pack.footer_size(data[-TAIL_SIZE:])
            decode(data[-footer_size:], size=size)


def test_bytes_before_or_after_a_footer_are_refused():
    refusal(b"\0" + FOOTER, size=PACK_SIZE)
    refusal(FOOTER + b"\0", size=PACK_SIZE + 1)


def test_the_footer_of_another_pack_is_refused():
    with pytest.raises(BadPackError, match="digest"):
        decode(FOOTER, pack_id=OTHER_PACK_ID)


def test_the_footer_of_another_repository_is_refused():
    with pytest.raises(BadPackError, match="digest"):
        pack.decode_footer(PACK_ID, FOOTER, pack_size=PACK_SIZE, ids=IdScheme(b"k" * 32))


def test_a_pack_of_another_size_than_its_footer_says_is_refused():
    for size in (PACK_SIZE - 1, PACK_SIZE + 1, 0, len(FOOTER)):
        assert "another size" in refusal(FOOTER, size=size)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_garbage_is_no_footer(data):
    refusal(data, size=len(data) + 1000)
    with pytest.raises(BadPackError):
        pack.footer_size(data[-TAIL_SIZE:])


# -- what a footer may claim -------------------------------------------------------------------


def test_a_forged_footer_is_taken_where_it_lists_what_can_be():
    data = forge((0, 52, 0), (52, 9948, 7))

    assert [entry.size for entry in decode(data, size=10_000 + len(data))] == [52, 9948]


@pytest.mark.parametrize(
    "listed",
    [
        pytest.param((0, 51, 0), id="smaller than a header"),
        pytest.param((0, 0, 0), id="empty"),
        pytest.param((0, 10_001, 0), id="larger than all blobs"),
        pytest.param((9_949, 52, 0), id="past the end of the blobs"),
        pytest.param((0xFFFFFFFF, 0xFFFFFFFF, 0), id="far past the end"),
        pytest.param((0, 100, 8), id="of an unknown level"),
        pytest.param((0, 100, 0x100), id="with its first reserved byte set"),
        pytest.param((0, 100, 0x01000000), id="with its last reserved byte set"),
    ],
)
def test_a_footer_that_lists_an_impossible_blob_is_refused(listed):
    data = forge((0, 52, 0), listed)

    assert "impossible" in refusal(data, size=10_000 + len(data))


def test_a_listed_blob_is_never_larger_than_the_largest_there_is():
    """Else a reader would fetch a gigabyte to find that it is no chunk."""
    largest = blob.HEADER.size + blob.PLAIN_SIZE_MAX
    blobs_size = 512 << 20
    fits, too_large = (
        forge((0, size, 0), blobs_size=blobs_size) for size in (largest, largest + 1)
    )

    assert decode(fits, size=blobs_size + len(fits))[0].size == largest
    assert "impossible" in refusal(too_large, size=blobs_size + len(too_large))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"magic": b"BFSpack2"}, "no pack ends here"),
        ({"version": 3}, "version 3"),
        ({"version": 0}, "version 0"),
        ({"reserved": 1}, "unknown"),
    ],
)
def test_an_unknown_tail_is_refused(changed, reason):
    data = forge((0, 100, 0), **changed)

    assert reason in refusal(data, size=10_000 + len(data))


@pytest.mark.parametrize(
    ("entry_count", "blobs_size"),
    [
        (pack.ENTRY_COUNT_MAX + 1, 1 << 30),
        (0xFFFFFFFF, 1 << 60),
        (193, 192 * blob.HEADER.size),  # more than could lie there side by side
    ],
)
def test_the_size_of_a_footer_is_bounded_before_it_is_read(entry_count, blobs_size):
    tail = forge(entry_count=entry_count, blobs_size=blobs_size)[-TAIL_SIZE:]

    with pytest.raises(BadPackError, match="too many"):
        pack.footer_size(tail)


def test_the_largest_footer_takes_little_memory():
    """Whoever opens a repository reads the footers of its new packs, wherever these come from."""
    count = pack.ENTRY_COUNT_MAX
    footer = pack.ENTRY.pack(bytes(32), 0, blob.HEADER.size, 0) * count
    tail = pack.TAIL.pack(pack.MAGIC, pack.VERSION, 0, count, count * blob.HEADER.size)
    data = footer + tail + IDS.digest("pack", footer + tail + PACK_ID)
    tracemalloc.start()
    try:
        size = count * blob.HEADER.size + len(data)
        entries = pack.decode_footer(PACK_ID, data, pack_size=size, ids=IDS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert len(entries) == count
    assert peak < 48 << 20


def test_a_tail_that_claims_many_entries_costs_no_memory():
    data = forge(entry_count=pack.ENTRY_COUNT_MAX, blobs_size=1 << 30)
    tracemalloc.start()
    try:
        refusal(data, size=(1 << 30) + len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


def test_tail_and_entries_have_the_documented_layout():
    footer = FOOTER[: ENTRY.size]
    assert footer == struct.pack("<32sIIB3x", ENTRIES[0].blob_id, 0, 52, 0)
    tail = FOOTER[-TAIL_SIZE:-32]
    assert tail == b"BFSpack1" + struct.pack("<HHIQ", 1, 0, 4, BLOBS_SIZE)


# -- names -------------------------------------------------------------------------------------


@given(st.binary(min_size=16, max_size=16))
def test_a_pack_is_found_again_by_its_name(raw):
    name = pack.pack_name(PackId(raw))

    assert name == f"packs/{raw.hex()[:2]}/{raw.hex()}"
    assert pack.pack_id_of(name) == raw


@pytest.mark.parametrize(
    "name",
    [
        "",
        "packs",
        "packs/",
        "packs/ab",
        "packs/ab/",
        "packs/ab/ab",
        "packs/ab/" + "ab" * 15,
        "packs/ab/" + "ab" * 17,
        "packs/ac/" + "ab" * 16,  # in the wrong folder
        "packs/AB/" + "AB" * 16,
        "packs/ab/" + "ab" * 15 + "AB",
        "packs/ab/ab" + " " * 30,
        "packs/ab/" + "ab " * 10 + "ab",
        "packs/ab/" + "ab" * 15 + "xy",
        "packs/ab/" + "ab" * 15 + "٣٣",
        "packs/ab/" + "ab" * 16 + "\n",
        "packs/ab/" + "ab" * 16 + "/",
        "/packs/ab/" + "ab" * 16,
        "pack/ab/" + "ab" * 16,
        "packs/ab/.tmp-" + "ab" * 13,
        "records/ab/" + "ab" * 16,
    ],
)
def test_other_names_are_no_packs(name):
    assert pack.pack_id_of(name) is None


@given(st.text(max_size=60) | st.text("0123456789abcdefAB /", max_size=45))
@settings(max_examples=200)
def test_a_name_that_is_taken_for_a_pack_is_the_one_of_that_pack(text):
    for name in (text, "packs/" + text, f"packs/{text[:2]}/{text}"):
        pack_id = pack.pack_id_of(name)
        assert pack_id is None or pack.pack_name(pack_id) == name
