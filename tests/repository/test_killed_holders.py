"""A process is killed while it holds a lock, any of them: all others go on as if it had never been."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty import SteppedStorage
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import Busy, LockTimeout
from backupfs.repository.repository import Repository
from backupfs.service import Policy, Service
from backupfs.storage.locks import is_held

SECONDS_MAX = 30.0
KEPT = noise(20 * CHUNK_SIZE, seed=1)
DOOMED = noise(20 * CHUNK_SIZE, seed=2)
NEW = noise(20 * CHUNK_SIZE, seed=3)


def say(word: Path, text: str) -> None:
    """Whole or not at all: somebody waits for it."""
    new = word.with_name("new word")
    new.write_text(text)
    new.rename(word)


def act_and_stop(location: str, stop_at: str, act: Callable[[Service], object], word: Path) -> int:
    """A process that acts, and stops for ever before the call of its storage that begins so."""
    child = os.fork()
    if child:
        return child
    try:
        storage = SteppedStorage(location)
        with Service(Repository(storage, Ambient())) as service:

            def stop(verb: str, name: str) -> None:
                if f"{verb} {name}".startswith(stop_at):
                    say(word, "stopped")
                    time.sleep(3600)

            storage.before = stop
            act(service)
            say(word, "ended")
            time.sleep(3600)
    finally:
        os._exit(1)


def kill_when_stopped(child: int, word: Path, held: list[Path]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not word.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert word.read_text() == "stopped", "it never came there"
        assert all(is_held(path) for path in held)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not any(is_held(path) for path in held)


def back_up_new(service: Service) -> None:
    back_up(service, NEW, volume="new")


def delete_and_collect(service: Service) -> None:
    service.delete(service.resolve("doomed@latest"))
    service.gc()


def import_again(service: Service) -> None:
    record = service.resolve("doomed@latest")
    exported = service.export_record(record)
    service.delete(record)
    service.import_record(exported)


def stage(service: Service) -> None:
    area = service.open_staging(Policy(), mountpoint=None)
    handle = area.create("staged.img", mode=0o644, uid=0, gid=0)
    area.begin_writing(handle)
    area.note_write(handle)
    handle.staged.draft.write(0, NEW)
    area.flush(handle, interrupted=False)


MOMENTS = {
    "a writer that stores": (back_up_new, "put_new packs/", []),
    "a writer that publishes": (back_up_new, "put_new records/", ["locks/publish"]),
    "an import": (import_again, "put_new records/", ["locks/publish", "locks/gc"]),
    "gc before its plan": (delete_and_collect, "put_new plans/", ["locks/gc"]),
    "gc that deletes": (delete_and_collect, "delete packs/", ["locks/gc"]),
    "gc at its end": (delete_and_collect, "delete plans/", ["locks/gc"]),
    "a staging area": (stage, "put_new packs/", ["drafts"]),
}


def everything_works(location: str) -> None:
    """All that would want one of the locks; none of it may wait for the dead."""
    with Service.open(location, lock_seconds_max=10) as service:
        assert restored(service, service.resolve("kept@latest")) == KEPT
        record = back_up(service, NEW, volume="new")
        exported = service.export_record(record)
        service.delete(record)
        service.import_record(exported)
        area = service.open_staging(Policy(), mountpoint=None)
        handle = area.create("other.img", mode=0o644, uid=0, gid=0)
        area.begin_writing(handle)
        area.note_write(handle)
        handle.staged.draft.write(0, KEPT)
        area.flush(handle, interrupted=False)
        area.release(handle, interrupted=False)
        area.unlink("other.img")
        area.close()
        service.gc()
        assert is_clean(service)
        assert restored(service, service.resolve("other@latest")) == KEPT
        assert restored(service, service.resolve("new@latest")) == NEW
        assert restored(service, service.resolve("kept@latest")) == KEPT


def in_time(act: Callable[[], None]) -> None:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS_MAX)
    assert not thread.is_alive(), "it waits for the dead"
    if problems:
        raise problems[0]


@pytest.fixture
def filled(location: str) -> str:
    with Service.open(location) as service:
        back_up(service, KEPT, volume="kept")
        back_up(service, DOOMED, volume="doomed")
    return location


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_holder_is_in_nobodys_way(filled, tmp_path, cache_home, moment):
    act, stop_at, names = MOMENTS[moment]
    held = [Path(filled) / name for name in names if name != "drafts"]
    child = act_and_stop(filled, stop_at, act, tmp_path / "word")
    if "drafts" in names:
        deadline = time.monotonic() + SECONDS_MAX
        while not (tmp_path / "word").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        held += list(Path(filled).glob("drafts/*/lock"))
        assert held

    kill_when_stopped(child, tmp_path / "word", held)

    in_time(lambda: everything_works(filled))
    shutil.rmtree(cache_home)
    in_time(lambda: everything_works(filled))
    assert [path for path in (Path(filled) / "sessions").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("moment", ["a writer that publishes", "gc that deletes", "a staging area"])
def test_a_holder_that_lives_is_waited_for_within_bounds(filled, tmp_path, moment):
    """Stopped, but not dead: who needs the same lock is told, and nobody else is held up."""
    act, stop_at, _names = MOMENTS[moment]
    child = act_and_stop(filled, stop_at, act, tmp_path / "word")
    try:
        deadline = time.monotonic() + SECONDS_MAX
        while not (tmp_path / "word").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

        def others() -> None:
            with Service.open(filled, lock_seconds_max=0.2) as service:
                assert restored(service, service.resolve("kept@latest")) == KEPT
                assert is_clean(service)
                if moment == "a writer that publishes":
                    with pytest.raises(LockTimeout):
                        back_up(service, NEW, volume="other")
                else:
                    back_up(service, NEW, volume="other")
                if moment == "gc that deletes":
                    with pytest.raises(Busy):
                        service.gc()
                if moment == "a staging area":
                    with pytest.raises(Busy):
                        service.open_staging(Policy(), mountpoint=None)

        in_time(others)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    in_time(lambda: everything_works(filled))


def test_a_process_killed_while_it_writes_into_the_index_leaves_it_to_others(filled, tmp_path):
    """The index has a lock of its own for writers; it dies with them, and what they wrote with it."""
    word = tmp_path / "word"
    child = os.fork()
    if not child:
        try:
            with Service.open(filled) as service:
                index = service.repository.index

                def stop(_transaction: object) -> bytes:
                    say(word, "stopped")
                    time.sleep(3600)
                    return b""

                index._bump_generation = stop  # type: ignore[method-assign]
                back_up_new(service)
        finally:
            os._exit(1)
    with Service.open(filled) as before:  # has it open all the while
        kill_when_stopped(child, word, [])

        in_time(lambda: everything_works(filled))
        before.refresh()
        assert restored(before, before.resolve("new@latest")) == NEW
