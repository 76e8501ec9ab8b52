"""gc: frees what nothing reaches, never what something does, whoever works beside it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, FaultyStorage, SteppedStorage
from support.images import CHUNK_SIZE, BytesSource, back_up, is_clean, noise, restored
from support.processes import DIED, die, in_a_child

from backupfs.ambient import Ambient
from backupfs.errors import (
    Busy,
    CorruptObject,
    DamageError,
    LockTimeout,
    MissingData,
    StorageError,
    StorageFull,
)
from backupfs.format.pack import pack_name
from backupfs.format.record import record_name
from backupfs.repository import gc as gc_module
from backupfs.repository.rebuild import list_packs
from backupfs.repository.repository import Repository
from backupfs.repository.sessions import Plan, encode_plan, plan_name
from backupfs.service import Policy, Record, Service
from backupfs.storage import locks
from backupfs.storage.locks import try_lock
from backupfs.types import ObjectName


def chunks(count: int, *, seed: int) -> bytes:
    return noise(count * CHUNK_SIZE, seed=seed)


def packs(service: Service) -> dict[bytes, int]:
    return list_packs(service.repository.storage)


def mostly_dead(service: Service, *, seed: int = 1) -> tuple[Record, bytes]:
    """A backup whose chunks lie in a pack that is dead for the rest."""
    image = chunks(10, seed=seed)
    longer = back_up(service, image + chunks(50, seed=seed + 1000), volume=f"longer {seed}")
    record = back_up(service, image, volume=f"shorter {seed}")
    service.delete(longer)
    return record, image


# -- alone -------------------------------------------------------------------------------------


def test_what_no_backup_reaches_is_gone(location, service):
    record = back_up(service, chunks(20, seed=1))
    service.delete(record)

    report = service.gc()

    assert (report.packs_before, report.packs_deleted, report.bytes_after) == (2, 2, 0)
    assert packs(service) == {}
    assert list((Path(location) / "plans").iterdir()) == []


def test_what_backups_share_stays_until_the_last_of_them_is_gone(service):
    image = chunks(20, seed=1)
    first, second = back_up(service, image), back_up(service, image)

    service.delete(first)
    service.gc()
    assert restored(service, second) == image
    assert is_clean(service)

    service.delete(second)
    service.gc()
    assert packs(service) == {}


def test_nothing_is_done_where_nothing_is_dead(service):
    back_up(service, chunks(20, seed=1))
    before = packs(service)

    report = service.gc()

    assert (report.packs_deleted, report.packs_repacked) == (0, 0)
    assert packs(service) == before


def test_thin_packs_are_repacked_and_what_is_alive_survives(service):
    record, image = mostly_dead(service)

    report = service.gc()

    assert report.packs_repacked >= 1
    assert report.bytes_after < report.bytes_before // 3
    assert restored(service, record) == image
    assert is_clean(service)
    again = service.gc()
    assert (again.packs_deleted, again.packs_repacked) == (0, 0)


def test_packs_of_small_blobs_are_not_taken_for_dead(service):
    """Their footers are as large as their blobs, and were copied again by every gc."""
    image = b"".join(number.to_bytes(4, "big") * (CHUNK_SIZE // 4) for number in range(100))
    back_up(service, image)

    report = service.gc()

    assert (report.packs_deleted, report.packs_repacked) == (0, 0)


def test_many_small_packs_are_joined(location):
    images = [chunks(1, seed=seed) for seed in range(gc_module.SMALL_PACKS_MIN)]
    records = []
    for image in images:
        with Service.open(location) as service:
            records.append(back_up(service, image))

    with Service.open(location) as service:
        report = service.gc()

        assert report.packs_repacked >= gc_module.SMALL_PACKS_MIN
        assert len(packs(service)) == 2, "one of chunks and one of nodes"
        assert [restored(service, record) for record in records] == images
        assert is_clean(service)
        assert service.gc().packs_repacked == 0


def test_progress_tells_of_every_pack_once(service):
    back_up(service, chunks(70, seed=1))
    told: list[int] = []

    service.gc(progress=told.append)

    assert sum(told) == sum(packs(service).values())


def test_a_healed_blob_is_freed_of_its_damaged_copy(location, cache_home):
    """Else an index made anew might name the damaged copy, and gc take the good one for dead."""
    image = chunks(20, seed=1)
    with Service.open(location) as service:
        record = back_up(service, image)
        (pack_id,) = (pack_id for pack_id, size in packs(service).items() if size > 100_000)
        path = Path(location) / pack_name(pack_id)
        data = bytearray(path.read_bytes())
        data[CHUNK_SIZE] ^= 1
        path.write_bytes(data)
        assert not is_clean(service)
        back_up(service, image)
        assert is_clean(service)

        service.gc()

        assert pack_id not in packs(service)
        service.repository.index.clear()
        service.repository.refresh_index()
        assert is_clean(service)
        assert restored(service, record) == image
        assert service.gc().packs_repacked == 0


# -- what stops it -----------------------------------------------------------------------------


def test_one_gc_at_a_time(location, service):
    lock = try_lock(Path(location) / "locks" / "gc")
    lock.describe("process 7")

    with pytest.raises(Busy, match="process 7"):
        service.gc()

    lock.release()
    service.gc()


def test_an_unreadable_record_stops_it_before_anything_is_deleted(location, service):
    """Nobody can tell what that backup reaches; it may be put back from an export."""
    kept, doomed = back_up(service, chunks(9, seed=1)), back_up(service, chunks(9, seed=2))
    service.delete(doomed)
    path = Path(location) / record_name(kept.backup_id)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = packs(service)

    with pytest.raises(CorruptObject):
        service.gc()

    assert packs(service) == before
    path.write_bytes(whole)
    service.gc()
    assert is_clean(service)
    assert len(packs(service)) < len(before)


def test_an_unreadable_draft_stops_it(location, service):
    doomed = back_up(service, chunks(9, seed=2))
    service.delete(doomed)
    state = Path(location) / "drafts" / "another host" / f"{'0' * 32}.msgpack"
    state.parent.mkdir()
    state.write_bytes(b"damaged")

    with pytest.raises(CorruptObject):
        service.gc()

    assert len(packs(service)) == 2


def test_an_unreadable_node_stops_it(location):
    with Service.open(location) as service:
        record = back_up(service, chunks(9, seed=1))
        doomed = back_up(service, chunks(9, seed=2), volume="other")
        at = service.repository.index.find(record.root)
        service.delete(doomed)
    with (Path(location) / pack_name(at.pack_id)).open("r+b") as file:
        file.seek(at.offset + 100)
        file.write(b"damage")

    with Service.open(location) as service:
        with pytest.raises(DamageError):
            service.gc()

        assert len(packs(service)) == 4


def test_a_writer_that_does_not_answer_is_waited_for_and_then_named(location, service, monkeypatch):
    monkeypatch.setattr(gc_module, "ACKNOWLEDGE_SECONDS_MAX", 0.3)
    service.delete(back_up(service, chunks(9, seed=1)))
    silent = try_lock(Path(location) / "sessions" / ("0" * 32))
    silent.describe("process 7 on that host")

    with pytest.raises(LockTimeout, match="process 7 on that host"):
        service.gc()

    assert len(packs(service)) == 2
    assert list((Path(location) / "plans").iterdir()) == []
    silent.release()
    assert service.gc().packs_deleted == 2


# -- after the dead ----------------------------------------------------------------------------


def test_leftovers_of_killed_processes_are_cleaned(location):
    def be_killed() -> None:
        service = Service.open(location)
        service.backup(BytesSource(chunks(70, seed=1)), volume="vm", cancelled=lambda: False)
        writer = service.repository.writer()
        writer.store.store_chunks([chunks(1, seed=2)])
        while not any((Path(location) / "spool").glob("*/*")):
            pass
        die()

    assert in_a_child(be_killed) == DIED
    folder = Path(location)
    assert list((folder / "spool").glob("*/*"))
    stale = Plan("f" * 32, frozenset())
    (folder / plan_name(stale.plan_id)).write_bytes(encode_plan(stale))
    (folder / plan_name("e" * 32)).write_bytes(b"a plan that cannot be read")

    with Service.open(location) as service:
        service.gc()

        assert is_clean(service)
        assert len(service.backups()) == 1
    assert [path.name for path in (folder / "spool").iterdir()] == ["reserve"]
    assert list((folder / "plans").iterdir()) == []
    assert [path for path in (folder / "sessions").rglob("*") if path.is_file()] == []


class DyingStorage(SteppedStorage):
    """Ends the process before, or after, its change number ``die_at`` of the repository."""

    def __init__(self, location: str, die_at: int, *, after: bool) -> None:
        super().__init__(location)
        self._countdown = die_at
        if after:
            self.after = self._count
        else:
            self.before = self._count

    def _count(self, verb: str, _name: str) -> None:
        if verb in ("put_new", "delete"):
            self._countdown -= 1
            if self._countdown == 0:
                die()


@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "after its effect"])
def test_gc_may_be_killed_at_any_change(location, after):
    """The next writer, reader and gc find everything that was alive, and nothing half done."""
    with Service.open(location) as service:
        alive = [mostly_dead(service, seed=seed) for seed in (1, 2)]
        doomed = back_up(service, chunks(30, seed=77))
        service.delete(doomed)

    for die_at in itertools.count(1):

        def collect(die_at: int = die_at) -> None:
            storage = DyingStorage(location, die_at, after=after)
            with Service(Repository(storage, Ambient())) as dying:
                dying.gc()

        code = in_a_child(collect)
        with Service.open(location) as service:
            again = back_up(service, chunks(30, seed=77))
            assert is_clean(service), f"killed at change {die_at}"
            assert restored(service, again) == chunks(30, seed=77)
            for record, image in alive:
                assert restored(service, record) == image
            service.delete(again)
        if code == 0:
            break
        assert code == DIED
    assert die_at > 5
    with Service.open(location) as service:
        service.gc()
        assert is_clean(service)
        assert service.gc().packs_deleted == 0


@pytest.mark.parametrize("how", [FULL, LOST_ACKNOWLEDGEMENT], ids=["full", "lost"])
def test_gc_may_fail_at_any_call_and_the_same_process_goes_on(location, how):
    with Service(Repository(FaultyStorage(location), Ambient())) as service:
        storage = service.repository.storage
        alive = mostly_dead(service)
        for fail_at in itertools.count(1):
            service.delete(back_up(service, chunks(30, seed=77)))
            with Service(Repository(FaultyStorage(location), Ambient())) as collector:
                failing = collector.repository.storage
                failing.fail_at(fail_at, how)
                with contextlib.suppress(StorageError):
                    collector.gc()
                fired = failing.fired
                failing.repair()
                # Its writing parts start only now, after the failure.
                again = back_up(collector, chunks(30, seed=77))
            service.refresh()
            assert is_clean(service), f"failed at call {fail_at}: {failing.calls[fail_at - 1]}"
            assert restored(service, again) == chunks(30, seed=77)
            assert restored(service, alive[0]) == alive[1]
            service.delete(again)
            service.gc()  # or each would have more to look at than the one before
            if not fired:
                break
        assert fail_at > 10
        assert storage.fired is False


# -- beside writers ----------------------------------------------------------------------------


class CollectedSource(BytesSource):
    """An image during whose reading something else happens, after each of its pieces."""

    def __init__(self, data: bytes, between: Callable[[], object]) -> None:
        super().__init__(data, piece_size=20 * CHUNK_SIZE)
        self._between = between

    def extents(self) -> Iterator[tuple[int, bytes]]:
        for offset, data in super().extents():
            yield offset, data
            self._between()


@pytest.mark.parametrize("where", ["the same service", "another service"])
def test_a_backup_lives_through_gc_at_any_moment(location, service, where):
    """What it has stored is reached by no record yet, and it reuses what only dead ones reach."""
    image = chunks(100, seed=1)
    service.delete(back_up(service, image[: 40 * CHUNK_SIZE] + chunks(30, seed=2), volume="old"))
    with Service.open(location) as other:
        collector = service if where == "the same service" else other

        record = service.backup(CollectedSource(image, collector.gc), volume="vm")

        assert restored(service, record) == image
        assert is_clean(service)
        assert is_clean(other)
        collector.gc()
        assert is_clean(other)


def test_a_backup_in_another_process_lives_through_gc(location):
    image = chunks(100, seed=1)
    with Service.open(location) as service:
        service.delete(back_up(service, image[: 40 * CHUNK_SIZE], volume="old"))
    go_in, go_out = os.pipe()
    done_in, done_out = os.pipe()

    def step() -> None:
        os.write(done_out, b".")
        os.read(go_in, 1)

    def write() -> None:
        with Service.open(location) as writing:
            writing.backup(CollectedSource(image, step), volume="vm")

    child = os.fork()
    if child == 0:
        try:
            write()
            os._exit(0)
        finally:
            os._exit(1)
    with Service.open(location) as service:
        for _ in range(5):
            os.read(done_in, 1)
            service.gc()
            os.write(go_out, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for file in (go_in, go_out, done_in, done_out):
            os.close(file)

        service.refresh()
        (record,) = service.backups()
        assert restored(service, record) == image
        assert is_clean(service)


def test_a_staged_draft_and_a_head_live_through_gc(location, service):
    """The draft is published later; the head's backup is deleted, and its content stays."""
    old, new = chunks(30, seed=1), chunks(60, seed=2)
    area = service.open_staging(Policy(), mountpoint=None)
    head = area.create("head.img", mode=0o644, uid=0, gid=0)
    area.note_write(head)
    head.staged.draft.write(0, old)
    area.flush(head, interrupted=False)
    area.release(head, interrupted=False)
    (published,) = service.backups()
    service.delete(published)
    draft = area.create("draft.img", mode=0o644, uid=0, gid=0)

    with Service.open(location) as other:
        for start in range(0, len(new), 20 * CHUNK_SIZE):
            area.note_write(draft)
            draft.staged.draft.write(start, new[start : start + 20 * CHUNK_SIZE])
            other.gc()
            service.gc()
        area.flush(draft, interrupted=False)
        other.gc()
        area.release(draft, interrupted=False)
        other.gc()

        assert head.staged.draft.read(0, len(old)) == old
        (record,) = service.backups()
        assert restored(service, record) == new
        assert is_clean(other)

        area.unlink("head.img")
        other.gc()
        assert is_clean(other)
        assert sum(packs(other).values()) < len(new) * 1.1
    area.close()


