"""rsync in its four ways of writing a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mounted import MIB, Mounted, needs, patched, random_bytes, run

pytestmark = [pytest.mark.tools, needs("rsync")]

IMAGE = random_bytes(8 * MIB + 123)
CHANGED = patched(IMAGE, 5 * MIB + 3, random_bytes(MIB // 2, 5))


def made_older(path: Path, seconds: int) -> Path:
    """rsync takes files of one size and time for equal; these are not."""
    os.utime(path, (1_600_000_000 + seconds, 1_600_000_000 + seconds))
    return path


def test_rsync_publishes_when_it_renames_its_temporary_file(mounted: Mounted) -> None:
    run("rsync", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)
    assert os.listdir(mounted.staging) == ["web01.img"]
    assert os.listdir(mounted.volumes) == ["web01"]


def test_rsync_over_a_head_makes_the_next_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("rsync", "-t", made_older(mounted.image(IMAGE), 0), target)

    run("rsync", "-t", made_older(mounted.image(CHANGED), 1), target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert mounted.stored_bytes("web01") < MIB


@pytest.mark.parametrize("words", [["-t"], ["-a"], ["-t", "--inplace", "--no-whole-file"]])
def test_rsync_of_an_unchanged_image_makes_no_backup(mounted: Mounted, words: list[str]) -> None:
    source = made_older(mounted.image(IMAGE), 0)
    target = mounted.staging / "web01.img"

    run("rsync", *words, source, target)
    run("rsync", *words, source, target)
    mounted.remount()
    run("rsync", *words, source, target)

    mounted.assert_backups("web01", IMAGE)


def test_rsync_that_compares_contents_makes_no_backup_of_an_unchanged_image(
    mounted: Mounted,
) -> None:
    """Neither by checksum nor in place: there rsync writes nothing at all."""
    source = mounted.image(IMAGE)
    target = mounted.staging / "web01.img"
    run("cp", source, target)

    run("rsync", "--checksum", source, target)
    run("rsync", "--inplace", "--no-whole-file", "--ignore-times", source, target)

    mounted.assert_backups("web01", IMAGE)


def test_rsync_in_place_stores_only_what_changed(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    source = mounted.image(CHANGED)
    run("rsync", "-It", "--inplace", "--no-whole-file", source, target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert 0 < mounted.stored_bytes("web01") < MIB // 2 + 4 * (64 << 10)
    assert mounted.xattr(mounted.latest("web01"), "kind") == "incremental"


def test_first_rsync_in_place_is_a_backup(mounted: Mounted) -> None:
    run("rsync", "-t", "--inplace", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)


def test_rsync_in_place_of_a_smaller_image_is_held(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("rsync", "--inplace", "--no-whole-file", mounted.image(IMAGE[:MIB]), target)

    mounted.assert_held("web01.img", "web01", IMAGE)
    mounted.command("publish", "web01.img")
    mounted.assert_backups("web01", IMAGE, IMAGE[:MIB])


def test_rsync_that_appends_to_a_head_makes_the_next_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE[: 3 * MIB]), target)

    run("rsync", "--append", mounted.image(IMAGE), target)

    mounted.assert_backups("web01", IMAGE[: 3 * MIB], IMAGE)


@pytest.mark.parametrize("is_in_staging", [True, False], ids=["there", "elsewhere"])
def test_rsync_with_a_folder_for_its_temporary_files(mounted: Mounted, is_in_staging: bool) -> None:
    """From another file system it cannot rename: it copies, and does not set the size then."""
    temporary = (mounted.staging if is_in_staging else mounted.folder) / ".tmp"
    temporary.mkdir()
    target = mounted.staging / "web01.img"
    words = ("rsync", "-t", f"--temp-dir={temporary}")

    run(*words, made_older(mounted.image(IMAGE), 0), target)
    run(*words, made_older(mounted.image(CHANGED), 1), target)

    mounted.assert_backups("web01", IMAGE, CHANGED)


def test_rsync_in_place_that_keeps_the_replaced_image(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("rsync", "-b", "-I", "--inplace", mounted.image(CHANGED), target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    mounted.assert_backups("web01.img~", IMAGE)


@pytest.mark.parametrize("words", [["-S"], ["-S", "--inplace"], ["-S", "--preallocate"]])
def test_sparse_rsync_writes_odd_pieces_and_holes(mounted: Mounted, words: list[str]) -> None:
    content = IMAGE[: MIB + 9] + bytes(3 * MIB + 77) + IMAGE[MIB:] + bytes(2 * MIB)
    changed = patched(content, 9, bytes(MIB))
    target = mounted.staging / "web01.img"

    run("rsync", *words, "-t", made_older(mounted.image(content), 0), target)
    run("rsync", *words, "-t", made_older(mounted.image(changed), 1), target)

    mounted.assert_backups("web01", content, changed)
    assert mounted.latest("web01").stat().st_blocks * 512 < len(content) - 4 * MIB


def test_rsync_a_of_a_folder_backs_up_all_of_it_without_a_complaint(mounted: Mounted) -> None:
    folder = mounted.folder / "images"
    (folder / "sub folder").mkdir(parents=True)
    made_older(mounted.image(IMAGE, "images/web01.img"), 0).chmod(0o640)
    made_older(mounted.image(CHANGED, "images/sub folder/disk-0.raw"), 0)

    run("rsync", "-aHAX", f"{folder}/", mounted.staging)
    again = run("rsync", "-aHAX", "--itemize-changes", f"{folder}/", mounted.staging)

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("sub folder/disk-0", CHANGED)
    assert b">f" not in again.stdout
    assert (mounted.staging / "web01.img").stat().st_mode & 0o7777 == 0o640


def test_rsync_with_a_partial_folder_and_delayed_updates(mounted: Mounted) -> None:
    """Its folders begin with a dot: nothing in them is ever a backup."""
    folder = mounted.folder / "images"
    folder.mkdir()
    mounted.image(IMAGE, "images/web01.img")
    mounted.image(CHANGED, "images/web02.img")

    run("rsync", "-a", "--delay-updates", "--partial", f"{folder}/", mounted.staging)

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", CHANGED)
    assert sorted(os.listdir(mounted.volumes)) == ["web01", "web02"]
    assert sorted(os.listdir(mounted.staging)) == ["web01.img", "web02.img"]


def test_rsync_copies_a_backup_out_with_its_holes(mounted: Mounted) -> None:
    content = IMAGE[:MIB] + bytes(4 * MIB) + IMAGE[MIB : 2 * MIB]
    run("cp", mounted.image(content), mounted.staging / "web01.img")

    run("rsync", "-SL", mounted.latest("web01"), mounted.folder / "out.img")

    out = mounted.folder / "out.img"
    assert out.read_bytes() == content
    assert out.stat().st_blocks * 512 < 3 * MIB
