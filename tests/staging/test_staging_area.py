"""The staging area: what becomes of copies, and what the next daemon finds of them."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.ambients import SetClock
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, UNAVAILABLE, FaultyStorage
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored
from support.processes import DIED, die, in_a_child

from backupfs.ambient import Ambient
from backupfs.errors import (
    Busy,
    DraftNotFound,
    InvalidName,
    NameTaken,
    NothingToPublish,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from backupfs.format.draft_state import DraftState
from backupfs.repository.repository import Repository
from backupfs.service import Policy, Service
from backupfs.staging.area import StagingArea
from backupfs.staging.deciding import RETRY_SECONDS
from backupfs.staging.lifecycle import State
from backupfs.staging.state_store import StateStore
from backupfs.staging.write_handle import WriteHandle
from backupfs.storage import local

IMAGE = noise(20 * CHUNK_SIZE, seed=1)
OTHER = noise(25 * CHUNK_SIZE, seed=2)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def service(location: str, clock: SetClock) -> Iterator[Service]:
    with Service.open(location, ambient=clock) as opened:
        yield opened


@pytest.fixture
def area(service: Service) -> Iterator[StagingArea]:
    opened = service.open_staging(Policy(), mountpoint=None)
    yield opened
    opened.close()


# -- what clients do, as the mount passes it on ------------------------------------------------


def write(area: StagingArea, handle: WriteHandle, data: bytes, offset: int = 0) -> None:
    if handle.staged.wants_mark:
        area.begin_writing(handle)
    area.note_write(handle)
    handle.staged.draft.write(offset, data)
    handle.note_written(offset, len(data))


def close(area: StagingArea, handle: WriteHandle, *, killed: bool = False) -> None:
    area.flush(handle, interrupted=killed)
    area.release(handle, interrupted=killed)


def publish_settled(area: StagingArea) -> None:
    for staged in area.settled():
        area.publish_settled(staged)


def create(area: StagingArea, name: str) -> WriteHandle:
    return area.create(name, mode=0o644, uid=0, gid=0)


def reopen(area: StagingArea, name: str, *, truncate: bool = False) -> WriteHandle:
    staged = area.find(name)
    assert staged is not None
    return area.open_write(staged, truncate=truncate)


def copy(area: StagingArea, name: str, data: bytes, *, killed: bool = False) -> None:
    """cp, over what is there or anew."""
    is_there = area.find(name) is not None
    handle = reopen(area, name, truncate=True) if is_there else create(area, name)
    for start in range(0, len(data), 100_000):
        write(area, handle, data[start : start + 100_000], start)
    close(area, handle, killed=killed)


def state(area: StagingArea, name: str) -> str:
    staged = area.find(name)
    assert staged is not None
    return f"{staged.state}: {staged.reason}" if staged.reason else str(staged.state)


def content(area: StagingArea, name: str) -> bytes:
    staged = area.find(name)
    assert staged is not None
    return staged.draft.read(0, staged.size)


def images(service: Service, volume: str = "vm") -> list[bytes]:
    service.refresh()
    return [restored(service, record) for record in service.catalogue.backups(volume)]


@contextmanager
def next_start(
    location: str, policy: Policy | None = None
) -> Iterator[tuple[Service, StagingArea]]:
    """The daemon that comes after."""
    with Service.open(location) as service:
        area = service.open_staging(policy or Policy(), mountpoint=None)
        yield service, area
        area.close()


def daemon_that_dies(location: str, act: Callable[[StagingArea], object]) -> None:
    """Stage something in another process, which then ends without cleaning anything up."""

    def live_and_die() -> None:
        service = Service.open(location)
        act(service.open_staging(Policy(), mountpoint=None))
        die()

    assert in_a_child(live_and_die) == DIED


# -- publishing --------------------------------------------------------------------------------


def test_a_closed_copy_is_a_backup_and_its_file_a_head(service, area):
    copy(area, "folder/vm.img", IMAGE)

    assert state(area, "folder/vm.img") == "published"
    (record,) = service.backups("folder/vm")
    assert restored(service, record) == IMAGE
    assert record.stored_bytes > len(IMAGE)
    assert content(area, "folder/vm.img") == IMAGE
    assert is_clean(service)


def test_the_last_of_many_handles_publishes(service, area):
    first = create(area, "vm.img")
    second = reopen(area, "vm.img")
    write(area, first, IMAGE)

    close(area, first)
    assert images(service) == []
    write(area, second, b"late", 5)
    close(area, second)

    assert images(service) == [IMAGE[:5] + b"late" + IMAGE[9:]]


def test_a_head_opened_and_closed_unchanged_makes_no_backup(service, area):
    copy(area, "vm.img", IMAGE)

    close(area, reopen(area, "vm.img"))
    area.set_attributes(area.find("vm.img"), mode=0o600, mtime_ns=5, uid=7, gid=8)

    assert len(images(service)) == 1
    assert state(area, "vm.img") == "published"
    assert (area.find("vm.img").mode, area.find("vm.img").mtime_ns) == (0o600, 5)


def test_a_change_in_place_is_an_incremental_backup(service, area):
    copy(area, "vm.img", IMAGE)

    handle = reopen(area, "vm.img")
    write(area, handle, b"changed", 50_000)
    close(area, handle)

    first, second = service.backups("vm")
    assert second.parent_id == first.backup_id
    assert len(b"changed") < second.stored_bytes < CHUNK_SIZE
    assert images(service) == [IMAGE, IMAGE[:50_000] + b"changed" + IMAGE[50_007:]]


def test_the_copy_of_the_same_data_is_another_backup_that_stores_next_to_nothing(service, area):
    copy(area, "vm.img", IMAGE)
    copy(area, "vm.img", IMAGE)

    assert images(service) == [IMAGE, IMAGE]
    assert service.backups("vm")[1].stored_bytes == 0


def test_an_empty_file_is_no_backup_until_something_is_written(service, area):
    copy(area, "vm.img", b"")

    assert state(area, "vm.img").startswith("held: no byte")
    assert images(service) == []
    with pytest.raises(NothingToPublish):
        area.publish_now("vm.img")
    copy(area, "vm.img", IMAGE)
    assert images(service) == [IMAGE]


def test_zeros_wait_for_quiet_and_a_writer_who_comes_back_ends_the_wait(service, area, clock):
    handle = create(area, "vm.img")
    area.truncate(handle.staged, 1 << 20, handle)
    close(area, handle)
    assert state(area, "vm.img").startswith("settling")

    clock.advance(4)
    publish_settled(area)
    assert images(service) == []
    again = reopen(area, "vm.img")
    clock.advance(10)
    publish_settled(area)
    assert images(service) == []
    write(area, again, IMAGE)
    close(area, again)

    assert images(service) == [IMAGE.ljust(1 << 20, b"\0")]


def test_zeros_that_stay_zeros_are_published_after_the_wait(service, area, clock):
    handle = create(area, "vm.img")
    write(area, handle, bytes(4096))
    close(area, handle)

    clock.advance(5.1)
    publish_settled(area)

    assert images(service) == [bytes(4096)]
    assert state(area, "vm.img") == "published"


# -- holding -----------------------------------------------------------------------------------


def test_a_copy_whose_program_was_killed_is_held_until_a_complete_one_comes(service, area):
    copy(area, "vm.img", IMAGE)
    copy(area, "vm.img", OTHER[:-5000], killed=True)

    assert state(area, "vm.img") == "held: the program that wrote it was killed"
    assert images(service) == [IMAGE]
    assert content(area, "vm.img") == OTHER[:-5000], "resumable"
    copy(area, "vm.img", OTHER)
    assert images(service) == [IMAGE, OTHER]


@pytest.mark.parametrize("before", [100_000, len(IMAGE) + 5000], ids=["shorter", "longer"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_killed_copy_is_completed_by_who_writes_all_over_it(service, area, before, order):
    """In whatever order; scp sets the size at its end."""
    copy(area, "vm.img", noise(before, seed=77), killed=True)

    handle = reopen(area, "vm.img")
    third = len(IMAGE) // 3
    for part in order:
        end = len(IMAGE) if part == 2 else (part + 1) * third
        write(area, handle, IMAGE[part * third : end], part * third)
    area.truncate(handle.staged, len(IMAGE), handle)
    close(area, handle)

    assert images(service) == [IMAGE]


def test_a_killed_copy_of_which_not_all_was_written_over_stays_held(service, area):
    copy(area, "vm.img", IMAGE[:100_000], killed=True)

    handle = reopen(area, "vm.img")
    write(area, handle, IMAGE[100_000:], 100_000)
    area.truncate(handle.staged, len(IMAGE), handle)
    close(area, handle)
    assert images(service) == []

    handle = reopen(area, "vm.img")
    write(area, handle, IMAGE[:100_000])
    area.truncate(handle.staged, len(IMAGE) + 1000, handle)
    close(area, handle)
    assert images(service) == [], "two programs, and zeros at the end"


def test_a_program_that_sets_the_size_last_and_did_not_was_cut_short(location):
    """As rsync --inplace: its end looks like any other, but for that."""
    with next_start(location) as (service, area):
        copy(area, "vm.img", IMAGE)
        handle = reopen(area, "vm.img")
        handle.sets_size_last = True
        area.truncate(handle.staged, len(IMAGE), handle)
        write(area, handle, OTHER[:1000])
        close(area, handle)

        assert state(area, "vm.img").startswith("held: rsync was interrupted")
    with next_start(location) as (service, area):
        assert state(area, "vm.img").startswith("held: rsync was interrupted")
        assert images(service) == [IMAGE]


@pytest.mark.parametrize("holes", [0, 5000], ids=["no hole at the end", "a hole at the end"])
def test_a_program_that_sets_the_size_last_completes_what_was_cut_short(service, area, holes):
    copy(area, "vm.img", IMAGE[:1000], killed=True)
    handle = reopen(area, "vm.img")
    handle.sets_size_last = True

    write(area, handle, IMAGE[1000:], 1000)
    area.truncate(handle.staged, len(IMAGE) + holes, handle)
    close(area, handle)

    assert images(service) == [IMAGE + bytes(holes)]


def test_a_program_that_sets_the_size_last_and_wrote_nothing_makes_no_backup(service, area):
    copy(area, "vm.img", IMAGE)
    handle = reopen(area, "vm.img")
    handle.sets_size_last = True

    close(area, handle)

    assert state(area, "vm.img") == "published"
    assert images(service) == [IMAGE]


def test_a_duplicate_that_was_closed_is_no_end_to_the_next_daemon(location):
    """Programs of a shell's group close one each; what was written so far is kept, and held."""

    def write_half(area: StagingArea) -> None:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE[:5000])
        area.flush(handle, interrupted=False, goes_on=True)

    daemon_that_dies(location, write_half)

    with next_start(location) as (service, area):
        assert state(area, "vm.img") == "held: backupfs ended while it was being written"
        assert content(area, "vm.img") == IMAGE[:5000]
        assert images(service) == []