def test_a_draft_that_nobody_holds_open_lives_through_gc(location):
    """Kept by a daemon that is gone: its state is all that names its root."""
    image = chunks(30, seed=1)

    def stage() -> None:
        service = Service.open(location)
        area = service.open_staging(Policy(publish_on_rename_only=True), mountpoint=None)
        handle = area.create("vm.img", mode=0o644, uid=0, gid=0)
        area.note_write(handle)
        handle.staged.draft.write(0, image)
        area.flush(handle, interrupted=False)
        die()

    assert in_a_child(stage) == DIED
    with Service.open(location) as service:
        service.gc()
        record = service.publish("vm.img")

        assert restored(service, record) == image
        assert is_clean(service)


def test_a_pack_is_not_relied_on_while_it_is_put_in_place_and_condemned(location):
    """Between its name appearing in the folder and the writer knowing so, gc can see it."""
    image = chunks(20, seed=1)
    storage = SteppedStorage(location)
    in_place, go_on = threading.Event(), threading.Event()

    def hold(verb: str, name: str) -> None:
        if verb == "put_new" and name.startswith("packs/") and not in_place.is_set():
            in_place.set()
            assert go_on.wait(20)

    with Service(Repository(storage, Ambient())) as service, Service.open(location) as collector:
        writer = service.repository.writer()
        storage.after = hold
        pieces = [image[start : start + CHUNK_SIZE] for start in range(0, len(image), CHUNK_SIZE)]
        writer.store.store_chunks(pieces)
        sealing = threading.Thread(target=lambda: writer.store.seal(since=0))
        sealing.start()
        assert in_place.wait(20)
        reports = []
        collecting = threading.Thread(target=lambda: reports.append(collector.gc()))
        collecting.start()
        collecting.join(1.0)  # it has condemned the pack, and waits for the writer
        backing_up = threading.Thread(target=lambda: back_up(service, image))
        backing_up.start()
        backing_up.join(0.5)

        go_on.set()
        for thread in (sealing, collecting, backing_up):
            thread.join(30)

        (record,) = service.backups()
        assert reports
        collector.refresh()
        assert is_clean(collector)
        assert restored(collector, record) == image


