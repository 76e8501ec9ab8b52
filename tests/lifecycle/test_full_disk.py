"""A disk that is full, turns read-only or goes away: one clear error for who meets it, what was
published is untouched, and everything works again when there is room."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
from lifecycle_mount import KIB, MIB, Site, assert_same, becomes, content, site_in
from small_disk import DISK_SIZE, Disk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")

SECONDS_MAX = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.take_away()


@pytest.fixture
def site(tmp_path: Path, commands: CommandServer, disk: Disk) -> Iterator[Site]:
    """A mounted repository on the small disk, with a backup of 4 MiB."""
    with site_in(tmp_path / "site", commands, repo=disk.path / "repo") as found:
        found.may_log_errors = True
        found.init()
        found.mount()
        found.copy_in("vm.img", DATA)
        yield found


DATA = content(4 * MIB, 1)


def assert_backup_is_whole(site: Site) -> None:
    assert_same(site.latest("vm").read_bytes(), DATA, "the published backup")
    ended = site.command("verify", check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def fail_to_copy(site: Site, data: bytes, name: str = "big.img") -> None:
    ended = site.run("cp", site.image(data, "big"), site.staging / name, check=False)
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr, ended.stderr


# -- full --------------------------------------------------------------------------------------


def test_copy_that_does_not_fit_fails_and_costs_nothing_else(site: Site, disk: Disk) -> None:
    fail_to_copy(site, content(40 * MIB, 2))

    assert_backup_is_whole(site)
    assert site.names("big") == []
    draft = site.drafts()["big.img"]
    assert draft["state"] == "held" and "no space" in draft["reason"]
    assert disk.free_size > DISK_SIZE // 4, "what was written in vain is still there"


def test_what_did_not_fit_is_no_backup_after_the_next_start(site: Site, disk: Disk) -> None:
    fail_to_copy(site, content(40 * MIB, 2))
    disk.fill()

    for how in ("unmounted", "killed"):
        site.unmount() if how == "unmounted" else site.kill()
        site.mount()
        assert site.names("big") == []
        assert site.drafts().get("big.img", {"state": "held"})["state"] == "held"
    disk.empty()
    site.remount()
    assert site.names("big") == []
    assert_backup_is_whole(site)


def test_room_is_made_by_rm_and_gc_on_a_full_disk(site: Site, disk: Disk) -> None:
    more = content(6 * MIB, 3)
    site.copy_in("old.img", more)
    assert_same(site.latest("old").read_bytes(), more, "what is to go")  # its pack is open now
    fail_to_copy(site, content(40 * MIB, 2))
    disk.fill()
    assert disk.free_size < 64 * KIB

    (site.staging / "big.img").unlink()
    (site.staging / "old.img").unlink()
    (site.volumes / "old" / site.names("old")[0]).unlink()
    collected = site.command("gc")

    assert becomes(lambda: disk.free_size > 5 * MIB, seconds=10), collected.stdout
    assert_backup_is_whole(site)
    site.copy_in("new.img", content(3 * MIB, 4))
    disk.empty()
    fits = content(8 * MIB, 2)
    site.copy_in("big.img", fits)
    assert_same(site.latest("big").read_bytes(), fits, "what fits now")


def test_gc_without_a_mount_works_on_a_full_disk(site: Site, disk: Disk) -> None:
    site.copy_in("old.img", content(6 * MIB, 3))
    (site.staging / "old.img").unlink()
    site.unmount()
    disk.fill()

    site.command("delete", "old@latest")
    site.command("gc")

    assert disk.free_size > 5 * MIB
    site.mount()
    assert_backup_is_whole(site)


def test_full_disk_can_be_mounted_and_read(site: Site, disk: Disk) -> None:
    site.unmount()
    disk.fill()

    site.mount()

    assert_backup_is_whole(site)
    fail_to_copy(site, content(MIB, 5), "vm.img")
    assert_backup_is_whole(site)
    site.unmount()


def test_program_hears_of_a_full_disk_while_it_writes(site: Site, disk: Disk) -> None:
    """It may have hours to go, or be one that does not look at what closing says."""
    source = site.image(content(4 * DISK_SIZE, 2), "big")

    ended = site.run(
        "qemu-img", "convert", "-O", "raw", source, site.staging / "big.img", check=False
    )

    assert ended.returncode == 1 and "error while writing" in ended.stderr
    assert site.drafts()["big.img"]["state"] == "held"
    assert_backup_is_whole(site)


def test_patch_that_does_not_fit_leaves_the_head_and_its_backup(site: Site, disk: Disk) -> None:
    disk.fill(leave=256 * KIB)
    patch = site.image(content(3 * MIB, 6), "patch")
    words = ("dd", f"if={patch}", f"of={site.staging}/vm.img", "bs=1M", "conv=notrunc")

    ended = site.run(*words, check=False)

    assert ended.returncode == 1 and "No space left" in ended.stderr
    assert len(site.names("vm")) == 1
    assert_backup_is_whole(site)
    assert site.drafts()["vm.img"]["state"] == "held"
    disk.empty()
    site.run("rsync", "--inplace", "--ignore-times", site.image(DATA), site.staging / "vm.img")
    assert site.drafts() == {}
    assert_same((site.staging / "vm.img").read_bytes(), DATA, "the head")


def test_rsync_that_does_not_fit_leaves_nothing_that_cannot_be_removed(
    site: Site, disk: Disk
) -> None:
    disk.fill(leave=MIB)

    ended = site.run("rsync", site.image(content(5 * MIB, 7)), site.staging, check=False)

    assert ended.returncode != 0
    assert os.listdir(site.staging) == ["vm.img"]
    assert_backup_is_whole(site)


@pytest.mark.parametrize("leave", range(0, 40 * KIB, 4 * KIB))
def test_copy_beside_the_brink_is_whole_or_none(site: Site, disk: Disk, leave: int) -> None:
    """Data, nodes, state and record need a page or two each: room ends in another place each time."""
    data = content(100 * KIB, leave)
    disk.fill(leave=130 * KIB + leave)

    ended = site.run("cp", site.image(data), site.staging / "new.img", check=False)

    made = site.names("new")
    if ended.returncode == 0 and not made:  # all was stored but the record
        assert "publishing failed" in site.drafts()["new.img"]["reason"]
        disk.empty()
        site.remount()
    if ended.returncode == 0:
        assert_same(site.latest("new").read_bytes(), data, "what was acknowledged")
    else:
        assert made == []
    disk.empty()
    assert_backup_is_whole(site)
    site.copy_in("new.img", data)
    assert_same(site.latest("new").read_bytes(), data, "the copy after that")


def test_kills_on_a_disk_that_is_nearly_full_lose_nothing(site: Site, disk: Disk) -> None:
    rng = random.Random(8)
    kept: dict[str, bytes] = {}
    for number in range(10):
        data = content(rng.randint(100 * KIB, 6 * MIB), 100 + number)
        name = f"v{number}"
        copy = site.start(
            "cp", site.image(data), site.staging / f"{name}.img", stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            copy.wait(timeout=rng.uniform(0, 0.1))
        site.kill()
        if copy.wait(timeout=30) == 0:
            kept[name] = data
        site.mount()
        for volume, expected in kept.items():
            assert_same(site.latest(volume).read_bytes(), expected, volume)
        if disk.free_size < 4 * MIB and kept:
            victim = rng.choice(sorted(kept))
            del kept[victim]
            for made in site.names(victim):
                (site.volumes / victim / made).unlink()
            for staged in site.staging.iterdir():
                if staged.name != "vm.img":
                    staged.unlink()
            site.command("gc")
    assert_backup_is_whole(site)


def test_small_objects_that_do_not_fit_are_refused_with_the_reason(site: Site, disk: Disk) -> None:
    (record,) = site.backups.glob("*.msgpack")
    sidecar = site.image(record.read_bytes(), record.name)
    (site.volumes / "vm" / site.names("vm")[0]).unlink()
    metadata = site.image(b'{"key": "%s"}' % (b"x" * 20000), "metadata.json")
    disk.fill()

    for words in (("cp", sidecar, site.backups), ("mkdir", site.staging / "folder")):
        ended = site.run(*words, check=False)
        assert ended.returncode == 1 and "No space left" in ended.stderr, ended.stderr
    ended = site.command("metadata", "vm", "--set", metadata, check=False)
    assert ended.returncode == 1 and "no space left" in ended.stderr

    disk.empty()
    site.run("cp", sidecar, site.backups)
    assert_backup_is_whole(site)


def test_full_disk_of_the_index_stops_no_backup(
    tmp_path: Path, commands: CommandServer, disk: Disk
) -> None:
    """The index is a cache: what it cannot take in is found in the packs at the next start."""
    with site_in(tmp_path / "site", commands) as site:
        site.may_log_errors = True
        site.environment["XDG_CACHE_HOME"] = str(disk.path / "cache")
        site.init()
        site.mount()
        disk.fill()
        data = content(12 * MIB, 9)

        site.copy_in("vm.img", data)

        assert_same(site.latest("vm").read_bytes(), data, "vm")
        site.unmount()
        disk.empty()
        site.mount()
        assert_same(site.latest("vm").read_bytes(), data, "vm")
        site.assert_verified()


# -- read-only and gone ------------------------------------------------------------------------


def test_disk_that_turns_read_only_refuses_and_recovers(
    tmp_path: Path, commands: CommandServer
) -> None:
    with site_in(tmp_path / "site", commands) as site:
        site.may_log_errors = True
        site.init()
        site.mount()
        site.copy_in("vm.img", DATA)
        data = content(2 * MIB, 10)
        if site.run("chattr", "-R", "+i", site.repo, check=False).returncode:
            pytest.skip("needs a file system with immutable files")
        try:
            started = time.monotonic()
            for words in (
                ("cp", site.image(data), site.staging / "new.img"),
                ("unlink", site.volumes / "vm" / site.names("vm")[0]),
                ("mkdir", site.staging / "folder"),
            ):
                ended = site.run(*words, check=False)
                assert ended.returncode == 1 and "Read-only file system" in ended.stderr
            assert_same(site.latest("vm").read_bytes(), DATA, "vm")
            assert time.monotonic() - started < SECONDS_MAX
        finally:
            site.run("chattr", "-R", "-i", site.repo)

        site.copy_in("new.img", data)
        assert_same(site.latest("new").read_bytes(), data, "new")
        assert_backup_is_whole(site)


def test_repository_that_is_moved_away_gives_errors_and_recovers(site: Site, disk: Disk) -> None:
    aside = disk.path / "aside"
    site.repo.rename(aside)
    started = time.monotonic()

    ended = site.run("cp", site.image(content(MIB, 11)), site.staging / "new.img", check=False)
    assert ended.returncode == 1
    assert os.listdir(site.path)
    assert site.status()["volumes"] in (0, 1)
    assert site.command("list", check=False).returncode == 1
    time.sleep(2)
    assert time.monotonic() - started < SECONDS_MAX
    assert len(site.log_text().splitlines()) < 15, "the log is flooded"

    aside.rename(site.repo)
    assert becomes(lambda: site.latest("vm").exists(), seconds=20)
    site.copy_in("new.img", content(MIB, 12))
    assert_backup_is_whole(site)


def test_repository_that_is_removed_ends_in_errors_and_can_be_unmounted(site: Site) -> None:
    shutil.rmtree(site.repo)

    for words in (
        ("cp", site.image(content(MIB, 13)), site.staging / "new.img"),
        ("cat", site.staging / "vm.img"),
        ("ls", site.volumes / "vm" / "2000-01-01T000000Z.img"),
    ):
        ended = site.run(*words, check=False, seconds=SECONDS_MAX)
        assert ended.returncode != 0 and ended.stderr
    site.unmount()
    assert not site.is_mounted()


def test_too_many_open_files_is_an_error_and_passes(site: Site) -> None:
    daemon = site.daemon()
    others = content(2 * MIB, 14)
    limit = str(len(os.listdir(f"/proc/{daemon}/fd")))
    site.run("prlimit", f"--pid={daemon}", f"--nofile={limit}:1024")

    site.run("cp", site.image(others), site.staging / "new.img", check=False, seconds=SECONDS_MAX)
    os.listdir(site.volumes)

    site.run("prlimit", f"--pid={daemon}", "--nofile=1024:1024")
    assert site.daemon() == daemon
    site.copy_in("new.img", others)
    assert_same(site.latest("new").read_bytes(), others, "new")
    assert_backup_is_whole(site)
