"""The index and the packs: the packs are the truth, whatever happens at the same time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faulty import SteppedStorage
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import CorruptObject, StorageUnavailable
from backupfs.format.ids import IdScheme
from backupfs.format.pack import pack_name
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.rebuild import list_packs, read_footer, refresh_index
from backupfs.repository.repository import Repository
from backupfs.service import Service
from backupfs.storage import local
from backupfs.types import ObjectName, PackId

IDS = IdScheme()


@pytest.fixture
def stepped(location: str) -> SteppedStorage:
    return SteppedStorage(location)


def test_a_lost_index_is_rebuilt_when_the_repository_is_opened(location, cache_home):
    image = noise(300_000, seed=1)
    with Service.open(location) as service:
        record = back_up(service, image)
    shutil.rmtree(cache_home)

    with Service.open(location) as service:
        assert restored(service, record) == image
        assert is_clean(service)


def test_the_index_of_an_earlier_state_forgets_packs_that_are_gone(location, service):
    """As after putting an older copy of the repository's folder in place."""
    back_up(service, noise(300_000, seed=1))
    for pack_id in list_packs(service.repository.storage):
        (Path(location) / pack_name(pack_id)).unlink()

    service.repository.refresh_index()

    assert service.repository.index.pack_ids() == set()
    record = back_up(service, noise(300_000, seed=1))
    assert restored(service, record) == noise(300_000, seed=1)
    assert service.verify([record]).damage == []


def test_a_pack_with_a_damaged_footer_is_reported_and_left_out(location, service):
    back_up(service, noise(300_000, seed=1))
    (pack_id, size), *_ = list_packs(service.repository.storage).items()
    path = Path(location) / pack_name(pack_id)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    service.repository.index.clear()

    damage = service.repository.refresh_index()

    assert [error.name for error in damage] == [pack_name(pack_id)]
    assert pack_id not in service.repository.index.pack_ids()
    with pytest.raises(CorruptObject):
        read_footer(service.repository.storage, IDS, pack_id, size)


@pytest.mark.parametrize("size", [0, 1, 55, 56, 100])
def test_what_is_too_short_for_a_pack_is_reported(service, size):
    name = ObjectName(f"packs/ab/ab{'0' * 30}")
    service.repository.storage.put_new(name, bytes(size))

    (error,) = service.repository.refresh_index()

    assert error.name == name


def test_strange_names_among_the_packs_are_ignored(service, location):
    storage = service.repository.storage
    for name in ("packs/x", "packs/ab/AB" + "0" * 30, "packs/cd/ab" + "0" * 30, "packs/ab/c/d"):
        storage.put_new(ObjectName(name), b"strange")

    assert service.repository.refresh_index() == []
    assert list_packs(storage) == {}


def test_a_footer_larger_than_the_first_read_is_read_whole(service):
    """The footer of 1,600 small blobs is larger than what one read brings."""
    image = b"".join(number.to_bytes(4, "big") * 4096 for number in range(1600))

    record = back_up(service, image)
    service.repository.index.clear()
    service.repository.refresh_index()

    assert restored(service, record) == image


# -- at the same time as others ----------------------------------------------------------------


def test_a_pack_that_is_stored_during_the_listing_stays_known(location, service, stepped):
    """It was forgotten: readers found its blobs missing, and gc could take it for dead."""
    index = service.repository.index

    def store(verb, name):
        if verb == "list" and name == "packs/" and not service.backups():
            back_up(service, noise(200_000, seed=1))

    stepped.after = store
    refresh_index(stepped, IDS, index)

    assert index.pack_ids() == set(list_packs(service.repository.storage))
    assert len(index.pack_ids()) == 2


def test_a_pack_that_gc_deletes_while_its_footer_is_read_does_not_come_back(
    location, service, stepped
):
    """Writers would rely on it, and their backups could never be read."""
    record = back_up(service, noise(200_000, seed=1))
    service.delete(record)
    index = service.repository.index
    index.clear()

    def collect(verb, name):
        if verb == "get_range" and name.startswith("packs/") and not collected:
            collected.append(True)
            assert service.gc().packs_deleted == 2

    collected: list[bool] = []
    stepped.after = collect
    refresh_index(stepped, IDS, index)

    assert collected
    assert list_packs(stepped) == {}
    assert index.pack_ids() == set()


def test_copies_of_a_repository_have_indexes_of_their_own(location, scratch):
    """A mirror has the same id and other packs: a writer must not rely on a pack of the mirror."""
    old, new = noise(200_000, seed=1), noise(200_000, seed=2)
    with Service.open(location) as service:
        first = back_up(service, old)
        shutil.copytree(location, scratch / "mirror")
        service.delete(first)
        service.gc()

        with Service.open(str(scratch / "mirror")) as mirror:
            assert restored(mirror, first) == old
            back_up(mirror, new)
            records = [back_up(service, old), back_up(service, new)]
            assert is_clean(mirror)

        assert [restored(service, record) for record in records] == [old, new]
        service.repository.refresh_index()
        assert is_clean(service)


@pytest.fixture
def two_users(
    location: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Service, Service]]:
    """Two services of one repository, each with an index of its own, as those of two users."""
    with Service.open(location) as one:
        monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "cache of another user"))
        with Service.open(location) as other:
            yield one, other


