"""Clocks that tests set by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from backupfs.ambient import Ambient


class SetClock(Ambient):
    """The time stands still until ``advance``; randomness and waiting stay as they are."""

    def __init__(self, moment: datetime = datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)) -> None:
        self.moment = moment
        self.elapsed = 0.0

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.elapsed

    def advance(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        self.elapsed += seconds