def test_a_write_beside_the_close_of_another_handle_is_marked(location, monkeypatch):
    """In the moment in which the close takes the mark away: the event loop does not wait for it."""

    def write_beside_a_close(area: StagingArea) -> None:
        first = create(area, "vm.img")
        second = area.open_write(first.staged, truncate=False)
        write(area, first, IMAGE[:5000])
        unmark = StateStore.unmark_writing

        def unmark_late(states, draft_id):
            area.note_write(second)
            assert second.staged.wants_mark
            second.staged.draft.write(5000, IMAGE[5000:9000])
            unmark(states, draft_id)

        monkeypatch.setattr(StateStore, "unmark_writing", unmark_late)
        area.flush(first, interrupted=False)
        area.begin_writing(second)  # as who writes does where the mark is wanted

    daemon_that_dies(location, write_beside_a_close)

    with next_start(location) as (service, area):
        assert state(area, "vm.img") == "held: backupfs ended while it was being written"
        assert images(service) == []


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_record_found_at_the_start_counts_as_published_when_it_is_durable(
    location, monkeypatch, is_broken
):
    """The daemon died between the name of the record and the sync of its folder."""

    def publish_and_die(area: StagingArea) -> None:
        real = local.sync_folder

        def die_there(folder: Path) -> None:
            if folder.name == "records" and any(folder.iterdir()):
                die()
            real(folder)

        monkeypatch.setattr(local, "sync_folder", die_there)
        copy(area, "vm.img", IMAGE)

    daemon_that_dies(location, publish_and_die)
    synced: list[str] = []
    real = local.sync_folder

    def noted(folder: Path) -> None:
        if folder.name == "records" and is_broken:
            raise OSError(errno.EIO, "broken")
        synced.append(folder.name)
        real(folder)

    monkeypatch.setattr(local, "sync_folder", noted)
    with next_start(location) as (_service, area):
        found = state(area, "vm.img")
        assert found.startswith("held: publishing failed") if is_broken else found == "published"
        assert ("records" in synced) is not is_broken


