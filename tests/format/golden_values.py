"""The values behind the golden files, and the script that wrote them once.

A golden file is what version 1 looks like on disk for ever: it is written once and never again, for
a reader of today must read what a writer of the first day wrote. ``write_missing`` therefore only
adds files; where a file of that name is there, it is refused.

    PYTHONPATH=tests python tests/format/golden_values.py NAME…
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from support.differences import as_difference, as_whole_difference

from backupfs.format import blob, pack, tree
from backupfs.format.config import DIFFERENCES, PIECES, RepositoryConfig, encode_config
from backupfs.format.draft_state import DraftState, encode_draft_state
from backupfs.format.ids import IdScheme
from backupfs.format.record import Description, Record, encode_record
from backupfs.repository.images import Root
from backupfs.repository.metadata import MetadataStore
from backupfs.repository.sessions import Plan, encode_ack, encode_plan
from backupfs.storage.memory import MemoryStorage
from backupfs.types import HOLE, BlobId, ObjectName, PackId

GOLDEN = Path(__file__).parent / "golden" / "v1"
IDS = IdScheme()

CHUNK_SIZE = 16 << 10
RAW_CHUNK = hashlib.shake_128(b"backupfs golden raw chunk").digest(CHUNK_SIZE)
ZSTD_CHUNK = b"".join(b"line %05d of a file\n" % number for number in range(1000))[:CHUNK_SIZE]
IMAGE_SIZE = 3 * CHUNK_SIZE - 1000  # raw chunk, hole, compressed chunk with its end cut off
IMAGE = (RAW_CHUNK + bytes(CHUNK_SIZE) + ZSTD_CHUNK)[:IMAGE_SIZE]
LAST_CHUNK = IMAGE[2 * CHUNK_SIZE :].ljust(CHUNK_SIZE, b"\0")

NODE = tree.encode_node([IDS.chunk_id(RAW_CHUNK), HOLE, IDS.chunk_id(LAST_CHUNK)])
NODE_ID = IDS.node_id(NODE, level=1)
UPPER_NODE = tree.encode_node([HOLE] * 127 + [NODE_ID])
UPPER_NODE_ID = IDS.node_id(UPPER_NODE, level=2)

PACK_ID = PackId(bytes(range(16)))
# (level, id, plain bytes) in the order in which they lie in the pack
PACK_BLOBS: list[tuple[int, BlobId, bytes]] = [
    (0, IDS.chunk_id(RAW_CHUNK), RAW_CHUNK),
    (0, IDS.chunk_id(LAST_CHUNK), LAST_CHUNK),
    (1, NODE_ID, NODE),
    (2, UPPER_NODE_ID, UPPER_NODE),
]

# A pack with a difference: it, then the chunk that it is to. By method 2, and one by method 3.
CHANGED_CHUNK = RAW_CHUNK[:4096] + ZSTD_CHUNK[:4096] + RAW_CHUNK[8192:]
PACK_ID_2 = PackId(bytes(range(16, 32)))
PACK_2_BLOBS: list[tuple[BlobId, bytes, BlobId | None]] = [
    (IDS.chunk_id(CHANGED_CHUNK), CHANGED_CHUNK, IDS.chunk_id(RAW_CHUNK)),
    (IDS.chunk_id(RAW_CHUNK), RAW_CHUNK, None),
]

REPOSITORY_ID = "6e0f3d4a-5b1c-4c7e-9a52-0d1f2e3c4b5a"

CONFIG = RepositoryConfig(
    repository_id=REPOSITORY_ID,
    chunk_size=CHUNK_SIZE,
    pack_size=64 << 20,
    compression_level=1,
    created_at=datetime(2026, 11, 22, 14, 0, 0, 123456, tzinfo=UTC),
    optional_features=("some-optional-feature",),
)
CONFIG_WITH_DIFFERENCES = replace(CONFIG, mandatory_features=(DIFFERENCES,), optional_features=())
CONFIG_WITH_PIECES = replace(CONFIG_WITH_DIFFERENCES, mandatory_features=(DIFFERENCES, PIECES))

FULL_RECORD = Record(
    backup_id="0b0e4f2c-1111-4222-8333-444455556666",
    repository_id=REPOSITORY_ID,
    volume="hosts/wéb 01\n",
    name="2026-11-22T142503Z.img",
    size=IMAGE_SIZE,
    chunk_size=CHUNK_SIZE,
    root=NODE_ID,
    height=1,
    kind="full",
    parent_id=None,
    created_at=datetime(2026, 11, 22, 14, 25, 7, 500000, tzinfo=UTC),
    data_timestamp=datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC),
    source_mtime_ns=1795357503000000001,
    source_mode=0o640,
    data_size=2 * CHUNK_SIZE,
    stored_bytes=20_000,
    host="node-1.example",
    metadata={"name": "wéb", "tags": ["a", 1, 2.5, None, True], "volume": {"size": 1}},
    description=Description(
        display_name="nightly",
        display_description="two\nlines",
        availability_zone="nova",
        user_id="user",
        project_id="project",
        container="volumes",
        snapshot_id="9f2c6c2e-0000-4000-8000-000000000000",
        service="backupfs.cinder",
    ),
)

INCREMENTAL_RECORD = Record(
    backup_id="0b0e4f2c-1111-4222-8333-444455557777",
    repository_id=REPOSITORY_ID,
    volume="web01",
    name="2026-11-22T142503Z-2.img",
    size=1 << 40,
    chunk_size=CHUNK_SIZE,
    root=HOLE,
    height=4,
    kind="incremental",
    parent_id="0b0e4f2c-1111-4222-8333-444455556666",
    created_at=datetime(2026, 11, 22, 14, 25, 7, tzinfo=UTC),
    data_timestamp=datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC),
    source_mtime_ns=None,
    source_mode=None,
    data_size=0,
    stored_bytes=0,
    host="",
)

METADATA_VOLUME = "hosts/wéb 01\n"
METADATA = {"owner": "Zoë", "size": 5, "tags": ["a", None, True, 2.5]}
METADATA_NAME = ObjectName("metadata/54c2d1f03c0c3b7d41cc4888b8e3b437/000000000001.msgpack")

PLAN = Plan("00112233445566778899aabbccddeeff", frozenset({PACK_ID, PackId(bytes(16))}))
ACKNOWLEDGED = {Root(NODE_ID, 1), Root(UPPER_NODE_ID, 2)}

DRAFT_STATE = DraftState(
    draft_id="ffeeddccbbaa99887766554433221100",
    name="hosts/wéb 01\n.img",
    size=IMAGE_SIZE,
    root=NODE_ID,
    height=1,
    data_count=2,
    mode=0o640,
    uid=1000,
    gid=(1 << 32) - 2,
    mtime_ns=1795357503000000001,
    written=True,
    changed=True,
    interrupted=False,
    held="its writer was killed",
    stored_bytes=20_000,
    next_id="0b0e4f2c-1111-4222-8333-444455558888",
    published_id="0b0e4f2c-1111-4222-8333-444455556666",
    changed_at=datetime(2026, 11, 22, 14, 25, 7, tzinfo=UTC),
    sequence=7,
)


def golden_metadata() -> bytes:
    """What a volume's first put of metadata stores."""
    storage = MemoryStorage()
    MetadataStore(storage, IDS).put(METADATA_VOLUME, METADATA)
    return storage.get(METADATA_NAME, size_max=1 << 20)


