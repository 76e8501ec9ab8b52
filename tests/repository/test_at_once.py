"""Processes and threads that back up, delete, restore, import and collect, all at once.

Whatever is listed in the end restores to what was backed up, also for a process whose index is made
anew from the packs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE, BytesSource, is_clean, noise, restored

from backupfs.errors import BackupExists, BackupNotFound, Busy, DamageError, MissingData
from backupfs.service import Description, Policy, Record, Service
from backupfs.staging.area import StagingArea

SECONDS = 8.0
VOLUMES = ("a", "b", "c")
POOL = [noise(CHUNK_SIZE, seed=seed) for seed in range(60)]


def image_of(seed: int) -> bytes:
    """Of chunks that other images have too: what one deletes another is about to reuse."""
    choice = random.Random(seed)
    return b"".join(choice.choice(POOL) for _ in range(choice.randrange(5, 60)))


def back_up_one(service: Service, choice: random.Random) -> Record:
    seed = choice.randrange(1 << 30)
    return service.backup(
        BytesSource(image_of(seed), piece_size=choice.choice([5000, CHUNK_SIZE * 7])),
        volume=choice.choice(VOLUMES),
        description=Description(display_name=str(seed)),
    )


def check_restore(service: Service, record: Record) -> None:
    """Every byte is proven by reading it; backups made here are also known by their seed."""
    image = restored(service, record)
    seed = record.description.display_name
    assert seed is None or image == image_of(int(seed))


def delete_one(service: Service, choice: random.Random) -> None:
    service.refresh()
    records = service.backups()
    if len(records) > 5:
        service.delete(choice.choice(records))


def restore_one(service: Service, choice: random.Random) -> None:
    service.refresh()
    records = service.backups()
    if not records:
        return
    record = choice.choice(records)
    try:
        check_restore(service, record)
    except DamageError:
        # Deleted, and collected, while it was read.
        assert record.backup_id not in service.repository.records.get_all()[0]


def delete_and_import(service: Service, choice: random.Random) -> None:
    record = back_up_one(service, choice)
    exported = service.export_record(record)
    service.delete(record)
    service.import_record(exported)


def collect(service: Service, _choice: random.Random) -> None:
    service.gc()


ACTS: tuple[Callable[[Service, random.Random], object], ...] = (
    back_up_one,
    back_up_one,
    back_up_one,
    delete_one,
    delete_one,
    restore_one,
    delete_and_import,
    collect,
)


def act_until(service: Service, end: float, seed: int, problems: list[str]) -> None:
    choice = random.Random(seed)
    while time.monotonic() < end and not problems:
        act = choice.choice(ACTS)
        try:
            act(service, choice)
        except (Busy, BackupNotFound, BackupExists, MissingData):
            pass  # another was quicker
        except Exception:
            problems.append(f"{act.__name__} in {seed}:\n{traceback.format_exc()}")


def stage_until(area: StagingArea, end: float, seed: int, problems: list[str]) -> None:
    """Copies into the staging area; these have no display name but one volume each."""
    choice = random.Random(seed)
    name = f"staged-{seed}.img"
    handle = area.create(name, mode=0o644, uid=0, gid=0)
    staged = handle.staged
    try:
        while time.monotonic() < end and not problems:
            for _ in range(choice.randrange(1, 20)):
                if staged.wants_mark:
                    area.begin_writing(handle)
                area.note_write(handle)
                place = choice.randrange(40)
                staged.draft.write(place * CHUNK_SIZE, choice.choice(POOL))
            time.sleep(choice.random() / 20)
            area.flush(handle, interrupted=False)
            before = staged.draft.read(0, staged.size)
            area.release(handle, interrupted=False)
            assert staged.draft.read(0, staged.size) == before
            handle = area.open_write(staged, truncate=False)
    except Exception:
        problems.append(f"staging in {seed}:\n{traceback.format_exc()}")
    finally:
        area.release(handle, interrupted=False)


def live(location: str, end: float, seed: int, *, stages: bool) -> list[str]:
    """One process: two threads of one service, and perhaps its staging area."""
    problems: list[str] = []
    with Service.open(location) as service:
        threads = [
            threading.Thread(target=act_until, args=(service, end, seed + number, problems))
            for number in range(2)
        ]
        area = service.open_staging(Policy(), mountpoint=None) if stages else None
        if area is not None:
            threads.append(
                threading.Thread(target=stage_until, args=(area, end, seed + 2, problems))
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if area is not None:
            area.close()
    return problems


def start_process(location: str, end: float, seed: int, report: Path, *, stages: bool) -> int:
    child = os.fork()
    if child == 0:
        try:
            report.write_text("\n".join(live(location, end, seed, stages=stages)))
            os._exit(0)
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(1)
    return child


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [int(os.environ.get("BACKUPFS_TEST_SEED", "1000"))])
def test_whatever_is_listed_in_the_end_restores(location, scratch, cache_home, seed):
    end = time.monotonic() + SECONDS
    reports = [scratch / f"report-{number}" for number in range(3)]
    children = [
        start_process(location, end, seed + 10 * number, report, stages=number == 0)
        for number, report in enumerate(reports)
    ]
    for child in children:
        os.waitpid(child, 0)

    assert [report.read_text() for report in reports] == [""] * 3
    check(location)
    shutil.rmtree(cache_home)
    check(location)
    with Service.open(location) as service:
        for _ in range(2):  # what the first one copies may be small packs that the next one joins
            service.gc()
        again = service.gc()
        assert (again.packs_deleted, again.packs_repacked) == (0, 0)
    assert [path for path in (Path(location) / "sessions").rglob("*") if path.is_file()] == []
    check(location)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [int(os.environ.get("BACKUPFS_TEST_SEED", "1000"))])
def test_processes_killed_in_the_middle_of_anything_harm_nobody(
    location, scratch, cache_home, seed
):
    """One process lives on, others are killed and come again; what they had published stays."""
    end = time.monotonic() + SECONDS / 2
    choice = random.Random(seed)
    steady_report, other_report = scratch / "steady", scratch / "other"
    other_report.touch()
    steady = start_process(location, end, seed, steady_report, stages=False)
    number = 0
    while time.monotonic() < end:
        number += 1
        child = start_process(location, end, seed + 10 * number, other_report, stages=True)
        time.sleep(0.2 + choice.random() / 2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert other_report.read_text() == ""
    os.waitpid(steady, 0)

    assert number > 3
    assert steady_report.read_text() == ""
    check(location)
    with Service.open(location) as service:
        service.open_staging(Policy(), mountpoint=None).close()
        service.gc()
    shutil.rmtree(cache_home)
    check(location)


def check(location: str) -> None:
    with Service.open(location) as service:
        records = service.backups()
        assert len(records) > 5
        assert is_clean(service)
        for record in records:
            check_restore(service, record)
