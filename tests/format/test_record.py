"""Records: whatever comes in, what is taken is exactly what somebody wrote."""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import pytest
from golden_values import FULL_RECORD, INCREMENTAL_RECORD
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.errors import InvalidRecord
from backupfs.format import codec, tree
from backupfs.format import record as record_module
from backupfs.format.ids import IdScheme
from backupfs.format.names import backup_name, check_volume_name
from backupfs.format.record import (
    METADATA_SIZE_MAX,
    RECORD_SIZE_MAX,
    Description,
    Record,
    canonical_backup_id,
    decode_record,
    encode_record,
    is_backup_id,
    record_name,
)
from backupfs.types import HOLE, IMAGE_SIZE_MAX, BlobId, ceil_div

IDS = IdScheme()
ENCODED = encode_record(FULL_RECORD, IDS)

MOMENTS = st.datetimes(
    min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)
)
SECONDS = MOMENTS.map(lambda moment: moment.replace(microsecond=0))
UUIDS = st.uuids().map(str)
SIZES = st.integers(0, (1 << 63) - 1)
VOLUMES = st.text(min_size=1, max_size=60).filter(lambda text: not check_volume_name(text))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
DESCRIPTIONS = st.builds(
    Description,
    **{field.name: st.none() | st.text(max_size=20) for field in dataclasses.fields(Description)},
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    size = draw(st.integers(0, IMAGE_SIZE_MAX))
    chunk_size = 1 << draw(st.integers(14, 22))
    data_timestamp = draw(SECONDS)
    taken = {backup_name(data_timestamp, ())} if draw(st.booleans()) else ()
    return Record(
        backup_id=draw(UUIDS),
        repository_id=draw(UUIDS),
        volume=draw(VOLUMES),
        name=backup_name(data_timestamp, taken),
        size=size,
        chunk_size=chunk_size,
        root=draw(st.just(HOLE) | st.binary(min_size=32, max_size=32).map(BlobId)),
        height=tree.height(size, chunk_size=chunk_size),
        kind=draw(st.sampled_from(["full", "incremental"])),
        parent_id=draw(st.none() | UUIDS),
        created_at=draw(MOMENTS),
        data_timestamp=data_timestamp,
        source_mtime_ns=draw(st.none() | st.integers(-(1 << 63), (1 << 63) - 1)),
        source_mode=draw(st.none() | st.integers(0, 0o7777)),
        data_size=draw(st.integers(0, size)),
        stored_bytes=draw(SIZES),
        host=draw(st.text(max_size=60)),
        metadata=draw(st.none() | st.dictionaries(st.text(max_size=5), JSON, max_size=4)),
        description=draw(DESCRIPTIONS),
    )


def sealed(record: Record = FULL_RECORD, /, **changed: Any) -> bytes:
    """A record with fields changed or added as anyone can make it: its digest is right."""
    value = codec.decode(encode_record(record, IDS), size_max=RECORD_SIZE_MAX)
    del value["digest"]
    value.update(changed)
    value["digest"] = IDS.digest("record", codec.encode(value))
    return codec.encode(value)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRecord) as caught:
        decode_record(data, IDS)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value.reason


# -- round trip --------------------------------------------------------------------------------


@given(records())
@settings(max_examples=100, deadline=None)
def test_a_record_comes_back_as_it_was(record):
    data = encode_record(record, IDS)

    assert len(data) <= RECORD_SIZE_MAX
    assert decode_record(data, IDS) == record


@given(records())
@settings(max_examples=30, deadline=None)
def test_a_record_has_one_encoding(record):
    data = encode_record(record, IDS)

    assert encode_record(decode_record(data, IDS), IDS) == data


def test_a_sealed_record_without_changes_is_the_record():
    assert sealed() == ENCODED


def test_a_record_of_all_that_is_allowed_fits():
    metadata = {"": "x" * (METADATA_SIZE_MAX - len('{"": ""}'))}
    widest = dict.fromkeys((field.name for field in dataclasses.fields(Description)), "é" * 2048)
    record = dataclasses.replace(
        FULL_RECORD,
        volume="/".join(["x" * 255] * 16),
        metadata=metadata,
        description=Description(**widest),
        host="h" * 255,
    )

    data = encode_record(record, IDS)

    assert len(data) < RECORD_SIZE_MAX
    assert decode_record(data, IDS) == record


@given(records())
@settings(max_examples=50, deadline=None)
def test_both_ways_of_decoding_understand_the_same(record):
    data = encode_record(record, IDS)

    assert record_module._decode_checked(data, IDS) == record
    assert record_module._decode_common(data, IDS) == (
        record if len(data) <= codec.SMALL_SIZE else None
    )


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [FULL_RECORD, INCREMENTAL_RECORD], ids=["full", "incremental"])
def test_every_flipped_bit_is_refused(record):
    data = bytearray(encode_record(record, IDS))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            refusal(data)
            data[position] ^= 1 << bit

    assert decode_record(data, IDS) == record


