"""Records and metadata as objects: one commit each, whole or not at all."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, UNAVAILABLE, FaultyStorage
from support.images import back_up, is_clean, noise

from backupfs.ambient import Ambient
from backupfs.errors import (
    CorruptObject,
    InvalidMetadata,
    ObjectNotFound,
    StorageError,
)
from backupfs.format.ids import IdScheme
from backupfs.format.record import METADATA_SIZE_MAX, record_name
from backupfs.repository.metadata import MetadataStore
from backupfs.repository.records import RecordStore
from backupfs.storage.memory import MemoryStorage
from backupfs.types import ObjectName

IDS = IdScheme()


@pytest.fixture
def metadata() -> MetadataStore:
    return MetadataStore(MemoryStorage(), IDS)


# -- records -----------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_put(service):
    record = back_up(service, noise(50_000, seed=1))
    records = RecordStore(service.repository.storage, IDS, service.config)

    assert records.get(record.backup_id) == record
    assert records.get_all()[0].keys() == {record.backup_id}
    records.put(record)
    records.delete(record.backup_id)
    records.delete(record.backup_id)
    with pytest.raises(ObjectNotFound):
        records.get(record.backup_id)


def test_every_flipped_bit_of_a_record_is_found(location, service):
    record = back_up(service, noise(50_000, seed=1))
    path = Path(location) / record_name(record.backup_id)
    whole = path.read_bytes()

    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptObject):
            service.repository.records.get(record.backup_id)


def test_a_record_under_another_name_is_not_that_backup(location, service):
    record = back_up(service, noise(50_000, seed=1))
    other_id = Ambient().new_uuid()
    (Path(location) / record_name(record.backup_id)).rename(Path(location) / record_name(other_id))

    records, unreadable = service.repository.records.get_all()

    assert records == {}
    assert list(unreadable) == [record_name(other_id)]


def test_files_that_are_no_records_are_not_listed(service):
    for name in ("records/README.msgpack", "records/x/y.msgpack"):
        service.repository.storage.put_new(ObjectName(name), b"?")

    assert service.repository.records.get_all()[0].keys() == set()


# -- metadata ----------------------------------------------------------------------------------


def test_the_last_metadata_counts_and_empty_ones_remove_them(metadata):
    assert metadata.get("vm") == {}

    metadata.put("vm", {"owner": "ann", "n": [1, {"deep": None}]})
    metadata.put("vm", {"owner": "bob"})
    metadata.put("other", {"owner": "eve"})

    assert metadata.get("vm") == {"owner": "bob"}
    metadata.put("vm", {})
    assert metadata.get("vm") == {}
    assert metadata.get("other") == {"owner": "eve"}


@pytest.mark.parametrize(
    "value",
    [
        ["a list"],
        "text",
        None,
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": {1, 2}},
        {"x": "y" * METADATA_SIZE_MAX},
        {1: "a number as key", "1": b""},
    ],
    ids=repr,
)
def test_what_is_no_metadata_changes_nothing(metadata, value):
    metadata.put("vm", {"owner": "ann"})

    with pytest.raises(InvalidMetadata):
        metadata.put("vm", value)

    assert metadata.get("vm") == {"owner": "ann"}


def test_metadata_nested_beyond_reason_are_refused(metadata):
    value: dict[str, object] = {}
    for _ in range(100_000):
        value = {"deeper": value}

    with pytest.raises(InvalidMetadata):
        metadata.put("vm", value)


def test_metadata_of_another_volume_are_not_taken_for_this_one(metadata):
    storage = MemoryStorage()
    store = MetadataStore(storage, IDS)
    store.put("vm", {"owner": "ann"})
    ((name, data),) = storage.objects.items()
    store.put("other", {"owner": "eve"})
    (other,) = set(storage.objects) - {name}
    storage.objects[other] = data

    with pytest.raises(CorruptObject):
        store.get("other")


def test_damaged_metadata_are_an_error_and_can_be_replaced():
    storage = MemoryStorage()
    store = MetadataStore(storage, IDS)
    store.put("vm", {"owner": "ann"})
    for name, data in storage.objects.items():
        storage.objects[name] = data[:-1] + bytes([data[-1] ^ 1])

    with pytest.raises(CorruptObject):
        store.get("vm")
    store.put("vm", {"owner": "bob"})

    assert store.get("vm") == {"owner": "bob"}


def test_put_behind_the_last_generation_fails_and_names_it():
    """The first put had no effect, as nobody looks for 13 digits; the next one never ended."""
    storage = MemoryStorage()
    store = MetadataStore(storage, IDS)
    store.put("vm", {"owner": "ann"})
    ((name, data),) = storage.objects.items()
    last = name.replace("000000000001", "999999999999")
    storage.objects[last] = data

    for _ in range(2):
        with pytest.raises(CorruptObject) as caught:
            store.put("vm", {"owner": "bob"})
        assert caught.value.name == last

    assert set(storage.objects) == {name, last}
    storage.delete(last)
    store.put("vm", {"owner": "bob"})
    assert store.get("vm") == {"owner": "bob"}


def test_many_who_put_at_once_leave_one_of_theirs(scratch):
    (scratch / "repository").mkdir()
    stores = [MetadataStore(FaultyStorage(scratch / "repository"), IDS) for _ in range(4)]
    seen: list[object] = []

    def put(number: int) -> None:
        for round_number in range(10):
            stores[number].put("vm", {"by": number, "round": round_number})
            seen.append(stores[number].get("vm"))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {} not in seen
    assert stores[0].get("vm")["round"] == 9


@pytest.mark.parametrize(
    "how", [FULL, UNAVAILABLE, LOST_ACKNOWLEDGEMENT], ids=["full", "unavailable", "lost"]
)
def test_metadata_are_the_old_or_the_new_after_any_failure(scratch, how):
    (scratch / "repository").mkdir()
    storage = FaultyStorage(scratch / "repository")
    store = MetadataStore(storage, IDS)
    old: dict[str, object] = {"round": 0}
    store.put("vm", old)

    for fail_at in itertools.count(1):
        new = {"round": fail_at}
        storage.fail_at(fail_at, how)
        try:
            store.put("vm", new)
            failed = False
        except StorageError:
            failed = True
        fired = storage.fired
        storage.repair()

        assert store.get("vm") in ([old, new] if failed else [new])
        store.put("vm", new)
        assert store.get("vm") == old or store.get("vm") == new
        old = new
        if not fired:
            break
    assert fail_at > 3


def test_metadata_go_into_backups_from_then_on(service):
    first = back_up(service, noise(1000, seed=1))
    service.put_metadata("vm", {"owner": "ann"})
    second = back_up(service, noise(1000, seed=1))

    assert first.metadata in (None, {})
    assert second.metadata == {"owner": "ann"}
    assert is_clean(service)
