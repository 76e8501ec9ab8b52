"""Publishing: one name for one backup, whoever publishes at the same moment."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.ambients import SetClock
from support.faulty import FaultyStorage
from support.images import CHUNK_SIZE, BytesSource, back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import BackupExists, LockTimeout, StorageUnavailable
from backupfs.repository.images import Root
from backupfs.repository.repository import Repository
from backupfs.service import Record, Service
from backupfs.staging.draft import Content
from backupfs.staging.publish import Publication, publish
from backupfs.storage import local
from backupfs.storage.locks import try_lock
from backupfs.types import HOLE

BACKUP_ID = "0b0e4f2c-0000-4000-8000-000000000000"


def names(service: Service, volume: str = "vm") -> list[str]:
    service.refresh()
    return [record.name for record in service.catalogue.backups(volume)]


def test_backups_of_one_second_are_numbered_in_order(location):
    with Service.open(location, ambient=SetClock()) as service:
        ids = [back_up(service, noise(100, seed=seed)).backup_id for seed in range(12)]

        assert names(service)[:3] == [
            "2026-11-22T142503Z.img",
            "2026-11-22T142503Z-2.img",
            "2026-11-22T142503Z-3.img",
        ]
        assert [record.backup_id for record in service.backups("vm")] == ids


def test_a_name_that_became_free_is_not_used_again_before_later_ones(location):
    """The newest backup would come before older ones."""
    with Service.open(location, ambient=SetClock()) as service:
        back_up(service, b"1")
        second = back_up(service, b"2")
        back_up(service, b"3")
        service.delete(second)

        assert back_up(service, b"4").name == "2026-11-22T142503Z-4.img"


def test_names_of_one_second_are_shared_out_between_processes(location):
    """Services with catalogues of their own, in the same second of the clock."""
    problems: list[Exception] = []

    def publish_some(number: int) -> None:
        try:
            with Service.open(location, ambient=SetClock()) as service:
                for seed in range(6):
                    back_up(service, noise(100, seed=number * 10 + seed))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=publish_some, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    with Service.open(location) as service:
        found = names(service)
        assert len(found) == len(set(found)) == 24
        assert is_clean(service)


def test_an_import_and_a_backup_never_share_a_name(location):
    """The record comes back under its name, or is refused because that was given away."""
    with Service.open(location, ambient=SetClock()) as service:
        image = noise(100, seed=1)
        for _ in range(5):
            record = back_up(service, image)
            exported = service.export_record(record)
            service.delete(record)
            outcome: list[object] = []

            def bring_back(exported: bytes = exported, outcome: list[object] = outcome) -> None:
                with Service.open(location) as other:
                    try:
                        outcome.append(other.import_record(exported))
                    except BackupExists as error:
                        outcome.append(error)

            importing = threading.Thread(target=bring_back)
            importing.start()
            back_up(service, image)
            importing.join()

            assert len(outcome) == 1
            found = names(service)
            assert len(found) == len(set(found))


def test_a_backup_whose_answer_was_lost_is_there_and_its_id_is_taken(location):
    image = noise(5 * CHUNK_SIZE, seed=1)

    def take(service: Service) -> Record:
        return service.backup(BytesSource(image), volume="vm", backup_id=BACKUP_ID)

    storage = FaultyStorage(location)
    with Service(Repository(storage, Ambient())) as service:
        real = storage.put_new

        def lose_the_answer(name, data):
            real(name, data)
            if name.startswith("records/"):
                raise StorageUnavailable(reason="the answer was lost")

        storage.put_new = lose_the_answer
        with pytest.raises(StorageUnavailable):
            take(service)
        storage.put_new = real

        with pytest.raises(BackupExists):
            take(service)
        (record,) = service.backups()
        assert record.backup_id == BACKUP_ID
        assert restored(service, record) == image


def test_publishing_the_same_content_under_the_same_id_again_is_the_same_backup(service):
    """What the staging area does after an error that left open whether the record was written."""
    record = back_up(service, noise(5 * CHUNK_SIZE, seed=1))
    other = back_up(service, noise(5 * CHUNK_SIZE, seed=2))
    again = Publication(
        volume="vm",
        backup_id=record.backup_id,
        data_timestamp=record.data_timestamp,
        stored_bytes=0,
    )

    def publish_as_first(source: Record) -> Record:
        content = Content(root=Root(source.root, source.height), size=source.size, data_count=5)
        return publish(service.repository, service.catalogue, content, again)

    assert publish_as_first(record) == record
    with pytest.raises(BackupExists):
        publish_as_first(other)
    assert len(service.backups()) == 2


def test_a_record_that_nobody_has_synced_is_durable_when_it_counts_as_published(
    location, monkeypatch
):
    """Who wrote it died, or failed, just before that."""
    synced: list[Path] = []
    is_broken = True

    def noted(folder: Path) -> None:
        if folder.name == "records" and is_broken:
            raise OSError(errno.EIO, "broken")
        synced.append(folder)

    monkeypatch.setattr(local, "sync_folder", noted)
    with Service.open(location) as service:
        content = Content(root=Root(HOLE, 1), size=CHUNK_SIZE, data_count=0)
        publication = Publication(
            volume="vm", backup_id=BACKUP_ID, data_timestamp=datetime.now(UTC), stored_bytes=0
        )
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                publish(service.repository, service.catalogue, content, publication)
        is_broken = False

        record = publish(service.repository, service.catalogue, content, publication)

        assert record.backup_id == BACKUP_ID
        assert service.repository.folder / "records" in synced


@pytest.mark.parametrize(
    ("size", "is_incremental"), [(3 * CHUNK_SIZE, True), (2 * CHUNK_SIZE, False)]
)
def test_only_a_parent_of_the_same_size_is_one(service, size, is_incremental):
    parent = back_up(service, noise(3 * CHUNK_SIZE, seed=1))

    record = back_up(service, noise(size, seed=2))

    assert record.kind == ("incremental" if is_incremental else "full")
    assert record.parent_id == (parent.backup_id if is_incremental else None)


def test_a_parent_that_is_gone_or_unwanted_is_none(service):
    image = noise(CHUNK_SIZE, seed=1)
    gone = back_up(service, image)
    kept = back_up(service, image)
    service.delete(gone)

    def parent_with(parent: str | None) -> str | None:
        return service.backup(BytesSource(image), volume="vm", parent=parent).parent_id

    assert parent_with(gone.backup_id) is None
    assert parent_with(None) is None
    assert parent_with(kept.backup_id) == kept.backup_id


def test_a_publisher_who_never_ends_is_waited_for_and_then_named(location):
    lock = try_lock(Path(location) / "locks" / "publish")
    lock.describe("process 7")

    with Service.open(location) as service:
        service.repository.lock_seconds_max = 0.2
        with pytest.raises(LockTimeout, match="process 7"):
            back_up(service, b"data")
        assert service.backups() == []
        lock.release()
        back_up(service, b"data")


def test_the_time_of_the_data_names_the_backup(service):
    moment = datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)

    record = service.backup(BytesSource(b"x"), volume="vm", data_timestamp=moment)

    assert record.name == "1999-12-31T235959Z.img"
    assert record.data_timestamp == moment.replace(microsecond=0)


def test_a_latest_backup_of_a_clock_that_was_ahead_is_warned_of(location, caplog):
    clock = SetClock()
    with Service.open(location, ambient=clock) as service:
        clock.advance(86400)
        ahead = back_up(service, b"ahead")
        assert "a clock was ahead" not in caplog.text
        clock.advance(-86400)

        back_up(service, b"now")

        assert "a clock was ahead" in caplog.text
        assert service.resolve("vm@latest") == ahead


def test_no_record_is_taken_in_over_packs_that_may_not_last(location):
    with Service.open(location) as service:
        record = back_up(service, noise(5 * CHUNK_SIZE, seed=1))
        exported = service.export_record(record)
        service.delete(record)
        repository = service.repository
        packs = repository.index.pack_ids()
        repository.storage.make_lasting = set
        repository.index.note_fleeting(packs, packs)

        with pytest.raises(StorageUnavailable, match="there to stay"):
            service.import_record(exported)

        assert service.backups() == []
        del repository.storage.make_lasting
        assert service.import_record(exported).record == record