# -- beside an import --------------------------------------------------------------------------


def during_the_second_mark(storage: SteppedStorage, act: Callable[[], object]) -> None:
    """Have ``act`` done when gc has its acknowledgements and has read the last record."""
    lists: list[str] = []

    def step(verb: str, name: str) -> None:
        if verb == "list" and name == "records/":
            lists.append(name)
            if len(lists) == 2:
                act()

    storage.after = step


@pytest.mark.parametrize("what_is_dead", ["all", "only the nodes"])
def test_an_import_during_gc_is_complete_or_refused(location, scratch, what_is_dead):
    """A record whose data are condemned waits for what gc decides."""
    image = chunks(20, seed=1)
    storage = SteppedStorage(location)
    with Service.open(location) as service, Service(Repository(storage, Ambient())) as collector:
        service.repository.writer()
        record = back_up(service, image)
        if what_is_dead == "only the nodes":
            back_up(service, image + chunks(1, seed=2))
        exported = service.export_record(record)
        service.delete(record)
        outcome: list[object] = []

        def import_it() -> None:
            try:
                outcome.append(service.import_record(exported).record)
            except MissingData as error:
                outcome.append(error)

        importing = threading.Thread(target=import_it)

        def start_import() -> None:
            importing.start()
            importing.join(1.0)

        during_the_second_mark(storage, start_import)
        collector.gc()
        importing.join(30)

        assert len(outcome) == 1
        collector.refresh()
        service.refresh()
        with Service.open(location) as fresh:
            assert is_clean(fresh)
            for found in fresh.backups():
                assert restored(fresh, found) == (image + chunks(1, seed=2))[: found.size]


