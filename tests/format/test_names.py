"""Names of volumes and backups."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from backupfs.format.names import BACKUP_NAME, backup_name, check_volume_name, order_of, volume_of

MOMENTS = st.datetimes(
    min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)
)


@pytest.mark.parametrize(
    "volume",
    [
        "web01",
        "100/disk-0",
        "a b\nc",
        "-rf",
        "wéb",
        "…",
        "volume.tar",
        "web01.img",
        ".hidden",
        "latest",
        "a/" * 100 + "b",
        "x" * 255,
        "é" * 127,
        "2026-11-22T142503Z",
        "2026-11-22T142503Z-1.img",
        "٢٠٢٦-11-22T142503Z.img",
        "metadata.json.old",
    ],
)
def test_a_volume_may_be_called(volume):
    assert check_volume_name(volume) == ""


@pytest.mark.parametrize(
    "volume",
    [
        "",
        "/",
        "/web01",
        "web01/",
        "a//b",
        ".",
        "..",
        "../etc",
        "a/../b",
        "a/./b",
        "a\0b",
        "\udcff",
        "x" * 256,
        "é" * 128,
        "a/" + "x" * 256 + "/b",
        "/".join(["x" * 100] * 41),
        "latest.img",
        "metadata.json",
        "a/latest.img/b",
        "2026-11-22T142503Z.img",
        "a/2026-11-22T142503Z-2.img",
        "2026-11-22T142503Z-10.img",
    ],
)
def test_a_volume_may_not_be_called(volume):
    assert check_volume_name(volume)


@given(st.text(max_size=300))
def test_a_name_that_is_taken_is_a_path_below_a_folder(volume):
    assume(check_volume_name(volume) == "")

    parts = volume.split("/")
    assert all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    assert "\0" not in volume


@pytest.mark.parametrize(
    ("staged", "volume"),
    [
        ("web01.img", "web01"),
        ("web01.raw", "web01"),
        ("web01", "web01"),
        ("web01.qcow2", "web01.qcow2"),
        ("web01.img.img", "web01.img"),
        ("web01.img.raw", "web01.img"),
        ("web01.IMG", "web01.IMG"),
        ("100/disk-0.raw", "100/disk-0"),
        ("a.img/b", "a.img/b"),
        ("a.img/b.img", "a.img/b"),
        (".img", ".img"),
        ("a/.raw", "a/.raw"),
        ("img", "img"),
    ],
)
def test_a_staged_path_stands_for_a_volume(staged, volume):
    assert volume_of(staged) == volume


@given(st.text(min_size=1, max_size=20))
def test_every_staged_path_stands_for_some_volume(staged):
    assert volume_of(staged)
    if not staged.endswith("/"):
        assert volume_of(staged + ".img") == staged


MOMENT = datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)


def test_a_backup_is_named_by_its_time_in_utc():
    assert backup_name(MOMENT, ()) == "2026-11-22T142503Z.img"
    assert backup_name(MOMENT + timedelta(microseconds=999_999), ()) == "2026-11-22T142503Z.img"
    elsewhere = MOMENT.astimezone(timezone(timedelta(hours=-7)))
    assert backup_name(elsewhere, ()) == "2026-11-22T142503Z.img"


def test_backups_of_one_second_are_numbered_from_two():
    taken: list[str] = []
    for _ in range(12):
        taken.append(backup_name(MOMENT, taken))

    assert taken[0] == "2026-11-22T142503Z.img"
    assert taken[1] == "2026-11-22T142503Z-2.img"
    assert taken[-1] == "2026-11-22T142503Z-12.img"
    assert sorted(taken, key=order_of) == taken


def test_the_newest_comes_last_whatever_became_free():
    taken = {"2026-11-22T142503Z-3.img", "2026-11-22T142504Z-7.img"}

    assert backup_name(MOMENT, taken) == "2026-11-22T142503Z-4.img"


def test_a_forged_number_leaves_no_backup_without_a_name():
    taken = ["2026-11-22T142503Z-999999999.img"]
    for number in ("", "-2", "-3"):
        taken.append(backup_name(MOMENT, taken))
        assert taken[-1] == f"2026-11-22T142503Z{number}.img"


@given(MOMENTS, st.integers(0, 20))
def test_every_name_given_is_one_of_a_backup(moment, taken_count):
    taken: list[str] = []
    for _ in range(taken_count):
        taken.append(backup_name(moment, taken))
    name = backup_name(moment, taken)

    assert name not in taken
    assert BACKUP_NAME.fullmatch(name)
    assert check_volume_name(name)


@given(MOMENTS, MOMENTS)
def test_names_sort_as_their_times(one, other):
    one, other = one.replace(microsecond=0), other.replace(microsecond=0)

    by_name = order_of(backup_name(one, ())) < order_of(backup_name(other, ()))

    assert by_name == (one < other)


@pytest.mark.parametrize(
    "name",
    [
        "2026-11-22T142503Z",
        "2026-11-22T142503Z.img\n",
        "2026-11-22T142503Z.raw",
        "2026-11-22T142503Z-0.img",
        "2026-11-22T142503Z-1.img",
        "2026-11-22T142503Z-02.img",
        "2026-11-22T142503Z-.img",
        "2026-11-22T142503Z-1234567890.img",
        "2026-11-22 142503Z.img",
        "../2026-11-22T142503Z.img",
        "٢٠٢٦-11-22T142503Z.img",
        "x2026-11-22T142503Z.img",
    ],
)
def test_a_backup_is_not_named(name):
    assert not BACKUP_NAME.fullmatch(name)
