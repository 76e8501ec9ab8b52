"""Disks and limits that refuse: read-only, not ours, gone, out of room, inodes or open files.

Every command, and every program in the mount, ends with one clear error and never hangs; what can be
read is read, and when the refusal has passed all is as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_server import CommandServer
from lifecycle_mount import BACKUPFS, MIB, Ended, Site, Word, assert_same, content, site_in
from small_disk import DISK_SIZE, Disk

import backupfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")

SECONDS_MAX = 30.0
NOBODY = 65534
DATA = content(3 * MIB, 1)
OTHER = content(3 * MIB, 2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    if os.path.ismount(disk.path):
        disk.take_away()


@pytest.fixture
def site(tmp_path: Path, commands: CommandServer, disk: Disk) -> Iterator[Site]:
    """A repository on the small disk, with a backup; not mounted."""
    with site_in(tmp_path / "site", commands, repo=disk.path / "repo") as found:
        found.may_log_errors = True
        found.init()
        found.command("backup", found.image(DATA, "vm.img"))
        yield found


def refused(ended: Ended, *words: str) -> None:
    """It failed, and the last line says why; no line is a traceback."""
    assert ended.returncode in (1, 3), (ended.args, ended.returncode, ended.stderr)
    lines = ended.stderr.splitlines()
    assert lines and all(line.startswith("backupfs: ") for line in lines), ended.stderr
    assert any(word in lines[-1] for word in words), ended.stderr


def assert_readable(site: Site) -> None:
    """All that only reads works."""
    restored = site.folder / "restored.img"
    site.command("restore", "vm@latest", restored, "--force")
    assert_same(restored.read_bytes(), DATA, "vm")
    for words in (("list",), ("show", "vm@latest"), ("verify",), ("stats",), ("metadata", "vm")):
        site.command(*words)


def writing_commands(site: Site) -> list[tuple[Word, ...]]:
    record, metadata = site.folder / "vm.msgpack", site.image(b"{}", "metadata.json")
    site.command("export", "vm@latest", record, "--force")
    return [
        ("backup", site.image(OTHER, "other.img")),
        ("delete", "vm@latest"),
        ("gc",),
        ("import", record),
        ("metadata", "vm", "--set", metadata),
        ("publish", "nothing"),
    ]


# -- read-only, and somebody else's ------------------------------------------------------------


def test_read_only_disk_is_read_and_every_write_is_refused_in_one_line(
    site: Site, disk: Disk
) -> None:
    words = writing_commands(site)
    disk.turn("ro")

    assert_readable(site)
    for command in words:
        refused(site.command(*command, check=False), "Read-only file system")
    refused(site.try_mount(), "Read-only file system")
    assert not site.is_mounted()
    site.mount("ro")
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    site.unmount()
    disk.turn("rw")

    site.mount()
    site.copy_in("other.img", OTHER)
    site.assert_verified()


IDENTITY = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all")


def python_of_nobody() -> list[str]:
    """A Python with our package that others may run, as words; empty where there is none."""
    packages = {str(Path(module.__file__ or "").parents[1]) for module in (backupfs, click)}
    for python in (sys.executable, "/usr/bin/python3"):
        words = ["env", f"PYTHONPATH={':'.join(packages)}", python]
        asked = [
            "setpriv",
            *IDENTITY,
            "--",
            *words,
            "-c",
            "import backupfs.cli.backups, lmdb, rich",
        ]
        if not subprocess.run(asked, capture_output=True, timeout=30, check=False).returncode:
            return words
    return []


def as_nobody(site: Site, python: list[str], name: str, *words: Word) -> Ended:
    return site.run(
        *("setpriv", *IDENTITY, "--", *python, "-m", "backupfs.cli.main", name, site.repo, *words),
        check=False,
        seconds=SECONDS_MAX,
    )


@pytest.fixture
def open_folders(tmp_path: Path) -> None:
    """pytest's folders are their owner's alone."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_repository_of_another_user_is_refused_or_read_as_its_rights_are(
    site: Site, open_folders: None
) -> None:
    python = python_of_nobody()
    if not python:
        pytest.skip("another user cannot run a Python with this package")
    words = writing_commands(site)
    cache = site.folder / "cache of nobody"
    cache.mkdir()
    cache.chmod(0o777)
    site.environment["XDG_CACHE_HOME"] = str(cache)

    for command in (("list",), ("verify",), ("stats",), *words):
        refused(as_nobody(site, python, *map(str, command)), "Permission denied")

    subprocess.run(["chmod", "-R", "a+rX", site.repo], check=True, timeout=30)
    for command in (("list",), ("verify",), ("stats",), ("show", "vm@latest")):
        ended = as_nobody(site, python, *command)
        assert ended.returncode == 0, ended.stderr
    for command in words:
        refused(as_nobody(site, python, *map(str, command)), "Permission denied")


# -- gone --------------------------------------------------------------------------------------


