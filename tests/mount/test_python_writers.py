"""Python's own copying, writers through mmap, and writers with an unusual pattern of calls."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import threading

import pytest
from mounted import MIB, Mounted, assert_same, becomes, patched, random_bytes, run

IMAGE = random_bytes(8 * MIB + 50)


def test_copy2_sets_attributes_after_closing(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)
    source.chmod(0o600)
    os.utime(source, (1_300_000_000, 1_300_000_000))

    shutil.copy2(source, mounted.staging / "web01.img")
    shutil.copyfile(source, mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE, IMAGE)
    assert (mounted.staging / "web01.img").stat().st_mode & 0o7777 == 0o600


def test_mapped_file_is_one_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    with target.open("xb+") as file:
        file.truncate(len(IMAGE))
        with mmap.mmap(file.fileno(), len(IMAGE)) as mapped:
            mapped[:] = IMAGE

    mounted.assert_backups("web01", IMAGE)


def test_pages_that_change_after_the_last_close_are_in_the_backup(mounted: Mounted) -> None:
    """The kernel writes them after the flush of close(2): they come with the release at unmapping."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    descriptor = os.open(target, os.O_RDWR)
    mapped = mmap.mmap(descriptor, 0)
    os.close(descriptor)

    mapped[MIB : MIB + 5] = b"after"
    assert len(mounted.names("web01")) == 1
    mapped.close()

    mounted.assert_backups("web01", IMAGE, patched(IMAGE, MIB, b"after"))


def test_mapping_made_by_a_program_that_ends_without_unmapping(mounted: Mounted) -> None:
    program = (
        "import mmap, os, sys; file = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(file, 0);"
        "os.close(file); m[:5] = b'after'; os._exit(0)"
    )
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run(sys.executable, "-c", program, target)

    mounted.assert_backups("web01", IMAGE, patched(IMAGE, 0, b"after"))


@pytest.mark.parametrize("_attempt", range(3))  # without the look at each write some succeed
def test_program_killed_while_it_wrote_through_a_mapping_is_no_backup(
    mounted: Mounted, _attempt: int
) -> None:
    """It has closed all descriptors, mmap's own too: the last close is not what completes it."""
    program = (
        "import mmap, os, sys, time; file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "size = 8 << 20; os.ftruncate(file, size); m = mmap.mmap(file, size);"
        "os.closerange(3, 100); m[: size // 2] = os.urandom(size // 2);"
        "open(sys.argv[2], 'x'); time.sleep(60)"
    )
    target, half_done = mounted.staging / "web01.img", mounted.folder / "half done"
    writer = mounted.start(sys.executable, "-c", program, target, half_done)
    assert becomes(half_done.exists, seconds=20)

    writer.kill()
    writer.wait(timeout=20)

    assert "killed" in mounted.assert_held("web01.img", "web01")["reason"]


