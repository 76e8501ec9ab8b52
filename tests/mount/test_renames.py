"""Renaming what is staged: temporary names, heads, and volumes of other names."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest
from mounted import MIB, Mounted, assert_same, patched, random_bytes, run

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")


@pytest.mark.parametrize(
    "name",
    [
        ".web01.img.AbC123",
        "web01.img.part",
        "web01.img.filepart",
        "web01.img.tmp",
        ".goutputstream-XYZ123",
        "._web01.img",
        ".hidden",
        ".folder/web01.img",
        "folder.part/web01.img",
    ],
)
def test_temporary_name_publishes_when_it_is_renamed(mounted: Mounted, name: str) -> None:
    temporary = mounted.staging / name
    temporary.parent.mkdir(exist_ok=True)

    run("cp", mounted.image(IMAGE), temporary)
    draft = mounted.drafts()[name]
    assert (draft["state"], draft["volume"]) == ("held", None)
    assert "temporary" in draft["reason"]
    assert os.listdir(mounted.volumes) == [] and os.listdir(mounted.backups) == []

    temporary.rename(mounted.staging / "web01.img")
    mounted.assert_backups("web01", IMAGE)


@pytest.mark.parametrize("name", ["~$web01.img", "web01.img.bak", "web01.part.img", "part", "tmp"])
def test_names_that_only_look_like_temporary_ones_publish(mounted: Mounted, name: str) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / name)

    mounted.assert_backups(name.removesuffix(".img"), IMAGE)


def test_temporary_name_over_a_head_replaces_it(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    run("cp", mounted.image(CHANGED), mounted.staging / ".new")
    mounted.assert_kept("web01", IMAGE)

    run("mv", mounted.staging / ".new", target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert os.listdir(mounted.staging) == ["web01.img"]
    assert mounted.xattr(mounted.latest("web01"), "kind") == "incremental"
    mounted.remount()
    assert_same(target, CHANGED)
    mounted.assert_backups("web01", IMAGE, CHANGED)


def test_rename_while_the_file_is_open_publishes_at_its_release(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    with (mounted.staging / ".goutputstream-ABC123").open("xb", buffering=0) as file:
        file.write(CHANGED[:MIB])
        os.rename(file.name, target)
        assert len(mounted.names("web01")) == 1
        file.write(CHANGED[MIB:])
        assert len(mounted.names("web01")) == 1

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert_same(target, CHANGED)


def test_head_that_is_replaced_while_it_is_written_is_dropped(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    with target.open("rb+", buffering=0) as file:
        file.write(b"lost")
        run("cp", mounted.image(CHANGED), mounted.staging / ".new")
        run("mv", mounted.staging / ".new", target)
        file.write(b"lost too")

    mounted.assert_backups("web01", IMAGE, CHANGED)


def test_head_under_another_name_is_the_first_backup_of_another_volume(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    run("mv", mounted.staging / "web01.img", mounted.staging / "web02.img")

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", IMAGE)
    assert mounted.stored_bytes("web02") == 0
    assert os.listdir(mounted.staging) == ["web02.img"]


def test_head_in_another_folder_is_a_backup_of_the_volume_there(mounted: Mounted) -> None:
    (mounted.staging / "100").mkdir()
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    run("mv", mounted.staging / "web01.img", mounted.staging / "100")

    mounted.assert_backups("100/web01", IMAGE)
    mounted.assert_backups("web01", IMAGE)


def test_head_of_one_volume_over_that_of_another(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(CHANGED), mounted.staging / "web02.img")

    run("mv", "-f", mounted.staging / "web02.img", mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE, CHANGED)
    mounted.assert_backups("web02", CHANGED)


def test_head_is_put_aside_under_a_temporary_name_and_brought_back(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("mv", target, mounted.staging / ".aside")
    mounted.assert_kept("web01", IMAGE)
    run("mv", mounted.staging / ".aside", target)

    assert_same(mounted.latest("web01"), IMAGE)
    assert mounted.drafts() == {}


def test_rename_to_its_own_name_changes_nothing(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    target.rename(target)

    mounted.assert_backups("web01", IMAGE)


def test_rename_that_must_not_replace(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(CHANGED), mounted.staging / ".new")

    run("mv", "-n", mounted.staging / ".new", mounted.staging / "web01.img", check=False)

    mounted.assert_kept("web01", IMAGE)
    assert (mounted.staging / ".new").exists()


def test_exchanging_two_names_is_refused(mounted: Mounted) -> None:
    one, two = mounted.staging / "web01.img", mounted.staging / "web02.img"
    run("cp", mounted.image(IMAGE), one)
    run("cp", mounted.image(CHANGED), two)
    libc = ctypes.CDLL(None, use_errno=True)

    failed = libc.renameat2(-100, bytes(one), -100, bytes(two), 2)

    assert failed and ctypes.get_errno() == errno.EINVAL
    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", CHANGED)


def test_empty_folder_is_renamed_and_a_full_one_is_not(mounted: Mounted) -> None:
    """Renaming a full one would make backups of other volumes of all that is in it."""
    (mounted.staging / "one").mkdir()
    (mounted.staging / "one").rename(mounted.staging / "two")
    assert os.listdir(mounted.staging) == ["two"]
    run("cp", mounted.image(IMAGE), mounted.staging / "two" / "web01.img")

    with pytest.raises(OSError) as caught:
        (mounted.staging / "two").rename(mounted.staging / "three")

    assert caught.value.errno in (errno.EPERM, errno.EXDEV)
    run("mv", mounted.staging / "two", mounted.staging / "three", check=False)
    assert (mounted.staging / "two" / "web01.img").exists()


def test_sidefiles_that_finder_makes_are_no_backups(mounted: Mounted) -> None:
    for name in ("._web01.img", ".DS_Store"):
        run("cp", mounted.image(IMAGE), mounted.staging / name)

    assert os.listdir(mounted.volumes) == []
