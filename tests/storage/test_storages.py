"""The contract of ``storage.base``, held by every storage there is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from backupfs.ambient import Ambient
from backupfs.errors import CorruptObject, ObjectExists, ObjectNotFound
from backupfs.storage.base import SpooledFile, Storage
from backupfs.storage.local import LocalStorage
from backupfs.storage.memory import MemoryStorage
from backupfs.types import ObjectName

NAME = ObjectName("packs/ab/abcd")


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "memory":
        return MemoryStorage()
    folder = tmp_path / "storage"
    folder.mkdir()
    local = LocalStorage(folder, Ambient())
    request.addfinalizer(local.close)
    return local


def spooled(tmp_path: Path, data: bytes) -> SpooledFile:
    path = tmp_path / "storage" / "spool" / os.urandom(8).hex()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return SpooledFile(path=path, size=len(data))


def names(storage: Storage, prefix: str) -> set[str]:
    return {info.name for info in storage.list(prefix)}


@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000), memoryview(b"view"), bytearray(b"b")])
def test_what_was_put_is_read_back(storage, data):
    storage.put_new(NAME, data)

    assert storage.get(NAME, size_max=1 << 20) == bytes(data)


def test_a_spooled_file_is_taken_in_and_gone(storage, tmp_path):
    file = spooled(tmp_path, b"pack")

    storage.put_new(NAME, file)

    assert storage.get(NAME, size_max=10) == b"pack"
    assert not file.path.exists()


def test_putting_the_same_bytes_again_is_harmless(storage, tmp_path):
    storage.put_new(NAME, b"same")

    storage.put_new(NAME, b"same")
    again = spooled(tmp_path, b"same")
    storage.put_new(NAME, again)

    assert storage.get(NAME, size_max=10) == b"same"
    assert not again.path.exists()


def test_other_bytes_under_a_used_name_are_refused(storage, tmp_path):
    storage.put_new(NAME, b"first")

    with pytest.raises(ObjectExists):
        storage.put_new(NAME, b"other")
    with pytest.raises(ObjectExists):
        storage.put_new(NAME, spooled(tmp_path, b"longer than before"))

    assert storage.get(NAME, size_max=10) == b"first"
    assert names(storage, "packs/") == {NAME}


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 10, b"0123456789"),
        (3, 4, b"3456"),
        (8, 10, b"89"),
        (10, 1, b""),
        (50, 5, b""),
        (2, 0, b""),
    ],
)
def test_a_range_is_cut_only_at_the_end(storage, offset, size, expected):
    storage.put_new(NAME, b"0123456789")

    assert storage.get_range(NAME, offset, size) == expected


def test_what_is_not_there_is_not_found(storage):
    with pytest.raises(ObjectNotFound):
        storage.get(NAME, size_max=10)
    with pytest.raises(ObjectNotFound):
        storage.get_range(NAME, 0, 1)


def test_an_object_larger_than_allowed_is_not_read(storage):
    storage.put_new(NAME, b"0123456789")

    with pytest.raises(CorruptObject):
        storage.get(NAME, size_max=9)


def test_a_listing_names_objects_below_its_prefix_with_sizes(storage):
    storage.put_new(ObjectName("records/a.msgpack"), b"12")
    storage.put_new(ObjectName("packs/ab/abcd"), b"345")
    storage.put_new(ObjectName("packs/cd/cdef"), b"")
    storage.put_new(ObjectName("packs2/x"), b"x")

    listed = {(info.name, info.size) for info in storage.list("packs/")}

    assert listed == {("packs/ab/abcd", 3), ("packs/cd/cdef", 0)}
    assert names(storage, "packs/cd/") == {"packs/cd/cdef"}
    assert names(storage, "nothing/") == set()


def test_a_deleted_object_is_gone_and_deleting_again_is_harmless(storage):
    storage.put_new(NAME, b"data")
    storage.get_range(NAME, 0, 1)

    storage.delete(NAME)
    storage.delete(NAME)

    assert names(storage, "packs/") == set()
    with pytest.raises(ObjectNotFound):
        storage.get_range(NAME, 0, 1)


def test_of_many_who_put_different_bytes_one_wins(storage):
    outcomes: list[str] = []

    def put(number: int) -> None:
        try:
            storage.put_new(NAME, b"%d" % number)
            outcomes.append("stored")
        except ObjectExists:
            outcomes.append("refused")

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["refused"] * 7 + ["stored"]
    assert storage.get(NAME, size_max=10) in {b"%d" % number for number in range(8)}
