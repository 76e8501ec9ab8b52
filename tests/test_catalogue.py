"""The catalogue: made from the records, told of changes, and right again after any."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path

import pytest
from support.ambients import SetClock
from support.faulty import UNAVAILABLE, FaultyStorage, SteppedStorage
from support.images import back_up, noise

from backupfs.catalogue import Catalogue, Change
from backupfs.errors import CorruptObject, StorageError
from backupfs.format.ids import IdScheme
from backupfs.format.record import record_name
from backupfs.repository.records import RecordLoader, RecordStore
from backupfs.service import Record, Service
from backupfs.storage.local import LocalStorage


@pytest.fixture
def stepped(location: str) -> SteppedStorage:
    return SteppedStorage(location)


@pytest.fixture
def catalogue(stepped: SteppedStorage, service: Service) -> Catalogue:
    """Another process's view of the same records."""
    return uncached(stepped, service)


def uncached(storage: LocalStorage, service: Service) -> Catalogue:
    records = RecordStore(storage, IdScheme(), service.config)
    return Catalogue(RecordLoader(records, storage, None), storage)


def ids(catalogue: Catalogue) -> list[str]:
    return [record.backup_id for record in catalogue.all()]


def in_order(service: Service, count: int, *, volume: str = "vm") -> list[Record]:
    """Backups one second apart."""
    clock = service.repository.ambient
    assert isinstance(clock, SetClock)
    records = []
    for seed in range(count):
        records.append(back_up(service, noise(100, seed=seed), volume=volume))
        clock.advance(1)
    return records


@pytest.fixture
def service(location: str):
    with Service.open(location, ambient=SetClock()) as opened:
        yield opened


def test_backups_come_by_volume_and_then_by_time(service, catalogue):
    second = in_order(service, 3, volume="b")
    first = in_order(service, 2, volume="a/x")
    catalogue.refresh()

    assert catalogue.all() == first + second
    assert catalogue.volumes() == ["a/x", "b"]
    assert catalogue.backups("b") == second
    assert catalogue.latest("b") == second[-1]
    assert catalogue.by_name("b", second[1].name) == second[1]
    assert catalogue.get(first[0].backup_id) == first[0]
    assert catalogue.ids_starting_with(first[0].backup_id[:8]) == [first[0].backup_id]
    assert (catalogue.latest("c"), catalogue.backups("c"), catalogue.by_name("b", "x")) == (
        None,
        [],
        None,
    )


def test_ten_backups_of_one_second_stand_in_the_order_of_their_numbers(service, catalogue):
    records = [back_up(service, noise(100, seed=seed)) for seed in range(12)]
    catalogue.refresh()

    assert catalogue.backups("vm") == records


def test_the_names_of_one_second_are_those_and_no_others(service, catalogue):
    before = in_order(service, 2)
    clock = service.repository.ambient
    same = [back_up(service, noise(100, seed=seed)) for seed in range(12)]
    moment = clock.now()
    clock.advance(1)
    in_order(service, 2)
    in_order(service, 1, volume="other")
    catalogue.refresh()

    assert catalogue.names_of_second("vm", moment) == [record.name for record in same]
    assert catalogue.names_of_second("vm", before[0].data_timestamp) == [before[0].name]
    assert catalogue.names_of_second("other", moment) == []
    assert catalogue.names_of_second("none", moment) == []


def test_many_records_at_once_and_one_by_one_come_in_one_order(service, catalogue):
    records = in_order(service, 40)
    alone = catalogue
    for record in reversed(records):
        alone.add(record)
    together = uncached(service.repository.storage, service)
    together.refresh()

    assert alone.all() == together.all() == records
    assert together.by_name("vm", records[7].name) == records[7]


def test_of_two_backups_with_one_name_the_other_is_found_when_one_goes(service, catalogue):
    """Published by two hosts at once: the name is no more than a name."""
    (record,) = in_order(service, 1)
    twin = dataclasses.replace(record, backup_id="ffffffff-0000-4000-8000-000000000000")
    for known in (twin, record):
        catalogue.add(known)

    found = catalogue.by_name("vm", record.name)
    catalogue.remove(record)

    assert found == record
    assert catalogue.by_name("vm", record.name) == twin
    catalogue.remove(twin)
    assert catalogue.by_name("vm", record.name) is None


def test_subscribers_are_told_of_every_change_once(service, catalogue):
    told: list[Change] = []
    catalogue.subscribe(told.append)
    first, second = in_order(service, 2)

    catalogue.refresh()
    catalogue.refresh()
    service.delete(first)
    catalogue.refresh()
    catalogue.add(second)
    catalogue.remove(first)
    catalogue.remove(second)
    catalogue.add(second)

    assert [(set(change.added), set(change.removed)) for change in told] == [
        ({first, second}, set()),
        (set(), {first}),
        (set(), {second}),
        ({second}, set()),
    ]


def test_a_volume_without_backups_is_none(service, catalogue):
    (record,) = in_order(service, 1)
    catalogue.refresh()

    service.delete(record)
    catalogue.refresh()

    assert catalogue.volumes() == []
    assert catalogue.all() == []