def test_a_record_cut_anywhere_or_followed_by_more_is_refused():
    for size in range(len(ENCODED)):
        refusal(ENCODED[:size])
    refusal(ENCODED + b"\0")
    refusal(ENCODED + ENCODED)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_garbage_is_no_record(data):
    refusal(data)


def test_a_record_of_another_key_is_refused():
    assert "digest" in refusal(encode_record(FULL_RECORD, IdScheme(b"k" * 32)))


def test_a_digest_of_another_domain_is_refused():
    value = codec.decode(ENCODED, size_max=RECORD_SIZE_MAX)
    del value["digest"]
    value["digest"] = IDS.digest("config", codec.encode(value))

    assert "digest" in refusal(codec.encode(value))


# -- what a sealed record may say --------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 255, 1 << 62])
def test_an_unknown_version_is_refused_by_number(version):
    assert f"version {version} " in refusal(sealed(version=version))


def test_a_later_version_is_named_before_its_digest_is_checked():
    value = codec.decode(sealed(version=2, extra=1), size_max=RECORD_SIZE_MAX)
    del value["digest"]

    assert "version 2 " in refusal(codec.encode(value))


def test_a_field_that_does_not_belong_is_refused():
    assert "do not belong" in refusal(sealed(comment="hello"))


@pytest.mark.parametrize("key", sorted(set(codec.decode(ENCODED, size_max=RECORD_SIZE_MAX))))
def test_a_record_without_one_of_its_fields_is_refused(key):
    value = codec.decode(ENCODED, size_max=RECORD_SIZE_MAX)
    del value[key]
    if key != "digest":
        del value["digest"]
        value["digest"] = IDS.digest("record", codec.encode(value))

    refusal(codec.encode(value))


def test_fields_in_another_order_are_refused():
    value = codec.decode(ENCODED, size_max=RECORD_SIZE_MAX)
    del value["digest"]
    turned = dict(reversed(value.items()))
    turned["digest"] = IDS.digest("record", codec.encode(turned))

    assert "do not belong" in refusal(codec.encode(turned))


def test_a_record_that_is_not_canonical_is_refused():
    assert ENCODED[0] == 0xDE  # a map of sixteen fields or more, counted in 16 bits
    assert "canonical" in refusal(b"\xdf\0\0" + ENCODED[1:])


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "../../etc/passwd"},
        {"id": "0B0E4F2C-1111-4222-8333-444455556666"},
        {"id": "0b0e4f2c111142228333444455556666"},
        {"id": "0b0e4f2c-1111-4222-8333-44445555666"},
        {"id": "0b0e4f2c-1111-4222-8333-44445555666\n"},
        {"id": None},
        {"id": b"0b0e4f2c-1111-4222-8333-444455556666"},
        {"repository_id": "../up"},
        {"repository_id": "x" * 100},
        {"parent_id": "../up"},
        {"parent_id": ""},
        {"parent_id": 5},
        {"volume": ""},
        {"volume": "../up"},
        {"volume": "/etc/passwd"},
        {"volume": "a/../../b"},
        {"volume": "a\0b"},
        {"volume": "a//b"},
        {"volume": "a/"},
        {"volume": "x" * 256},
        {"volume": "/".join(["x"] * 2049)},
        {"volume": "latest.img"},
        {"volume": "a/2026-11-22T142503Z.img"},
        {"volume": "a/metadata.json/b"},
        {"volume": b"bytes"},
        {"name": ""},
        {"name": "latest.img"},
        {"name": "../2026-11-22T142503Z.img"},
        {"name": "2026-11-22T142503Z.img\n"},
        {"name": "2026-11-22T142503Z"},
        {"name": "2026-11-22T142503Z-1.img"},
        {"name": "٢٠٢٦-11-22T142503Z.img"},
        {"kind": "differential"},
        {"kind": ""},
        {"kind": "FULL"},
        {"size": -1},
        {"size": IMAGE_SIZE_MAX + 1},
        {"size": 1.0},
        {"size": True},
        {"chunk_size": 8 << 10},
        {"chunk_size": 8 << 20},
        {"chunk_size": 3 << 14},
        {"chunk_size": 0},
        {"height": 0},
        {"height": 2},
        {"height": 16},
        {"root": bytes(31)},
        {"root": bytes(33)},
        {"root": "x" * 32},
        {"root": None},
        {"created_at": "yesterday"},
        {"created_at": ""},
        {"created_at": "2026-11-22T14:25:07"},
        {"created_at": "2026-11-22T14:25:07Z"},
        {"created_at": "2026-11-22T15:25:07+01:00"},
        {"created_at": "2026-11-22T14:25:07.000000+00:00"},
        {"created_at": "0001-01-01T00:00:00+23:59"},
        {"created_at": "9999-12-31T23:59:59-23:59"},
        {"data_timestamp": "2026-13-22T14:25:07+00:00"},
        {"data_timestamp": None},
        {"source_mtime_ns": 1 << 63},
        {"source_mtime_ns": "now"},
        {"source_mode": 0o10000},
        {"source_mode": -1},
        {"data_size": -1},
        {"data_size": 1 << 63},
        {
            "data_size": ceil_div(FULL_RECORD.size, FULL_RECORD.chunk_size) * FULL_RECORD.chunk_size
            + 1
        },
        {"stored_bytes": None},
        {"host": "h" * 256},
        {"host": None},
        {"metadata": {}},
        {"metadata": "[]"},
        {"metadata": "null"},
        {"metadata": ""},
        {"metadata": '{"a": 1'},
        {"metadata": '{"a":1}'},
        {"metadata": '{"b": 1, "a": 1}'},
        {"metadata": '{"a": 1, "a": 1}'},
        {"metadata": '{"a": 1e400}'},
        {"metadata": '{"a": NaN}'},
        {"metadata": '{"a": -Infinity}'},
        {"metadata": '{"a": ' + "9" * 5000 + "}"},
        {"metadata": '{"a": "é"}'},
        {"metadata": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"},
        {"metadata": '{"a": "' + "x" * METADATA_SIZE_MAX + '"}'},
        {"description": {}},
        {"description": None},
        {"description": {"display_name": "x"}},
        {"description": {"self": "x"}},
        {"description": {"a\nforged line": None}},
        {"description": {**dataclasses.asdict(Description()), "display_name": 5}},
        {"description": {**dataclasses.asdict(Description()), "display_name": "x" * 4097}},
        {"description": {**dataclasses.asdict(Description()), "more": None}},
        {"description": {**dataclasses.asdict(Description()), b"service": None}},
    ],
    ids=lambda changed: repr(changed)[:60].encode("ascii", "replace").decode(),
)
def test_a_record_that_says_what_cannot_be_is_refused(changed):
    refusal(sealed(**changed))


