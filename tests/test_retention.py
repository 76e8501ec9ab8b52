"""Which backups a rule keeps, against what its words say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.format.record import KIND_FULL, Record
from backupfs.retention import RetentionPolicy, kept_ids
from backupfs.types import HOLE


def record(moment: datetime, number: int) -> Record:
    return Record(
        backup_id=f"{number:08x}-0000-4000-8000-000000000000",
        repository_id="0b0e4f2c-0000-4000-8000-000000000000",
        volume="vm",
        name="2026-11-22T142503Z.img",
        size=0,
        chunk_size=65536,
        root=HOLE,
        height=1,
        kind=KIND_FULL,
        parent_id=None,
        created_at=moment,
        data_timestamp=moment,
        source_mtime_ns=None,
        source_mode=None,
        data_size=0,
        stored_bytes=0,
        host="host",
    )


def kept(moments: list[str], **rules: int) -> list[str]:
    """Those of ``moments``, oldest first, that are kept."""
    records = [
        record(datetime.fromisoformat(moment).replace(tzinfo=UTC), number)
        for number, moment in enumerate(moments)
    ]
    ids = kept_ids(records, RetentionPolicy(**rules), NOW)
    return [moment for moment, each in zip(moments, records, strict=True) if each.backup_id in ids]


NOW = datetime(2030, 1, 1, tzinfo=UTC)
WEEK = [f"2026-11-{day:02}T{hour:02}:00:00" for day in range(16, 23) for hour in (1, 13)]


@pytest.mark.parametrize(
    ("moments", "rules", "expected"),
    [
        (WEEK, {}, []),
        ([], {"last": 3}, []),
        (WEEK, {"last": 3}, WEEK[-3:]),
        (WEEK, {"last": 99}, WEEK),
        (WEEK, {"daily": 3}, [WEEK[-5], WEEK[-3], WEEK[-1]]),
        (WEEK, {"hourly": 2}, WEEK[-2:]),
        (WEEK, {"daily": 2, "last": 3}, WEEK[-3:]),
        (WEEK, {"weekly": 5}, [WEEK[-1]]),
        (["2026-12-31T23:59:59", "2027-01-01T00:00:00"], {"yearly": 2}, None),
        (["2026-12-31T23:59:59", "2027-01-01T00:00:00"], {"weekly": 2}, ["2027-01-01T00:00:00"]),
        (["2026-12-27T23:59:59", "2026-12-28T00:00:00"], {"weekly": 2}, None),
        (["2026-01-31T00:00:00", "2026-02-01T00:00:00"], {"monthly": 1}, ["2026-02-01T00:00:00"]),
        # Periods without a backup do not count.
        (["2020-01-01T00:00:00", "2026-01-01T00:00:00"], {"daily": 2}, None),
        (["2020-01-01T00:00:00", "2026-01-01T00:00:00"], {"yearly": 2}, None),
    ],
)
def test_the_newest_of_each_of_the_last_periods_is_kept(moments, rules, expected):
    assert kept(moments, **rules) == (moments if expected is None else expected)


COUNTS = st.integers(0, 4)
POLICIES = st.fixed_dictionaries(
    dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly", "yearly"), COUNTS)
)
MOMENTS = st.lists(
    st.integers(0, 5000).map(
        lambda hours: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
    ),
    max_size=25,
)
PERIODS: dict[str, Callable[[datetime], object]] = {
    "hourly": lambda moment: (moment.date(), moment.hour),
    "daily": lambda moment: moment.date(),
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}


@given(MOMENTS, POLICIES)
def test_any_rules_keep_what_their_words_say(moments, rules):
    records = [record(moment, number) for number, moment in enumerate(sorted(moments))]
    expected = {each.backup_id for each in records[::-1][: rules["last"]]}
    for rule, period_of in PERIODS.items():
        newest = {period_of(each.data_timestamp): each.backup_id for each in records}
        expected |= set(list(newest.values())[::-1][: rules[rule]])

    now = max(moments, default=NOW)
    assert kept_ids(records, RetentionPolicy(**rules), now) == expected


def test_backups_of_a_clock_that_was_ahead_stay_and_do_not_count():
    ahead = ["2031-03-01T00:00:00", "2032-03-01T00:00:00"]

    assert kept([*WEEK, *ahead], last=1) == [WEEK[-1], *ahead]
    assert kept([*WEEK, *ahead], daily=2, yearly=1) == [WEEK[-3], WEEK[-1], *ahead]
    assert kept(ahead, last=1) == ahead
