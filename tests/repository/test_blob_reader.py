"""Reading blobs: proven bytes or an error, and only for what is really damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.damage import flip
from support.faulty import UNAVAILABLE, FaultyStorage, SteppedStorage
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored
from support.parts import Parts

from backupfs.ambient import Ambient
from backupfs.errors import CorruptBlob, DamageError, MissingBlob, StorageUnavailable
from backupfs.format.pack import pack_name
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.index import BlobLocation
from backupfs.repository.rebuild import list_packs
from backupfs.repository.repository import Repository
from backupfs.service import Record, Service
from backupfs.types import BlobId

IMAGE = noise(40 * CHUNK_SIZE, seed=1)


def ids_of(service: Service, record: Record) -> list[BlobId]:
    count = -(-record.size // CHUNK_SIZE)
    return leaf_ids(service.repository.reader, Root(record.root, record.height), 0, count)


def place_of(service: Service, blob_id: BlobId) -> BlobLocation:
    location = service.repository.index.find(blob_id)
    assert location is not None
    return location


@pytest.mark.parametrize("within", [0, 10, 20, 60, 2000], ids=lambda within: f"byte {within}")
def test_damage_is_an_error_for_its_chunk_and_for_no_other(location, service, within):
    record = back_up(service, IMAGE)
    flip(location, place_of(service, ids_of(service, record)[7]), within=within)
    image = service.open_image(record)

    for chunk_index in range(40):
        start = chunk_index * CHUNK_SIZE
        if chunk_index == 7:
            with pytest.raises(CorruptBlob):
                image.read(start, CHUNK_SIZE)
        else:
            assert image.read(start, CHUNK_SIZE) == IMAGE[start : start + CHUNK_SIZE]
    with pytest.raises(CorruptBlob):
        image.read(0, len(IMAGE))


def test_a_blob_moved_in_its_pack_is_no_other_blob(location, service):
    """Bytes that are whole, at the wrong place, prove nothing."""
    record = back_up(service, IMAGE)
    first, second = (place_of(service, blob_id) for blob_id in ids_of(service, record)[:2])
    assert first.size == second.size
    path = Path(location) / pack_name(first.pack_id)
    data = bytearray(path.read_bytes())
    data[first.offset : first.offset + first.size] = data[
        second.offset : second.offset + second.size
    ]
    path.write_bytes(data)

    with pytest.raises(CorruptBlob):
        service.open_image(record).read(0, CHUNK_SIZE)


def test_a_pack_that_is_gone_or_cut_off_is_damage(location, service):
    record = back_up(service, IMAGE)
    blob_id = ids_of(service, record)[39]
    at = place_of(service, blob_id)
    path = Path(location) / pack_name(at.pack_id)

    path.write_bytes(path.read_bytes()[: at.offset + 100])
    with pytest.raises(CorruptBlob):
        service.open_image(record).read(39 * CHUNK_SIZE, CHUNK_SIZE)

    path.unlink()
    service.repository.storage.close()
    with pytest.raises(MissingBlob):
        service.open_image(record).read(0, CHUNK_SIZE)


@pytest.mark.parametrize("is_told_first", [True, False])
def test_storing_damaged_data_again_heals_them(location, is_told_first):
    with Service.open(location) as service:
        record = back_up(service, IMAGE)
        for blob_id in ids_of(service, record)[3:5]:
            flip(location, place_of(service, blob_id))
        if is_told_first:
            assert len(service.verify().damage) == 2
        else:
            for chunk_index in (3, 4):
                with pytest.raises(CorruptBlob):
                    service.open_image(record).read(chunk_index * CHUNK_SIZE, 1)
            service.refresh()

        again = back_up(service, IMAGE)

        assert 2 * CHUNK_SIZE < again.stored_bytes < 3 * CHUNK_SIZE
        assert restored(service, record) == IMAGE
        assert is_clean(service)
        service.refresh()
        assert back_up(service, IMAGE).stored_bytes == 0


def test_damage_found_by_reading_is_healed_by_the_next_backup_of_the_same_process(
    location, service
):
    """A service of Cinder restores, fails, and backs up the volume again."""
    record = back_up(service, IMAGE)
    flip(location, place_of(service, ids_of(service, record)[3]))
    with pytest.raises(CorruptBlob):
        restored(service, record)

    back_up(service, IMAGE)

    assert restored(service, record) == IMAGE


def test_verify_is_not_deceived_by_what_is_still_in_memory(location, service):
    """A node that is damaged on the disk and still cached from its making."""
    record = back_up(service, IMAGE)
    flip(location, place_of(service, record.root))

    report = service.verify()

    assert [(found.backup_id, found.offset) for found in report.damage] == [(record.backup_id, 0)]
    assert not is_clean(service), "told the first time only"


def test_what_is_damaged_on_the_disk_is_verified_as_such_by_another_process_too(location):
    with Service.open(location) as service:
        record = back_up(service, IMAGE)
        flip(location, place_of(service, ids_of(service, record)[5]))

    with Service.open(location) as service:
        (found,) = service.verify().damage

    assert (found.backup_id, found.offset, found.size) == (
        record.backup_id,
        5 * CHUNK_SIZE,
        CHUNK_SIZE,
    )


def test_an_unreachable_storage_is_no_damage(location):
    service = Service(Repository(FaultyStorage(location), Ambient()))
    with service:
        record = back_up(service, IMAGE)
        service.repository.storage.fail_at(1, UNAVAILABLE, stay_broken=True)

        with pytest.raises(StorageUnavailable):
            restored(service, record)

        service.repository.storage.repair()
        assert service.repository.index.damaged() == frozenset()
        assert restored(service, record) == IMAGE


def test_damage_is_told_also_when_the_index_cannot_note_it(location, service, monkeypatch):
    def full(_blob_ids):
        raise StorageUnavailable(reason="the cache's disk is full")

    record = back_up(service, IMAGE)
    flip(location, place_of(service, ids_of(service, record)[3]))
    monkeypatch.setattr(service.repository.index, "mark_damaged", full)

    with pytest.raises(CorruptBlob):
        restored(service, record)

    back_up(service, IMAGE)
    assert restored(service, record) == IMAGE


# -- beside gc ---------------------------------------------------------------------------------


def thin_packs(service: Service) -> tuple[Record, bytes]:
    """A backup most of whose chunks lie in packs that gc will repack."""
    filler = back_up(service, IMAGE + noise(60 * CHUNK_SIZE, seed=2))
    record = back_up(service, IMAGE)
    service.delete(filler)
    return record, IMAGE


def test_a_blob_that_gc_moves_between_two_steps_of_a_reader_is_no_damage(location):
    """After the look-up and before the read, by another process."""
    storage = SteppedStorage(location)
    with Service.open(location) as collector, Service(Repository(storage, Ambient())) as service:
        record, image = thin_packs(collector)
        service.refresh()
        collected: list[int] = []

        def collect(verb: str, name: str) -> None:
            is_ours = threading.current_thread().name.startswith(("MainThread", "restore"))
            if is_ours and verb == "get_range" and name.startswith("packs/") and not collected:
                collected.append(0)
                collected.append(collector.gc().packs_repacked)

        storage.before = collect
        assert restored(service, record) == image
        assert collected[1]
        assert service.repository.index.damaged() == frozenset()


def test_readers_go_on_beside_one_gc_after_the_other(location):
    with Service.open(location) as service, Service.open(location) as collector:
        kept = back_up(service, IMAGE)
        stop, wrong = threading.Event(), []

        def read() -> None:
            with Service.open(location) as reader:
                while not stop.is_set():
                    try:
                        if restored(reader, kept) != IMAGE:
                            wrong.append("other bytes")
                    except DamageError as error:
                        wrong.append(str(error))

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for seed in range(6):
            filler = noise(30 * CHUNK_SIZE, seed=100 + seed)
            mixed = back_up(service, IMAGE[: 10 * CHUNK_SIZE] + filler)
            service.delete(mixed)
            collector.gc()
        stop.set()
        for reader in readers:
            reader.join()

        assert wrong == []
        assert is_clean(service)


def test_readers_and_writers_share_what_is_still_in_the_air(parts: Parts) -> None:
    """What one thread stores another reads at once, from the packer or from the index."""
    wrong: list[object] = []

    def store_and_read(seed: int) -> None:
        for number in range(20):
            chunks = [noise(CHUNK_SIZE, seed=seed * 1000 + number * 10 + n) for n in range(10)]
            batch = parts.store.store_chunks(chunks)
            if parts.reader.chunks(batch.ids) != chunks:
                wrong.append(batch.ids)
            if number % 5 == 0:
                parts.packer.seal(since=0)

    threads = [threading.Thread(target=store_and_read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert list_packs(parts.storage)
