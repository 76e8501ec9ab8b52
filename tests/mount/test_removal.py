"""rm and rmdir: what goes, what stays, and what is not to be removed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, becomes, patched, random_bytes, run, shell

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")
AGAIN = patched(IMAGE, 0, b"again")


@pytest.fixture
def web01(mounted: Mounted) -> Path:
    """A volume of three backups and a head: its folder."""
    for content in (IMAGE, CHANGED, AGAIN):
        run("cp", mounted.image(content), mounted.staging / "web01.img")
    return mounted.volumes / "web01"


def refused(path: Path, *words: str) -> str:
    """What a program says that must fail."""
    ended = run(*words, path, check=False)
    assert ended.returncode != 0
    return ended.stderr.decode()


def test_removing_the_name_in_volumes_deletes_the_backup(mounted: Mounted, web01: Path) -> None:
    names = mounted.names("web01")
    backup_id = mounted.xattr(web01 / names[1], "id")

    run("rm", web01 / names[1])

    mounted.assert_backups("web01", IMAGE, AGAIN)
    assert not (mounted.backups / f"{backup_id}.img").exists()
    assert not (mounted.backups / f"{backup_id}.msgpack").exists()
    assert backup_id not in [item["id"] for item in mounted.listed("list")]


def test_removing_the_name_in_backups_deletes_the_backup(mounted: Mounted, web01: Path) -> None:
    """The parent first: every backup is complete in itself."""
    names = mounted.names("web01")
    backup_id = mounted.xattr(web01 / names[0], "id")

    run("rm", mounted.backups / f"{backup_id}.img")

    assert not (web01 / names[0]).exists()
    mounted.assert_backups("web01", CHANGED, AGAIN)
    mounted.command("gc")
    mounted.command("verify")
    mounted.assert_backups("web01", CHANGED, AGAIN)


def test_removing_the_latest_moves_the_link(mounted: Mounted, web01: Path) -> None:
    run("rm", web01 / mounted.names("web01")[2])

    assert os.readlink(web01 / "latest.img") == mounted.names("web01")[1]
    assert_same(web01 / "latest.img", CHANGED)


def test_record_goes_with_its_backup_only(mounted: Mounted, web01: Path) -> None:
    record = next(mounted.backups.glob("*.msgpack"))

    assert "not permitted" in refused(record, "rm", "-f")

    assert record.exists()


def test_removed_head_leaves_all_backups(mounted: Mounted, web01: Path) -> None:
    run("rm", mounted.staging / "web01.img")

    assert os.listdir(mounted.staging) == []
    mounted.assert_backups("web01", IMAGE, CHANGED, AGAIN)
    mounted.remount()
    assert os.listdir(mounted.staging) == []
    mounted.assert_backups("web01", IMAGE, CHANGED, AGAIN)


def test_backup_after_the_head_was_removed_is_incremental_all_the_same(
    mounted: Mounted, web01: Path
) -> None:
    run("rm", mounted.staging / "web01.img")
    latest = mounted.xattr(web01 / "latest.img", "id")

    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE, CHANGED, AGAIN, IMAGE)
    assert mounted.xattr(web01 / "latest.img", "parent") == latest
    assert mounted.stored_bytes("web01") < 64 << 10


@pytest.mark.parametrize("flags", ["-r", "-rf"])
def test_removing_the_folder_removes_the_volume(mounted: Mounted, web01: Path, flags: str) -> None:
    ended = run("rm", flags, web01)

    assert ended.stderr == b""
    assert os.listdir(mounted.volumes) == []
    assert os.listdir(mounted.backups) == []
    assert mounted.listed("list") == []


@pytest.mark.parametrize("place", ["100", "100/a", "100/a/disk-0"])
def test_removing_a_folder_of_volumes_in_sub_folders(mounted: Mounted, place: str) -> None:
    """Folders that are there for what lies in them stay until rmdir, as everywhere."""
    (mounted.staging / "100/a").mkdir(parents=True)
    run("cp", mounted.image(IMAGE), mounted.staging / "100/a/disk-0.img")
    run("cp", mounted.image(IMAGE), mounted.staging / "other.img")

    ended = run("rm", "-r", mounted.volumes / place)

    assert ended.stderr == b""
    above = [folder for folder in ("100/a", "100") if place.startswith(f"{folder}/")]
    for folder in above:
        assert os.listdir(mounted.volumes / folder) == []
        (mounted.volumes / folder).rmdir()
    assert os.listdir(mounted.volumes) == ["other"]
    run("cp", mounted.image(CHANGED), mounted.staging / "100/a/disk-0.img")
    mounted.assert_backups("100/a/disk-0", CHANGED)


def test_emptied_folder_goes_with_the_last_volume_that_came_into_it(mounted: Mounted) -> None:
    (mounted.staging / "100").mkdir()
    for name in ("disk-0", "disk-1"):
        run("cp", mounted.image(IMAGE), mounted.staging / "100" / f"{name}.img")
        if name == "disk-0":
            run("rm", "-r", mounted.volumes / "100" / name)
    assert os.listdir(mounted.volumes / "100") == ["disk-1"]

    mounted.command("delete", "100/disk-1@latest")

    assert becomes(lambda: os.listdir(mounted.volumes) == [], seconds=20)


def test_python_removes_a_volume(mounted: Mounted, web01: Path) -> None:
    shutil.rmtree(web01)

    assert os.listdir(mounted.volumes) == []


def test_slow_removal_of_a_folder(mounted: Mounted, web01: Path) -> None:
    """The kernel forgets what it was told of names after a second."""
    for name in sorted(os.listdir(web01)):
        (web01 / name).unlink()
        assert not becomes(lambda: not web01.exists(), seconds=0.4)
    web01.rmdir()

    assert os.listdir(mounted.volumes) == []


def test_folder_whose_backups_were_removed_takes_the_next_one(
    mounted: Mounted, web01: Path
) -> None:
    shell('rm "$1"/2*', web01)
    assert mounted.names("web01") == []
    assert "latest.img" not in os.listdir(web01)

    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)


def test_volume_that_was_removed_comes_back_with_the_next_backup(
    mounted: Mounted, web01: Path
) -> None:
    run("rm", "-r", web01)

    run("cp", mounted.image(CHANGED), mounted.staging / "web01.img")

    mounted.assert_backups("web01", CHANGED)
    assert mounted.xattr(web01 / "latest.img", "kind") == "full"


def test_head_keeps_its_content_when_its_backups_are_gone(mounted: Mounted, web01: Path) -> None:
    run("rm", "-r", web01)
    mounted.command("gc")

    assert_same(mounted.staging / "web01.img", AGAIN)
    shell('printf more | dd of="$1" conv=notrunc status=none', mounted.staging / "web01.img")
    mounted.assert_backups("web01", patched(AGAIN, 0, b"more"))


def test_removing_a_volume_spares_those_below_it(mounted: Mounted, web01: Path) -> None:
    (mounted.staging / "web01").mkdir()
    run("cp", mounted.image(IMAGE), mounted.staging / "web01" / "disk.img")

    shell('rm "$1"/2*', web01)

    assert "not empty" in refused(web01, "rmdir")
    mounted.assert_backups("web01/disk", IMAGE)
    run("rm", "-r", web01)
    assert os.listdir(mounted.volumes) == []


def test_folder_with_backups_is_not_removed(mounted: Mounted, web01: Path) -> None:
    with pytest.raises(OSError) as caught:
        web01.rmdir()

    assert caught.value.errno == errno.ENOTEMPTY
    mounted.assert_backups("web01", IMAGE, CHANGED, AGAIN)


def test_folders_of_the_tree_are_not_removed(mounted: Mounted) -> None:
    for name in ("staging", "volumes", "backups", ".backupfs"):
        with pytest.raises(OSError) as caught:
            (mounted.path / name).rmdir()
        assert caught.value.errno in (errno.EPERM, errno.EBUSY, errno.ENOTEMPTY)
    assert len(os.listdir(mounted.path)) == 5


def test_staged_folder_is_removed_when_it_is_empty(mounted: Mounted) -> None:
    folder = mounted.staging / "100"
    folder.mkdir()
    run("cp", mounted.image(IMAGE), folder / "disk.img")

    with pytest.raises(OSError) as caught:
        folder.rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    run("rm", "-r", folder)

    assert os.listdir(mounted.staging) == []
    mounted.assert_backups("100/disk", IMAGE)


def test_backup_that_is_open_can_be_read_after_its_removal(mounted: Mounted, web01: Path) -> None:
    path = web01 / mounted.names("web01")[0]
    with path.open("rb", buffering=0) as file:
        assert file.read(1000) == IMAGE[:1000]
        path.unlink()
        mounted.command("gc")

        assert file.read() == IMAGE[1000:]
        # Once the kernel asks again: the file has no name, but it is still this file.
        assert not becomes(lambda: os.fstat(file.fileno()).st_size != len(IMAGE), seconds=1.5)

    mounted.assert_backups("web01", CHANGED, AGAIN)


def test_space_of_removed_backups_comes_back_with_gc(mounted: Mounted) -> None:
    for number in range(3):
        content = random_bytes(4 * MIB, number)
        run("cp", mounted.image(content), mounted.staging / "web01.img")
    used = int(mounted.listed("stats")["stored_bytes"])
    for name in mounted.names("web01")[:2]:
        (mounted.volumes / "web01" / name).unlink()

    mounted.command("gc")

    assert int(mounted.listed("stats")["stored_bytes"]) < used - 7 * MIB
    mounted.assert_backups("web01", content)


def test_head_that_is_open_can_be_read_after_its_removal(mounted: Mounted) -> None:
    content = random_bytes(48 * MIB)  # more than the daemon keeps in memory
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(content), target)
    with target.open("rb", buffering=0) as file:
        run("rm", "-r", target, mounted.volumes / "web01")
        mounted.command("gc")

        assert file.read() == content
    mounted.command("gc")
    assert int(mounted.listed("stats")["stored_bytes"]) < MIB


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_staged_file_that_loses_its_name_while_it_is_written_is_whole_for_who_reads_it(
    mounted: Mounted, how: str
) -> None:
    """Others copy to a temporary name, and rename it with the file still open."""
    content = random_bytes(24 * MIB)
    target = mounted.staging / "web01.img"
    with target.open("wb", buffering=0) as writer:
        writer.write(content)
        os.fsync(writer.fileno())
        with target.open("rb", buffering=0) as reader:
            if how == "removed":
                target.unlink()
            else:
                run("cp", mounted.image(IMAGE), mounted.staging / "web01.img.part")
                (mounted.staging / "web01.img.part").rename(target)
            mounted.command("gc")
            writer.close()
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            assert reader.read(len(content)) == content
    mounted.command("gc")
    assert int(mounted.listed("stats")["stored_bytes"]) < len(IMAGE) + MIB


def test_staged_file_without_a_name_keeps_its_data_through_gc(mounted: Mounted) -> None:
    content = random_bytes(24 * MIB)
    target = mounted.staging / "web01.img"
    with target.open("w+b", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        target.unlink()
        mounted.command("gc")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        assert os.pread(file.fileno(), len(content), 0) == content