def test_a_blob_stored_twice_outlives_the_gc_of_either_index(two_users):
    """Each index may know another copy of a blob; gc by one deletes what the other relies on."""
    one, other = two_users
    image = noise(200_000, seed=1)
    for service in two_users:
        service.repository.writer()
    records = [back_up(one, image), back_up(other, image)]
    assert len(list_packs(one.repository.storage)) == 4
    for service in two_users:
        service.repository.refresh_index()

    one.gc()
    other.gc()
    one.gc()

    assert len(list_packs(one.repository.storage)) == 2
    for service in two_users:
        service.refresh()
        assert is_clean(service)
        assert [restored(service, record) for record in records] == [image, image]


def test_a_reader_finds_the_copy_that_the_gc_of_another_index_has_left(two_users):
    one, other = two_users
    image = noise(200_000, seed=1)
    for service in two_users:
        service.repository.writer()
    back_up(one, image)
    record = back_up(other, image)
    other.repository.refresh_index()
    other.repository.storage.close()  # or a deleted pack would still be read

    one.gc()

    assert restored(other, record) == image


def test_the_name_of_a_pack_is_made_lasting_before_anyone_relies_on_it(two_users, monkeypatch):
    """Who stores it may be about to, and a power cut would take it from those who found it."""
    one, other = two_users
    back_up(one, noise(200_000, seed=1))
    packs = list_packs(one.repository.storage)
    assert not other.repository.index.pack_ids()
    synced: list[Path] = []
    sync_folder = local.sync_folder

    def noted(folder: Path) -> None:
        assert not other.repository.index.pack_ids(), "relied on already"
        synced.append(folder)
        sync_folder(folder)

    monkeypatch.setattr(local, "sync_folder", noted)

    other.repository.refresh_index()

    assert other.repository.index.pack_ids() == set(packs)
    folder = other.repository.folder
    assert {(folder / pack_name(pack_id)).parent for pack_id in packs} <= set(synced)
    assert {folder, folder / "packs"} <= set(synced)


def test_packs_of_a_disk_that_cannot_be_synced_are_read_and_not_relied_on(two_users, monkeypatch):
    one, other = two_users
    image = noise(200_000, seed=1)
    index, store = other.repository.index, other.repository.writer().store

    record = back_up(one, image)

    def broken(_folder: Path) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as context:
        context.setattr(local, "sync_folder", broken)
        other.repository.refresh_index()

    assert restored(other, record) == image
    ids = leaf_ids(other.repository.reader, Root(record.root, record.height), 0, 3)
    assert None not in index.find_many(ids)
    assert index.find_usable(ids) == [None] * 3
    stored = store.store_chunks([image[:CHUNK_SIZE]])
    assert stored.ids == ids[:1]
    assert stored.added_size > CHUNK_SIZE, "whole, as others may differ from it"

    other.repository.refresh_index()
    assert None not in index.find_usable(ids), "by now they are durable"


def test_of_two_copies_the_one_that_stays_is_not_given_up(two_users, monkeypatch):
    one, other = two_users
    for service in two_users:
        service.repository.writer()
    image = noise(200_000, seed=1)
    record = back_up(one, image)
    other.repository.refresh_index()
    lasting = other.repository.index.pack_ids()
    for pack_id in lasting:  # or nothing would be stored twice
        one.repository.index.forget_packs([pack_id])
    back_up(one, image)
    packs = list_packs(other.repository.storage)
    names = {pack_name(pack_id) for pack_id in packs.keys() - lasting}
    assert names
    real = other.repository.storage.make_lasting

    def some(asked):
        asked = set(asked)
        return asked & names | real(asked)

    monkeypatch.setattr(other.repository.storage, "make_lasting", some)

    with pytest.raises(StorageUnavailable, match="there to stay"):
        other.gc()

    assert other.repository.index.fleeting()
    ids = leaf_ids(other.repository.reader, Root(record.root, record.height), 0, 3)
    places = other.repository.index.find_usable(ids)
    assert {place.pack_id for place in places if place} <= lasting and None not in places
    assert list_packs(other.repository.storage) == packs
    monkeypatch.undo()
    other.gc()
    assert restored(other, record) == image


def test_packs_noted_by_one_process_stay_noted_when_another_asks_for_others(two_users):
    index = two_users[0].repository.index
    first, second = PackId(b"1" * 16), PackId(b"2" * 16)
    index.note_fleeting({first}, {first})

    index.note_fleeting({second}, set())
    assert index.fleeting() == {first}

    index.note_fleeting({first, second}, {second})
    assert index.fleeting() == {second}


def test_want_of_descriptors_leaves_nothing_in_doubt(two_users, monkeypatch):
    one, other = two_users
    back_up(one, noise(200_000, seed=1))

    def wanting(_folder: Path) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as context:
        context.setattr(local, "sync_folder", wanting)
        with pytest.raises(StorageUnavailable):
            other.repository.refresh_index()

    assert not other.repository.index.pack_ids()
    other.repository.refresh_index()
    assert other.repository.index.pack_ids() and not other.repository.index.fleeting()


def test_one_repository_by_two_names_is_one(location, scratch):
    (scratch / "link").symlink_to(location)
    with Service.open(location) as one, Service.open(str(scratch / "link")) as other:
        assert one.repository.index is other.repository.index


def test_opening_fails_as_a_whole(location, monkeypatch):
    """No index stays open behind an error, or the next opening would find it closed."""

    def fails(_self):
        raise CorruptObject(name="x", reason="test")

    with monkeypatch.context() as context:
        context.setattr(Repository, "refresh_index", fails)
        with pytest.raises(CorruptObject):
            Repository.open(location, Ambient())

    Repository.open(location, Ambient()).close()
