"""Repair: what is whole in damaged packs is saved, nothing is deleted, lost images are found."""

from __future__ import annotations

import itertools
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_check import Recording
from support.crash_disk import read_image, write_image
from support.crash_run import Promise
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, UNAVAILABLE, FaultyStorage
from support.images import CHUNK_SIZE, SparseSource, back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import InvalidOption, StorageError, StorageUnavailable
from backupfs.format.blob import HEADER
from backupfs.repository.pack_scan import READ_SIZE, PackScan
from backupfs.repository.rebuild import list_packs, read_footer
from backupfs.repository.repository import Repository
from backupfs.service import Policy, Service, init
from backupfs.storage.local import LocalStorage

IMAGE = noise(30 * CHUNK_SIZE, seed=1)
OTHER = noise(10 * CHUNK_SIZE, seed=2)


@pytest.fixture(autouse=True)
def quiet(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "cache"))
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder(location: str) -> Path:
    """A repository with two backups, in two packs each."""
    with Service.open(location) as service:
        back_up(service, IMAGE)
        back_up(service, OTHER, volume="other")
    return Path(location)


def lose_index(scratch: Path) -> None:
    shutil.rmtree(scratch / "cache")


def packs(folder: Path) -> list[Path]:
    """The largest first."""
    found = [path for path in (folder / "packs").rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def cut_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-70])


def flip_footer(path: Path) -> None:
    flip(path, path.stat().st_size - 60)


def add_rubbish(path: Path) -> None:
    path.write_bytes(path.read_bytes() + noise(1000, seed=3))


def prepend_rubbish(path: Path) -> None:
    path.write_bytes(b"BFSb" + noise(1000, seed=3) + path.read_bytes())


def assert_both_are_whole(service: Service) -> None:
    assert is_clean(service)
    assert restored(service, service.resolve("vm@latest")) == IMAGE
    assert restored(service, service.resolve("other@latest")) == OTHER


# -- packs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_index", [True, False], ids=["with index", "index lost"])
@pytest.mark.parametrize(
    "damage", [cut_footer, flip_footer, add_rubbish, prepend_rubbish], ids=lambda d: d.__name__
)
def test_packs_without_a_footer_are_saved_whole(folder, scratch, damage, has_index):
    before = {path.name: path for path in packs(folder)}
    for path in before.values():
        damage(path)
    damaged = {name: path.read_bytes() for name, path in before.items()}
    if not has_index:
        lose_index(scratch)

    with Service.open(str(folder)) as service:
        done = service.repair()

        assert {pack.object_name for pack in done.packs} == {
            f"packs/{name[:2]}/{name}" for name in before
        }
        assert_both_are_whole(service)
        assert not service.repair().packs
    kept = {path.name: path.read_bytes() for path in (folder / "damaged").iterdir()}
    assert kept == damaged
    lose_index(scratch)
    with Service.open(str(folder)) as service:
        service.gc()
        assert_both_are_whole(service)


def test_swapped_packs_are_saved(folder, scratch):
    one, other, *_ = packs(folder)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    lose_index(scratch)

    with Service.open(str(folder)) as service:
        assert len(service.repair().packs) == 2
        assert_both_are_whole(service)


@pytest.mark.parametrize("damage", ["cut", "flipped header", "flipped payload"])
def test_what_is_gone_is_gone_alone_and_a_new_copy_heals(folder, scratch, damage):
    path = packs(folder)[0]
    size = HEADER.size + CHUNK_SIZE
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: 20 * size + 100])
        lost = 10
    else:
        flip(path, 5 * size + (3 if damage == "flipped header" else 2000))
        cut_footer(path)
        lost = 1
    lose_index(scratch)

    with Service.open(str(folder)) as service:
        (pack,) = service.repair().packs
        assert pack.blobs == 30 - lost
        report = service.verify()
        assert {item.volume for item in report.damage} == {"vm"}
        assert sum(item.size for item in report.damage) == lost * CHUNK_SIZE
        back_up(service, IMAGE, volume="again")
        assert_both_are_whole(service)


def test_pack_of_rubbish_is_set_aside(folder, scratch):
    for path in packs(folder)[:1]:
        path.write_bytes(noise(50_000, seed=4))
    (folder / "packs/00").mkdir(exist_ok=True)
    (folder / "packs/00" / ("0" * 32)).write_bytes(b"")

    with Service.open(str(folder)) as service:
        done = service.repair()
        assert [pack.blobs for pack in done.packs] == [0, 0]
        back_up(service, IMAGE, volume="again")
        assert_both_are_whole(service)


