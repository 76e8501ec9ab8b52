"""What the mount refuses: every change to a backup, and every file that has no place in the tree."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, random_bytes, run

IMAGE = random_bytes(MIB)
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@pytest.fixture
def by_time(mounted: Mounted) -> Iterator[Path]:
    """A backup, which is the same after the test."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    path = mounted.volumes / "web01" / mounted.names("web01")[0]
    before = path.stat()
    yield path
    assert (path.stat().st_ino, path.stat()[3:]) == (before.st_ino, before[3:])
    mounted.assert_backups("web01", IMAGE)


def errno_of(act: Callable[[], object]) -> int:
    """How ``act`` fails."""
    with pytest.raises(OSError) as caught:
        act()
    assert caught.value.errno is not None
    return caught.value.errno


def staging_beside(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == "mnt") / "staging"


def open_with(path: Path, flags: int) -> None:
    os.close(os.open(path, flags, 0o644))


CHANGES: dict[str, Callable[[Path], object]] = {
    "open to write": lambda path: open_with(path, os.O_WRONLY),
    "open to read and write": lambda path: open_with(path, os.O_RDWR),
    "open to append": lambda path: open_with(path, os.O_WRONLY | os.O_APPEND),
    "open and empty": lambda path: open_with(path, os.O_WRONLY | os.O_TRUNC),
    "open to read and empty": lambda path: open_with(path, os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 10),
    "enlarge": lambda path: os.truncate(path, 10 * MIB),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "utime": lambda path: os.utime(path, (1, 1)),
    "rename": lambda path: path.rename(path.with_name("other.img")),
    "rename to staging": lambda path: path.rename(staging_beside(path) / "other.img"),
    "rename a head over it": lambda path: (staging_beside(path) / "web01.img").rename(path),
    "link": lambda path: path.with_name("other.img").hardlink_to(path),
    "setxattr": lambda path: os.setxattr(path, "user.backupfs.id", b"other"),
    "removexattr": lambda path: os.removexattr(path, "user.backupfs.id"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_backup_cannot_be_changed_by_root(by_time: Path, mounted: Mounted, name: str) -> None:
    by_id = next(mounted.backups.glob("*.img"))
    for path in (by_time, by_id, by_time.with_name("latest.img").resolve()):
        assert errno_of(lambda path=path: CHANGES[name](path)) in {*DENIED, errno.ENOTSUP}


def test_backup_cannot_be_mapped_for_writing(by_time: Path) -> None:
    with by_time.open("rb") as file:
        assert errno_of(lambda: mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED)) in DENIED
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == IMAGE


def test_backup_cannot_be_copied_over(by_time: Path, mounted: Mounted) -> None:
    """With cp -f, mv or install it is removed first, and that is allowed."""
    other = mounted.image(IMAGE[:5], "other")

    for words in (
        ["cp"],
        ["cp", "-p"],
        ["rsync"],
        ["tee"],
        ["dd", "conv=notrunc", f"of={by_time}"],
    ):
        assert run(*words, other, by_time, check=False).returncode != 0


@pytest.mark.parametrize(
    "place", [".", "volumes", "volumes/web01", "volumes/new", "backups", ".backupfs"]
)
def test_files_and_folders_are_made_in_staging_only(
    by_time: Path, mounted: Mounted, place: str
) -> None:
    folder = mounted.path / place
    wanted = {errno.ENOENT} if place == "volumes/new" else DENIED

    for act in (
        lambda: open_with(folder / "new.img", os.O_WRONLY | os.O_CREAT),
        lambda: (folder / "new").mkdir(),
        lambda: (folder / "new").symlink_to("x"),
        lambda: (folder / "new").hardlink_to(mounted.staging / "web01.img"),
        lambda: (mounted.staging / "web01.img").rename(folder / "new.img"),
        lambda: os.mkfifo(folder / "new"),
        lambda: os.mknod(folder / "new", 0o100644),
    ):
        assert errno_of(act) in wanted
    assert (mounted.staging / "web01.img").exists()


def test_staging_takes_files_and_folders_only(mounted: Mounted) -> None:
    target = mounted.staging / "new.img"
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    assert errno_of(lambda: target.symlink_to("x")) in DENIED
    assert errno_of(lambda: target.hardlink_to(mounted.staging / "web01.img")) in DENIED
    assert errno_of(lambda: os.mkfifo(target)) in DENIED
    with socket.socket(socket.AF_UNIX) as listener:
        assert errno_of(lambda: listener.bind(os.path.relpath(target))) in DENIED
    assert os.listdir(mounted.staging) == ["web01.img"]


@pytest.mark.parametrize(
    "name", ["README.txt", ".backupfs/status.json", ".backupfs/events.log", "latest"]
)
def test_made_files_cannot_be_changed(by_time: Path, mounted: Mounted, name: str) -> None:
    path = mounted.path / name if name != "latest" else by_time.with_name("latest.img")

    if name != "latest":
        assert errno_of(lambda: open_with(path, os.O_WRONLY)) in DENIED
        assert errno_of(lambda: os.truncate(path, 0)) in DENIED
        assert errno_of(path.unlink) in DENIED
    assert errno_of(lambda: path.rename(path.with_name("other"))) in DENIED
    assert path.read_bytes()


def test_records_are_replaced_by_themselves_only(by_time: Path, mounted: Mounted) -> None:
    record = next(mounted.backups.glob("*.msgpack"))
    content = record.read_bytes()

    record.chmod(0o600)  # as "cp -p" does after copying it in
    assert errno_of(lambda: record.write_bytes(b"rubbish")) == errno.EINVAL
    assert errno_of(lambda: record.rename(record.with_name("other.msgpack"))) in DENIED
    record.write_bytes(content)

    assert_same(record, content)


@pytest.mark.parametrize(("first", "second"), [("x.img", "x.raw"), ("x.raw", "x"), ("x", "x.img")])
def test_second_name_of_a_volume_is_refused(mounted: Mounted, first: str, second: str) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / first)
    target = mounted.staging / second

    assert errno_of(lambda: target.write_bytes(b"other")) == errno.EEXIST
    assert run("cp", mounted.image(IMAGE), target, check=False).returncode != 0
    (mounted.staging / ".x.part").write_bytes(b"other")
    assert errno_of(lambda: (mounted.staging / ".x.part").rename(target)) == errno.EEXIST

    (mounted.staging / ".x.part").unlink()
    assert os.listdir(mounted.staging) == [first]
    mounted.assert_backups("x", IMAGE)
    (mounted.staging / first).rename(target)
    mounted.assert_backups("x", IMAGE)
    mounted.remount()
    assert os.listdir(mounted.staging) == [second]


def test_second_name_is_free_when_the_first_is_gone(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "x.img")
    run("rm", mounted.staging / "x.img")

    run("cp", mounted.image(IMAGE), mounted.staging / "x.raw")

    mounted.assert_backups("x", IMAGE, IMAGE)


def test_lock_of_a_backup_by_its_reader_works(by_time: Path) -> None:
    """qemu and others lock what they read; nobody shall wait for it."""
    with by_time.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
