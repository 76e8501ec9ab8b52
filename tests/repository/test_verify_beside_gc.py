"""verify beside deletions and gc: what is deleted on purpose is no damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faulty import SteppedStorage
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.format.pack import PACKS_PREFIX
from backupfs.format.record import RECORDS_PREFIX
from backupfs.repository.repository import Repository
from backupfs.service import Record, Service
from backupfs.storage.base import ObjectInfo


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("moment", ["get_range packs/", "get records/"])
def test_a_backup_deleted_and_collected_meanwhile_is_no_damage(location, moment, quick):
    storage = SteppedStorage(location)
    with Service.open(location) as other, Service(Repository(storage, Ambient())) as service:
        kept = back_up(other, noise(20 * CHUNK_SIZE, seed=1))
        doomed = back_up(other, noise(20 * CHUNK_SIZE, seed=2))
        service.refresh()
        calls: list[str] = []

        def delete(verb: str, name: str) -> None:
            if f"{verb} {name}".startswith(moment):
                calls.append(name)
                if len(calls) == 2:
                    other.delete(doomed)
                    assert other.gc().packs_deleted

        storage.after = delete
        report = service.verify(quick=quick)

        assert len(calls) >= 2
        assert report.damage == []
        assert service.verify([kept]).damage == []


def test_a_pack_repacked_meanwhile_is_no_damage(location):
    storage = SteppedStorage(location)
    with Service.open(location) as other, Service(Repository(storage, Ambient())) as service:
        longer = back_up(other, noise(50 * CHUNK_SIZE, seed=1))
        back_up(other, noise(50 * CHUNK_SIZE, seed=1)[: 10 * CHUNK_SIZE])
        other.delete(longer)
        service.refresh()
        calls: list[str] = []

        def collect(verb: str, name: str) -> None:
            if verb == "get_range" and name.startswith("packs/"):
                calls.append(name)
                if len(calls) == 3:
                    assert other.gc().packs_repacked

        storage.before = collect
        report = service.verify()

        assert len(calls) >= 3
        assert report.damage == []


class MissingBoth(SteppedStorage):
    """A listing of packs that has neither the packs that gc moves blobs from nor those it moves
    them to: they were put into folders that had been listed, and deleted from those that had not."""

    def __init__(self, folder: Path | str, move: Callable[[], object]) -> None:
        super().__init__(folder)
        self.move = move
        self.is_armed = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        listed = [*super().list(prefix)]
        if prefix == PACKS_PREFIX and self.is_armed:
            self.is_armed = False
            self.move()
        return iter([info for info in listed if (self.folder / info.name).exists()])


@pytest.fixture
def apart(location, tmp_path, monkeypatch) -> Iterator[tuple[Service, Service, MissingBoth]]:
    """One that collects, and one with an index of its own whose listing is in the middle of that."""
    with Service.open(location) as other:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        storage = MissingBoth(location, lambda: other.gc())
        with Service(Repository(storage, Ambient())) as service:
            yield other, service, storage


def thin_backup(service: Service) -> Record:
    """A backup whose pack the next gc rewrites."""
    longer = back_up(service, noise(50 * CHUNK_SIZE, seed=1))
    record = back_up(service, noise(50 * CHUNK_SIZE, seed=1)[: 10 * CHUNK_SIZE], volume="kept")
    service.delete(longer)
    return record


@pytest.mark.parametrize("quick", [False, True])
def test_packs_that_a_listing_has_missed_are_no_damage(apart, quick):
    other, service, storage = apart
    thin_backup(other)
    storage.is_armed = True

    assert service.verify(quick=quick).damage == []
    assert not storage.is_armed
    assert service.repository.index.damaged() == frozenset()


def test_packs_that_a_reader_has_missed_are_found(apart):
    other, service, storage = apart
    record = thin_backup(other)
    # The tree lies in a pack that stays; of the chunks nothing is known yet.
    root = other.repository.reader.node(record.root, record.height)
    service.repository.reader.keep_node(record.root, record.height, root)
    storage.is_armed = True

    assert restored(service, record) == noise(50 * CHUNK_SIZE, seed=1)[: 10 * CHUNK_SIZE]
    assert not storage.is_armed
    assert service.repository.index.damaged() == frozenset()


def test_an_index_never_lacks_what_gc_has_moved(location, tmp_path, monkeypatch):
    """It is one for all processes of a host: what is moved is entered before it is forgotten."""
    with Service.open(location) as other:
        thin_backup(other)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        with Service.open(location) as service:
            assert other.gc().packs_repacked
            index = service.repository.index
            forget = index.forget_packs
            lacking: list[bytes] = []

            def look(pack_ids, *, leaves_gaps=False):
                forget(pack_ids, leaves_gaps=leaves_gaps)
                for record in other.backups():
                    ids = other.open_image(record).chunk_ids(0, 10)
                    lacking.extend(blob_id for blob_id in ids if index.find(blob_id) is None)

            monkeypatch.setattr(index, "forget_packs", look)
            service.repository.refresh_index()

            assert lacking == []


def test_gc_beside_a_host_that_publishes_faster_than_it_marks_comes_to_its_end(
    location, tmp_path, monkeypatch
):
    with Service.open(location) as other:
        kept = thin_backup(other)
        made: list[Record] = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        storage = SteppedStorage(location)
        with Service(Repository(storage, Ambient())) as service:

            def publish(verb: str, name: str) -> None:
                if (verb, name) == ("list", RECORDS_PREFIX):
                    made.append(back_up(other, noise(3 * CHUNK_SIZE, seed=100 + len(made))))

            storage.before = publish
            monkeypatch.setattr(service.repository, "renew_index", None)  # needs no index anew

            collected = service.gc()

            storage.before = lambda _verb, _name: None
            assert collected.packs_repacked and len(made) >= 2
            assert is_clean(service)
            for number, record in enumerate(made):
                assert restored(service, record) == noise(3 * CHUNK_SIZE, seed=100 + number)
            assert restored(service, kept) == noise(50 * CHUNK_SIZE, seed=1)[: 10 * CHUNK_SIZE]
