"""Blobs: what comes out is what went in, or nothing; whatever was done to the bytes."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.differences import as_difference, as_whole_difference

from backupfs.format import blob, pieces
from backupfs.format.blob import HEADER, BadBlobError, BlobEncoder, BlobHeader
from backupfs.format.ids import IdScheme
from backupfs.format.tree import NODE_SIZE
from backupfs.types import BlobId

IDS = IdScheme()
ENCODER = BlobEncoder(compression_level=1)
RANDOM = bytes((number * number * 31 + 7 * number) % 251 for number in range(700))
TEXT = b"the same words again and again, " * 40
BLOCKS = (TEXT * 13)[: 16 << 10]
NODE = b"".join(IDS.chunk_id(bytes([number])) for number in range(128))


def encode(plain: bytes, *, level: int = 0) -> bytes:
    (encoded,) = ENCODER.encode_many([plain], [IDS.blob_id(plain, level=level)], level=level)
    return encoded


def decode(data: bytes, plain: bytes, *, level: int = 0) -> bytes:
    expected = IDS.blob_id(plain, level=level)
    return blob.decode(data, expected=expected, level=level, ids=IDS)


def forge(payload: bytes, plain: bytes, *, level: int = 0, **changed: int) -> bytes:
    """A blob as an attacker would make it: any payload, any header, and a checksum that is right."""
    fields = {
        "level": level,
        "method": blob.METHOD_ZSTD,
        "stored_size": len(payload),
        "plain_size": len(plain),
        "blob_id": IDS.blob_id(plain, level=level),
        **changed,
    }
    return blob.pack_header(BlobHeader(**fields)) + payload


def assert_refused_or_harmless(data: bytes, plain: bytes, *, level: int = 0) -> None:
    try:
        decoded = decode(data, plain, level=level)
    except BadBlobError:
        return
    assert decoded == plain


def assert_refused(data: bytes, plain: bytes, *, level: int = 0) -> None:
    with pytest.raises(BadBlobError):
        decode(data, plain, level=level)


# -- round trip --------------------------------------------------------------------------------


@given(
    st.lists(
        st.binary(min_size=1, max_size=3000)
        | st.binary(min_size=1, max_size=30).map(lambda part: part * 99)
    )
)
@settings(max_examples=100, deadline=None)
def test_chunks_come_back_as_they_were(plains):
    encoded = ENCODER.encode_many(plains, [IDS.chunk_id(plain) for plain in plains], level=0)

    assert [decode(data, plain) for data, plain in zip(encoded, plains, strict=True)] == plains


@pytest.mark.parametrize("level", range(1, blob.LEVEL_MAX + 1))
def test_nodes_come_back_as_they_were(level):
    assert decode(encode(NODE, level=level), NODE, level=level) == NODE


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 4 << 20])
def test_chunks_of_every_size_come_back(size):
    plains = [os.urandom(size), bytes(size), (TEXT * (size // len(TEXT) + 1))[:size]]

    encoded = ENCODER.encode_many(plains, [IDS.chunk_id(plain) for plain in plains], level=0)

    assert [decode(data, plain) for data, plain in zip(encoded, plains, strict=True)] == plains


def test_any_buffer_is_taken_and_given_back_as_bytes():
    for buffer in (bytearray(TEXT), memoryview(TEXT)):
        (one,) = ENCODER.encode_many([buffer], [IDS.chunk_id(buffer)], level=0)
        both = ENCODER.encode_many([buffer, buffer], [IDS.chunk_id(TEXT)] * 2, level=0)

        assert all(decode(memoryview(data), TEXT) == TEXT for data in (one, *both))


def test_many_at_once_are_the_same_as_one_by_one():
    plains = [TEXT, RANDOM, TEXT * 5]

    together = ENCODER.encode_many(plains, [IDS.chunk_id(plain) for plain in plains], level=0)

    assert together == [encode(plain) for plain in plains]


def test_what_hardly_shrinks_is_kept_raw():
    noise = os.urandom(1000)
    for plain, method in [(noise, 0), (noise + bytes(30), 0), (noise + bytes(200), 1), (TEXT, 1)]:
        assert blob.unpack_header(encode(plain)).method == method


def test_stored_is_never_larger_than_plain_and_header():
    for size in range(64):
        assert len(encode(os.urandom(size))) <= size + HEADER.size


def test_one_encoder_serves_many_threads():
    plains = [bytes([number]) * 5000 + os.urandom(100) for number in range(64)]

    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(encode, plains))
        decoded = list(threads.map(decode, encoded, plains))

    assert decoded == plains


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "level"), [(RANDOM, 0), (TEXT, 0), (NODE, 3)], ids=["raw", "zstd", "node"]
)
def test_no_flipped_bit_gives_wrong_bytes(plain, level):
    data = bytearray(encode(plain, level=level))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            assert_refused_or_harmless(data, plain, level=level)
            data[position] ^= 1 << bit

    assert decode(data, plain, level=level) == plain


def test_every_change_of_a_header_byte_is_refused():
    data = bytearray(encode(TEXT))
    for position in range(HEADER.size):
        for change in range(1, 256):
            data[position] ^= change
            assert_refused(data, TEXT)
            data[position] ^= change


@pytest.mark.parametrize(
    ("plain", "level"), [(RANDOM, 0), (TEXT, 0), (NODE, 1)], ids=["raw", "zstd", "node"]
)
def test_a_blob_cut_anywhere_is_refused(plain, level):
    data = encode(plain, level=level)
    for size in range(len(data)):
        assert_refused(data[:size], plain, level=level)


def test_a_blob_with_bytes_after_it_is_refused():
    assert_refused(encode(TEXT) + b"\0", TEXT)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_payload_under_a_right_header_is_refused_or_harmless(payload):
    assert_refused_or_harmless(forge(payload, TEXT), TEXT)
    assert_refused_or_harmless(forge(payload, TEXT, method=blob.METHOD_RAW), TEXT)


@given(st.binary(max_size=100))
@settings(max_examples=200, deadline=None)
def test_garbage_is_no_header(data):
    with pytest.raises(BadBlobError):
        blob.unpack_header(data)


def test_a_blob_is_refused_in_the_place_of_another():
    assert_refused(encode(RANDOM), TEXT)
    assert_refused(encode(NODE), NODE, level=1)
    assert_refused(encode(NODE, level=1), NODE)
    assert_refused(encode(NODE, level=1), NODE, level=2)


def test_bytes_under_the_id_of_others_are_refused():
    other = TEXT.replace(b"again", b"never")
    assert_refused(forge(other, TEXT, method=blob.METHOD_RAW), TEXT)
    assert_refused(forge(zstandard.compress(other), TEXT), TEXT)


def test_a_node_in_the_domain_of_chunks_is_refused():
    """Else a chunk that a user writes could be made to read as a node."""
    as_chunk = forge(NODE, NODE, level=1, method=blob.METHOD_RAW, blob_id=IDS.chunk_id(NODE))

    with pytest.raises(BadBlobError):
        blob.decode(as_chunk, expected=IDS.chunk_id(NODE), level=1, ids=IDS)


@pytest.mark.parametrize("size", [0, 32, NODE_SIZE - 32, NODE_SIZE + 32, 2 * NODE_SIZE])
def test_a_node_of_another_size_is_refused(size):
    node = bytes(range(256)) * 32
    assert_refused(forge(node[:size], node[:size], level=1, method=0), node[:size], level=1)


# -- what a header may claim -------------------------------------------------------------------


def test_a_damaged_magic_reserved_field_or_checksum_is_refused_as_such():
    good = HEADER.pack(blob.MAGIC, 0, 0, 0, 3, 3, b"i" * 32, 0)[:-4]

    def sealed(body: bytes) -> bytes:
        return body + struct.pack("<I", zlib.crc32(body))

    assert blob.unpack_header(sealed(good)).blob_id == b"i" * 32
    for body in (
        b"BFSc" + good[4:],
        good[:4] + b"\x08" + good[5:],  # level
        good[:5] + b"\x02" + good[6:],  # method
        good[:6] + b"\x01\x00" + good[8:],  # reserved
        good[:6] + b"\x00\x01" + good[8:],
    ):
        with pytest.raises(BadBlobError):
            blob.unpack_header(sealed(body))
    with pytest.raises(BadBlobError, match="checksum"):
        blob.unpack_header(good + bytes(4))


@pytest.mark.parametrize(
    ("stored_size", "plain_size"),
    [(4, 3), (1, 0), (0, (4 << 20) + 1), (0xFFFFFFFF, 0xFFFFFFFF), (5, 0xFFFFFFFF)],
)
def test_impossible_sizes_are_refused(stored_size, plain_size):
    header = BlobHeader(
        level=0, method=0, stored_size=stored_size, plain_size=plain_size, blob_id=BlobId(b"i" * 32)
    )
    with pytest.raises(BadBlobError, match="sizes"):
        blob.unpack_header(blob.pack_header(header))


def zstd_frame(payload: bytes, *, claimed_size: int, window_log: int) -> bytes:
    """A frame that claims any size and window before ``payload``'s blocks (RFC 8878, 3.1.1)."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    unsized = compressor.compress(payload) + compressor.flush()
    assert not unsized[4] & 0xE0  # no content size, a window descriptor
    descriptor, window = bytes([unsized[4] | 0x80]), bytes([(window_log - 10) << 3])
    return unsized[:4] + descriptor + window + struct.pack("<I", claimed_size) + unsized[6:]


