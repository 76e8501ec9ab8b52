"""The mounted tree: its names, and what stat, statfs and getxattr say of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import stat
import struct
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mounted import CHUNK_SIZE, MIB, Mounted, assert_same, needs, random_bytes, run, shell

IMAGE = random_bytes(2 * MIB + 300)
HOLED = random_bytes(MIB) + bytes(6 * MIB) + random_bytes(CHUNK_SIZE, 2) + bytes(MIB)


def tree_of(mounted: Mounted) -> dict[str, tuple[int, int]]:
    """All paths of the mount, with inode number and mode."""
    found = {}
    for folder, folders, files in os.walk(mounted.path):
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            found[str(path.relative_to(mounted.path))] = (state.st_ino, state.st_mode)
    return found


def test_empty_repository_shows_its_five_names_in_order(mounted: Mounted) -> None:
    names = [entry.name for entry in os.scandir(mounted.path)]

    assert names == [".backupfs", "README.txt", "backups", "staging", "volumes"]
    for name in ("backups", "staging", "volumes"):
        assert os.listdir(mounted.path / name) == []
    assert sorted(os.listdir(mounted.path / ".backupfs")) == ["events.log", "status.json"]


def test_readme_says_in_twenty_lines_what_this_is(mounted: Mounted) -> None:
    text = (mounted.path / "README.txt").read_text()

    assert len(text.splitlines()) <= 20
    for name in ("staging/", "volumes/", "backups/", ".backupfs/", "metadata.json"):
        assert name in text
    assert (mounted.path / "README.txt").stat().st_size == len(text.encode())


def test_backup_is_named_by_its_time_and_by_its_id(mounted: Mounted) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    after = datetime.now(UTC)

    (by_id,) = mounted.backups.glob("*.img")
    (by_time,) = mounted.names("web01")

    assert str(uuid.UUID(by_id.stem)) == by_id.stem
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}Z\.img", by_time)
    moment = datetime.strptime(by_time, "%Y-%m-%dT%H%M%SZ.img").replace(tzinfo=UTC)
    assert before <= moment <= after
    assert sorted(os.listdir(mounted.volumes / "web01")) == [
        by_time,
        "latest.img",
        "metadata.json",
    ]
    assert sorted(os.listdir(mounted.backups)) == [by_id.name, f"{by_id.stem}.msgpack"]
    assert os.readlink(mounted.latest("web01")) == by_time


def test_both_names_of_a_backup_are_one_file(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    (by_id,) = mounted.backups.glob("*.img")
    by_time = mounted.volumes / "web01" / mounted.names("web01")[0]

    one, two = by_id.stat(), by_time.stat()

    assert one == two
    assert one.st_nlink == 2
    assert stat.S_IMODE(one.st_mode) == 0o444 and stat.S_ISREG(one.st_mode)
    assert one.st_size == len(IMAGE)
    assert by_time.name == f"{datetime.fromtimestamp(one.st_mtime, UTC):%Y-%m-%dT%H%M%SZ}.img"
    assert by_id.samefile(mounted.latest("web01"))
    assert mounted.latest("web01").lstat().st_mtime == one.st_mtime
    assert_same(by_id, IMAGE)


def test_tar_and_du_take_both_names_for_one_file(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    listed = run("tar", "-cvvf", "/dev/null", "-C", mounted.path, "volumes", "backups").stdout
    used = run("du", "-s", "--block-size=1", mounted.volumes, mounted.backups).stdout

    assert b"link to" in listed
    volumes, backups = (int(line.split()[0]) for line in used.splitlines())
    assert volumes >= len(IMAGE) and backups < CHUNK_SIZE


def test_blocks_count_data_and_no_holes(mounted: Mounted) -> None:
    run("cp", mounted.image(HOLED), mounted.staging / "web01.img")

    for path in (mounted.latest("web01"), mounted.staging / "web01.img"):
        assert path.stat().st_blocks * 512 == MIB + CHUNK_SIZE
        assert path.stat().st_size == len(HOLED)
    run("cp", "--sparse=auto", mounted.latest("web01"), mounted.folder / "out.img")
    assert_same(mounted.folder / "out.img", HOLED)


def test_blocks_never_exceed_the_size(mounted: Mounted) -> None:
    run("cp", mounted.image(b"tiny"), mounted.staging / "web01.img")

    assert mounted.latest("web01").stat().st_blocks == 1
    assert (mounted.staging / "web01.img").stat().st_blocks == 1


def test_block_size_makes_programs_ask_for_a_megabyte(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    assert mounted.latest("web01").stat().st_blksize >= MIB
    assert (mounted.staging / "web01.img").stat().st_blksize >= MIB


def test_statfs_is_that_of_the_disk_of_the_repository(mounted: Mounted) -> None:
    ours, disk = os.statvfs(mounted.path), os.statvfs(mounted.repo)

    assert ours.f_blocks * ours.f_frsize == disk.f_blocks * disk.f_frsize
    assert abs(ours.f_bavail * ours.f_frsize - disk.f_bavail * disk.f_frsize) < 8 << 30
    assert ours.f_namemax == 255


def test_folders_mirror_those_below_staging(mounted: Mounted) -> None:
    (mounted.staging / "100" / "more").mkdir(parents=True)
    for name in ("100/disk-0.raw", "100/more/disk-1.img", "100.img"):
        run("cp", mounted.image(IMAGE), mounted.staging / name)

    assert os.listdir(mounted.volumes) == ["100"]
    inside = [name for name in os.listdir(mounted.volumes / "100") if name[:2] != "20"]
    assert inside == ["disk-0", "latest.img", "metadata.json", "more"]
    mounted.assert_backups("100", IMAGE)
    mounted.assert_backups("100/disk-0", IMAGE)
    mounted.assert_backups("100/more/disk-1", IMAGE)
    assert mounted.xattr(mounted.latest("100/more/disk-1"), "volume") == "100/more/disk-1"


def test_listings_are_sorted(mounted: Mounted) -> None:
    names = [f"{letter}{number}.img" for letter in "bca" for number in range(7)]
    (mounted.staging / "b").mkdir()
    for name in (*names, "b/x.img", "b.img"):
        shell('printf "%s" "$1" > "$2"', name, mounted.staging / name)

    for folder in (mounted.staging, mounted.volumes, mounted.backups, mounted.volumes / "b"):
        listed = os.listdir(folder)
        assert listed == sorted(listed)
    assert len(os.listdir(mounted.staging)) == len(names) + 2


def test_long_listing_is_complete_while_backups_come_and_go(mounted: Mounted) -> None:
    script = 'for n in $(seq 300); do echo $n > "$1/n$n"; done'
    shell(script, mounted.staging)

    with os.scandir(mounted.volumes) as listing:
        first = [next(listing).name for _ in range(5)]
        run("rm", "-r", *(mounted.volumes / name for name in first))
        rest = [entry.name for entry in listing]

    assert sorted(first + rest) == sorted(f"n{number}" for number in range(1, 301))
    assert len(os.listdir(mounted.volumes)) == 295
    assert len(os.listdir(mounted.backups)) == 2 * 295


def test_inode_numbers_are_the_same_at_every_mount(mounted: Mounted) -> None:
    (mounted.staging / "folder").mkdir()
    for name in ("web01.img", "folder/web02.img", ".held"):
        run("cp", mounted.image(IMAGE), mounted.staging / name)
    run("dd", "if=/dev/zero", f"of={mounted.staging}/web01.img", "bs=1", "count=1", "conv=notrunc")
    before = tree_of(mounted)
    mounted.remount()

    after = tree_of(mounted)

    assert after == before
    assert len({number for number, _ in before.values()}) == len(before) - 3  # two names each


def test_attributes_of_a_head_outlive_the_mount(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    target.chmod(0o640)
    os.utime(target, ns=(1, 1_234_567_890_123_456_789))
    if os.geteuid() == 0:
        os.chown(target, 1234, 2345)
    before = target.stat()

    mounted.remount()

    after = target.stat()
    assert after.st_mtime_ns == 1_234_567_890_123_456_789
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns"):
        assert getattr(after, name) == getattr(before, name)


def test_extended_attributes_tell_what_a_backup_is(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    run("dd", "if=/dev/zero", f"of={target}", "bs=64k", "count=1", "conv=notrunc")
    first, second = (mounted.volumes / "web01" / name for name in mounted.names("web01"))
    listed = {item["name"]: item for item in mounted.listed("list")}

    for path in (first, second):
        values = {
            name: os.getxattr(path, name).decode()
            for name in os.listxattr(path)
            if name.startswith("user.backupfs.")
        }
        shown = listed[path.name]
        assert values["user.backupfs.id"] == shown["id"]
        assert values["user.backupfs.volume"] == "web01"
        assert values["user.backupfs.kind"] == shown["kind"]
        assert values["user.backupfs.stored_bytes"] == str(shown["stored_bytes"])
        created = datetime.fromisoformat(values["user.backupfs.created_at"])
        assert created == datetime.fromisoformat(shown["created_at"])
        assert re.fullmatch("[0-9a-f]{64}", values["user.backupfs.root"])
        assert values.get("user.backupfs.parent") == shown["parent_id"]
    assert mounted.xattr(second, "parent") == mounted.xattr(first, "id")


@pytest.mark.tools
@needs("getfattr")
def test_getfattr_lists_them(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    shown = run("getfattr", "-d", mounted.latest("web01")).stdout.decode()

    assert 'user.backupfs.volume="web01"' in shown


def test_staged_file_says_its_state(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(IMAGE), mounted.staging / ".web02.part")

    assert mounted.xattr(mounted.staging / "web01.img", "state") == "published"
    assert mounted.xattr(mounted.staging / ".web02.part", "state") == "held"
    assert mounted.xattr(mounted.staging / ".web02.part", "reason")


def test_unknown_attributes_are_not_there_and_cannot_be_set(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    for path in (mounted.latest("web01"), mounted.staging / "web01.img"):
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "user.backupfs.unknown")
        with pytest.raises(OSError, match=r"not supported|not permitted|denied"):
            os.setxattr(path, "user.other", b"value")


def test_status_tells_of_the_mount_and_of_drafts(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(IMAGE), mounted.staging / "web02.part")

    status = mounted.status()

    assert status["process_id"] == mounted.process_id
    assert Path(status["mountpoint"]) == mounted.path
    assert Path(status["location"]) == mounted.repo
    assert (status["volumes"], status["backups"]) == (1, 1)
    assert status["index_lookups"] > 0
    (draft,) = status["drafts"]
    assert (draft["name"], draft["state"], draft["size"]) == ("web02.part", "held", len(IMAGE))
    assert draft["reason"]
    assert json.loads(run("cat", mounted.path / ".backupfs" / "status.json").stdout)


def test_events_tell_what_happened(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(IMAGE[:5]), mounted.staging / "web01.img")
    run("rm", mounted.staging / "web01.img")
    run("rm", mounted.volumes / "web01" / mounted.names("web01")[0])

    lines = mounted.events().splitlines()

    for line, word in zip(lines, ("published", "held", "forgot", "deleted"), strict=True):
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ", line)
        assert word in line and "web01" in line


def test_head_reads_as_the_latest_backup_after_a_remount(mounted: Mounted) -> None:
    run("cp", mounted.image(HOLED), mounted.staging / "web01.img")

    mounted.remount()

    assert_same(mounted.staging / "web01.img", HOLED)
    run("dd", "if=/dev/zero", f"of={mounted.staging}/web01.img", "bs=1M", "count=1", "conv=notrunc")
    mounted.assert_backups("web01", HOLED, bytes(MIB) + HOLED[MIB:])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root opens files by their handles")
def test_file_handles_of_nfs_outlive_the_mount(mounted: Mounted) -> None:
    """A server of NFS gives its clients handles, made of inode numbers, and keeps nothing else."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    paths = [
        backup,
        mounted.staging / "web01.img",
        mounted.backups / f"{mounted.xattr(backup, 'id')}.msgpack",
        mounted.volumes / "web01" / "metadata.json",
    ]
    wanted = [path.read_bytes() for path in paths]
    handles = [handle_of(path) for path in paths]

    mounted.remount()

    assert [content_of(handle, mounted.path) for handle in handles] == wanted
    run("rm", backup)
    with pytest.raises(OSError, match="Stale"):
        content_of(handles[0], mounted.path)


LIBC = ctypes.CDLL(None, use_errno=True)
HANDLE_SIZE_MAX = 128


def handle_of(path: Path) -> ctypes.Array[ctypes.c_char]:
    """name_to_handle_at(2)."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", HANDLE_SIZE_MAX, 0), HANDLE_SIZE_MAX + 8)
    if LIBC.name_to_handle_at(-100, bytes(path), handle, ctypes.byref(ctypes.c_int()), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return handle


def content_of(handle: ctypes.Array[ctypes.c_char], mountpoint: Path) -> bytes:
    """What open_by_handle_at(2) opens."""
    place = os.open(mountpoint, os.O_RDONLY)
    try:
        descriptor = LIBC.open_by_handle_at(place, handle, os.O_RDONLY)
        code = ctypes.get_errno()
    finally:
        os.close(place)
    if descriptor < 0:
        raise OSError(code, os.strerror(code))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