def test_pack_that_the_disk_cannot_read_is_saved_in_part_and_stays(folder, monkeypatch):
    path = packs(folder)[0]
    name, bad = str(path.relative_to(folder)), 7 * (HEADER.size + CHUNK_SIZE) + 100
    cut_footer(path)
    read = LocalStorage.get_range

    def read_or_fail(self, what, offset, size):
        if what == name and offset <= bad < offset + size:
            raise StorageUnavailable(reason="Input/output error")
        return read(self, what, offset, size)

    monkeypatch.setattr(LocalStorage, "get_range", read_or_fail)
    with Service.open(str(folder)) as service:
        (pack,) = service.repair().packs

    assert pack.set_aside is None and path.exists()
    # The end of the one before lies in the same 4 KiB.
    assert pack.blobs == 28


def test_large_blobs_are_found_wherever_a_read_ends(scratch):
    """Of chunks of 4 MiB one read brings in two at most."""
    folder = scratch / "large"
    init(str(folder), chunk_size=4 << 20, pack_size=64 << 20)
    image = noise(5 * (4 << 20) + 17, seed=5)
    with Service.open(str(folder)) as service:
        record = back_up(service, image)
        storage, ids = service.repository.storage, service.repository.ids
        sizes = list_packs(storage)
        largest = max(sizes, key=lambda pack_id: sizes[pack_id])
        expected = read_footer(storage, ids, largest, sizes[largest])
        found = list(
            PackScan(
                storage, ids, largest, sizes[largest], find_base=service.repository.reader.base
            ).blobs()
        )
        assert sizes[largest] > 2 * READ_SIZE
        assert [blob.blob_id for blob in found] == [entry.blob_id for entry in expected]
        cut_footer(packs(folder)[0])
        service.repair()
        assert restored(service, record) == image


def test_dry_run_changes_nothing(folder):
    cut_footer(packs(folder)[0])
    before = read_image(folder / "packs") | read_image(folder / "records")

    with Service.open(str(folder)) as service:
        (pack,) = service.repair(dry_run=True).packs

    assert pack.blobs == 30 and pack.set_aside is None
    assert read_image(folder / "packs") | read_image(folder / "records") == before
    assert not (folder / "damaged").exists()


def test_repair_runs_beside_readers_and_writers(folder):
    with Service.open(str(folder)) as reader, Service.open(str(folder)) as writer:
        back_up(writer, OTHER, volume="third")
        for path in packs(folder):
            cut_footer(path)

        with Service.open(str(folder)) as service:
            service.repair()

        assert restored(reader, reader.resolve("vm@latest")) == IMAGE
        again = back_up(writer, IMAGE + OTHER, volume="fourth")
        assert restored(reader, again) == IMAGE + OTHER
        reader.gc()
        assert is_clean(writer)


# -- killed, or failing ------------------------------------------------------------------------


def test_power_cut_at_any_sync_of_a_repair_loses_nothing(folder, scratch):
    for path in packs(folder)[:2]:
        cut_footer(path)
    recording = Recording(folder)
    recording.note(Promise(what="repair"))
    with recording.running(), Service.open(str(folder)) as service:
        service.repair()
    count = 0

    for crash in recording.crashes(random.Random(1), random_count=2):
        count += 1
        left = scratch / "left"
        write_image(crash.image, left)
        try:
            with Service.open(str(left)) as service:
                service.repair()
                service.gc()
                assert_both_are_whole(service)
        finally:
            shutil.rmtree(left)
            lose_index(scratch)
    print(f"{count} power cuts")
    assert count > 20


@pytest.mark.parametrize("how", [FULL, UNAVAILABLE, LOST_ACKNOWLEDGEMENT], ids=str)
def test_repair_that_fails_at_any_call_succeeds_when_tried_again(folder, scratch, how):
    for path in packs(folder)[:2]:
        cut_footer(path)
    whole = read_image(folder)

    for fail_at in itertools.count(1):
        left = scratch / "left"
        write_image(whole, left)
        storage = FaultyStorage(left)
        try:
            with Service(Repository(storage, Ambient())) as service:
                storage.fail_at(fail_at, how)
                service.repair()
        except StorageError:
            assert storage.fired
        with Service.open(str(left)) as service:
            service.repair()
            assert_both_are_whole(service)
        shutil.rmtree(left)
        lose_index(scratch)
        if not storage.fired:
            break
    assert fail_at > 10


