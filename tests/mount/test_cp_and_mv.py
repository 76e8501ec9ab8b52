"""cp, mv, install and tar: the programs with which people copy images."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
from mounted import MIB, Mounted, patched, random_bytes, run

IMAGE = random_bytes(8 * MIB + 777)
HOLED = random_bytes(MIB + 100) + bytes(5 * MIB) + random_bytes(MIB, 2) + bytes(MIB)


@pytest.fixture
def holed(mounted: Mounted) -> Path:
    """``HOLED`` as a file with holes."""
    path = mounted.folder / "holed.img"
    with path.open("wb") as file:
        file.write(HOLED[: MIB + 100])
        file.seek(6 * MIB + 100)
        file.write(HOLED[6 * MIB + 100 : 7 * MIB + 100])
        file.truncate(len(HOLED))
    return path


def test_cp_makes_a_backup_that_is_there_when_it_returns(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE, "web01.img"), mounted.staging)

    mounted.assert_backups("web01", IMAGE)
    assert (mounted.staging / "web01.img").read_bytes() == IMAGE


def test_every_copy_of_many_is_seen_by_the_first_look(mounted: Mounted) -> None:
    source = mounted.image(IMAGE[:MIB])

    for count in range(1, 21):
        run("cp", source, mounted.staging / "web01.img")
        assert len(mounted.names("web01")) == count
        assert len(list(mounted.backups.glob("*.img"))) == count


def test_cp_over_a_head_makes_the_next_backup_of_what_changed(mounted: Mounted) -> None:
    changed = patched(IMAGE, 3 * MIB + 5, random_bytes(1000, 9))
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    run("cp", mounted.image(changed), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE, changed)
    assert mounted.xattr(mounted.latest("web01"), "kind") == "incremental"
    assert mounted.stored_bytes("web01") < MIB // 4


def test_cp_of_a_larger_image_over_a_head_is_a_full_backup(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    run("cp", mounted.image(IMAGE + bytes(MIB) + b"end"), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE, IMAGE + bytes(MIB) + b"end")
    assert mounted.xattr(mounted.latest("web01"), "kind") == "full"


@pytest.mark.parametrize("how", ["auto", "always", "never"])
def test_cp_of_an_image_with_holes_stores_no_holes(mounted: Mounted, holed: Path, how: str) -> None:
    target = mounted.staging / "web01.img"

    run("cp", f"--sparse={how}", holed, target)
    run("cp", f"--sparse={how}", holed, target)

    mounted.assert_backups("web01", HOLED, HOLED)
    # The chunks that the data touch, and no others.
    assert mounted.latest("web01").stat().st_blocks * 512 <= 2 * MIB + 3 * (64 << 10)


def test_cp_of_data_over_holes_and_holes_over_data(mounted: Mounted, holed: Path) -> None:
    dense = random_bytes(len(HOLED), 3)
    target = mounted.staging / "web01.img"

    run("cp", holed, target)
    run("cp", mounted.image(dense, "dense.img"), target)
    run("cp", "--sparse=always", holed, target)

    mounted.assert_backups("web01", HOLED, dense, HOLED)


def test_cp_p_keeps_mode_and_time(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)
    source.chmod(0o640)
    os.utime(source, ns=(1_500_000_000_123_456_789, 1_500_000_000_123_456_789))

    run("cp", "-p", source, mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)
    head = (mounted.staging / "web01.img").stat()
    assert (head.st_mode & 0o7777, head.st_mtime_ns) == (0o640, 1_500_000_000_123_456_789)
    shown = mounted.listed("show", "web01@latest")
    assert shown["source_mode"] == "0640"


def test_cp_a_of_a_folder_backs_up_every_image_in_it(mounted: Mounted) -> None:
    folder = mounted.folder / "100"
    (folder / "more").mkdir(parents=True)
    (folder / "disk-0.raw").write_bytes(IMAGE)
    (folder / "more" / "disk-1.img").write_bytes(IMAGE[:MIB])

    run("cp", "-a", folder, mounted.staging)

    mounted.assert_backups("100/disk-0", IMAGE)
    mounted.assert_backups("100/more/disk-1", IMAGE[:MIB])


def test_mv_from_elsewhere_leaves_a_backup_and_no_source(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)
    source.chmod(0o600)

    run("mv", source, mounted.staging / "web01.img")

    assert not source.exists()
    mounted.assert_backups("web01", IMAGE)


def test_mv_over_a_head_makes_the_next_backup(mounted: Mounted) -> None:
    changed = patched(IMAGE, 0, b"other")
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    run("mv", "-f", mounted.image(changed, "web01.img"), mounted.staging)

    mounted.assert_backups("web01", IMAGE, changed)
    assert mounted.xattr(mounted.latest("web01"), "kind") == "incremental"
    assert mounted.stored_bytes("web01") < MIB // 4


def test_image_is_kept_when_the_daemon_is_killed_right_after_mv(mounted: Mounted) -> None:
    """mv has unlinked its source when it returns: from then on the only copy is ours."""
    source = mounted.image(IMAGE)
    run("mv", source, mounted.staging / "web01.img")

    mounted.kill_daemon()
    run("umount", "-l", mounted.path)
    mounted.mount()

    assert not source.exists()
    mounted.assert_backups("web01", IMAGE)


def test_install_sets_mode_and_times_after_closing(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)
    os.utime(source, (1_400_000_000, 1_400_000_000))

    run("install", "-p", "-m", "0600", source, mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)
    head = (mounted.staging / "web01.img").stat()
    assert (head.st_mode & 0o7777, int(head.st_mtime)) == (0o600, 1_400_000_000)


@pytest.mark.parametrize("sparse", [False, True])
def test_tar_extracts_images_as_backups(mounted: Mounted, holed: Path, sparse: bool) -> None:
    plain = mounted.image(IMAGE, "web01.img")
    shutil.move(holed, mounted.folder / "web02.img")
    archive = mounted.folder / "images.tar"
    words = ["-S"] if sparse else []
    run("tar", *words, "-C", mounted.folder, "-cf", archive, plain.name, "web02.img")

    run("tar", "-C", mounted.staging, "-xpf", archive)

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", HOLED)
    with tarfile.open(archive) as listed:
        wanted = int(listed.getmember("web01.img").mtime)
    assert int((mounted.staging / "web01.img").stat().st_mtime) == wanted


def test_failing_copy_that_ends_short_of_the_latest_backup_is_held(mounted: Mounted) -> None:
    """cp closes as usual when its source fails: only the size can tell."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    short = mounted.image(IMAGE[: 3 * MIB], "short.img")

    run("cp", short, mounted.staging / "web01.img")

    draft = mounted.assert_held("web01.img", "web01", IMAGE)
    assert "smaller" in draft["reason"]
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    mounted.assert_backups("web01", IMAGE, IMAGE)


