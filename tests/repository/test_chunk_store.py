"""Storing chunks: what is there already is not stored again, unless nobody may rely on it."""

from __future__ import annotations

import pytest
from support.images import CHUNK_SIZE, noise

from backupfs.errors import StorageUnavailable
from backupfs.repository import chunks as chunks_module
from backupfs.repository.rebuild import list_packs
from backupfs.types import HOLE

CHUNKS = [noise(CHUNK_SIZE, seed=seed) for seed in range(3)]


def test_equal_chunks_are_stored_once(parts):
    first = parts.store.store_chunks([*CHUNKS, *CHUNKS])
    second = parts.store.store_chunks(CHUNKS)
    parts.store.seal(since=0)
    third = parts.store.store_chunks(CHUNKS)

    assert first.ids == [*second.ids, *second.ids]
    assert first.added_size == sum(len(chunk) + 52 for chunk in CHUNKS)
    assert second.added_size == third.added_size == 0
    assert len(list_packs(parts.storage)) == 1


def test_zeros_are_holes_and_cost_nothing(parts):
    batch = parts.store.store_chunks([bytes(CHUNK_SIZE), CHUNKS[0], bytearray(CHUNK_SIZE)])

    assert batch.ids[0] == batch.ids[2] == HOLE
    assert parts.reader.chunks(batch.ids)[0] == bytes(CHUNK_SIZE)
    parts.store.seal(since=0)
    assert parts.index.entry_count() == 1


@pytest.mark.parametrize("position", [0, CHUNK_SIZE // 2, CHUNK_SIZE - 1])
def test_one_byte_makes_the_difference_to_zeros(parts, position):
    chunk = bytearray(CHUNK_SIZE)
    chunk[position] = 1

    (blob_id,) = parts.store.store_chunks([chunk]).ids

    assert blob_id != HOLE
    assert parts.reader.chunks([blob_id]) == [bytes(chunk)]


def test_nothing_relies_on_condemned_packs(parts):
    (blob_id,) = parts.store.store_chunks(CHUNKS[:1]).ids
    parts.store.seal(since=0)
    condemned = parts.index.find(blob_id).pack_id
    parts.avoided.packs = frozenset([condemned])

    again = parts.store.store_chunks(CHUNKS[:1])
    parts.store.seal(since=0)

    assert again.added_size > 0
    assert parts.index.find(blob_id).pack_id != condemned
    assert parts.store.store_chunks(CHUNKS[:1]).added_size == 0


def test_nothing_relies_on_damaged_blobs(parts):
    (blob_id,) = parts.store.store_chunks(CHUNKS[:1]).ids
    parts.store.seal(since=0)
    parts.avoided.blobs = frozenset([blob_id])

    assert parts.store.store_chunks(CHUNKS[:1]).added_size > 0


def test_nodes_of_different_levels_are_different_blobs(parts):
    node = noise(4096, seed=9)

    low = parts.store.store_nodes([node], level=1)
    high = parts.store.store_nodes([node], level=2)

    assert low.ids != high.ids
    assert parts.reader.node(low.ids[0], 1) == parts.reader.node(high.ids[0], 2) == node


def test_a_batch_that_cannot_be_compressed_leaves_no_claim_behind(parts, monkeypatch):
    def fails(*_arguments, **_named):
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(chunks_module.BlobEncoder, "encode_many", fails)
        with pytest.raises(MemoryError):
            parts.store.store_chunks(CHUNKS)
    with pytest.raises(StorageUnavailable):
        parts.store.check(since=0)

    batch = parts.store.store_chunks(CHUNKS)

    assert batch.added_size > 0
    parts.store.seal(since=parts.store.failures)
    assert parts.reader.chunks(batch.ids) == CHUNKS


def test_what_a_closed_packer_does_not_take_is_claimed_by_nobody(parts):
    """Or a seal would wait for it for ever."""
    parts.packer.close()

    with pytest.raises(StorageUnavailable):
        parts.store.store_chunks([noise(CHUNK_SIZE, seed=1)])

    assert not parts.packer._claimed