def test_gc_hears_of_a_file_while_it_is_renamed(area, monkeypatch):
    copy(area, "one.part", IMAGE)
    copy(area, "two.part", OTHER)
    there = {staged.draft.saved.root for staged in area.files()}

    class Watched(dict):
        def __setitem__(self, name, staged):
            super().__setitem__(name, staged)
            assert there <= area._checkpoint_all()

        def __delitem__(self, name):
            super().__delitem__(name)
            assert there <= area._checkpoint_all()

    monkeypatch.setattr(area, "_files", Watched(area._files))

    area.rename("one.part", "two.part")

    assert content(area, "two.part") == IMAGE


def test_a_duplicate_that_was_closed_does_not_hold_the_file_at_its_release(service, area):
    handle = create(area, "vm.img")
    write(area, handle, IMAGE)
    area.flush(handle, interrupted=False, goes_on=True)

    area.release(handle, interrupted=False)

    assert images(service) == [IMAGE]
    assert not area.find("vm.img").is_marked


def test_a_smaller_copy_is_held_and_published_when_told_to(service, area):
    copy(area, "vm.img", IMAGE)
    copy(area, "vm.img", IMAGE[:1000])

    assert state(area, "vm.img").startswith("held: smaller than the latest backup")
    record = area.publish_now("vm.img")

    assert record.size == 1000
    assert images(service) == [IMAGE, IMAGE[:1000]]
    with pytest.raises(NothingToPublish):
        area.publish_now("vm.img")


