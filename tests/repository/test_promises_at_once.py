"""Processes that back up, delete, import, collect and verify at once, some killed in the middle.

Each writes down what it was promised, the moment it was: a backup is good, a backup is gone. Another
process compares the repository with what is written down, all the while; so do the processes
themselves. ``BACKUPFS_PROMISE_SECONDS`` and ``BACKUPFS_TEST_SEED`` are for longer runs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE, BytesSource, alike, is_clean, restored

from backupfs.errors import (
    BackupExists,
    BackupNotFound,
    Busy,
    DamageError,
    MissingData,
)
from backupfs.service import Description, Policy, Service

SECONDS = float(os.environ.get("BACKUPFS_PROMISE_SECONDS", "8"))
SEED = int(os.environ.get("BACKUPFS_TEST_SEED", "1"))
FAMILIES = 8
POOL = [[alike(family, number) for number in range(5)] for family in range(FAMILIES)]
VOLUMES = ("a", "b/c", "d")
PROCESSES = 3
COUNT_MAX = 12  # backups; then more are deleted than made


def image_of(seed: int) -> bytes:
    """Of chunks that other images have too, many of them differences: what one deletes another is
    about to rely on."""
    choice = random.Random(seed)
    chunks = [choice.choice(POOL[place % FAMILIES]) for place in range(choice.randrange(3, 40))]
    return b"".join(chunks)[: -choice.randrange(1, CHUNK_SIZE)]


class Log:
    """What was promised, by all processes; a line is written whole or not at all."""

    def __init__(self, path: Path, slot: int = 0) -> None:
        self.slot = slot  # which of the processes writes; each deletes only some of the backups
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(self, word: str, backup_id: str, seed: int | str = "") -> None:
        os.write(self._file, f"{word} {backup_id} {seed}\n".encode())

    def states(self) -> dict[str, str]:
        """The last word about each backup."""
        return {backup_id: words[-1] for backup_id, words in self.words().items()}

    def words(self) -> dict[str, list[str]]:
        """All words about each backup, in order."""
        words: dict[str, list[str]] = {}
        for line in self._path.read_text().splitlines():
            word, backup_id = line.split()[:2]
            words.setdefault(backup_id, []).append(word)
        return words

    def seeds(self) -> dict[str, int]:
        lines = [line.split() for line in self._path.read_text().splitlines()]
        return {words[1]: int(words[2]) for words in lines if len(words) == 3}


# -- what a process does -----------------------------------------------------------------------


def make(service: Service, log: Log, choice: random.Random) -> None:
    seed, backup_id = choice.randrange(1 << 30), str(uuid.UUID(int=choice.getrandbits(128)))
    log.say("making", backup_id, seed)
    service.backup(
        BytesSource(image_of(seed), piece_size=choice.choice([5000, CHUNK_SIZE * 7])),
        volume=choice.choice(VOLUMES),
        backup_id=backup_id,
        description=Description(display_name=str(seed)),
    )
    log.say("good", backup_id)


def take_away(service: Service, log: Log, choice: random.Random) -> None:
    service.refresh()
    records = service.backups()
    ours = [record for record in records if uuid.UUID(record.backup_id).int % PROCESSES == log.slot]
    if not ours or len(records) <= choice.randrange(COUNT_MAX):
        return
    record = choice.choice(ours)
    exported = service.export_record(record)
    log.say("deleting", record.backup_id)
    service.delete(record)
    log.say("gone", record.backup_id)
    if choice.random() < 0.4:
        log.say("importing", record.backup_id)
        service.import_record(exported)
        log.say("good", record.backup_id)


def collect(service: Service, _log: Log, _choice: random.Random) -> None:
    service.gc()


def look(service: Service, log: Log, choice: random.Random) -> None:
    """What is promised now, and is not being deleted, is there and has its bytes."""
    words, seeds = log.words(), log.seeds()
    good = [backup_id for backup_id in words if words[backup_id][-1] == "good"]
    service.refresh()
    for backup_id in choice.sample(good, min(3, len(good))):
        try:
            found = restored(service, service.resolve(backup_id))
        except (BackupNotFound, DamageError):
            # Not: whether it is promised now. It may have been deleted and taken in again meanwhile.
            assert log.words()[backup_id] != words[backup_id], f"{backup_id} was promised"
        else:
            assert found == image_of(seeds[backup_id])


def verify(service: Service, log: Log, _choice: random.Random) -> None:
    damage = service.verify().damage
    assert not damage, damage


# Another one runs a gc, has deleted or collected what this one wants, or has taken its name.
QUICKER = (Busy, BackupNotFound, MissingData, BackupExists)
ACTS: tuple[Callable[[Service, Log, random.Random], None], ...] = (
    *(make, make, make, take_away, take_away, collect, look, look, verify),
)


def live(location: str, log: Log, seed: int, end: float) -> None:
    choice = random.Random(seed)
    while time.monotonic() < end:
        with Service.open(location) as service:
            for _ in range(choice.randrange(1, 15)):
                act = choice.choice(ACTS)
                with contextlib.suppress(*QUICKER):
                    act(service, log, choice)
                if time.monotonic() > end:
                    return


def start(act: Callable[[], None], report: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(1)
    return child


# -- the tests -----------------------------------------------------------------------------------


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("caches", ["one host", "two hosts"])
@pytest.mark.parametrize("kills", [False, True], ids=["nobody is killed", "some are killed"])
def test_every_promise_is_kept_at_every_moment(
    location, scratch, tmp_path, monkeypatch, caches, kills
):
    log = Log(tmp_path / "log")
    choice = random.Random(SEED)
    end = time.monotonic() + SECONDS / 2
    children: dict[int, tuple[int, Path]] = {}
    number = 0

    def start_one(slot: int) -> None:
        nonlocal number
        number += 1
        if caches == "two hosts":  # each has an index of its own
            monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / f"cache-{number % 2}"))
        report = tmp_path / f"report-{number}"
        seed, its_log = SEED * 1000 + number, Log(tmp_path / "log", slot)
        child = start(lambda: live(location, its_log, seed, end), report)
        children[child] = slot, report

    for slot in range(PROCESSES):
        start_one(slot)
    killed = 0
    while kills and time.monotonic() < end:
        time.sleep(choice.random() / 3)
        victim = choice.choice(list(children))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        slot, report = children.pop(victim)
        assert not report.exists(), report.read_text()
        killed += 1
        start_one(slot)
    for child, (_slot, report) in children.items():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, report.read_text()
    assert not list(tmp_path.glob("report-*"))

    assert killed > 3 or not kills
    check(location, log)
    with Service.open(location) as service:
        service.open_staging(Policy(), mountpoint=None).close()
        for _ in range(2):  # what the first one copies may be small packs that the next one joins
            service.gc()
        again = service.gc()
        assert (again.packs_deleted, again.packs_repacked) == (0, 0)
    for cache in scratch.glob("cache*"):
        shutil.rmtree(cache)
    check(location, log)


def check(location: str, log: Log) -> None:
    """All that was promised and not begun to be deleted is there; what is there is right."""
    states, seeds = log.states(), log.seeds()
    with Service.open(location) as service:
        there = {record.backup_id: record for record in service.backups()}
        assert {backup_id for backup_id, word in states.items() if word == "good"} <= there.keys()
        assert {
            backup_id for backup_id, word in states.items() if word == "gone"
        } & there.keys() == set()
        assert there.keys() <= states.keys()
        assert is_clean(service)
        for backup_id, record in there.items():
            assert restored(service, record) == image_of(seeds[backup_id])
        assert len(there) > 1