def test_data_may_be_counted_in_whole_chunks():
    """As in records of before data_size was cut to the image's end."""
    whole = ceil_div(FULL_RECORD.size, FULL_RECORD.chunk_size) * FULL_RECORD.chunk_size
    assert whole > FULL_RECORD.size

    assert decode_record(sealed(data_size=whole), IDS).data_size == whole


def test_metadata_of_every_depth_is_taken_or_refused():
    """Reading and writing JSON give up at depths of their own; neither may escape as a surprise."""
    for depth in range(100, 2000, 7):
        text = '{"a": ' * depth + "1" + "}" * depth
        try:
            record = decode_record(sealed(metadata=text), IDS)
        except InvalidRecord:
            continue
        assert encode_record(record, IDS) == sealed(metadata=text)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_taken_as_it_is_or_refused(data):
    keys = list(codec.decode(ENCODED, size_max=RECORD_SIZE_MAX))
    key = data.draw(st.sampled_from(keys[:-1]))
    item = data.draw(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(max_size=40)
        | st.binary(max_size=40)
        | st.lists(st.integers(0, 9), max_size=3)
        | st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=3), max_size=3)
    )
    forged = sealed(**{key: item})

    try:
        record = decode_record(forged, IDS)
    except InvalidRecord as error:
        assert len(str(error).splitlines()) == 1
        return
    assert encode_record(record, IDS) == forged


def test_oversize_is_refused_unread():
    assert "more than" in refusal(sealed(padding=bytes(RECORD_SIZE_MAX)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(sealed(metadata="[" * (METADATA_SIZE_MAX - 1)), id="deep json"),
        pytest.param(sealed(metadata='{"a": 1' * 30_000), id="broken json"),
        pytest.param(sealed(description={str(n): None for n in range(4096)}), id="many fields"),
        pytest.param(sealed(description={"a": [[]] * 100_000}), id="many lists"),
        pytest.param(sealed(metadata="9" * METADATA_SIZE_MAX), id="a long number"),
        pytest.param(sealed(padding=bytes(1_000_000)), id="a large extra field"),
        pytest.param(bytes(64 << 20), id="64 MiB of zeros"),
    ],
)
def test_a_hostile_record_costs_little(data):
    tracemalloc.start()
    started = time.process_time()
    try:
        refusal(data)
        elapsed = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 16 << 20
    assert elapsed < 5


# -- ids and names -----------------------------------------------------------------------------


def test_a_record_is_named_by_its_id():
    assert FULL_RECORD.object_name == record_name(FULL_RECORD.backup_id)
    assert FULL_RECORD.object_name == "records/0b0e4f2c-1111-4222-8333-444455556666.msgpack"


@given(st.uuids())
def test_a_caller_may_write_a_uuid_as_it_likes(value):
    for text in (str(value), str(value).upper(), value.hex, f"{{{value}}}", value.urn):
        assert canonical_backup_id(text) == str(value)


@pytest.mark.parametrize("text", ["", "x", "../" * 12, "0b0e4f2c-1111-4222-8333-44445555666g"])
def test_what_is_no_uuid_is_no_backup_id(text):
    assert not is_backup_id(text)
    with pytest.raises(InvalidRecord):
        canonical_backup_id(text)


def test_metadata_is_kept_as_sorted_json():
    value = codec.decode(ENCODED, size_max=RECORD_SIZE_MAX)

    assert value["metadata"] == json.dumps(FULL_RECORD.metadata, sort_keys=True)