def test_disk_that_is_taken_away_ends_in_errors_and_comes_back(site: Site, disk: Disk) -> None:
    site.mount()
    source = site.image(OTHER, "other.img")
    with site.latest("vm").open("rb") as reading:
        disk.take_away()

        for words in (
            ("cp", source, site.staging / "other.img"),
            ("cmp", source, site.latest("vm")),
            ("unlink", site.volumes / "vm" / site.names("vm")[0]),
        ):
            ended = site.run(*words, check=False, seconds=SECONDS_MAX)
            assert ended.returncode and ended.stderr, words
        reading.seek(2 * MIB)
        try:
            found = reading.read(MIB)
        except OSError:
            pass
        else:
            assert found == DATA[2 * MIB :]
    for command in (("list",), ("backup", source), ("gc",), ("verify",)):
        refused(site.command(*command, check=False, seconds=SECONDS_MAX), "no backupfs repository")
    site.unmount()
    assert not site.is_mounted()


# -- full --------------------------------------------------------------------------------------


def test_command_that_fills_the_disk_leaves_room_for_the_next(site: Site, disk: Disk) -> None:
    big = site.image(content(2 * DISK_SIZE, 3), "big.img")

    refused(site.command("backup", big, check=False), "no space left")

    assert [item["volume"] for item in site.listed("list")] == ["vm"]
    site.command("gc")
    assert disk.free_size > DISK_SIZE - 8 * MIB
    assert_readable(site)
    disk.fill()
    refused(site.command("backup", site.image(OTHER, "other.img"), check=False), "no space left")
    assert_readable(site)
    site.command("delete", "vm@latest")
    site.command("gc")
    small = content(MIB, 4)
    site.command("backup", site.image(small, "vm.img"))
    site.command("restore", "vm@latest", site.folder / "restored.img", "--force")
    assert_same((site.folder / "restored.img").read_bytes(), small, "what fits now")


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5, 8, 12])
def test_disk_without_inodes_is_a_full_disk(
    tmp_path: Path, commands: CommandServer, left: int
) -> None:
    disk = Disk(tmp_path / "disk", inodes=120)
    try:
        with site_in(tmp_path / "site", commands, repo=disk.path / "repo") as site:
            site.may_log_errors = True
            site.init()
            site.mount()
            site.copy_in("vm.img", DATA)
            fillers = disk.path / "fillers"
            fillers.mkdir()
            for number in range(os.statvfs(disk.path).f_ffree - left):
                (fillers / str(number)).touch()

            ended = site.run("cp", site.image(OTHER), site.staging / "other.img", check=False)

            if ended.returncode == 0 and not site.names("other"):
                assert site.drafts()["other.img"]["state"] == "held"
            elif ended.returncode:
                assert "No space left" in ended.stderr
                assert site.names("other") == []
            assert_same(site.latest("vm").read_bytes(), DATA, "vm")
            site.assert_verified()
            shutil.rmtree(fillers)
            site.copy_in("other.img", OTHER)
            assert_same(site.latest("other").read_bytes(), OTHER, "other")
            site.command("gc")
            site.assert_verified()
    finally:
        disk.take_away()


# -- open files --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 10, 12, 14, 20])
def test_commands_with_few_open_files_work_or_say_so(site: Site, limit: int) -> None:
    limited = ("prlimit", f"--nofile={limit}", "--", BACKUPFS)
    source = site.image(OTHER, "other.img")
    for words in (
        ("backup", site.repo, source),
        ("verify", site.repo),
        ("gc", site.repo),
        ("restore", site.repo, "vm@latest", site.folder / "restored.img"),
    ):
        ended = site.run(*limited, *words, check=False, seconds=SECONDS_MAX)
        if ended.returncode:
            refused(ended, "Too many open files")
    assert not list(site.folder.glob(".backupfs-*"))
    site.assert_verified()
    assert_readable(site)
    (damaged,) = [line for line in site.command("verify").stdout.splitlines() if line]
    assert "no damage" in damaged


def open_files_limit(process_id: int) -> int:
    """How many open files a process may have."""
    limits = Path(f"/proc/{process_id}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    return int(line.split()[3])


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(1024, 8192, 4096), (256, 1024, 1024), (5000, 8192, 5000)]
)
def test_daemon_raises_its_limit_of_open_files_as_far_as_it_may_and_needs(
    site: Site, soft: int, hard: int, raised: int
) -> None:
    words = ("mount", site.repo, site.path, "-o", f"log_file={site.log_file}")

    site.run("prlimit", f"--nofile={soft}:{hard}", "--", BACKUPFS, *words)

    assert open_files_limit(site.daemon()) == raised
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")


@pytest.mark.parametrize("limit", [12, 17, 20, 24])
def test_daemon_with_few_open_files_works_or_says_so(site: Site, limit: int) -> None:
    words = ("mount", site.repo, site.path, "-o", f"log_file={site.log_file}")
    # The hard limit too: a daemon raises the other one as far as it may.
    ended = site.run("prlimit", f"--nofile={limit}", "--", BACKUPFS, *words, check=False)
    if ended.returncode:
        refused(ended, "Too many open files")
        assert not site.is_mounted()
        return
    copies = [
        site.start("cp", site.image(OTHER, f"s{n}"), site.staging / f"v{n}.img", stderr=-3)
        for n in range(8)
    ]
    done = [copy.wait(SECONDS_MAX) == 0 for copy in copies]
    site.run("ls", "-lR", site.volumes)
    assert open_files_limit(site.daemon()) == limit

    site.remount()

    for number, is_done in enumerate(done):
        if is_done:
            assert_same(site.latest(f"v{number}").read_bytes(), OTHER, number)
        else:
            assert site.names(f"v{number}") == []
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    site.assert_verified()
