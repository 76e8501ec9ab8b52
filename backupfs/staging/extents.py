"""Which ranges of one chunk have been written (pure)."""

from __future__ import annotations


class Extents:
    """Sorted, disjoint, non-touching half-open ranges of bytes."""

    def __init__(self, ranges: list[tuple[int, int]] | None = None) -> None:
        self._ranges = ranges or []

    def copy(self) -> Extents:
        return Extents(list(self._ranges))

    def add(self, start: int, end: int) -> None:
        """Count [start, end) as written."""
        if start >= end:
            return
        last = self._ranges[-1] if self._ranges else None
        if last is not None and last[0] <= start <= last[1]:
            self._ranges[-1] = (last[0], max(last[1], end))  # the usual case: going on
            return
        kept = []
        for low, high in self._ranges:
            if high < start or end < low:
                kept.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        kept.append((start, end))
        self._ranges = sorted(kept)

    def covers(self, size: int) -> bool:
        """Whether all of [0, size) was written."""
        return bool(self._ranges) and self._ranges[0][0] <= 0 and self._ranges[0][1] >= size

    def ranges(self) -> list[tuple[int, int]]:
        return list(self._ranges)
