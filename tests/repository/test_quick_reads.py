"""Reads that do not wait: the same proven bytes, or nothing, and never an error of their own."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from support.damage import flip
from support.images import CHUNK_SIZE, back_up, noise
from test_blob_reader import ids_of, place_of

from backupfs.errors import CorruptBlob
from backupfs.format.pack import pack_name
from backupfs.repository.images import Root
from backupfs.repository.quick_reads import QuickRead
from backupfs.repository.repository import Repository
from backupfs.service import Record, Service

IMAGE = noise(200 * CHUNK_SIZE, seed=3)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder on a disk: a file system in memory cannot read without waiting."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    file = os.open(probe, os.O_RDONLY)
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        pytest.skip(f"reads without waiting are refused here: {error}")
    finally:
        os.close(file)
    return tmp_path


def root_of(record: Record) -> Root:
    return Root(record.root, record.height)


def prepared(service: Service, data: bytes = IMAGE) -> Record:
    """A backup whose nodes, places and packs are known, and whose chunks are in no cache."""
    record = back_up(service, data)
    reads = service.repository.quick_reads
    image = service.open_image(record)
    for chunk_index in range(len(data) // CHUNK_SIZE):
        image.read(chunk_index * CHUNK_SIZE, 1)  # opens its pack
        reads.learn(root_of(record), chunk_index)
    forget_chunks(service, record)
    return record


def forget_chunks(service: Service, record: Record) -> None:
    for blob_id in ids_of(service, record):
        service.repository.reader._chunks.drop(blob_id)


def read_quickly(repository: Repository, record: Record, chunk_index: int) -> bytes | None:
    """A chunk, however often it must be asked for; None where it is declined."""
    begun = repository.quick_reads.begin(root_of(record), chunk_index)
    if not isinstance(begun, QuickRead):
        return begun
    deadline = time.monotonic() + 10
    try:
        while not begun.attempt():
            assert time.monotonic() < deadline
        return begun.chunk
    finally:
        begun.close()


def test_every_chunk_is_what_was_backed_up(service):
    record = prepared(service, IMAGE + bytes(3 * CHUNK_SIZE) + IMAGE[:5])

    for chunk_index in range(204):
        expected = (IMAGE + bytes(3 * CHUNK_SIZE) + IMAGE[:5])[chunk_index * CHUNK_SIZE :]
        found = read_quickly(service.repository, record, chunk_index)
        assert found is not None
        assert found[: len(expected)] == expected[:CHUNK_SIZE]


def test_what_is_not_in_memory_is_declined_and_learnt(service):
    record = back_up(service, IMAGE)
    with Service.open(service.location, ambient=service.repository.ambient) as other:
        repository = other.repository
        assert read_quickly(repository, record, 3) is None
        assert not repository.quick_reads.is_known(root_of(record), 3)

        other.open_image(record).read(3 * CHUNK_SIZE, 1)  # opens the pack
        repository.reader._chunks.drop(ids_of(other, record)[3])
        repository.quick_reads.learn(root_of(record), 3)

        assert repository.quick_reads.is_known(root_of(record), 3)
        assert read_quickly(repository, record, 3) == IMAGE[3 * CHUNK_SIZE : 4 * CHUNK_SIZE]


@pytest.mark.parametrize("within", [0, 5, 10, 20, 60, 2000], ids=lambda within: f"byte {within}")
def test_damage_is_declined_and_has_one_judge(location, service, within):
    record = prepared(service)
    flip(location, place_of(service, ids_of(service, record)[7]), within=within)

    assert read_quickly(service.repository, record, 7) is None
    with pytest.raises(CorruptBlob):
        service.open_image(record).read(7 * CHUNK_SIZE, 1)
    service.repository.quick_reads.learn(root_of(record), 7)
    assert read_quickly(service.repository, record, 7) is None
    service.repository.quick_reads.learn(root_of(record), 8)
    assert read_quickly(service.repository, record, 8) == IMAGE[8 * CHUNK_SIZE : 9 * CHUNK_SIZE]


def test_a_pack_that_gc_moved_is_declined_until_its_new_place_is_learnt(location, service):
    record = prepared(service)
    place = place_of(service, ids_of(service, record)[7])
    service.repository.storage.delete(pack_name(place.pack_id))
    service.repository.index.forget_packs([place.pack_id])
    service.repository.refresh_index()

    assert read_quickly(service.repository, record, 7) is None
    assert not service.repository.quick_reads.is_known(root_of(record), 7)


def test_a_pack_that_was_cut_off_never_ends_a_read(location, service):
    record = prepared(service)
    place = place_of(service, ids_of(service, record)[7])
    os.truncate(Path(location) / pack_name(place.pack_id), place.offset + 10)
    begun = service.repository.quick_reads.begin(root_of(record), 7)
    assert isinstance(begun, QuickRead)

    assert not any(begun.attempt() for _ in range(100))

    begun.close()


def test_want_of_descriptors_is_declined(service, monkeypatch):
    record = prepared(service)

    def no_descriptor(_file):
        raise OSError(errno.EMFILE, "none is left")

    monkeypatch.setattr(os, "dup", no_descriptor)

    assert read_quickly(service.repository, record, 7) is None


def test_a_disk_that_fails_or_cannot_read_without_waiting_is_left_to_others(service, monkeypatch):
    record = prepared(service)

    def refused(*_arguments):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "preadv", refused)

    assert read_quickly(service.repository, record, 7) is None


def test_a_lock_that_is_held_while_a_pack_is_opened_is_not_waited_for(service):
    record = prepared(service)

    with service.repository.storage._lock:
        assert read_quickly(service.repository, record, 7) is None

    assert read_quickly(service.repository, record, 7) == IMAGE[7 * CHUNK_SIZE : 8 * CHUNK_SIZE]


def test_a_tree_too_low_for_its_image_is_declined(service):
    record = prepared(service)

    assert service.repository.quick_reads.begin(Root(record.root, 1), 1000) is None


def test_a_difference_is_declined_and_the_chunks_beside_it_are_not(service):
    back_up(service, IMAGE)
    changed = IMAGE[:100] + b"changed" + IMAGE[107:]
    record = prepared(service, changed)
    assert place_of(service, ids_of(service, record)[0]).base is not None

    assert read_quickly(service.repository, record, 0) is None

    assert service.repository.quick_reads.is_known(root_of(record), 0)
    assert read_quickly(service.repository, record, 1) == IMAGE[CHUNK_SIZE : 2 * CHUNK_SIZE]
    assert service.open_image(record).read(0, CHUNK_SIZE) == changed[:CHUNK_SIZE]
