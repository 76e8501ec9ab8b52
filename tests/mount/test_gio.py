"""gio copy: how Nautilus and its relatives copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mounted import MIB, Mounted, needs, patched, random_bytes, run

pytestmark = [pytest.mark.tools, needs("gio", "dbus-run-session")]

IMAGE = random_bytes(6 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")


def copy(source: Path, target: Path) -> None:
    run("dbus-run-session", "--", "gio", "copy", "-p", source, target)


def test_gio_sets_attributes_after_the_copy_is_published(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)
    source.chmod(0o640)
    os.utime(source, (1_500_000_000, 1_500_000_000))

    copy(source, mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)
    head = (mounted.staging / "web01.img").stat()
    assert (head.st_mode & 0o7777, int(head.st_mtime)) == (0o640, 1_500_000_000)


def test_gio_over_a_head_renames_while_the_file_is_open(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    copy(mounted.image(IMAGE), target)

    copy(mounted.image(CHANGED), target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert os.listdir(mounted.staging) == ["web01.img"]
    assert sorted(os.listdir(mounted.volumes)) == ["web01"]