BOMB_SIZE = 256 << 20
PLAIN = TEXT * 50


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(zstandard.compress(bytes(BOMB_SIZE)), id="claims what it gives"),
        pytest.param(
            zstd_frame(bytes(BOMB_SIZE), claimed_size=len(PLAIN), window_log=20),
            id="gives more than it claims",
        ),
        pytest.param(
            zstd_frame(PLAIN, claimed_size=0xFFFFFFFF, window_log=20),
            id="claims more than it gives",
        ),
        pytest.param(
            zstd_frame(PLAIN, claimed_size=len(PLAIN), window_log=31)[:-9],
            id="wants a window of 2 GiB",
        ),
        pytest.param(
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BOMB_SIZE)),
            id="claims nothing",
        ),
        pytest.param(
            b"\x50\x2a\x4d\x18" + struct.pack("<I", 99) + bytes(99), id="a frame to be skipped"
        ),
        pytest.param(zstandard.compress(PLAIN[:-1]) + zstandard.compress(b"!"), id="two frames"),
    ],
)
def test_a_decompression_bomb_costs_neither_memory_nor_time(payload):
    assert len(payload) <= len(PLAIN)
    data = forge(payload, PLAIN)
    decode(encode(PLAIN), PLAIN)
    tracemalloc.start()
    started = time.process_time()
    try:
        assert_refused(data, PLAIN)
        elapsed = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20
    assert elapsed < 1
    assert decode(encode(PLAIN), PLAIN) == PLAIN  # the thread's decompressor is as good as before


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20])
@pytest.mark.parametrize("level", [1, 3, 19])
def test_a_difference_takes_little_whatever_the_size_of_chunks(size, level):
    base = random.Random(1).randbytes(size)
    plain = base[: size - 9000] + random.Random(2).randbytes(4000) + base[size - 5000 :]
    blob_id = IDS.chunk_id(plain)

    made = as_difference(plain, base, compression_level=level)

    assert len(made) < 4000 + size // 4096 + 200
    decoded = blob.decode(made, expected=blob_id, level=0, ids=IDS, find_base=lambda _: base)
    assert decoded == plain


