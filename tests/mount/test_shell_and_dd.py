"""Redirects, pipes, dd, touch and truncate: writers that close early, late or without a byte."""

from __future__ import annotations

import shutil

import pytest
from mounted import (
    CHUNK_SIZE,
    MIB,
    Mounted,
    assert_same,
    becomes,
    patched,
    random_bytes,
    run,
    shell,
)

IMAGE = random_bytes(8 * MIB)
FIRST, SECOND = IMAGE[: 3 * MIB + 11], IMAGE[3 * MIB + 11 :]


def test_redirect_makes_one_backup(mounted: Mounted) -> None:
    """The shell closes once before the first write, and twice after the last."""
    shell('cat "$1" > "$2"', mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.assert_backups("web01", IMAGE)


def test_redirect_over_a_head_makes_the_next_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    changed = patched(IMAGE, MIB, b"changed")

    shell('cat "$1" > "$2"', mounted.image(IMAGE), target)
    shell('cat "$1" > "$2"', mounted.image(changed), target)

    mounted.assert_backups("web01", IMAGE, changed)


def test_group_of_programs_makes_one_backup(mounted: Mounted) -> None:
    """Every program of the group ends with a close of its own."""
    one, two = mounted.image(FIRST, "one"), mounted.image(SECOND, "two")

    shell('(cat "$1"; cat "$2") > "$3"', one, two, mounted.staging / "web01.img")
    shell('{ cat "$1"; sleep 0.2; cat "$2"; } > "$3"', one, two, mounted.staging / "web02.img")

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", IMAGE)


def test_appending_makes_a_second_backup(mounted: Mounted) -> None:
    one, two = mounted.image(FIRST, "one"), mounted.image(SECOND, "two")

    shell('cat "$1" > "$3"; cat "$2" >> "$3"', one, two, mounted.staging / "web01.img")

    mounted.assert_backups("web01", FIRST, IMAGE)


def test_tee_makes_a_backup_of_each_of_its_files(mounted: Mounted) -> None:
    one, two = mounted.staging / "web01.img", mounted.staging / "web02.img"

    shell('tee "$2" "$3" < "$1" > /dev/null', mounted.image(IMAGE), one, two)

    mounted.assert_backups("web01", IMAGE)
    mounted.assert_backups("web02", IMAGE)


def test_empty_redirect_and_touch_are_no_backups(mounted: Mounted) -> None:
    shell(': > "$1"; touch "$2"', mounted.staging / "web01.img", mounted.staging / "web02.img")

    assert (mounted.staging / "web01.img").stat().st_size == 0
    assert (mounted.staging / "web02.img").stat().st_size == 0
    assert not (mounted.volumes / "web01").exists()
    assert not (mounted.volumes / "web02").exists()


def test_touch_of_a_head_sets_its_time_and_makes_no_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("touch", "-d", "2020-02-02T02:02:02Z", target)

    mounted.assert_backups("web01", IMAGE)
    assert int(target.stat().st_mtime) == 1580608922


def test_file_that_was_touched_first_takes_a_copy(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("touch", target)

    run("cp", mounted.image(IMAGE), target)

    mounted.assert_backups("web01", IMAGE)


def test_emptied_head_loses_no_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    shell(': > "$1"', target)

    mounted.assert_held("web01.img", "web01", IMAGE)
    run("cp", mounted.image(IMAGE), target)
    mounted.assert_backups("web01", IMAGE, IMAGE)


def test_dd_to_a_new_file_makes_one_backup(mounted: Mounted) -> None:
    source = mounted.image(IMAGE[:-100])

    run("dd", f"if={source}", f"of={mounted.staging}/web01.img", "bs=4k")
    run("dd", f"if={source}", f"of={mounted.staging}/web02.img", "bs=1000003")
    run("dd", f"if={source}", f"of={mounted.staging}/web03.img", "bs=1M", "conv=fsync,sparse")

    for volume in ("web01", "web02", "web03"):
        mounted.assert_backups(volume, IMAGE[:-100])


def test_dd_with_o_direct_makes_one_backup(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)

    run("dd", f"if={source}", f"of={mounted.staging}/web01.img", "bs=1M", "oflag=direct")

    mounted.assert_backups("web01", IMAGE)


def test_dd_into_a_head_stores_only_what_changed(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    patch = mounted.image(random_bytes(4096 * 3, 7), "patch")

    run("dd", f"if={patch}", f"of={target}", "bs=4096", "seek=100", "conv=notrunc")

    mounted.assert_backups("web01", IMAGE, patched(IMAGE, 409600, patch.read_bytes()))
    assert 0 < mounted.stored_bytes("web01") < 3 * (64 << 10)
    assert mounted.xattr(mounted.latest("web01"), "kind") == "incremental"


def test_dd_of_odd_pieces_into_a_head(mounted: Mounted) -> None:
    """Neither sectors nor pages are to be counted on."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    patch = mounted.image(random_bytes(70_001, 7), "patch")

    run("dd", f"if={patch}", f"of={target}", "bs=517", "seek=253", "conv=notrunc")

    mounted.assert_backups("web01", IMAGE, patched(IMAGE, 517 * 253, patch.read_bytes()))


def test_dd_beyond_the_end_of_a_head_enlarges_it(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(FIRST), target)
    patch = mounted.image(b"end", "patch")

    run("dd", f"if={patch}", f"of={target}", "bs=1M", "seek=5", "conv=notrunc")

    mounted.assert_backups("web01", FIRST, FIRST.ljust(5 * MIB, b"\0") + b"end")


def test_dd_with_seek_to_a_new_file_has_zeros_before(mounted: Mounted) -> None:
    """dd sets the size to the place it seeks to before it writes."""
    patch = mounted.image(SECOND, "patch")

    run("dd", f"if={patch}", f"of={mounted.staging}/web01.img", "bs=1M", "seek=3")

    mounted.assert_backups("web01", bytes(3 * MIB) + SECOND)


def test_writing_what_is_there_already_stores_nothing(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("dd", f"if={mounted.image(IMAGE)}", f"of={target}", "bs=1M", "conv=notrunc")

    mounted.assert_backups("web01", IMAGE, IMAGE)
    assert mounted.stored_bytes("web01") == 0


def test_opening_a_head_for_writing_without_a_write_makes_no_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    shell('exec 3<>"$1"; exec 4>>"$1"', target)

    mounted.assert_backups("web01", IMAGE)


def test_two_writers_of_one_head_make_one_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    script = """
        exec 3<>"$1"
        printf first | dd of="$1" bs=1 seek=100 conv=notrunc status=none
        printf second >&3
    """

    shell(script, target)

    wanted = patched(patched(IMAGE, 100, b"first"), 0, b"second")
    mounted.assert_backups("web01", IMAGE, wanted)


def test_sized_file_without_data_settles_before_it_is_a_backup(
    mount_with_settle: Mounted,
) -> None:
    mounted = mount_with_settle

    run("truncate", "-s", "8M", mounted.staging / "web01.img")

    assert mounted.drafts()["web01.img"]["state"] == "settling"
    assert mounted.names("web01") == []
    assert becomes(lambda: mounted.names("web01") != [], seconds=10)
    mounted.assert_backups("web01", bytes(8 * MIB))
    assert mounted.latest("web01").stat().st_blocks == 0


def test_sized_file_that_is_filled_meanwhile_is_one_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"

    run("truncate", "-s", "8M", target)
    run("dd", f"if={mounted.image(IMAGE)}", f"of={target}", "bs=1M", "conv=notrunc")

    mounted.assert_backups("web01", IMAGE)


def test_growing_a_head_by_truncate_is_a_backup_of_zeros_behind(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(FIRST), target)

    run("truncate", "-s", "9M", target)

    mounted.assert_backups("web01", FIRST, FIRST.ljust(9 * MIB, b"\0"))


def test_shrunken_head_is_held_and_grows_back_with_zeros(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)

    run("truncate", "-s", "100001", target)

    mounted.assert_held("web01.img", "web01", IMAGE)
    assert_same(target, IMAGE[:100001])
    run("truncate", "-s", "8M", target)
    mounted.assert_backups("web01", IMAGE, IMAGE[:100001].ljust(8 * MIB, b"\0"))


def test_image_of_a_tebibyte_with_little_in_it(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    end = mounted.image(b"end", "end")
    middle = mounted.image(b"middle", "middle")
    script = """
        exec 3<>"$1"
        dd if="$2" bs=1 seek=1T conv=notrunc status=none of="$1"
        dd if="$3" bs=1M seek=500000 conv=notrunc status=none of="$1"
    """

    shell(script, target, end, middle)

    (name,) = mounted.names("web01")
    state = (mounted.volumes / "web01" / name).stat()
    assert state.st_size == (1 << 40) + 3
    assert state.st_blocks * 512 <= 2 * CHUNK_SIZE
    with mounted.latest("web01").open("rb") as file:
        file.seek(500000 << 20)
        assert file.read(8) == b"middle\0\0"
        file.seek(1 << 40)
        assert file.read() == b"end"


def test_write_far_beyond_what_can_be_kept_is_too_large_and_no_backup(
    mount_with_settle: Mounted,
) -> None:
    mounted = mount_with_settle
    target = mounted.staging / "web01.img"
    words = [f"if={mounted.image(IMAGE)}", "bs=1", "count=1", "conv=notrunc"]

    ended = run("dd", *words, f"of={target}", "seek=7E", check=False)

    assert ended.returncode != 0 and b"File too large" in ended.stderr
    assert not becomes(lambda: mounted.names("web01") != [], seconds=3)
    with target.open("rb+") as file, pytest.raises(OSError, match="File too large"):
        file.truncate(1 << 60)


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        ("gzip -1", 'gzip -dc "$1" > "$2"'),
        ("zstd -q", 'zstd -q -d --sparse "$1" -o "$2"'),
        ("zstd -q", 'zstd -q -d -f --no-sparse "$1" -o "$2"'),
        ("xz -0", 'xz -dc "$1" > "$2"'),
        ("lz4 -q", 'lz4 -q -d "$1" "$2"'),
    ],
)
def test_image_is_unpacked_into_a_backup(mounted: Mounted, pack: str, unpack: str) -> None:
    program = pack.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"not installed: {program}")
    content = IMAGE[:MIB] + bytes(3 * MIB) + IMAGE[MIB : 2 * MIB] + bytes(MIB)
    packed = mounted.folder / "packed"
    shell(f'{pack} < "$1" > "$2"', mounted.image(content), packed)

    shell(unpack, packed, mounted.staging / "web01.img")

    mounted.assert_backups("web01", content)