def test_an_import_after_gc_says_what_is_missing(service):
    record = back_up(service, chunks(20, seed=1))
    exported = service.export_record(record)
    service.delete(record)
    service.gc()

    with pytest.raises(MissingData):
        service.import_record(exported)

    assert service.backups() == []


def test_an_import_before_gc_keeps_the_data(service):
    image = chunks(20, seed=1)
    record = back_up(service, image)
    exported = service.export_record(record)
    service.delete(record)

    service.import_record(exported)
    service.gc()

    assert restored(service, record) == image


# -- a full disk -------------------------------------------------------------------------------


def test_gc_needs_no_room_to_begin_with(location, service, monkeypatch):
    """On a full disk gc is the way out. It gives up its reserve for the lock and for the plan."""
    service.delete(back_up(service, chunks(20, seed=1)))
    reserve = Path(location) / "spool" / "reserve"
    real_open, storage = os.open, service.repository.storage
    real_put = storage.put_new

    def open_if_room(path, flags, *arguments, **named):
        if flags & os.O_CREAT and reserve.exists() and not Path(path).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(path, flags, *arguments, **named)

    def put_if_room(name, data):
        if reserve.exists():
            raise StorageFull(reason="test")
        real_put(name, data)

    with monkeypatch.context() as context:
        context.setattr(locks.os, "open", open_if_room)
        context.setattr(storage, "put_new", put_if_room)
        report = service.gc()

    assert report.packs_deleted == 2
    assert reserve.stat().st_size == gc_module.RESERVE_SIZE, "for the next time"


