"""Every verb, with every one of its storage calls failing in turn.

Whatever fails: what was published stays as it was, ``verify`` is clean, and the same verb succeeds
when it is tried again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, UNAVAILABLE, FaultyStorage
from support.images import CHUNK_SIZE, back_up, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import BackupNotFound, StorageError, StorageUnavailable
from backupfs.repository.repository import Repository
from backupfs.service import Record, RetentionPolicy, Service

HOWS = {
    "full": (FULL, False),
    "full from then on": (FULL, True),
    "unavailable": (UNAVAILABLE, False),
    "unavailable from then on": (UNAVAILABLE, True),
    "acknowledgement lost": (LOST_ACKNOWLEDGEMENT, False),
}

OLD = noise(70 * CHUNK_SIZE, seed=1)
CHANGED = noise(CHUNK_SIZE, seed=2) + OLD[CHUNK_SIZE:]
NEW = OLD[: 30 * CHUNK_SIZE] + noise(50 * CHUNK_SIZE, seed=3)


@dataclass
class World:
    """A repository as it is before each try, with backups that must survive everything."""

    location: str
    kept: dict[str, bytes]  # content by id

    def open(self) -> Service:
        return Service.open(self.location)

    def check(self, what: str) -> None:
        """All is as it should be, seen by a process that starts now."""
        with self.open() as service:
            report = service.verify()
            assert report.complete and not report.damage, what
            records = {record.backup_id: record for record in service.backups()}
            for backup_id, image in self.kept.items():
                assert restored(service, records[backup_id]) == image, what
            for record in records.values():
                assert restored(service, record) in (OLD, CHANGED, NEW), what


@pytest.fixture
def world(location: str) -> World:
    with Service.open(location) as service:
        kept = {
            back_up(service, OLD).backup_id: OLD,
            back_up(service, CHANGED).backup_id: CHANGED,
        }
    return World(location, kept)


def failures(
    world: World, act: Callable[[Service], object], how: str
) -> Iterator[tuple[str, bool]]:
    """Open the repository and ``act``, with call 1, 2, 3… failing, until none does.

    Yields after each try: what failed, and whether ``act`` did.
    """
    kind, stay_broken = HOWS[how]
    for fail_at in itertools.count(1):
        storage = FaultyStorage(world.location)
        storage.fail_at(fail_at, kind, stay_broken=stay_broken)
        failed = False
        try:
            with Service(Repository(storage, Ambient())) as service:
                act(service)
        except StorageError:
            failed = True
        what = f"call {fail_at}, {storage.calls[fail_at - 1]}" if storage.fired else "none"
        yield what, failed
        if not storage.fired:
            assert not failed
            return


@pytest.mark.parametrize("how", HOWS)
def test_backup(world, how):
    count = 0
    for what, failed in failures(world, lambda service: back_up(service, NEW), how):
        count += 1
        world.check(what)
        with world.open() as service:
            made = [record for record in service.backups() if record.backup_id not in world.kept]
            assert len(made) <= 1
            assert made or failed, what
            again = back_up(service, NEW)
            assert restored(service, again) == NEW, what
            for record in (*made, again):
                service.delete(record)
            if count % 2:
                service.gc()  # at times the next try finds what this one left, at times not
    assert count > 10
    world.check("the end")


@pytest.mark.parametrize("how", HOWS)
def test_backup_again_by_the_same_process(world, how):
    """As a service of Cinder does: nothing of the failed try may be relied on."""
    kind, stay_broken = HOWS[how]
    for fail_at in itertools.count(1):
        storage = FaultyStorage(world.location)
        with Service(Repository(storage, Ambient())) as service:
            storage.fail_at(fail_at, kind, stay_broken=stay_broken)
            with contextlib.suppress(StorageError):
                back_up(service, NEW)
            storage.repair()
            again = back_up(service, NEW)
            world.check(f"failed at call {fail_at}")
            assert restored(service, again) == NEW
            service.refresh()
            for record in service.backups():
                if record.backup_id not in world.kept:
                    service.delete(record)
            service.gc()
        if not storage.fired:
            return


@pytest.mark.parametrize("how", HOWS)
def test_delete(world, how):
    def delete(service: Service) -> None:
        new = [record for record in service.backups() if record.backup_id not in world.kept]
        if not new:
            raise StorageUnavailable(reason="its record could not be read")
        service.delete(new[0])

    with world.open() as service:
        back_up(service, NEW)
    for what, _failed in failures(world, delete, how):
        world.check(what)
        with world.open() as service:
            for record in service.backups():
                if record.backup_id not in world.kept:
                    service.delete(record)
                    with pytest.raises(BackupNotFound):
                        service.delete(record)
            back_up(service, NEW)
    world.check("the end")


@pytest.mark.parametrize("how", HOWS)
def test_prune(world, how):
    policy = RetentionPolicy(last=1)

    def add_doomed(service: Service) -> None:
        for _ in range(3):
            back_up(service, NEW, volume="doomed")

    with world.open() as service:
        add_doomed(service)
    for what, _failed in failures(
        world, lambda service: service.prune(policy, volume="doomed"), how
    ):
        world.check(what)
        with world.open() as service:
            service.prune(policy, volume="doomed")
            assert len(service.backups("doomed")) == 1, what
            add_doomed(service)


@pytest.mark.parametrize("how", ["full from then on", "unavailable", "acknowledgement lost"])
def test_gc(world, how):
    def leave_garbage() -> None:
        with world.open() as service:
            service.delete(
                back_up(service, noise(70 * CHUNK_SIZE, seed=7) + OLD[: 10 * CHUNK_SIZE])
            )
            doomed = back_up(service, NEW, volume="doomed")
            service.delete(doomed)

    leave_garbage()
    for what, failed in failures(world, lambda service: service.gc(), how):
        world.check(what)
        with world.open() as service:
            service.gc()
            report = service.gc()
            assert (report.packs_deleted, report.packs_repacked) == (0, 0), what
            again = back_up(service, NEW)
            assert restored(service, again) == NEW
            service.delete(again)
        world.check(f"{what}, then once more ({failed=})")
        leave_garbage()


@pytest.mark.parametrize("how", HOWS)
def test_import(world, how):
    with world.open() as service:
        record = back_up(service, NEW)
        exported = service.export_record(record)
        service.delete(record)

    for what, failed in failures(world, lambda service: service.import_record(exported), how):
        world.check(what)
        with world.open() as service:
            outcome = service.import_record(exported)
            assert outcome.record == record
            assert failed or outcome.already_there, what
            assert restored(service, record) == NEW
            service.delete(record)


@pytest.mark.parametrize("how", HOWS)
def test_metadata(world, how):
    rounds = itertools.count(1)
    values: list[dict[str, object]] = [{}]

    def put(service: Service) -> None:
        values.append({"round": next(rounds)})
        service.put_metadata("vm", values[-1])

    for what, failed in failures(world, put, how):
        with world.open() as service:
            found = service.get_metadata("vm")
            assert found in (values[-2:] if failed else values[-1:]), what
            service.put_metadata("vm", values[-1])
            assert service.get_metadata("vm") == values[-1], what


@pytest.mark.parametrize("how", HOWS)
def test_making_the_index_anew(world, how):
    """What could not be read then is read at the next look, and nothing is stored twice for it."""
    for what, _failed in failures(world, lambda service: service.repository.renew_index(), how):
        world.check(what)
        with world.open() as service:
            stored = service.stats().stored_bytes
            service.delete(back_up(service, OLD, volume="again"))
            assert service.stats().stored_bytes == stored, what


@pytest.mark.parametrize("how", HOWS)
def test_restore_and_verify(world, how):
    """Reading changes nothing, and what cannot be read is an error and never other bytes."""
    records: list[Record] = []

    def read(service: Service) -> None:
        records[:] = service.backups()
        for record in records:
            assert restored(service, record) == world.kept[record.backup_id]
        service.verify()

    for what, _failed in failures(world, read, how):
        world.check(what)