def test_what_is_open_is_not_published_by_being_told_to(service, area):
    handle = create(area, "vm.img")
    write(area, handle, IMAGE)

    with pytest.raises(NothingToPublish):
        area.publish_now("vm.img")
    close(area, handle)

    assert images(service) == [IMAGE]


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporary", [".vm.img.x7Yz01", "vm.img.part", ".goutputstream-AB12CD"])
def test_a_temporary_name_is_published_when_it_is_renamed(service, area, temporary):
    copy(area, temporary, IMAGE)
    assert state(area, temporary).startswith("held: a temporary name")
    with pytest.raises(InvalidName):
        area.publish_now(temporary)

    area.rename(temporary, "vm.img")

    assert images(service) == [IMAGE]
    assert area.find(temporary) is None


def test_a_rename_before_the_last_close_publishes_at_that_close(service, area):
    handle = create(area, "vm.img.part")
    write(area, handle, IMAGE)
    area.rename("vm.img.part", "vm.img")
    assert images(service) == []

    close(area, handle)

    assert images(service) == [IMAGE]


def test_a_partial_file_that_rsync_keeps_is_held(service, area):
    """It gives it the time 0 before it renames it."""
    copy(area, ".vm.img.x7Yz01", IMAGE)
    area.set_attributes(area.find(".vm.img.x7Yz01"), mtime_ns=0)

    area.rename(".vm.img.x7Yz01", "vm.img")

    assert state(area, "vm.img").startswith("held: rsync was interrupted")
    assert images(service) == []


def test_renaming_over_a_head_replaces_it(service, area, location):
    copy(area, "vm.img", IMAGE)
    copy(area, ".vm.img.x7Yz01", OTHER)

    area.rename(".vm.img.x7Yz01", "vm.img")

    assert images(service) == [IMAGE, OTHER]
    assert content(area, "vm.img") == OTHER
    assert [staged.name for staged in area.files()] == ["vm.img"]
    assert len(list((Path(location) / "drafts").glob("*/*.msgpack"))) == 1


def test_a_file_replaced_while_it_is_open_leaves_nothing_behind(service, area, location):
    copy(area, "vm.img", IMAGE)
    open_before = reopen(area, "vm.img")
    write(area, open_before, b"lost", 0)
    copy(area, "new.part", OTHER)

    area.rename("new.part", "vm.img")
    write(area, open_before, b"lost too", 0)
    close(area, open_before)

    assert images(service) == [IMAGE, OTHER]
    folder = Path(location) / "drafts"
    assert len(list(folder.glob("*/*.msgpack"))) == 1
    assert list(folder.glob("*/*.writing")) == []


def test_a_head_renamed_to_another_volume_is_its_first_backup(service, area):
    copy(area, "vm.img", IMAGE)

    area.rename("vm.img", "clone.img")

    assert images(service, "clone") == [IMAGE]
    assert images(service) == [IMAGE]
    assert area.find("vm.img") is None


def test_a_head_renamed_within_its_volume_makes_no_backup(service, area):
    copy(area, "vm.img", IMAGE)

    area.rename("vm.img", "vm.raw")

    assert len(images(service)) == 1
    assert state(area, "vm.raw") == "published"


def test_only_a_rename_publishes_where_the_mount_says_so(service, clock):
    area = service.open_staging(Policy(publish_on_rename_only=True), mountpoint=None)
    copy(area, "vm.img", IMAGE)
    assert state(area, "vm.img").startswith("held: waits to be renamed")
    copy(area, "other.new", OTHER)

    area.rename("other.new", "other.img")

    assert images(service, "other") == [OTHER]
    assert images(service) == []
    area.close()


def test_a_volume_is_staged_under_one_name(area):
    copy(area, "vm.img", IMAGE)
    copy(area, "other.img", OTHER)

    for name in ("vm.raw", "vm"):
        with pytest.raises(NameTaken):
            create(area, name)
        with pytest.raises(NameTaken):
            area.rename("other.img", name)
    with pytest.raises(NameTaken):
        create(area, "vm.img")
    assert sorted(staged.name for staged in area.files()) == ["other.img", "vm.img"]


@pytest.mark.parametrize("name", ["latest.img/x", "a//b", "../x", "x" * 300, "a\0b", "\udc80"])
def test_impossible_names_are_refused(area, name):
    copy(area, "vm.img", IMAGE)

    with pytest.raises(InvalidName):
        create(area, name)
    with pytest.raises(InvalidName):
        area.rename("vm.img", name)

    assert [staged.name for staged in area.files()] == ["vm.img"]


def test_removing_forgets_the_file_and_never_a_backup(service, area, location):
    copy(area, "vm.img", IMAGE)
    copy(area, "draft.img", OTHER, killed=True)

    area.unlink("vm.img")
    area.unlink("draft.img")

    assert area.files() == []
    assert images(service) == [IMAGE]
    assert list((Path(location) / "drafts").glob("*/*.msgpack")) == []
    with pytest.raises(DraftNotFound):
        area.unlink("vm.img")


def test_a_file_removed_while_it_is_open_stays_removed(service, area, location):
    handle = create(area, "vm.img")
    write(area, handle, IMAGE)
    area.flush(handle, interrupted=False)

    area.unlink("vm.img")
    write(area, handle, OTHER)
    close(area, handle)

    assert images(service) == []
    assert list((Path(location) / "drafts").glob("*/*.msgpack")) == []
    assert list((Path(location) / "drafts").glob("*/*.writing")) == []


