"""A repository whose owner has a quota: there is room on the disk, and none for this one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
from lifecycle_mount import MIB, Site, assert_same, content, site_in

IMAGE_SIZE = 600 * MIB  # of the file system; sparse
QUOTA = 40 * MIB
FIRST = content(20 * MIB, 1)
TOO_MUCH = content(30 * MIB, 2)


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """A folder of a btrfs, which counts by itself what may be kept below it."""
    if os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None:
        pytest.skip("needs root and mkfs.btrfs")
    image, folder = tmp_path / "btrfs.img", tmp_path / "btrfs"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    run("mkfs.btrfs", "-q", image)
    folder.mkdir()
    try:
        run("mount", "-o", "loop", image, folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no btrfs can be mounted here: {error.stderr.decode()}")
    try:
        run("btrfs", "quota", "enable", folder)
        run("btrfs", "subvolume", "create", folder / "owner")
        run("btrfs", "qgroup", "limit", str(QUOTA), folder / "owner")
        yield folder / "owner"
    finally:
        run("umount", folder)


def test_copy_beyond_the_quota_fails_and_fits_after_rm_and_gc(
    tmp_path: Path, commands: CommandServer, limited: Path
) -> None:
    with site_in(tmp_path / "site", commands, repo=limited / "repo") as site:
        site.may_log_errors = True
        site.init()
        site.mount()
        site.copy_in("first.img", FIRST)
        run("sync")  # btrfs counts what it has written

        refused = copy(site, "second.img")

        assert refused.returncode == 1
        assert "quota" in site.drafts()["second.img"]["reason"]
        assert_same(site.latest("first").read_bytes(), FIRST, "the published backup")
        for path in (*site.staging.iterdir(), site.latest("first").resolve()):
            path.unlink()
        site.command("gc")
        assert becomes_room_for(site, "second.img")
        assert_same(site.latest("second").read_bytes(), TOO_MUCH, "what fits now")
        site.assert_verified()


def copy(site: Site, name: str) -> subprocess.CompletedProcess[str]:
    return site.run("cp", site.image(TOO_MUCH, "source"), site.staging / name, check=False)


def becomes_room_for(site: Site, name: str) -> bool:
    """Whether the copy fits, once the file system has counted what was deleted."""
    for _ in range(20):
        run("sync")
        if copy(site, name).returncode == 0:
            return True
        site.command("gc")  # what came of the copy that did not fit
    return False