# -- images without a record -------------------------------------------------------------------


def lose_record(folder: Path, service: Service) -> None:
    (folder / service.resolve("vm@latest").object_name).unlink()
    service.refresh()


def test_image_of_a_lost_record_is_found_and_adopted(folder):
    with Service.open(str(folder)) as service:
        assert service.repair().trees == []
        root = service.resolve("vm@latest").root.hex()
        lose_record(folder, service)

        (lost,) = service.repair().trees
        assert (lost.root, lost.size, lost.data_size) == (root, len(IMAGE), len(IMAGE))
        record = service.adopt(root[:12], volume="found")

        assert restored(service, record) == IMAGE
        assert service.repair().trees == []
        service.gc()
        assert restored(service, record) == IMAGE and is_clean(service)


@pytest.mark.parametrize("size", [1, 16384, 100_000, 130 * CHUNK_SIZE, 129 * CHUNK_SIZE - 5])
def test_size_of_a_lost_image_is_given_or_guessed(location, size):
    image = noise(size, seed=6)
    with Service.open(location) as service:
        record = back_up(service, image)
        service.delete(record)
        (lost,) = service.repair().trees

        exact = service.adopt(lost.root, volume="exact", size=size)
        service.delete(exact)
        guessed = service.adopt(lost.root, volume="guessed")

        assert restored(service, guessed) == image.ljust(lost.size, b"\0")
        assert 0 <= lost.size - size < CHUNK_SIZE
        service.delete(guessed)
        for wrong in (lost.size - CHUNK_SIZE, 1 << 40):
            with pytest.raises(InvalidOption):
                service.adopt(lost.root, volume="wrong", size=wrong)


@pytest.mark.parametrize("chunks", [1, 130])
def test_size_that_would_cut_data_off_is_refused(location, chunks):
    """Only whole chunks were looked at: up to a chunk less one byte was lost without a word."""
    size = chunks * CHUNK_SIZE - 1000
    image = noise(size - 1, seed=7) + b"!"
    with Service.open(location) as service:
        service.delete(back_up(service, image))
        (lost,) = service.repair().trees

        for wrong in (size - 1, (chunks - 1) * CHUNK_SIZE + 1, (chunks - 1) * CHUNK_SIZE):
            with pytest.raises(InvalidOption, match="data beyond that size"):
                service.adopt(lost.root, volume="found", size=wrong)

        record = service.adopt(lost.root, volume="found", size=size)
        assert restored(service, record) == image


def test_zeros_at_the_end_are_not_known_of(location):
    with Service.open(location) as service:
        source = SparseSource(300 * CHUNK_SIZE, [(0, b"x")])
        service.delete(service.backup(source, volume="vm"))

        (lost,) = service.repair().trees

        # More than 128 chunks, or the tree would be of one level.
        assert lost.size == 129 * CHUNK_SIZE
        whole = service.adopt(lost.root, volume="vm", size=300 * CHUNK_SIZE)
        assert restored(service, whole) == b"x".ljust(300 * CHUNK_SIZE, b"\0")


def test_image_that_is_not_complete_is_not_listed(folder):
    with Service.open(str(folder)) as service:
        lose_record(folder, service)
        packs(folder)[0].unlink()

        assert service.repair().trees == []


def test_what_is_staged_is_no_lost_image(folder):
    with Service.open(str(folder)) as service:
        area = service.open_staging(Policy(), mountpoint=None)
        handle = area.create("vm.img", mode=0o644, uid=0, gid=0)
        area.begin_writing(handle)
        area.note_write(handle)
        handle.staged.draft.write(0, OTHER[:CHUNK_SIZE])
        area.sync(handle)

        assert service.repair().trees == []
        area.release(handle, interrupted=True)
        area.close()


@pytest.mark.parametrize("root", ["", "abc", "f" * 64])
def test_unknown_root_is_not_adopted(folder, root):
    with Service.open(str(folder)) as service, pytest.raises(InvalidOption):
        service.adopt(root, volume="found")