@pytest.mark.parametrize("by", ["unlink", "rename"])
def test_a_file_removed_while_its_state_is_saved_does_not_come_back(
    area, location, monkeypatch, by
):
    """The state that a first write saves must not come after the removal."""
    copy(area, "new.part", IMAGE)
    handle = create(area, "vm.img")
    saving = threading.Event()
    real = StateStore.save

    def save_slowly(store: StateStore, state: DraftState) -> None:
        if state.draft_id == handle.staged.draft_id:
            saving.set()
            time.sleep(0.2)
        real(store, state)

    monkeypatch.setattr(StateStore, "save", save_slowly)
    beginning = threading.Thread(target=lambda: area.begin_writing(handle))
    beginning.start()
    assert saving.wait(10)
    if by == "unlink":
        area.unlink("vm.img")
    else:
        area.rename("new.part", "vm.img")
    beginning.join()

    folder = Path(location) / "drafts"
    assert list(folder.glob(f"*/{handle.staged.draft_id}*")) == []
    area.release(handle, interrupted=False)


def test_folders_are_kept_over_restarts(location):
    with next_start(location) as (_service, area):
        area.make_folder("a")
        area.make_folder("a/b")
        area.make_folder("c")
        area.remove_folder("c")
        with pytest.raises(InvalidName):
            area.make_folder("a//b")
        assert not area.is_empty_folder("a")
        assert area.is_empty_folder("a/b")

    with next_start(location) as (_service, area):
        assert area.folders() == {"a", "a/b"}
        assert area.is_folder("") and area.is_folder("a/b") and not area.is_folder("c")


# -- the next daemon ---------------------------------------------------------------------------


def test_what_was_flushed_and_not_published_is_published_by_the_next(location):
    def stage(area: StagingArea) -> None:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        assert images(service) == [IMAGE]
        assert state(area, "vm.img") == "published"
    with next_start(location) as (service, _area):
        assert images(service) == [IMAGE], "once"


def test_what_was_written_after_its_last_flush_is_held_as_of_that_flush(location):
    def stage(area: StagingArea) -> None:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)
        write(area, handle, b"more", len(IMAGE))

    daemon_that_dies(location, stage)

    for _ in range(2):
        with next_start(location) as (service, area):
            assert state(area, "vm.img") == "held: backupfs ended while it was being written"
            assert images(service) == []
            assert content(area, "vm.img") == IMAGE
    with next_start(location) as (service, area):
        area.publish_now("vm.img")
        assert images(service) == [IMAGE]


def test_one_writer_of_two_that_has_closed_does_not_speak_for_the_other(location):
    def stage(area: StagingArea) -> None:
        first = create(area, "vm.img")
        second = reopen(area, "vm.img")
        write(area, first, IMAGE)
        write(area, second, b"half of it", 0)
        close(area, first)

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        assert state(area, "vm.img").startswith("held")
        assert images(service) == []


def test_what_was_only_synced_is_held(location):
    """fsync is no close: dd oflag=sync was in the middle of it."""

    def stage(area: StagingArea) -> None:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.sync(handle)

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        assert state(area, "vm.img").startswith("held")
        assert images(service) == []
        assert content(area, "vm.img") == IMAGE


def test_a_file_that_was_being_written_for_the_first_time_is_still_there(location):
    def stage(area: StagingArea) -> None:
        write(area, create(area, "vm.img"), IMAGE)

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        assert state(area, "vm.img").startswith("held")
        assert images(service) == []


@pytest.mark.parametrize("killed_later", [False, True])
def test_a_head_survives_the_daemon(location, killed_later):
    def stage(area: StagingArea) -> None:
        copy(area, "vm.img", IMAGE)
        area.set_attributes(area.find("vm.img"), mode=0o600, uid=5, gid=6, mtime_ns=123_456)
        if killed_later:
            write(area, reopen(area, "vm.img"), b"changed", 0)

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        staged = area.find("vm.img")
        assert content(area, "vm.img") == IMAGE
        assert images(service) == [IMAGE]
        assert (staged.uid, staged.gid, staged.mode) == (5, 6, 0o600)
        if killed_later:
            assert state(area, "vm.img").startswith("held")
        else:
            assert (state(area, "vm.img"), staged.mtime_ns) == ("published", 123_456)


