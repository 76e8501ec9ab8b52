"""The options of a mount that say what is published when, and what may be changed at all."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import pytest
from mounted import MIB, Mounted, assert_same, becomes, patched, random_bytes, run, shell

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")
MountWith = Callable[[str], Mounted]


# -- ro ----------------------------------------------------------------------------------------


def test_read_only_mount_shows_backups_and_changes_nothing(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(CHANGED), mounted.staging / ".held")
    mounted.remount("ro")
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    record = next(mounted.backups.glob("*.msgpack"))

    assert sorted(os.listdir(mounted.path)) == [".backupfs", "README.txt", "backups", "volumes"]
    assert_same(mounted.latest("web01"), IMAGE)
    for act in (
        backup.unlink,
        record.unlink,
        lambda: backup.rename(backup.with_name("x")),
        lambda: record.write_bytes(record.read_bytes()),
        lambda: (mounted.backups / "x.msgpack").write_bytes(b"x"),
        lambda: (mounted.volumes / "web01" / "metadata.json").write_text("{}"),
        lambda: (mounted.volumes / "web01").rmdir(),
        lambda: backup.chmod(0o600),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == errno.EROFS
    assert mounted.status()["read_only"] is True

    mounted.remount()
    mounted.assert_kept("web01", IMAGE)
    assert_same(mounted.staging / ".held", CHANGED)


def test_read_only_mount_shows_new_backups(mounted: Mounted) -> None:
    mounted.remount("ro")
    source = mounted.image(IMAGE, "web01.img")

    mounted.command("backup", source)

    assert becomes(lambda: mounted.names("web01") != [], seconds=20)
    assert_same(mounted.latest("web01"), IMAGE)


# -- settle ------------------------------------------------------------------------------------


def test_settle_is_the_time_that_zeros_wait(mount_with: MountWith) -> None:
    mounted = mount_with("settle=2")
    started = time.monotonic()

    run("truncate", "-s", "1M", mounted.staging / "zeros.img")

    assert becomes(lambda: mounted.names("zeros") != [], seconds=30)
    assert time.monotonic() - started > 1.9
    run("cp", mounted.image(IMAGE), mounted.staging / "data.img")
    assert len(mounted.names("data")) == 1


def test_settle_of_nothing_publishes_zeros_at_once(mount_with: MountWith) -> None:
    mounted = mount_with("settle=0")

    run("truncate", "-s", "1M", mounted.staging / "zeros.img")

    assert becomes(lambda: mounted.names("zeros") != [], seconds=20)
    mounted.assert_backups("zeros", bytes(MIB))


def test_settling_draft_is_published_by_the_command(mount_with: MountWith) -> None:
    mounted = mount_with("settle=600")
    run("truncate", "-s", "1M", mounted.staging / "zeros.img")
    assert mounted.drafts()["zeros.img"]["state"] == "settling"

    mounted.command("publish", "zeros.img")

    mounted.assert_backups("zeros", bytes(MIB))


def test_settle_all_waits_for_quiet_between_closes(mount_with: MountWith) -> None:
    """As servers of NFS and SMB write: open, write a piece, close, and again."""
    mounted = mount_with("settle=6,settle_all")
    target = mounted.staging / "web01.img"
    source = mounted.image(IMAGE)

    for part in range(4):
        place = [f"skip={part}", f"seek={part}", "count=1", "bs=512k", "conv=notrunc"]
        run("dd", f"if={source}", f"of={target}", *place)
        assert mounted.drafts()["web01.img"]["state"] == "settling"
    assert mounted.names("web01") == []

    assert becomes(lambda: mounted.names("web01") != [], seconds=30)
    mounted.assert_backups("web01", IMAGE)


def test_settling_draft_outlives_the_mount(mount_with: MountWith) -> None:
    mounted = mount_with("settle=600,settle_all")
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    assert mounted.names("web01") == []

    mounted.remount()

    mounted.assert_backups("web01", IMAGE)


def test_killed_copy_does_not_settle(mount_with: MountWith) -> None:
    mounted = mount_with("settle=0.3,settle_all")

    shell(
        '(head -c 500000 "$1"; kill -9 $BASHPID) > "$2" || true',
        mounted.image(IMAGE),
        mounted.staging / "web01.img",
    )

    time.sleep(1)
    mounted.assert_held("web01.img", "web01")


# -- publish=rename ----------------------------------------------------------------------------


def test_with_publish_rename_only_a_rename_publishes(mount_with: MountWith) -> None:
    mounted = mount_with("publish=rename")
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    draft = mounted.assert_held("web01.img", "web01")
    assert "rename" in draft["reason"]

    run("cp", mounted.image(CHANGED), mounted.staging / ".web01.new")
    run("mv", mounted.staging / ".web01.new", mounted.staging / "web01.img")

    mounted.assert_backups("web01", CHANGED)


def test_with_publish_rename_the_command_publishes_too(mount_with: MountWith) -> None:
    mounted = mount_with("publish=rename")
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.command("publish", "web01.img")
    run("dd", "if=/dev/zero", f"of={mounted.staging}/web01.img", "count=1", "conv=notrunc")

    mounted.assert_held("web01.img", "web01", IMAGE)
    mounted.remount()  # what is held stays held, whatever the options are now
    mounted.assert_held("web01.img", "web01", IMAGE)
    mounted.command("publish", "web01.img")
    mounted.assert_backups("web01", IMAGE, bytes(512) + IMAGE[512:])


def test_with_publish_rename_a_held_copy_stays_held_after_a_remount(mount_with: MountWith) -> None:
    mounted = mount_with("publish=rename")
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.remount("publish=rename")

    mounted.assert_held("web01.img", "web01")


# -- what fstab may hold -----------------------------------------------------------------------


def test_words_of_fstab_are_taken(mount_with: MountWith) -> None:
    mounted = mount_with("rw,nosuid,nodev,noatime,nofail,_netdev,x-systemd.automount,user,exec")

    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)


@pytest.mark.parametrize(
    "options", ["umask=9", "uid=root", "settle=-1", "settle=nan", "publish=never", "compress"]
)
def test_wrong_options_mount_nothing(mounted: Mounted, options: str) -> None:
    mounted.unmount()

    with pytest.raises(AssertionError, match=options.partition("=")[0]):
        mounted.mount(options)

    assert not os.path.ismount(mounted.path)
