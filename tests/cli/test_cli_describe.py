"""Values as tables and JSON have them."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.cli.describe import (
    as_json,
    compact_time,
    counted,
    human_size,
    rfc3339,
)
from backupfs.cli.escaping import escaped, printable
from backupfs.service import RetentionPolicy

MOMENT = datetime(2026, 11, 22, 16, 25, 3, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 50, "1.0 PiB"),
        (1 << 70, "1024.0 EiB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert human_size(size) == text


def test_times_are_in_utc() -> None:
    assert compact_time(MOMENT) == "2026-11-22T142503Z"
    assert rfc3339(MOMENT) == "2026-11-22T14:25:03Z"
    assert rfc3339(MOMENT.replace(microsecond=5)) == "2026-11-22T14:25:03.000005Z"
    assert compact_time(None) == "-"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web 01", "web 01"),
        ("grün", "grün"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b31m", r"\x9b31m"),
        ("right\u202eleft", r"right\u202eleft"),
        ("no\u00a0break", r"no\xa0break"),
        ("\udcff", r"\udcff"),
        ("back\\nslash", r"back\\nslash"),
        ("[red]:smile:", "[red]:smile:"),
    ],
)
def test_nothing_unprintable_of_a_name_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text() | st.binary().map(os.fsdecode))
def test_any_name_becomes_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()


def test_escaping_leaves_what_is_escaped_already() -> None:
    assert escaped(repr("a\nb")) == repr("a\nb")


def test_counting() -> None:
    assert [counted(count, "pack") for count in (0, 1, 2)] == ["0 packs", "1 pack", "2 packs"]


def test_reports_become_json_values() -> None:
    found = as_json({"policy": RetentionPolicy(last=3), "at": MOMENT.astimezone(UTC), "row": (1,)})

    assert found["policy"]["last"] == 3
    assert found["at"] == "2026-11-22T14:25:03Z"
    assert found["row"] == [1]
