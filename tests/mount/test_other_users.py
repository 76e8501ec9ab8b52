"""Another user than the one who mounted: who may read, who may write, whose the files are."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import MIB, Ended, Mounted, Word, mounts_below, needs, random_bytes, run

import backupfs

pyfuse3 = pytest.importorskip("pyfuse3")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else"),
    needs("setpriv"),
]

IMAGE = random_bytes(MIB)
NOBODY = 65534
OTHER = 4321


def as_user(number: int, *words: Word, check: bool = False) -> Ended:
    """Run a program as another user, with no rights and no groups of ours."""
    identity = [f"--reuid={number}", f"--regid={number}", "--clear-groups", "--inh-caps=-all"]
    return run("setpriv", *identity, "--", *words, check=check)


def denied(ended: Ended) -> bool:
    return ended.returncode != 0 and b"ermission denied" in ended.stderr


@pytest.fixture
def source(work: Path) -> Path:
    """An image that everybody may read."""
    path = work / "public.img"
    path.write_bytes(IMAGE)
    path.chmod(0o644)
    return path


def test_without_allow_other_nobody_else_sees_the_mount(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    assert denied(as_user(NOBODY, "ls", mounted.path))
    assert denied(as_user(NOBODY, "cat", mounted.latest("web01")))


def test_with_allow_other_everybody_reads_and_only_the_owner_changes(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with("allow_other")
    run("cp", source, mounted.staging / "web01.img")
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    record = next(mounted.backups.glob("*.msgpack"))

    assert as_user(NOBODY, "cat", mounted.latest("web01"), check=True).stdout == IMAGE
    assert as_user(NOBODY, "cat", record, check=True).stdout
    for words in (
        ["rm", "-f", backup],
        ["rm", "-f", record.with_suffix(".img")],
        ["rm", "-f", mounted.staging / "web01.img"],
        ["rmdir", mounted.volumes / "web01"],
        ["cp", source, mounted.staging / "web02.img"],
        ["cp", source, mounted.staging / "web01.img"],
        ["cp", source, mounted.backups / "x.msgpack"],
        ["mkdir", mounted.staging / "folder"],
        ["mv", mounted.staging / "web01.img", mounted.staging / "web02.img"],
        ["sh", "-c", f'echo "{{}}" > {mounted.volumes}/web01/metadata.json'],
    ):
        assert denied(as_user(NOBODY, *words)), words
    mounted.assert_backups("web01", IMAGE)


def test_umask_takes_rights_away_from_backups_and_folders(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with("allow_other,umask=027")

    run("cp", source, mounted.staging / "web01.img")

    assert mounted.latest("web01").stat().st_mode & 0o7777 == 0o440
    assert mounted.volumes.stat().st_mode & 0o7777 == 0o750
    assert denied(as_user(NOBODY, "ls", mounted.volumes))
    assert denied(as_user(NOBODY, "cat", mounted.latest("web01")))


def test_open_umask_lets_everybody_stage_and_own_it(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with("allow_other,umask=000")
    target = mounted.staging / "web01.img"

    as_user(NOBODY, "cp", source, target, check=True)

    mounted.assert_backups("web01", IMAGE)
    head = target.stat()
    assert (head.st_uid, head.st_gid) == (NOBODY, NOBODY)
    assert denied(as_user(OTHER, "cp", source, target))
    as_user(NOBODY, "dd", "if=/dev/zero", f"of={target}", "bs=5", "count=1", "conv=notrunc")
    mounted.assert_backups("web01", IMAGE, bytes(5) + IMAGE[5:])
    mounted.remount("allow_other,umask=000")
    assert target.stat().st_uid == NOBODY


def test_private_head_is_read_by_its_owner_only(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with("allow_other,umask=000")
    target = mounted.staging / "web01.img"
    as_user(NOBODY, "install", "-m", "600", source, target, check=True)

    assert denied(as_user(OTHER, "cat", target))
    assert denied(as_user(OTHER, "chmod", "666", target)) or (
        target.stat().st_mode & 0o7777 == 0o600
    )
    assert as_user(NOBODY, "cat", target, check=True).stdout == IMAGE


def test_uid_and_gid_give_everything_to_one_user(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with(f"allow_other,uid={NOBODY},gid={NOBODY},umask=077")

    as_user(NOBODY, "cp", "-p", source, mounted.staging / "web01.img", check=True)

    backup = mounted.latest("web01")
    for path in (mounted.path, mounted.staging, backup, mounted.staging / "web01.img"):
        assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
    assert backup.stat().st_mode & 0o7777 == 0o400
    assert as_user(NOBODY, "cat", backup, check=True).stdout == IMAGE
    assert denied(as_user(OTHER, "ls", mounted.path))
    as_user(NOBODY, "rm", "-rf", mounted.volumes / "web01", check=True)
    assert mounted.names("web01") == []


def test_backup_cannot_be_changed_by_its_owner_or_by_others(
    mount_with: Callable[[str], Mounted], source: Path
) -> None:
    mounted = mount_with(f"allow_other,uid={NOBODY},gid={NOBODY},umask=000")
    as_user(NOBODY, "cp", source, mounted.staging / "web01.img", check=True)
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]

    for user in (NOBODY, OTHER):
        for words in (
            ["truncate", "-s", "0", backup],
            ["dd", "if=/dev/zero", f"of={backup}", "count=1", "conv=notrunc"],
            ["chmod", "644", backup],
            ["touch", "-d", "2020-01-01", backup],
            ["ln", backup, mounted.staging / "link.img"],
            ["mv", "-n", backup, mounted.volumes / "web01" / "other.img"],
        ):
            assert as_user(user, *words).returncode != 0, (user, words)
    mounted.assert_backups("web01", IMAGE)


def python_for(number: int) -> list[str]:
    """A Python with our package that the user may run, as words; empty where there is none."""
    packages = [Path(backupfs.__file__).parents[1], Path(pyfuse3.__file__).parents[1]]
    for python in (sys.executable, "/usr/bin/python3"):
        words = ["env", f"PYTHONPATH={':'.join(map(str, packages))}", python]
        script = f"{shlex.join(words)} -c 'import backupfs.daemon'"
        if as_user(number, "bash", "-c", script).returncode == 0:
            return words
    return []


@needs("fusermount3")
def test_ordinary_user_mounts_a_repository_of_his_own(work: Path, source: Path) -> None:
    words = python_for(NOBODY)
    if not words:
        pytest.skip("another user cannot run a Python with this package")
    if not os.stat("/dev/fuse").st_mode & 0o002:
        pytest.skip("/dev/fuse is for root alone here")
    home = work / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    script = """
        cd "$1"; image=$2; shift 2
        export HOME=$PWD XDG_CACHE_HOME=$PWD/cache
        mkdir mnt
        "$@" -m backupfs.cli.main init repo
        "$@" -m backupfs.cli.main mount repo mnt -o "log_file=$PWD/log"
        trap 'fusermount3 -uq mnt || true' EXIT
        cp "$image" mnt/staging/web01.img
        cmp "$image" mnt/volumes/web01/latest.img
        stat -c %u mnt/staging/web01.img mnt/volumes/web01/latest.img
        "$@" -m backupfs.cli.main unmount mnt
        "$@" -m backupfs.cli.main verify repo
    """

    ended = as_user(NOBODY, "bash", "-euc", script, "bash", home, source, *words)

    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.count(f"{NOBODY}\n".encode()) == 2
    assert not mounts_below(work)
