"""Version 1 as it was written on its first day: it decodes to the same values, and encodes back."""

from __future__ import annotations

import golden_values
import pytest
from golden_values import GOLDEN, IDS

from backupfs.format import blob, codec, pack, tree
from backupfs.format.config import decode_config, encode_config
from backupfs.format.draft_state import decode_draft_state, encode_draft_state
from backupfs.format.record import decode_record, encode_record
from backupfs.repository.metadata import MetadataStore
from backupfs.repository.sessions import decode_ack, decode_plan, encode_ack, encode_plan, plan_name
from backupfs.storage.memory import MemoryStorage
from backupfs.types import BlobId


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_every_golden_file_has_a_value_and_every_value_a_file():
    assert {path.name for path in GOLDEN.iterdir()} == set(golden_values.golden_files())


def test_golden_files_are_never_overwritten(tmp_path):
    (tmp_path / "config").write_bytes(b"as it was")

    with pytest.raises(FileExistsError):
        golden_values.write_missing(tmp_path, ["config"])

    assert (tmp_path / "config").read_bytes() == b"as it was"


def test_golden_config_decodes_and_encodes_back():
    assert decode_config(golden("config"), IDS) == golden_values.CONFIG
    assert encode_config(golden_values.CONFIG, IDS) == golden("config")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config-with-differences", golden_values.CONFIG_WITH_DIFFERENCES),
        ("config-with-pieces", golden_values.CONFIG_WITH_PIECES),
    ],
)
def test_golden_configs_with_features_decode_and_encode_back(name, config):
    assert decode_config(golden(name), IDS) == config
    assert encode_config(config, IDS) == golden(name)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("record-full.msgpack", golden_values.FULL_RECORD),
        ("record-incremental.msgpack", golden_values.INCREMENTAL_RECORD),
    ],
)
def test_golden_records_decode_and_encode_back(name, record):
    assert decode_record(golden(name), IDS) == record
    assert encode_record(record, IDS) == golden(name)


def test_golden_node_decodes_and_encodes_back():
    entries = tree.node_entries(golden("node"))

    assert entries == tree.node_entries(golden_values.NODE)
    assert tree.encode_node(entries) == golden("node")
    assert tree.data_count(golden("node")) == 2


def golden_entries() -> list[pack.PackEntry]:
    data = golden("pack")
    size = pack.footer_size(data[-pack.TAIL_SIZE :])
    return pack.decode_footer(golden_values.PACK_ID, data[-size:], pack_size=len(data), ids=IDS)


def test_golden_pack_lists_and_holds_its_blobs():
    data = golden("pack")

    decoded = [(entry.level, entry.blob_id, decode_at(data, entry)) for entry in golden_entries()]

    assert decoded == golden_values.PACK_BLOBS


def decode_at(data: bytes, entry: pack.PackEntry) -> bytes:
    stored = data[entry.offset : entry.offset + entry.size]
    return blob.decode(stored, expected=entry.blob_id, level=entry.level, ids=IDS)


def test_golden_pack_holds_blobs_of_both_methods():
    data = golden("pack")

    headers = [blob.unpack_header(data[entry.offset :]) for entry in golden_entries()]

    methods = [(header.level, header.method) for header in headers]
    raw, zstd = blob.METHOD_RAW, blob.METHOD_ZSTD
    assert methods == [(0, raw), (0, zstd), (1, raw), (2, raw)]


