"""qemu-img and qemu-io: images of virtual machines, in, out and on top of each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, becomes, needs, patched, random_bytes, run

pytestmark = [pytest.mark.tools, needs("qemu-img", "qemu-io")]

IMAGE = random_bytes(4 * MIB) + bytes(6 * MIB) + random_bytes(2 * MIB, 2) + bytes(4 * MIB)
CHANGED = patched(IMAGE, 11 * MIB + 512, random_bytes(4096, 3))


def convert(source: Path, target: Path, *words: str, source_format: str = "raw") -> None:
    run("qemu-img", "convert", *words, "-f", source_format, "-O", "raw", source, target)


@pytest.mark.parametrize("words", [[], ["-W", "-m", "16"], ["-S", "0"], ["-t", "none"]])
def test_convert_makes_one_backup(mounted: Mounted, words: list[str]) -> None:
    """qemu-img makes, sizes and closes the file before it opens it again to write the image."""
    convert(mounted.image(IMAGE), mounted.staging / "web01.img", *words)

    mounted.assert_backups("web01", IMAGE)
    assert mounted.latest("web01").stat().st_blocks * 512 <= 6 * MIB


def test_convert_over_a_head_makes_the_next_backup(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    convert(mounted.image(IMAGE), target)

    convert(mounted.image(CHANGED), target)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert mounted.stored_bytes("web01") < MIB // 4


@pytest.mark.parametrize("words", [["-n"], ["-n", "-W", "-m", "16"]])
def test_convert_into_an_existing_head_stores_what_changed(
    mounted: Mounted, words: list[str]
) -> None:
    target = mounted.staging / "web01.img"
    convert(mounted.image(IMAGE), target)

    convert(mounted.image(CHANGED), target, *words)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert mounted.stored_bytes("web01") < MIB // 4


def test_convert_into_a_head_writes_zeros_over_data(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    convert(mounted.image(random_bytes(len(IMAGE), 9)), target)

    convert(mounted.image(IMAGE), target, "-n")

    mounted.assert_kept("web01", random_bytes(len(IMAGE), 9), IMAGE)
    assert mounted.latest("web01").stat().st_blocks * 512 <= 6 * MIB


def test_convert_of_a_qcow2_image(mounted: Mounted) -> None:
    qcow2 = mounted.folder / "source.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", mounted.image(IMAGE), qcow2)

    convert(qcow2, mounted.staging / "web01.img", source_format="qcow2")

    mounted.assert_backups("web01", IMAGE)


def test_convert_of_an_image_of_zeros_is_a_backup_after_a_while(
    mount_with_settle: Mounted,
) -> None:
    mounted = mount_with_settle

    convert(mounted.image(bytes(8 * MIB)), mounted.staging / "web01.img")

    assert becomes(lambda: mounted.names("web01") != [], seconds=10)
    mounted.assert_backups("web01", bytes(8 * MIB))


def test_create_settles_and_is_one_backup_with_what_comes_next(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"

    run("qemu-img", "create", "-f", "raw", target, "8M")
    assert mounted.drafts()["web01.img"]["state"] == "settling"
    run("qemu-io", "-f", "raw", "-c", "write -P 0x41 1M 64k", target)

    mounted.assert_backups("web01", patched(bytes(8 * MIB), MIB, b"A" * 65536))


def test_qcow2_file_can_be_staged_and_written_at_random(mounted: Mounted) -> None:
    """Any file can be a volume; qcow2 is written back and forth, with its table at the start."""
    target = mounted.staging / "web01.qcow2"

    run("qemu-img", "convert", "-O", "qcow2", mounted.image(IMAGE), target)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x42 100k 300k", target)

    backup = mounted.latest("web01.qcow2")
    raw = mounted.folder / "out.raw"
    run("qemu-img", "check", "-f", "qcow2", backup)
    convert(backup, raw, source_format="qcow2")
    assert_same(raw, patched(IMAGE, 100 << 10, b"B" * (300 << 10)))
    assert mounted.drafts() == {}


def test_convert_out_of_a_backup_keeps_holes(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    raw, qcow2 = mounted.folder / "out.raw", mounted.folder / "out.qcow2"

    convert(mounted.latest("web01"), raw, "-m", "8", "-W")
    run("qemu-img", "convert", "-O", "qcow2", "-f", "raw", mounted.latest("web01"), qcow2)

    assert_same(raw, IMAGE)
    assert raw.stat().st_blocks * 512 <= 6 * MIB
    assert qcow2.stat().st_size < 7 * MIB
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", mounted.latest("web01"), qcow2)


def test_overlay_over_a_backup_leaves_it_as_it_is(mounted: Mounted) -> None:
    """How a machine boots from a backup at once: the backup below, a qcow2 file of changes above."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    overlay = mounted.folder / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backup, overlay)

    run(
        *("qemu-io", "-f", "qcow2", "-c", "write -P 0x43 12000k 128k", "-c", "write -z 0 1M"),
        *("-c", "read -P 0x43 12000k 128k", "-c", "read -P 0 0 1M", "-c", "flush", overlay),
    )

    raw = mounted.folder / "out.raw"
    convert(overlay, raw, source_format="qcow2")
    changed = patched(patched(IMAGE, 12000 << 10, b"C" * (128 << 10)), 0, bytes(MIB))
    assert_same(raw, changed)
    mounted.assert_backups("web01", IMAGE)

    convert(overlay, mounted.staging / "web01.img", "-n", source_format="qcow2")

    mounted.assert_backups("web01", IMAGE, changed)
    assert mounted.stored_bytes("web01") < MIB // 2


def test_overlay_in_the_mount_over_a_backup_in_the_mount(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    overlay = mounted.staging / "overlay.qcow2"

    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backup, overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x44 1M 1M", overlay)

    info = json.loads(
        run("qemu-img", "info", "--output=json", mounted.latest("overlay.qcow2")).stdout
    )
    assert info["virtual-size"] == len(IMAGE)
    raw = mounted.folder / "out.raw"
    convert(mounted.latest("overlay.qcow2"), raw, source_format="qcow2")
    assert_same(raw, patched(IMAGE, MIB, b"D" * MIB))


def test_damaged_overlay_cannot_write_to_the_backup_below(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    refused = run(
        *("qemu-io", "-f", "raw", "-c", "write 0 4k", mounted.latest("web01")), check=False
    )

    assert refused.returncode != 0
    mounted.assert_backups("web01", IMAGE)