@pytest.mark.parametrize(
    "why", ["killed", "smaller", "temporary", "lost a write", "partial of rsync"]
)
def test_what_was_held_is_held_by_the_next_daemon_too(location, why):
    def stage(area: StagingArea) -> None:
        copy(area, "vm.img", b"1")
        if why == "killed":
            copy(area, "vm.img", IMAGE, killed=True)
        elif why == "smaller":
            copy(area, "vm.img", IMAGE)
            copy(area, "vm.img", IMAGE[:-1])
        elif why == "temporary":
            copy(area, "other.part", IMAGE)
        elif why == "lost a write":
            lose_a_write(area)
        else:
            copy(area, ".vm.img.x7Yz01", IMAGE)
            area.set_attributes(area.find(".vm.img.x7Yz01"), mtime_ns=0)
            area.rename(".vm.img.x7Yz01", "vm.img")

    def lose_a_write(area: StagingArea) -> None:
        handle = reopen(area, "vm.img")
        write(area, handle, IMAGE)
        area.sync(handle)
        handle.staged.draft._fail(StorageFull(reason="test"))
        with pytest.raises(StorageFull):
            area.flush(handle, interrupted=False)
        area.release(handle, interrupted=False)

    daemon_that_dies(location, stage)

    with Service.open(location) as service:
        before = len(service.backups())
    for _ in range(2):
        with next_start(location) as (service, area):
            held = [staged for staged in area.files() if staged.state is State.HELD]
            assert len(held) == 1
            assert held[0].reason
            assert len(service.backups()) == before


def test_a_settling_draft_settles_again(location):
    def stage(area: StagingArea) -> None:
        copy(area, "vm.img", bytes(5000))

    daemon_that_dies(location, stage)

    with next_start(location, Policy(settle_seconds=0.0)) as (service, area):
        assert state(area, "vm.img").startswith("settling")
        publish_settled(area)
        assert images(service) == [bytes(5000)]


def test_a_daemon_that_died_while_publishing_has_published_once(location, monkeypatch):
    """The record was written, and the draft's own state was not."""

    def stage(area: StagingArea) -> None:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)
        monkeypatch.setattr(StateStore, "save", lambda _self, _state: die())
        area.release(handle, interrupted=False)

    daemon_that_dies(location, stage)

    for _ in range(2):
        with next_start(location) as (service, area):
            assert images(service) == [IMAGE]
            assert state(area, "vm.img") == "published"


@pytest.mark.parametrize("is_replaced_changed", [False, True])
def test_a_rename_cut_short_leaves_one_file_of_the_name(location, monkeypatch, is_replaced_changed):
    """The new state is there, and the one it replaced still is."""

    def stage(area: StagingArea) -> None:
        copy(area, "vm.img", IMAGE)
        if is_replaced_changed:
            copy(area, "vm.img", IMAGE + b"unpublished", killed=True)
        copy(area, "new.part", OTHER)
        monkeypatch.setattr(StateStore, "remove", lambda _self, _draft_id: die())
        area.rename("new.part", "vm.img")

    daemon_that_dies(location, stage)

    with next_start(location) as (service, area):
        assert content(area, "vm.img") == OTHER
        assert images(service) == [IMAGE, OTHER]
        others = [staged for staged in area.files() if staged.name != "vm.img"]
        if is_replaced_changed:
            (aside,) = others
            assert aside.name.endswith(".part")
            assert content(area, aside.name) == IMAGE + b"unpublished"
            assert aside.state is State.HELD
        else:
            assert others == []


def test_closing_keeps_what_is_open_for_the_next(location):
    with next_start(location) as (_service, area):
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)

    with next_start(location) as (service, area):
        assert state(area, "vm.img").startswith("held")
        assert content(area, "vm.img") == IMAGE
        assert images(service) == []


def test_one_process_has_the_staging_area(location, area):
    with Service.open(location) as other, pytest.raises(Busy):
        other.open_staging(Policy(), mountpoint=None)


def test_many_restarts_do_not_grow_anything(location):
    def everything() -> list[str]:
        return sorted(str(path) for path in Path(location).rglob("*"))

    with next_start(location) as (_service, area):
        copy(area, "vm.img", IMAGE)
        copy(area, "held.part", OTHER)
    before = everything()

    for _ in range(3):
        with next_start(location):
            pass

    assert everything() == before


# -- failures ----------------------------------------------------------------------------------


def faulty_area(location: str) -> tuple[Service, StagingArea, FaultyStorage]:
    storage = FaultyStorage(location)
    service = Service(Repository(storage, Ambient()))
    return service, service.open_staging(Policy(), mountpoint=None), storage


@pytest.mark.parametrize(
    "how", [FULL, UNAVAILABLE, LOST_ACKNOWLEDGEMENT], ids=["full", "away", "lost"]
)
def test_a_copy_may_fail_at_any_call_and_is_a_backup_when_it_comes_again(location, how):
    """A copy either fails where its program hears of it, or is held and named, or published."""
    kept = b"the backup before"
    with Service.open(location) as service:
        back_up(service, kept)
    for fail_at in itertools.count(1):
        image = noise(20 * CHUNK_SIZE, seed=fail_at)
        service, area, storage = faulty_area(location)
        with service:
            storage.fail_at(fail_at, how)
            try:
                copy(area, "vm.img", image)
                told = False
            except StorageError:
                told = True
                handle_left_open(area)
            fired = storage.fired
            storage.repair()

            published = images(service)
            assert kept in published
            assert told or state(area, "vm.img") != "published" or image in published
            assert is_clean(service)
            if area.find("vm.img") is None:
                copy(area, "vm.img", image)
            elif image not in published:
                try:
                    area.publish_now("vm.img")
                except NothingToPublish:
                    copy(area, "vm.img", image)
            assert image in images(service)
            assert len(images(service)) <= 3, "no backup twice by trying again"
            assert is_clean(service)
            for record in service.backups("vm")[1:]:
                service.delete(record)
            area.unlink("vm.img")
            area.close()
        if not fired:
            assert not told
            break
    assert fail_at > 5