def test_synced_mapping_is_seen_by_readers_at_once(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    with target.open("rb+") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[100:104] = b"seen"
        mapped.flush()

        assert target.read_bytes()[100:104] == b"seen"

    mounted.assert_backups("web01", IMAGE, patched(IMAGE, 100, b"seen"))


def test_writing_and_reading_by_one_handle(mounted: Mounted) -> None:
    with (mounted.staging / "web01.img").open("wb+", buffering=0) as file:
        file.write(IMAGE[:MIB])
        file.seek(1000)
        assert file.read(5000) == IMAGE[1000:6000]
        file.seek(MIB)
        file.write(IMAGE[MIB:])
        file.seek(0)
        assert file.read() == IMAGE

    mounted.assert_backups("web01", IMAGE)


def test_readers_see_what_is_written_while_it_is_written(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    with target.open("rb", buffering=0) as reader, target.open("rb+", buffering=0) as writer:
        assert reader.read(8) == IMAGE[:8]
        writer.write(b"new data")
        reader.seek(0)
        assert reader.read(8) == b"new data"
        assert_same(target, patched(IMAGE, 0, b"new data"))

    descriptor = os.open(target, os.O_WRONLY)
    with target.open("rb", buffering=0) as reader:
        assert reader.read(8) == b"new data"
        os.pwrite(descriptor, b"newer one", MIB)
        os.pwrite(descriptor, b"newer ...", 0)
        os.ftruncate(descriptor, len(IMAGE) + 10)
        reader.seek(0)
        assert reader.read(9) == b"newer ..."
        assert os.fstat(reader.fileno()).st_size == len(IMAGE) + 10
        reader.seek(MIB)
        assert reader.read(9) == b"newer one"
    os.close(descriptor)


def test_writing_backwards_and_over_each_other(mounted: Mounted) -> None:
    wanted = bytearray(IMAGE)
    with (mounted.staging / "web01.img").open("xb", buffering=0) as file:
        for offset in reversed(range(0, len(IMAGE), 300_007)):
            file.seek(offset)
            file.write(IMAGE[offset : offset + 300_007])
        for number in range(200):
            offset = number * 37_001
            file.seek(offset)
            file.write(b"%020d" % number)
            wanted[offset : offset + 20] = b"%020d" % number

    mounted.assert_backups("web01", bytes(wanted))


def test_many_threads_writing_one_file(mounted: Mounted) -> None:
    descriptor = os.open(mounted.staging / "web01.img", os.O_CREAT | os.O_WRONLY, 0o644)

    def write(number: int) -> None:
        for offset in range(number * 4096, len(IMAGE), 8 * 4096):
            os.pwrite(descriptor, IMAGE[offset : offset + 4096], offset)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)

    mounted.assert_backups("web01", IMAGE)


def test_fsync_in_the_middle_is_no_backup(mounted: Mounted) -> None:
    with (mounted.staging / "web01.img").open("xb", buffering=0) as file:
        file.write(IMAGE[: 3 * MIB])
        os.fsync(file.fileno())
        assert mounted.names("web01") == []
        file.write(IMAGE[3 * MIB :])

    mounted.assert_backups("web01", IMAGE)


def test_handle_inherited_by_a_child_publishes_when_both_are_done(mounted: Mounted) -> None:
    """Every close flushes; only the last one ends the copy."""
    with (mounted.staging / "web01.img").open("xb", buffering=0) as file:
        file.write(IMAGE[:MIB])
        run("true")
        duplicate = os.dup(file.fileno())
        os.close(duplicate)
        assert mounted.names("web01") == []
        file.write(IMAGE[MIB:])

    mounted.assert_backups("web01", IMAGE)


def test_preallocated_file_is_what_was_written_into_it(mounted: Mounted) -> None:
    """Without fallocate, glibc touches every block of the file with a write of one byte."""
    with (mounted.staging / "web01.img").open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
        file.write(IMAGE[: MIB // 2])

    mounted.assert_backups("web01", IMAGE[: MIB // 2].ljust(MIB, b"\0"))


def test_file_that_is_removed_while_it_is_written_is_no_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    with target.open("xb", buffering=0) as file:
        file.write(IMAGE[:MIB])
        target.unlink()
        file.write(IMAGE[MIB:])
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == len(IMAGE)

    mounted.assert_backups("web01")
    assert os.listdir(mounted.staging) == []


def test_file_that_takes_the_place_of_a_removed_one_is_a_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    with target.open("xb", buffering=0) as first:
        first.write(b"first" * 1000)
        target.unlink()
        with target.open("xb", buffering=0) as second:
            second.write(IMAGE)

    mounted.assert_backups("web01", IMAGE)


def test_temporary_file_without_a_name_is_no_backup(mounted: Mounted) -> None:
    """Python asks for one by O_TMPFILE, and is content with one that it removes at once."""
    with tempfile.TemporaryFile(dir=mounted.staging) as file:
        file.write(IMAGE)
        file.seek(0)
        assert file.read() == IMAGE

    assert os.listdir(mounted.staging) == []
    assert os.listdir(mounted.volumes) == []


def test_backup_is_read_past_the_page_cache(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    for size in ("4k", "1M", "3M"):
        words = ["dd", f"if={mounted.latest('web01')}", f"bs={size}", "iflag=direct"]
        assert run(*words).stdout == IMAGE
