"""Locks of processes: exclusive, given up by death, never stolen by those who only look."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backupfs.errors import StorageError
from backupfs.storage import locks
from backupfs.storage.locks import holder, is_held, try_lock

HOLD = """
import sys
from pathlib import Path
from backupfs.storage.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
lock.describe("process of a test")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(scratch: Path) -> Path:
    return scratch / "locks" / "one"


def test_one_at_a_time_holds_a_lock(path):
    lock = try_lock(path)

    assert lock is not None
    assert try_lock(path) is None
    assert is_held(path)

    lock.release()
    again = try_lock(path)
    assert again is not None
    again.release()


def test_releasing_twice_is_harmless(path):
    lock = try_lock(path)
    lock.release()
    other = try_lock(path)

    lock.release(remove=True)

    assert path.exists()
    assert is_held(path)
    other.release(remove=True)
    assert not path.exists()


def test_the_holder_leaves_word_of_itself(path):
    lock = try_lock(path)
    lock.describe("a much longer word that came first")
    lock.describe("process 7")

    assert holder(path) == "process 7"
    lock.release()
    assert holder(path.with_name("none")) == "another process"


def test_a_lock_opens_when_its_process_is_killed(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert try_lock(path) is None
        assert holder(path) == "process of a test"

        process.send_signal(signal.SIGKILL)
        process.wait()

        lock = try_lock(path)
        assert lock is not None
        lock.release()


def test_a_lock_is_not_inherited_by_programs_that_are_started(path):
    lock = try_lock(path)
    with subprocess.Popen(["sleep", "5"]) as process:
        lock.release()

        assert not is_held(path)
        process.kill()


def test_a_file_that_is_gone_is_not_held(path):
    assert not is_held(path)


def test_a_lock_taken_on_a_removed_file_is_taken_again(path, monkeypatch):
    """Its last holder may remove the file between our open and our lock."""
    removed = []
    real = locks.fcntl.flock

    def remove_first(file, how):
        if not removed:
            path.unlink()
            removed.append(True)
        real(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)

    lock = try_lock(path)

    assert path.exists()
    assert is_held(path)
    lock.release()


def test_who_only_looks_never_makes_taking_a_lock_fail(path):
    """A look takes a shared lock for a moment: a mount started just then must not say "busy"."""
    path.parent.mkdir(parents=True)
    path.touch()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_held(path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(2000):
            lock = try_lock(path)
            assert lock is not None
            lock.release()
    finally:
        stop.set()
        for looker in lookers:
            looker.join()


def test_leaving_word_is_not_worth_failing_for(path, monkeypatch):
    """On a full disk gc is the way out, so it must not need room to say who it is."""

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    lock = try_lock(path)

    lock.describe("process 7")

    assert holder(path) == "another process"
    lock.release()


def test_a_folder_that_cannot_be_used_is_a_storage_error(scratch):
    (scratch / "file").touch()

    with pytest.raises(StorageError):
        try_lock(scratch / "file" / "lock")