def handle_left_open(area: StagingArea) -> None:
    """The kernel releases what a failed close has left."""
    for staged in area.files():
        if staged.writers:
            area.release(WriteHandle(staged), interrupted=False)


def test_a_full_disk_fails_the_copy_and_leaves_what_was_published(location):
    service, area, storage = faulty_area(location)
    with service:
        copy(area, "vm.img", IMAGE)
        handle = reopen(area, "vm.img", truncate=True)
        write(area, handle, OTHER)
        storage.fail_at(1, FULL, stay_broken=True)

        with pytest.raises(StorageFull):
            area.flush(handle, interrupted=False)
        area.release(handle, interrupted=False)

        storage.repair()
        assert state(area, "vm.img").startswith("held: writing failed: no space")
        assert content(area, "vm.img") == IMAGE, "as of the last checkpoint"
        assert images(service) == [IMAGE]
        copy(area, "vm.img", OTHER)
        assert images(service) == [IMAGE, OTHER]
        area.close()


def test_publishing_that_failed_is_tried_by_the_next_daemon(location):
    service, area, storage = faulty_area(location)
    with service:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)
        storage.fail_at(1, UNAVAILABLE, stay_broken=True)
        area.release(handle, interrupted=False)
        storage.repair()
        assert state(area, "vm.img").startswith("held: publishing failed")
        assert "publishing failed" in area.events.text()
        area.close()

    with next_start(location) as (service, area):
        assert images(service) == [IMAGE]


def test_publishing_that_failed_is_tried_again_now_and_then(location, clock):
    storage = FaultyStorage(location)
    with Service(Repository(storage, clock)) as service:
        area = service.open_staging(Policy(), mountpoint=None)
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)
        storage.fail_at(1, UNAVAILABLE, stay_broken=True)
        area.release(handle, interrupted=False)
        assert state(area, "vm.img").startswith("held: publishing failed")

        for _ in range(3):
            assert not area.settled()
            clock.advance(RETRY_SECONDS)
            publish_settled(area)
        assert state(area, "vm.img").startswith("held: publishing failed")
        assert area.events.text().count("publishing failed") == 1, "told once"

        storage.repair()
        clock.advance(RETRY_SECONDS)
        publish_settled(area)

        assert state(area, "vm.img") == "published"
        assert images(service) == [IMAGE]
        area.close()


def test_a_file_held_for_another_reason_is_not_tried_again(area, clock):
    copy(area, "vm.img", IMAGE, killed=True)

    clock.advance(10 * RETRY_SECONDS)

    assert not area.settled()


def test_an_error_of_the_last_write_back_is_not_told_the_next_writer(location):
    """Pages of a mapping come after the last close, and only the release writes them back."""
    service, area, storage = faulty_area(location)
    with service:
        copy(area, "vm.img", IMAGE)
        handle = reopen(area, "vm.img")
        area.flush(handle, interrupted=False)
        write(area, handle, OTHER[:CHUNK_SIZE])
        storage.fail_at(1, FULL, stay_broken=True)
        area.release(handle, interrupted=False)
        storage.repair()
        assert state(area, "vm.img").startswith("held: writing failed: no space")
        assert content(area, "vm.img") == IMAGE, "as of the last checkpoint"

        handle = reopen(area, "vm.img")
        write(area, handle, OTHER)
        close(area, handle)

        assert images(service) == [IMAGE, OTHER]
        area.close()


@pytest.mark.parametrize("then", ["copied over", "renamed"])
def test_what_comes_after_a_publish_whose_answer_was_lost_is_another_backup(location, then):
    """The id that was meant for the first is taken by it, though nobody was told."""
    service, area, storage = faulty_area(location)
    with service:
        handle = create(area, "vm.img")
        write(area, handle, IMAGE)
        area.flush(handle, interrupted=False)
        real = storage.put_new

        def lose_the_answer(name, data):
            real(name, data)
            if name.startswith("records/"):
                raise StorageUnavailable(reason="the answer was lost")

        storage.put_new = lose_the_answer
        area.release(handle, interrupted=False)
        storage.put_new = real
        assert state(area, "vm.img").startswith("held: publishing failed")

        if then == "copied over":
            copy(area, "vm.img", OTHER)
            assert state(area, "vm.img") == "published"
            assert images(service) == [IMAGE, OTHER]
        else:
            area.rename("vm.img", "clone.img")
            assert images(service) == images(service, "clone") == [IMAGE]
        area.close()