def golden_pack() -> bytes:
    """The pack as this machine's zstd writes it: other versions of it may compress otherwise."""
    encoder = blob.BlobEncoder(compression_level=1)
    blobs, entries = b"", []
    for level, blob_id, plain in PACK_BLOBS:
        (encoded,) = encoder.encode_many([plain], [blob_id], level=level)
        entry = pack.PackEntry(blob_id=blob_id, offset=len(blobs), size=len(encoded), level=level)
        entries.append(entry)
        blobs += encoded
    return blobs + pack.encode_footer(PACK_ID, entries, blobs_size=len(blobs), ids=IDS)


def golden_pack_2(difference: bytes) -> bytes:
    """The same of a pack of version 2, with this blob for the difference."""
    encoder = blob.BlobEncoder(compression_level=1)
    blobs, entries = b"", []
    for blob_id, plain, base in PACK_2_BLOBS:
        encoded = difference
        if base is None:
            (encoded,) = encoder.encode_many([plain], [blob_id], level=0)
        size = len(encoded)
        entries.append(
            pack.PackEntry(blob_id=blob_id, offset=len(blobs), size=size, level=0, base=base)
        )
        blobs += encoded
    return blobs + pack.encode_footer(PACK_ID_2, entries, blobs_size=len(blobs), ids=IDS)


def golden_files() -> dict[str, bytes]:
    """Content of each golden file, by name, as the code of today would write it."""
    return {
        "acknowledgement.msgpack": encode_ack(ACKNOWLEDGED),
        "config": encode_config(CONFIG, IDS),
        "config-with-differences": encode_config(CONFIG_WITH_DIFFERENCES, IDS),
        "config-with-pieces": encode_config(CONFIG_WITH_PIECES, IDS),
        "draft-state.msgpack": encode_draft_state(DRAFT_STATE, IDS),
        "metadata.msgpack": golden_metadata(),
        "node": NODE,
        "pack": golden_pack(),
        "pack-with-a-difference": golden_pack_2(as_whole_difference(CHANGED_CHUNK, RAW_CHUNK)),
        "pack-with-pieces": golden_pack_2(as_difference(CHANGED_CHUNK, RAW_CHUNK)),
        "plan.msgpack": encode_plan(PLAN),
        "record-full.msgpack": encode_record(FULL_RECORD, IDS),
        "record-incremental.msgpack": encode_record(INCREMENTAL_RECORD, IDS),
    }


def write_missing(folder: Path, names: list[str]) -> None:
    """Write the golden files ``names``. Raises: FileExistsError; then that file is as it was."""
    files = golden_files()
    for name in names:
        with (folder / name).open("xb") as file:
            file.write(files[name])


if __name__ == "__main__":
    write_missing(GOLDEN, sys.argv[1:])