def test_the_reserve_also_makes_room_for_the_answers_of_writers(location, service, monkeypatch):
    monkeypatch.setattr(gc_module, "ROOM_FOR_ANSWERS_SECONDS", 0.3)
    service.delete(back_up(service, chunks(20, seed=1)))
    reserve = Path(location) / "spool" / "reserve"
    storage = service.repository.storage
    real_put = storage.put_new

    def put_if_room(name, data):
        if reserve.exists() and name.startswith("sessions/"):
            raise StorageFull(reason="test")
        real_put(name, data)

    with monkeypatch.context() as context:
        context.setattr(storage, "put_new", put_if_room)
        assert service.gc().packs_deleted == 2

    assert reserve.exists()


def test_what_cannot_be_repacked_for_want_of_room_stays_as_it_is(location):
    with Service(Repository(FaultyStorage(location), Ambient())) as service:
        storage = service.repository.storage
        record, image = mostly_dead(service)
        doomed = back_up(service, chunks(30, seed=5), volume="doomed")
        service.delete(doomed)
        real_put = storage.put_new

        def full_for_packs(name: ObjectName, data: object) -> None:
            if name.startswith("packs/"):
                raise StorageFull(reason="test")
            real_put(name, data)

        storage.put_new = full_for_packs
        report = service.gc()
        storage.put_new = real_put

        assert report.packs_deleted >= 2
        assert report.packs_repacked == 0
        assert restored(service, record) == image
        assert is_clean(service)
        assert service.gc().packs_repacked >= 1
        assert is_clean(service)
