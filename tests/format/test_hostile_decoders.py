"""Every decoder against bytes that are wrong in every way: arbitrary ones, valid ones that were changed,
and forged ones whose digest is right. Each ends with what it declares, and takes no memory on trust.

``BACKUPFS_FUZZ_EXAMPLES`` makes the runs longer, each time with other draws (scripts/fuzz).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import golden_values as golden
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile import NUMBERS, forged, hostile_bytes, mutated, peak_of

from backupfs.errors import BackupfsError, CorruptObject, InvalidRecord, UnsupportedFormat
from backupfs.format import blob, codec, pack, tree
from backupfs.format.config import decode_config, encode_config
from backupfs.format.draft_state import (
    FOLDERS_SIZE_MAX,
    decode_draft_state,
    decode_folders,
    encode_draft_state,
    encode_folders,
)
from backupfs.format.record import RECORD_SIZE_MAX, decode_record, encode_record
from backupfs.repository.metadata import MetadataStore
from backupfs.repository.rebuild import read_footer
from backupfs.repository.sessions import (
    decode_ack,
    decode_plan,
    encode_ack,
    encode_plan,
    plan_name,
)
from backupfs.staging.state_store import _holder_of
from backupfs.storage.memory import MemoryStorage
from backupfs.worker import frames
from backupfs.worker.client import _error_of
from backupfs.worker.frames import Channel, Disconnected

LONG = int(os.environ.get("BACKUPFS_FUZZ_EXAMPLES", "0"))
# Beyond what a decoder needs at any size, so many bytes for each that it was given. A list of numbers
# takes one byte for each here and eight there, a short text fifty; what is decoded is encoded again.
PEAK_FREE = 1 << 20
PEAK_FACTOR = 100


def many(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Decoder:
    """One decoder, bytes that it takes, and what it may raise."""

    name: str
    valid: list[bytes]
    decode: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    digest: Callable[[bytes], bytes] | None = None
    is_map: bool = True


IDS = golden.IDS
PLAN_NAME = plan_name(golden.PLAN.plan_id)


def digest(domain: str) -> Callable[[bytes], bytes]:
    return lambda data: IDS.digest(domain, data)


def get_metadata(data: bytes) -> object:
    storage = MemoryStorage()
    storage.put_new(golden.METADATA_NAME, data)
    return MetadataStore(storage, IDS).get(golden.METADATA_VOLUME)


MAPS = [
    Decoder(
        "config",
        [encode_config(golden.CONFIG, IDS)],
        lambda data: decode_config(data, IDS),
        (CorruptObject, UnsupportedFormat),
        digest("config"),
    ),
    Decoder(
        "record",
        [encode_record(golden.FULL_RECORD, IDS), encode_record(golden.INCREMENTAL_RECORD, IDS)],
        lambda data: decode_record(data, IDS),
        (InvalidRecord,),
        digest("record"),
    ),
    Decoder(
        "draft state",
        [encode_draft_state(golden.DRAFT_STATE, IDS)],
        lambda data: decode_draft_state(data, "a draft", IDS, chunk_size=golden.CHUNK_SIZE),
        (CorruptObject,),
        digest("state"),
    ),
    Decoder(
        "metadata", [golden.golden_metadata()], get_metadata, (CorruptObject,), digest("state")
    ),
    Decoder(
        "plan",
        [encode_plan(golden.PLAN)],
        lambda data: decode_plan(data, PLAN_NAME),
        (CorruptObject,),
    ),
    Decoder(
        "acknowledgement",
        [encode_ack(golden.ACKNOWLEDGED)],
        lambda data: decode_ack(data, "an answer"),
        (CorruptObject,),
    ),
    Decoder(
        "folders", [encode_folders({"a", "a/b", "ü"})], decode_folders, (codec.UndecodableError,)
    ),
]


def attempt(decoder: Decoder, data: bytes) -> None:
    """Decode; anything but what is declared fails the test."""
    try:
        decoder.decode(data)
    except decoder.errors as error:
        assert str(error)


def assert_bounded(decoder: Decoder, data: bytes) -> None:
    # The least of some: the interpreter and the library that draws allocate for themselves as well.
    peak = min(peak_of(lambda: attempt(decoder, data)) for _ in range(1 + 2 * bool(LONG)))
    assert peak < PEAK_FREE + PEAK_FACTOR * len(data), (decoder.name, peak, len(data))


@pytest.mark.parametrize("decoder", MAPS, ids=lambda decoder: decoder.name)
def test_any_bytes_are_decoded_or_refused(decoder):
    @given(hostile_bytes(decoder.valid))
    @many(120)
    def check(data):
        attempt(decoder, data)

    check()


@pytest.mark.parametrize("decoder", MAPS, ids=lambda decoder: decoder.name)
def test_forged_maps_are_decoded_or_refused(decoder):
    @given(forged(decoder.valid, decoder.digest))
    @many(150)
    def check(data):
        attempt(decoder, data)

    check()


@pytest.mark.parametrize("decoder", MAPS, ids=lambda decoder: decoder.name)
def test_memory_follows_the_bytes_that_are_there(decoder):
    @given(forged(decoder.valid, decoder.digest) | mutated(decoder.valid))
    @many(25)
    def check(data):
        assert_bounded(decoder, data)

    check()


# -- large ones ------------------------------------------------------------------------------------


LARGE: dict[str, Any] = {
    "numbers": [1] * 60_000,
    "short texts": ["ab"] * 20_000,
    "empty texts": [""] * 60_000,
    "pairs": [[b"", 1]] * 3_000,
    "deep": None,
    "a long text": "x" * 500_000,
    "text of wide letters": "\U0001f600" * 60_000,
    "bytes": bytes(500_000),
    "a map": {str(number): number for number in range(4096)},
    "deep json": '{"a": ' * 40_000 + "1" + "}" * 40_000,
    "wide json": "{" + ", ".join(f'"{number:06d}": 1' for number in range(19_000)) + "}",
    "a long number": "1" * 200_000,
}
LARGE["deep"] = [1]
for _ in range(400):
    LARGE["deep"] = [LARGE["deep"]]


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("decoder", MAPS, ids=lambda decoder: decoder.name)
def test_large_values_in_any_field_cost_a_multiple_of_their_bytes(decoder, value):
    forged_value = codec.decode(decoder.valid[0], size_max=1 << 20)
    forged_value.pop("digest", None)
    alike = [key for key, field in forged_value.items() if type(field) is type(value)]
    large = forged_value.keys() & {"metadata", "folders", "roots", "condemned"}
    for key in large | {[*forged_value, *alike][-1]}:
        data = {**forged_value, key: value}
        if decoder.digest is not None:
            data["digest"] = decoder.digest(codec.encode(data))
        assert_bounded(decoder, codec.encode(data))


# -- blobs -----------------------------------------------------------------------------------------

BLOBS = [
    blob.BlobEncoder(compression_level=1).encode_many([plain], [blob_id], level=level)[0]
    for level, blob_id, plain in golden.PACK_BLOBS
]
PLAIN_SIZES = [0, 1, 4095, 4096, 4097, golden.CHUNK_SIZE, blob.PLAIN_SIZE_MAX, (1 << 32) - 1]


def decode_blob(data: bytes) -> object:
    """As a reader would that looks for what the header names, and for one of those that were there."""
    wanted = [(blob_id, level) for level, blob_id, _plain in golden.PACK_BLOBS]
    try:
        header = blob.unpack_header(data)
    except blob.BadBlobError:
        pass
    else:
        wanted.append((header.blob_id, header.level))
    plains = {blob_id: plain for _level, blob_id, plain in golden.PACK_BLOBS}
    for blob_id, level in wanted:
        try:
            plain = blob.decode(data, expected=blob_id, level=level, ids=IDS)
        except blob.BadBlobError:
            continue
        assert IDS.blob_id(plain, level=level) == blob_id
        assert plain == plains.get(blob_id, plain)
    return None


BLOB = Decoder("blob", BLOBS, decode_blob, (), is_map=False)


@st.composite
def forged_blobs(draw: st.DrawFn) -> bytes:
    """A header whose checksum is right, and a payload that is or was a frame of zstd."""
    plain = draw(st.sampled_from([b"", bytes(4096), bytes(golden.CHUNK_SIZE), golden.ZSTD_CHUNK]))
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=draw(st.integers(10, 27)),
            write_content_size=draw(st.booleans()),
            write_checksum=draw(st.booleans()),
        )
    )
    payload = draw(
        st.sampled_from(
            [
                plain,
                compressor.compress(plain),
                compressor.compress(plain) * 2,
                compressor.compress(bytes(blob.PLAIN_SIZE_MAX)),
                # A frame that is to be skipped, of a size that a header may claim.
                b"\x50\x2a\x4d\x18" + (4096).to_bytes(4, "little") + bytes(4096),
                # A frame of one segment that claims 2 ** 60 bytes, and has none.
                b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little"),
            ]
        )
    )
    if draw(st.booleans()):
        payload = draw(mutated([payload]))
    body = struct.pack(
        "<4sBBHII32s",
        blob.MAGIC,
        draw(st.integers(0, 9)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0, 0, 0, 1])),
        draw(st.sampled_from([len(payload), len(payload), len(payload), 0, (1 << 32) - 1])),
        draw(st.sampled_from([len(plain), *PLAIN_SIZES])),
        draw(st.sampled_from([IDS.chunk_id(plain), bytes(32), golden.PACK_BLOBS[1][1]])),
    )
    return body + zlib.crc32(body).to_bytes(4, "little") + payload


@given(hostile_bytes(BLOBS))
@many(200)
def test_any_bytes_are_a_blob_or_refused(data):
    attempt(BLOB, data)


@given(forged_blobs())
@many(250)
def test_forged_blobs_are_refused_or_prove_right(data):
    attempt(BLOB, data)
    assert peak_of(lambda: attempt(BLOB, data)) < PEAK_FREE + 5 * blob.PLAIN_SIZE_MAX


def test_what_a_frame_claims_is_not_allocated():
    """In a child that may not grow: the library itself allocates outside of what Python counts."""
    import resource

    from support.processes import in_a_child

    limit = blob.PLAIN_SIZE_MAX
    compressor = zstandard.ZstdCompressor(write_content_size=True)
    bomb = compressor.compress(bytes(1 << 30))
    assert len(bomb) < 200_000
    headless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(limit))
    payloads = [bomb, headless, b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little")]

    def decode_all() -> None:
        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123
        room = pages * resource.getpagesize() + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        for payload in payloads:
            for plain_size in (limit, 4096):
                header = blob.BlobHeader(
                    level=0,
                    method=blob.METHOD_ZSTD,
                    stored_size=min(len(payload), plain_size),
                    plain_size=plain_size,
                    blob_id=golden.PACK_BLOBS[0][1],
                )
                data = blob.pack_header(header) + payload
                with pytest.raises(blob.BadBlobError):
                    blob.decode(data, expected=header.blob_id, level=0, ids=IDS)

    assert in_a_child(decode_all) == 0


@given(hostile_bytes([golden.NODE, golden.UPPER_NODE]))
@many(50)
def test_any_node_of_the_right_size_has_its_entries(data):
    node = data[: tree.NODE_SIZE].ljust(tree.NODE_SIZE, b"\0")

    assert b"".join(tree.node_entries(node)) == node
    assert 0 <= tree.data_count(node) <= tree.FANOUT


# -- packs -----------------------------------------------------------------------------------------

PACK = (golden.GOLDEN / "pack").read_bytes()
PACK_END = PACK[sum(len(data) for data in BLOBS) :]


def read_pack(data: bytes) -> object:
    storage = MemoryStorage()
    storage.put_new(pack.pack_name(golden.PACK_ID), data)
    entries = read_footer(storage, IDS, golden.PACK_ID, len(data))
    assert all(entry.offset + entry.size <= len(data) for entry in entries)
    return entries


FOOTER = Decoder("pack", [PACK, PACK_END], read_pack, (CorruptObject,), is_map=False)


@given(hostile_bytes([PACK, PACK_END]))
@many(200)
def test_any_bytes_are_a_pack_or_refused(data):
    attempt(FOOTER, data)
    assert_bounded(FOOTER, data)


numbers = st.sampled_from([number for number in NUMBERS if number < 1 << 32]) | st.integers(0, 9000)


@st.composite
def forged_packs(draw: st.DrawFn) -> bytes:
    """Packs whose digest is right, and whose entries are anything."""
    body = draw(st.binary(max_size=300)) + bytes(draw(st.integers(0, 3000)))
    footer = b"".join(
        pack.ENTRY.pack(bytes(32), draw(numbers), draw(numbers), draw(numbers))
        for _ in range(draw(st.integers(0, 5)))
    )
    count = draw(st.sampled_from([len(footer) // pack.ENTRY.size] * 4 + NUMBERS[:-2]))
    size = draw(st.sampled_from([len(body)] * 4 + NUMBERS))
    version, zero = draw(st.sampled_from([(1, 0)] * 5 + [(2, 0), (1, 1)]))
    tail = pack.TAIL.pack(pack.MAGIC, version, zero, count, size)
    return body + footer + tail + IDS.digest("pack", footer + tail + golden.PACK_ID)


@given(forged_packs())
@many(200)
def test_forged_packs_are_refused_or_list_what_can_be(data):
    attempt(FOOTER, data)
    assert_bounded(FOOTER, data)


# -- what processes say to each other ----------------------------------------------------------------

FRAMES = [
    frames.HEADER.pack(kind, offset, len(payload)) + payload
    for kind in frames.KINDS
    for offset, payload in ((0, b""), (65536, b"data"), (0, b'{"error": "Busy", "fields": {}}'))
]


def receive(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        channel = Channel(ours)
        while True:
            frame = channel.receive()
            if frame.kind in frames.DOCUMENTS:
                assert str(_error_of(frame.document()))


WORKER = Decoder("frames", FRAMES, receive, (BackupfsError, Disconnected), is_map=False)


@given(hostile_bytes(FRAMES))
@many(150)
def test_any_bytes_are_frames_or_refused(data):
    with contextlib.suppress(BackupfsError, Disconnected):
        receive(data)


json_words = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["error", "fields", "text", "x"]), json_words)
    | st.fixed_dictionaries(
        {
            "error": st.sampled_from(["Busy", "BackupfsError", "Any", "__name__", "annotations"]),
            "fields": json_words | st.dictionaries(st.sampled_from(["what", "holder"]), json_words),
        }
    )
)
@many(100)
def test_whatever_a_worker_tells_is_an_error_with_a_sentence(told):
    assert isinstance(str(_error_of(told)), str)


@given(st.text(max_size=100) | st.sampled_from(["[" * 1024, "{}", '{"pid": 1e999}', "1" * 1000]))
@many(100)
def test_any_word_of_a_holder_is_read(word):
    found = _holder_of(word)

    assert type(found.process_id) is int


def test_records_of_the_largest_size_are_refused_or_taken_quickly():
    """Time is bounded by the test's own limit: none of these may be quadratic."""
    for value in (
        "[" * 250_000,
        '"' * 250_000,
        '{"a":' * 40_000,
        "{" + '"a":1,' * 35_000 + '"a":1}',
    ):
        fields = codec.decode(encode_record(golden.FULL_RECORD, IDS), size_max=RECORD_SIZE_MAX)
        fields.pop("digest")
        fields["metadata"] = value
        fields["digest"] = IDS.digest("record", codec.encode(fields))
        with pytest.raises(InvalidRecord):
            decode_record(codec.encode(fields), IDS)
    folders = {"version": 1, "folders": ["a" * 14] * 900_000}
    data = codec.encode(folders)
    assert len(data) < FOLDERS_SIZE_MAX
    assert decode_folders(data) == {"a" * 14}
