"""File systems of real disks: made, backed up, and mounted out of their backups."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, needs, random_bytes, run

pytestmark = pytest.mark.tools


@dataclass(frozen=True)
class Kind:
    """One kind of file system."""

    name: str
    make: tuple[str, ...]
    check: tuple[str, ...]  # reads only; fails where something is wrong
    mount_options: str  # to mount what is read-only
    size: int


EXT4 = Kind("ext4", ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn"), "ro,noload", 32 * MIB)
XFS = Kind("xfs", ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n", "-f"), "ro,norecovery", 320 * MIB)
BTRFS = Kind("btrfs", ("mkfs.btrfs", "-q", "-f"), ("btrfs", "check"), "ro", 120 * MIB)
KINDS = [
    pytest.param(kind, marks=needs(kind.make[0], kind.check[0]), id=kind.name)
    for kind in (EXT4, XFS, BTRFS)
]


def why_no_loop() -> str:
    """Why files cannot be mounted here; empty where they can."""
    if os.geteuid() != 0:
        return "only root mounts file systems"
    if shutil.which("losetup") is None:
        return "losetup is not installed"
    found = subprocess.run(["losetup", "-f"], capture_output=True, timeout=30, check=False)
    if found.returncode:
        return "there are no loop devices"
    return ""


NO_LOOP = why_no_loop()
needs_loop = pytest.mark.skipif(bool(NO_LOOP), reason=NO_LOOP or "there are loop devices")


def needs_kernel(kind: Kind) -> None:
    """Skip where the kernel has no such file system."""
    run("modprobe", "-q", kind.name, check=False) if shutil.which("modprobe") else None
    known = Path("/proc/filesystems").read_text().split()
    if kind.name not in known:
        pytest.skip(f"the kernel knows no {kind.name}")


@contextmanager
def loop_mounted(image: Path, place: Path, options: str) -> Iterator[Path]:
    """A file mounted as a file system; its loop device goes away with it."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,{options}", image, place)
    try:
        yield place
    finally:
        if run("umount", place, check=False).returncode:
            run("umount", "-l", place, check=False)


def filled(folder: Path) -> dict[str, bytes]:
    """Files for a file system: small, large, sparse."""
    contents = {f"file {number}": random_bytes(1000 + number * 997, number) for number in range(60)}
    contents["large"] = random_bytes(5 * MIB, 99)
    contents["zeros"] = bytes(2 * MIB)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def made(kind: Kind, mounted: Mounted) -> tuple[Path, dict[str, bytes]]:
    """An image of a file system with files, made while it was mounted."""
    image = mounted.folder / f"{kind.name}.img"
    with image.open("wb") as file:
        file.truncate(kind.size)
    run(*kind.make, image)
    with loop_mounted(image, mounted.folder / "making", "rw") as place:
        contents = filled(place / "files")
    return image, contents


def assert_files(folder: Path, contents: dict[str, bytes]) -> None:
    assert sorted(os.listdir(folder)) == sorted(contents)
    for name, content in contents.items():
        assert_same(folder / name, content)


@needs_loop
@pytest.mark.parametrize("kind", KINDS)
def test_file_system_of_a_backup_is_whole_and_readable(mounted: Mounted, kind: Kind) -> None:
    needs_kernel(kind)
    image, contents = made(kind, mounted)

    run("cp", image, mounted.staging)

    backup = mounted.volumes / kind.name / mounted.names(kind.name)[0]
    run(*kind.check, backup)
    with loop_mounted(backup, mounted.folder / "looking", kind.mount_options) as place:
        assert_files(place / "files", contents)
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").write_bytes(b"x")
    run(*kind.check, backup)
    run("cmp", image, backup)
    assert backup.stat().st_blocks <= image.stat().st_blocks + kind.size // 512 // 10


@needs_loop
@needs("mkfs.ext4", "e2fsck", "rsync")
def test_next_backup_of_a_changed_file_system_is_small(mounted: Mounted) -> None:
    needs_kernel(EXT4)
    image, contents = made(EXT4, mounted)
    run("cp", image, mounted.staging)
    with loop_mounted(image, mounted.folder / "making", "rw") as place:
        (place / "files" / "new").write_bytes(b"new")

    head = mounted.staging / "ext4.img"
    run("rsync", "-It", "--inplace", "--no-whole-file", image, head)

    first, second = (mounted.volumes / "ext4" / name for name in mounted.names("ext4"))
    assert mounted.stored_bytes("ext4") < MIB
    for backup, wanted in ((first, contents), (second, {**contents, "new": b"new"})):
        run("e2fsck", "-fn", backup)
        with loop_mounted(backup, mounted.folder / "looking", "ro,noload") as place:
            assert_files(place / "files", wanted)


@needs_loop
@needs("mkfs.ext4", "e2fsck")
def test_head_that_is_mounted_writable_is_the_next_backup_when_unmounted(mounted: Mounted) -> None:
    """A loop device is a program that writes into a file here and there for a long time."""
    needs_kernel(EXT4)
    image, contents = made(EXT4, mounted)
    run("cp", image, mounted.staging)
    with loop_mounted(mounted.staging / "ext4.img", mounted.folder / "looking", "rw") as place:
        (place / "files" / "new").write_bytes(b"new" * 100_000)
        os.sync()
        assert len(mounted.names("ext4")) == 1
    shutil.which("udevadm") and run("udevadm", "settle", check=False)

    second = mounted.volumes / "ext4" / mounted.names("ext4")[-1]
    assert len(mounted.names("ext4")) == 2
    run("e2fsck", "-fn", second)
    with loop_mounted(second, mounted.folder / "looking", "ro,noload") as place:
        assert_files(place / "files", {**contents, "new": b"new" * 100_000})


@needs_loop
@needs("mkfs.ext4")
def test_backup_that_is_loop_mounted_outlives_its_deletion(mounted: Mounted) -> None:
    needs_kernel(EXT4)
    image, contents = made(EXT4, mounted)
    run("cp", image, mounted.staging)
    run("rm", mounted.staging / "ext4.img")
    backup = mounted.volumes / "ext4" / mounted.names("ext4")[0]
    with loop_mounted(backup, mounted.folder / "looking", "ro,noload") as place:
        backup.unlink()
        mounted.command("gc")
        Path("/proc/sys/vm/drop_caches").write_text("3")

        assert_files(place / "files", contents)


@needs("mkfs.ext4", "e2fsck", "debugfs")
def test_file_system_is_checked_and_listed_without_a_loop_device(mounted: Mounted) -> None:
    folder = mounted.folder / "files"
    filled(folder)
    image = mounted.folder / "ext4.img"
    run("mkfs.ext4", "-q", "-F", "-d", folder, image, "24M")

    run("cp", image, mounted.staging)

    run("e2fsck", "-fn", mounted.latest("ext4"))
    listed = run("debugfs", "-R", "ls -p /", mounted.latest("ext4")).stdout
    assert b"/large/" in listed
