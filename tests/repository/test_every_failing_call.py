"""Every verb, with every call of the system that changes the repository's folder failing in turn.

Below the storage: packs being written, states and marks of drafts, folders, locks. A disk is full
from one call on, a call fails, or fails after its effect, or a write takes half. Whatever fails:
what was acknowledged is there and byte-identical, ``verify`` is clean, gc runs, and the verb succeeds
when it is tried again, by the same process and by another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.crash_check import Crash, backups_of, examine
from support.crash_disk import Image, read_image, write_image
from support.crash_run import Promise, Run
from support.crash_world import World
from support.failing_calls import HOWS, FailingCalls
from support.images import CHUNK_SIZE, noise
from support.os_calls import watched_calls

from backupfs.errors import BackupfsError
from backupfs.format.names import volume_of
from backupfs.repository import gc, sessions
from backupfs.service import Record

NEW = noise(4 * CHUNK_SIZE - 300, seed=20)
PIECES = ((CHUNK_SIZE - 50, noise(CHUNK_SIZE, seed=21)), (100, noise(5000, seed=22)))

ACTS: dict[str, Callable[[World], None]] = {
    "backup": lambda world: world.back_up("vm", NEW) and None,
    "delete": lambda world: world.delete(next(iter(world.backups))),
    "prune": lambda world: world.prune("vm"),
    "gc": World.gc,
    "import": lambda world: world.import_back(next(iter(world.deleted))),
    "metadata": lambda world: world.put_metadata("vm", {"number": 3}),
    "copy": lambda world: world.write("new.img", (0, NEW)),
    "copy over a head": lambda world: world.write("head.img", (0, NEW), truncate=True),
    "patch": lambda world: world.write("head.img", *PIECES),
    "patch with fsync": lambda world: world.write("head.img", *PIECES, synced=1),
    "truncate": lambda world: world.truncate("head.img", 4 * CHUNK_SIZE),
    "publish": lambda world: world.publish("held.img"),
    "rename": lambda world: world.rename("x.part", "x.img"),
    "rename over a head": lambda world: world.rename("x.part", "head.img"),
    "rm": lambda world: world.unlink("head.img"),
    "mkdir": lambda world: world.make_folder("pool"),
}


@dataclass
class Start:
    """A repository as each try finds it."""

    image: Image
    promise: Promise
    deleted: dict[str, tuple[str, bytes]]
    records: dict[str, Record]


@pytest.fixture(autouse=True)
def quick(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "cache"))
    monkeypatch.setattr(sessions, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(gc, "ACKNOWLEDGE_POLL_SECONDS", 0.002)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def start(location: str) -> Start:
    with Run(location) as run:
        run.mount()
        world = World(run, lambda _promise: None, Promise())
        world.back_up("vm", noise(3 * CHUNK_SIZE, seed=1))
        world.back_up("vm", noise(4 * CHUNK_SIZE, seed=2))
        world.put_metadata("vm", {"number": 1})
        world.put_metadata("vm", {"number": 2})
        world.write("head.img", (0, noise(3 * CHUNK_SIZE, seed=3)))
        world.write("held.img", (0, noise(2 * CHUNK_SIZE, seed=4)), killed=True)
        world.write("x.part", (0, noise(4 * CHUNK_SIZE, seed=5)))
        world.gc()
        world.delete(world.back_up("db", noise(2 * CHUNK_SIZE, seed=6)))
    promise = replace(world.promise, what="start")
    return Start(read_image(Path(location)), promise, world.deleted, world._records)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("act", ACTS)
def test_failing_call_breaks_no_promise(scratch, start, act, how):
    folder, tried, number = scratch / "tried", 0, 0
    while True:
        number += 1
        write_image(start.image, folder)
        failing = FailingCalls(number, HOWS[how])
        promises = [start.promise]
        with watched_calls(folder, failing), Run(str(folder)) as run:
            run.mount()
            world = World(run, promises.append, start.promise)
            world.deleted, world._records = dict(start.deleted), start.records
            failing.is_armed = True
            is_done = attempt(ACTS[act], world)
            failing.is_armed = False
            assert is_done or failing.fired, "it failed of itself"
            if not is_done and number % 2:
                promises[-1] = tried_again(run, promises[-1])
                tried += 1
        image = read_image(folder)
        remove(folder)
        what = f"{act}, call {number} {how}: {failing.fired}"
        examine(Crash(what, image, promises[-1]), folder, None)
        if not failing.fired:
            break
    print(f"{number} calls, {tried} tried again at once")


def attempt(act: Callable[[World], None], world: World) -> bool:
    """Whether it did what it should."""
    try:
        act(world)
    except (BackupfsError, AssertionError):  # the world misses the backup that should have come
        return False
    return True


def tried_again(run: Run, promise: Promise) -> Promise:
    """Do once more what failed; it and all that was there before must last from now on."""
    aim = promise.aim or promise
    promise.again(run)
    found, staged = backups_of(run), run.staged()
    wanted = {(volume_of(name), content) for name, content in aim.staged[0].items()}
    allowed = wanted | set(aim.must.values()) | set(promise.may.values())
    assert promise.must.items() <= found.items(), promise.what
    assert set(aim.must.values()) <= set(found.values()) <= allowed, promise.what
    assert aim.staged[0].items() <= staged.items(), promise.what
    assert promise.gone not in staged, promise.what
    # What was renamed and could not be published is published by the next mount.
    may = promise.may
    return replace(aim, what=f"{promise.what}, again", must=found, may=may, staged=(staged,))


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
