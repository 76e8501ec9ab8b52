"""Ranges written of one chunk, against a plain list of bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.staging.extents import Extents

SIZE = 40
RANGES = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=20)


@given(RANGES)
def test_ranges_are_what_was_written_in_the_fewest_pieces(added):
    extents, written = Extents(), [False] * SIZE

    for start, end in added:
        extents.add(start, end)
        for place in range(start, end):
            written[place] = True

    ranges = extents.ranges()
    assert ranges == sorted(ranges)
    assert all(low < high for low, high in ranges)
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    covered = [any(low <= place < high for low, high in ranges) for place in range(SIZE)]
    assert covered == written
    assert extents.covers(SIZE) == all(written)


@given(RANGES)
def test_a_copy_goes_its_own_way(added):
    extents = Extents()
    for start, end in added:
        extents.add(start, end)
    before = extents.ranges()

    extents.copy().add(0, SIZE)
    extents.ranges().append((0, 1))

    assert extents.ranges() == before


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([], []),
        ([(3, 3), (5, 2)], []),
        ([(0, 4), (4, 8)], [(0, 8)]),
        ([(4, 8), (0, 4)], [(0, 8)]),
        ([(0, 2), (4, 6), (2, 4)], [(0, 6)]),
        ([(0, 2), (4, 6), (1, 5)], [(0, 6)]),
        ([(0, 10), (3, 5)], [(0, 10)]),
        ([(3, 5), (0, 10)], [(0, 10)]),
    ],
)
def test_neighbours_join(added, expected):
    extents = Extents()
    for start, end in added:
        extents.add(start, end)

    assert extents.ranges() == expected