def test_golden_pack_is_written_the_same_today_given_its_payloads():
    """Payloads are taken from the file: another version of zstd may compress to other bytes, all of
    which are valid. Headers, raw payloads, footer and tail do not depend on it."""
    data, written, entries = golden("pack"), b"", []

    for old, (level, blob_id, plain) in zip(
        golden_entries(), golden_values.PACK_BLOBS, strict=True
    ):
        payload = data[old.offset + blob.HEADER.size : old.offset + old.size]
        raw = payload == plain
        header = blob.BlobHeader(
            level=level,
            method=blob.METHOD_RAW if raw else blob.METHOD_ZSTD,
            stored_size=len(payload),
            plain_size=len(plain),
            blob_id=blob_id,
        )
        size = blob.HEADER.size + len(payload)
        entries.append(pack.PackEntry(blob_id=blob_id, offset=len(written), size=size, level=level))
        written += blob.pack_header(header) + payload
    written += pack.encode_footer(golden_values.PACK_ID, entries, blobs_size=len(written), ids=IDS)

    assert written == data


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("pack-with-a-difference", blob.METHOD_WHOLE_DIFFERENCE),
        ("pack-with-pieces", blob.METHOD_DIFFERENCE),
    ],
)
def test_golden_packs_with_a_difference_hold_it_and_its_base(name, method):
    data = golden(name)
    size = pack.footer_size(data[-pack.TAIL_SIZE :])
    entries = pack.decode_footer(
        golden_values.PACK_ID_2, data[-size:], pack_size=len(data), ids=IDS
    )
    stored = {entry.blob_id: data[entry.offset : entry.offset + entry.size] for entry in entries}

    def plain(blob_id: BlobId) -> bytes:
        return blob.decode(stored[blob_id], expected=blob_id, level=0, ids=IDS, find_base=plain)

    decoded = [(entry.blob_id, plain(entry.blob_id), entry.base) for entry in entries]
    assert decoded == golden_values.PACK_2_BLOBS
    assert blob.unpack_header(data).method == method
    assert [blob.base_of(stored[entry.blob_id]) for entry in entries] == [
        entry.base for entry in entries
    ]
    footer = pack.encode_footer(
        golden_values.PACK_ID_2, entries, blobs_size=len(data) - size, ids=IDS
    )
    assert footer == data[-size:]


def test_golden_record_restores_its_image_from_the_golden_pack():
    """The whole way from a record to an image's bytes, with nothing but the two files."""
    record = decode_record(golden("record-full.msgpack"), IDS)
    stored = {entry.blob_id: entry for entry in golden_entries()}
    data, image = golden("pack"), b""

    for chunk_index in range(tree.chunk_count(record.size, chunk_size=record.chunk_size)):
        node = decode_at(data, stored[record.root])
        chunk_id = tree.node_entry(node, tree.slot(chunk_index, level=1))
        hole = bytes(record.chunk_size)
        image += decode_at(data, stored[chunk_id]) if any(chunk_id) else hole

    assert image[: record.size] == golden_values.IMAGE


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "draft-state.msgpack",
        "metadata.msgpack",
        "record-full.msgpack",
        "record-incremental.msgpack",
    ],
)
def test_golden_maps_are_canonical_and_end_with_their_digest(name):
    value = codec.decode(golden(name), size_max=1 << 20)

    assert list(value)[-1] == "digest"
    assert codec.encode(value) == golden(name)


def test_golden_metadata_is_read_and_written_again():
    storage = MemoryStorage()
    storage.put_new(golden_values.METADATA_NAME, golden("metadata.msgpack"))
    store = MetadataStore(storage, IDS)

    assert store.get(golden_values.METADATA_VOLUME) == golden_values.METADATA
    assert golden_values.golden_metadata() == golden("metadata.msgpack")


def test_golden_plan_decodes_and_encodes_back():
    name = plan_name(golden_values.PLAN.plan_id)
    assert decode_plan(golden("plan.msgpack"), name) == golden_values.PLAN
    assert encode_plan(golden_values.PLAN) == golden("plan.msgpack")


def test_golden_acknowledgement_decodes_and_encodes_back():
    data = golden("acknowledgement.msgpack")

    assert decode_ack(data, "acknowledgement") == golden_values.ACKNOWLEDGED
    assert encode_ack(golden_values.ACKNOWLEDGED) == data


def test_golden_draft_state_decodes_and_encodes_back():
    data = golden("draft-state.msgpack")
    chunk_size = golden_values.CHUNK_SIZE

    assert decode_draft_state(data, "draft", IDS, chunk_size=chunk_size) == (
        golden_values.DRAFT_STATE
    )
    assert encode_draft_state(golden_values.DRAFT_STATE, IDS) == data
