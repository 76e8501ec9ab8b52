"""How long a disk may take before the event loop leaves it to threads."""

from __future__ import annotations

from backupfs.fuse.quick_reader import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, Pace


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