@pytest.mark.parametrize(
    "moment", ["@-1", "1950-01-01Z", "2250-01-01Z", "@99999999999", "2500-01-01Z"]
)
def test_images_of_odd_times_are_backups(mounted: Mounted, moment: str) -> None:
    """Times that cannot be kept become the nearest that can."""
    source = mounted.image(IMAGE[:MIB])
    run("touch", "-d", moment, source)
    seconds = int(source.stat().st_mtime)

    run("cp", "-p", source, mounted.staging / "web01.img")
    run("touch", "-d", moment, mounted.staging / "web01.img")
    mounted.remount()

    mounted.assert_backups("web01", IMAGE[:MIB])
    shown = int((mounted.staging / "web01.img").stat().st_mtime)
    assert shown == min(seconds, (1 << 63) // 10**9)


def test_backup_is_copied_within_the_mount(mounted: Mounted) -> None:
    """How one goes back to an earlier backup: nothing is stored for it."""
    changed = patched(IMAGE, 0, b"changed")
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    run("cp", mounted.image(changed), target)

    run("cp", mounted.volumes / "web01" / mounted.names("web01")[0], target)
    run("cp", target, mounted.staging / "web02.img")

    mounted.assert_backups("web01", IMAGE, changed, IMAGE)
    mounted.assert_backups("web02", IMAGE)
    assert mounted.stored_bytes("web01") == mounted.stored_bytes("web02") == 0
