"""How long a disk may take before the event loop leaves it to threads."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from backupfs.fuse.quick_reader import (
    ALONE_SECONDS_MAX,
    BESIDE_SECONDS_MAX,
    PAUSE_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    Pace,
    QuickReader,
)
from backupfs.repository.images import EMPTY
from backupfs.repository.quick_reads import QuickRead


def test_slow_disk_is_left_alone_for_longer_each_time():
    pace = Pace()

    pace.was_slow(100.0)
    assert not pace.is_quick(100.0 + PAUSE_SECONDS_MIN / 2)
    assert pace.is_quick(100.0 + PAUSE_SECONDS_MIN)
    for _ in range(20):
        pace.was_slow(200.0)

    assert not pace.is_quick(200.0 + PAUSE_SECONDS_MAX * 0.99)
    assert pace.is_quick(200.0 + PAUSE_SECONDS_MAX)


def test_disk_that_was_quick_again_is_paused_briefly():
    pace = Pace()
    for _ in range(20):
        pace.was_slow(100.0)

    pace.was_quick()
    pace.was_slow(200.0)

    assert pace.is_quick(200.0 + PAUSE_SECONDS_MIN)


class Never(QuickRead):
    """A read of a disk that does not answer."""

    def __init__(self) -> None:
        self.chunk = None
        self.attempts = 0
        self.is_closed = False

    def attempt(self) -> bool:
        self.attempts += 1
        return False

    def close(self) -> None:
        self.is_closed = True


class Stand:
    """In place of the reads, and of the wait for requests."""

    def __init__(self, *, others_wait: bool) -> None:
        self.begun: list[Never] = []
        self.others_wait = others_wait
        self.now = 100.0

    def begin(self, *_: Any) -> Never:
        self.begun.append(Never())
        return self.begun[-1]

    def is_there(self) -> bool:
        return self.others_wait

    def monotonic(self) -> float:
        self.now += 10e-6
        return self.now


@pytest.mark.parametrize(
    ("others_wait", "seconds_max"), [(False, ALONE_SECONDS_MAX), (True, BESIDE_SECONDS_MAX)]
)
def test_disk_that_does_not_answer_is_left_to_threads_at_once(others_wait, seconds_max):
    stand: Any = Stand(others_wait=others_wait)
    reader = QuickReader(stand, stand, stand, stand.monotonic)

    chunk = trio.run(reader.read, EMPTY, 0)

    assert chunk is None
    assert stand.now - 100.0 < seconds_max + 100e-6
    (read,) = stand.begun
    assert read.is_closed and read.attempts > 3
    assert trio.run(reader.read, EMPTY, 0) is None
    assert stand.begun == [read], "for a while the disk is not asked"
    stand.now += PAUSE_SECONDS_MIN
    trio.run(reader.read, EMPTY, 0)
    assert len(stand.begun) == 2