def difference_payload(*changed: int, frame: bytes | None = None, cut: int | None = None) -> bytes:
    """The payload of a difference to ``BLOCKS`` in those pieces, with or without a frame of ours."""
    flags = bytes(number in changed for number in range(len(BLOCKS) // 512))
    if frame is None:
        frame = zstandard.compress(bytes(512 * len(changed)))
    return (IDS.chunk_id(BLOCKS) + pieces.pack_map(flags) + frame)[:cut]


@pytest.mark.parametrize(
    ("payload", "plain", "level", "reason"),
    [
        pytest.param(bytes(32) + b"x", BLOCKS, 0, "missing", id="to the hole"),
        pytest.param(b"b" * 32, BLOCKS, 0, "impossible", id="with nothing but a base"),
        pytest.param(b"", BLOCKS, 0, "impossible", id="without a base"),
        pytest.param(b"b" * 32 + b"x", NODE, 1, "impossible", id="of a node"),
        pytest.param(b"b" * 32 + b"x", TEXT, 0, "no pieces", id="of an odd size"),
        pytest.param(difference_payload(), BLOCKS, 0, "nothing differs", id="in no piece"),
        pytest.param(difference_payload(3, cut=34), BLOCKS, 0, "decompressed", id="half a map"),
        pytest.param(difference_payload(3, frame=b""), BLOCKS, 0, "decompressed", id="no frame"),
        pytest.param(difference_payload(3, cut=-4), BLOCKS, 0, "decompressed", id="cut off"),
        pytest.param(
            difference_payload(3, 4, frame=zstandard.compress(bytes(512))),
            BLOCKS,
            0,
            "another size",
            id="with too few pieces",
        ),
        pytest.param(
            difference_payload(3, frame=zstandard.compress(bytes(4 << 20))),
            BLOCKS,
            0,
            "another size",
            id="with too many pieces",
        ),
        pytest.param(difference_payload(3), BLOCKS, 0, "its id", id="of other content"),
    ],
)
def test_an_impossible_difference_is_refused(payload, plain, level, reason):
    data = forge(payload, plain, level=level, method=blob.METHOD_DIFFERENCE)

    with pytest.raises(BadBlobError, match=reason):
        blob.decode(
            data,
            expected=IDS.blob_id(plain, level=level),
            level=level,
            ids=IDS,
            find_base=lambda _: plain,
        )


def test_a_base_of_another_size_is_refused():
    changed = b"!" + BLOCKS[1:]
    made = as_difference(changed, BLOCKS)

    with pytest.raises(BadBlobError, match="another size"):
        decode_to(made, changed, BLOCKS + BLOCKS)


def test_a_difference_that_gains_nothing_is_none():
    base, plain = (random.Random(seed).randbytes(64 << 10) for seed in (1, 2))
    changed = pieces.find_changed(plain, base)

    made = ENCODER.encode_difference(plain, IDS.chunk_id(plain), base, IDS.chunk_id(base), changed)

    assert made is None


@pytest.mark.parametrize("make", [as_difference, as_whole_difference])
def test_differences_of_both_methods_are_read(make):
    changed = BLOCKS[:5000] + b"something else" + BLOCKS[5014:]
    made = make(changed, BLOCKS)

    assert blob.base_of(made) == IDS.chunk_id(BLOCKS)
    assert len(made) < 300
    assert decode_to(made, changed, BLOCKS) == changed
    with pytest.raises(BadBlobError):
        decode_to(made, changed, bytes(len(BLOCKS)))


def decode_to(made: bytes, plain: bytes, base: bytes) -> bytes:
    return blob.decode(
        made, expected=IDS.chunk_id(plain), level=0, ids=IDS, find_base=lambda _: base
    )