def test_a_rename_that_cannot_be_kept_has_not_happened(service, area, monkeypatch):
    copy(area, "new.part", IMAGE)

    def full(_self, _state):
        raise StorageFull(reason="test")

    with monkeypatch.context() as context:
        context.setattr(StateStore, "save", full)
        with pytest.raises(StorageFull):
            area.rename("new.part", "vm.img")

    assert [staged.name for staged in area.files()] == ["new.part"]
    assert area.find("vm.img") is None
    area.rename("new.part", "vm.img")
    assert images(service) == [IMAGE]
    area.unlink("vm.img")


def test_a_rename_whose_publishing_fails_has_happened_and_says_so(location):
    service, area, storage = faulty_area(location)
    with service:
        copy(area, "new.part", IMAGE)
        storage.fail_at(1, UNAVAILABLE, stay_broken=True)

        with pytest.raises(StorageUnavailable):
            area.rename("new.part", "vm.img")

        storage.repair()
        assert state(area, "vm.img").startswith("held: publishing failed")
        assert area.publish_now("vm.img").volume == "vm"
        area.close()


# -- at once -----------------------------------------------------------------------------------


def test_many_copies_at_once_are_all_published(service, area):
    def copy_some(number: int) -> None:
        for round_number in range(3):
            copy(area, f"vm{number}.img", noise(5 * CHUNK_SIZE, seed=number * 10 + round_number))

    threads = [threading.Thread(target=copy_some, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number in range(6):
        expected = [noise(5 * CHUNK_SIZE, seed=number * 10 + seed) for seed in range(3)]
        assert images(service, f"vm{number}") == expected
    assert is_clean(service)


def test_events_tell_what_happened(area):
    copy(area, "vm.img", IMAGE)
    copy(area, "with\nnewline.part", OTHER)
    area.unlink("vm.img")

    lines = area.events.text().splitlines()

    assert [line.split(" ", 1)[1].split(":")[0] for line in lines] == [
        "published 'vm.img'",
        "held 'with\\nnewline.part'",
        "forgot 'vm.img'",
    ]
    assert os.linesep not in lines[1]


def test_copy_synced_in_its_middle_is_held_also_where_its_mark_is_lost(area, location, scratch):
    """As a power cut may leave it: half an image must not become a backup."""
    handle = create(area, "vm.img")
    write(area, handle, IMAGE[: 3 * CHUNK_SIZE])
    area.sync(handle)
    left = scratch / "left"
    shutil.copytree(location, left, ignore=shutil.ignore_patterns("*.writing"))

    with Service.open(str(left)) as service:
        found = service.open_staging(Policy(), mountpoint=None)
        assert state(found, "vm.img") == "held: backupfs ended while it was being written"
        assert content(found, "vm.img") == IMAGE[: 3 * CHUNK_SIZE]
        assert images(service) == []
        found.close()
    area.release(handle, interrupted=False)


def test_copy_that_was_told_of_an_error_by_fsync_is_held(area, service, monkeypatch):
    """Its program gives up and closes: what it wrote so far must not pass as complete."""
    handle = create(area, "vm.img")
    write(area, handle, IMAGE[: 3 * CHUNK_SIZE])

    def fails(_states, _state):
        raise StorageUnavailable(reason="Input/output error")

    with monkeypatch.context() as context:
        context.setattr(StateStore, "save", fails)
        with pytest.raises(StorageUnavailable):
            area.sync(handle)
    close(area, handle)

    assert state(area, "vm.img").startswith("held: writing failed")
    assert images(service) == []
    copy(area, "vm.img", IMAGE)
    assert images(service) == [IMAGE]


def test_file_that_cannot_be_removed_stays_in_view(area, monkeypatch):
    copy(area, "vm.img", IMAGE)

    def fails(_states, _draft_id):
        raise StorageUnavailable(reason="Input/output error")

    with monkeypatch.context() as context:
        context.setattr(StateStore, "remove", fails)
        with pytest.raises(StorageUnavailable):
            area.unlink("vm.img")

    assert content(area, "vm.img") == IMAGE
    area.unlink("vm.img")
    assert area.find("vm.img") is None


@pytest.mark.parametrize("change", ["another size", "another name"])
def test_what_has_the_id_of_a_backup_and_is_another_image_is_published_at_the_next_start(
    location, change
):
    """A record was put, the answer lost, and the file resized or renamed before the daemon died."""
    with next_start(location) as (service, area):
        copy(area, "vm.img", IMAGE)
        (record,) = service.backups()
        staged = area.find("vm.img")
        if change == "another size":
            staged.draft.truncate(len(IMAGE) + 1)
            staged.draft.checkpoint()
        else:
            area._files["other.img"] = area._files.pop("vm.img")
            staged.name = "other.img"
        staged.next_id, staged.changed, staged.state = record.backup_id, True, State.OPEN
        area._keeper.save(staged)

    with next_start(location) as (service, area):
        assert len(service.backups()) == 2
        newest = max(service.backups(), key=lambda made: made.created_at)
        assert (newest.volume, newest.size) != (record.volume, record.size)
        assert newest.backup_id != record.backup_id