def test_an_unchanged_folder_is_not_read_again(service, catalogue, stepped, monkeypatch):
    in_order(service, 2)
    catalogue.refresh()
    monkeypatch.setattr(stepped, "change_mark", lambda _prefix: 5)
    catalogue.refresh()
    calls: list[str] = []
    stepped.before = lambda verb, name: calls.append(f"{verb} {name}")

    catalogue.refresh()

    assert calls == []
    assert len(catalogue.all()) == 2


def test_an_unreadable_record_is_told_and_the_others_are_there(service, catalogue, location):
    first, second = in_order(service, 2)
    path = Path(location) / record_name(first.backup_id)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    catalogue.refresh()

    assert catalogue.all() == [second]
    assert [error.name for error in catalogue.unreadable()] == [record_name(first.backup_id)]
    path.unlink()
    catalogue.refresh()
    assert catalogue.unreadable() == []
    path.write_bytes(whole)
    catalogue.refresh()
    assert catalogue.all() == [first, second]


# -- at the same time as others ----------------------------------------------------------------


def test_a_record_deleted_between_listing_and_reading_is_no_error(service, catalogue, stepped):
    first, second = in_order(service, 2)

    def delete(verb: str, name: str) -> None:
        if verb == "list":
            service.repository.records.delete(first.backup_id)

    stepped.after = delete
    catalogue.refresh()

    assert catalogue.all() == [second]
    assert catalogue.unreadable() == []


def test_what_this_process_publishes_during_a_refresh_stays(service, catalogue, stepped):
    (first,) = in_order(service, 1)
    catalogue.refresh()
    published: list[Record] = []

    def publish(verb: str, name: str) -> None:
        if verb == "list" and not published:
            published.append(back_up(service, noise(100, seed=9)))
            catalogue.add(published[0])

    stepped.after = publish
    catalogue.refresh()

    assert catalogue.all() == [first, *published]


def test_what_this_process_deletes_during_a_refresh_stays_deleted(service, catalogue, stepped):
    first, second = in_order(service, 2)
    catalogue.refresh()

    def delete(verb: str, name: str) -> None:
        if verb == "list" and catalogue.get(first.backup_id):
            service.repository.records.delete(first.backup_id)
            catalogue.remove(first)

    stepped.after = delete
    catalogue.refresh()
    stepped.after = lambda _verb, _name: None
    catalogue.refresh()

    assert catalogue.all() == [second]


def test_many_who_refresh_publish_and_delete_end_with_the_truth(service, catalogue):
    problems: list[object] = []
    stop = threading.Event()

    def refresh() -> None:
        while not stop.is_set():
            try:
                catalogue.refresh()
                catalogue.all()
                catalogue.unreadable()
            except Exception as error:
                problems.append(error)

    refreshers = [threading.Thread(target=refresh) for _ in range(3)]
    for thread in refreshers:
        thread.start()
    alive: list[Record] = []
    for seed in range(30):
        alive.append(back_up(service, noise(100, seed=seed)))
        if seed % 3 == 2:
            service.delete(alive.pop(0))
    stop.set()
    for thread in refreshers:
        thread.join()

    catalogue.refresh()
    assert problems == []
    assert set(ids(catalogue)) == {record.backup_id for record in alive}


def test_a_record_that_could_not_be_read_for_a_moment_comes_back(service, location, monkeypatch):
    """A network that hiccups must not hide a backup from a mount until something else changes."""
    records = in_order(service, 3)
    storage = FaultyStorage(location)
    monkeypatch.setattr(storage, "change_mark", lambda _prefix: 7)
    catalogue = uncached(storage, service)
    storage.fail_at(3, UNAVAILABLE)
    with contextlib.suppress(StorageError):
        catalogue.refresh()
    assert storage.fired

    storage.repair()
    catalogue.refresh()

    assert catalogue.all() == records
    assert catalogue.unreadable() == []


def test_record_under_an_id_that_was_used_again_is_the_one_on_the_disk(service, catalogue):
    (first,) = in_order(service, 1)
    catalogue.refresh()
    changes: list[Change] = []
    catalogue.subscribe(changes.append)
    service.delete(first)
    second = dataclasses.replace(first, stored_bytes=first.stored_bytes + 1)
    service.repository.records.put(second)
    catalogue.refresh()
    assert catalogue.get(first.backup_id) == first, "its name is there as before"

    assert catalogue.current(first.backup_id) == second

    assert catalogue.get(first.backup_id) == second
    assert catalogue.all() == [second]
    assert changes == [Change(removed=(first,)), Change(added=(second,))]
    service.repository.records.delete(first.backup_id)
    assert catalogue.current(first.backup_id) is None
    assert catalogue.all() == []


def test_record_that_cannot_be_read_any_more_is_as_it_was(service, catalogue):
    known, other = in_order(service, 2)
    catalogue.refresh()
    folder = service.repository.folder
    for record in (known, other):
        (folder / record_name(record.backup_id)).write_bytes(b"damaged")

    assert catalogue.current(known.backup_id) == known
    fresh = uncached(service.repository.storage, service)
    with pytest.raises(CorruptObject):
        fresh.current(known.backup_id)
