"""What changed within chunks is all that is stored, whichever program brings it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import (
    CHUNK_SIZE,
    MIB,
    Mounted,
    assert_same,
    becomes,
    needs,
    patched,
    random_bytes,
    run,
)

IMAGE = random_bytes(8 * MIB, seed=1)
PLACES = [CHUNK_SIZE * place + 12_288 for place in range(0, 128, 5)]
BLOCK = 4096
# What was written, a tenth more, and the tree's two nodes.
STORED_MAX = len(PLACES) * BLOCK * 11 // 10 + 2 * BLOCK


def changed(image: bytes, seed: int) -> bytes:
    for place in PLACES:
        image = patched(image, place, random_bytes(BLOCK, seed=seed + place))
    return image


def by_cp(mounted: Mounted, source: Path, target: Path) -> None:
    run("cp", source, target)


def by_mv(mounted: Mounted, source: Path, target: Path) -> None:
    run("cp", source, target.with_name(".web01.img"))
    run("mv", target.with_name(".web01.img"), target)


def by_rsync(mounted: Mounted, source: Path, target: Path) -> None:
    run("rsync", "--times", "--ignore-times", source, target)


def by_rsync_in_place(mounted: Mounted, source: Path, target: Path) -> None:
    run("rsync", "--inplace", "--no-whole-file", "--ignore-times", source, target)


def by_dd(mounted: Mounted, source: Path, target: Path) -> None:
    content = source.read_bytes()
    descriptor = os.open(target, os.O_WRONLY)
    try:
        for place in PLACES:
            os.pwrite(descriptor, content[place : place + BLOCK], place)
    finally:
        os.close(descriptor)


def by_qemu(mounted: Mounted, source: Path, target: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, target)


def by_command(mounted: Mounted, source: Path, target: Path) -> None:
    mounted.command("backup", source, "--volume", "web01")


def after_forgetting_the_head(mounted: Mounted, source: Path, target: Path) -> None:
    target.unlink()
    run("cp", source, target)


def after_a_new_mount(mounted: Mounted, source: Path, target: Path) -> None:
    mounted.remount()
    run("cp", source, target)


@pytest.mark.parametrize(
    "bring",
    [
        by_cp,
        by_mv,
        pytest.param(by_rsync, marks=needs("rsync")),
        pytest.param(by_rsync_in_place, marks=needs("rsync")),
        by_dd,
        pytest.param(by_qemu, marks=needs("qemu-img")),
        by_command,
        after_forgetting_the_head,
        after_a_new_mount,
    ],
    ids=lambda bring: bring.__name__,
)
def test_an_incremental_stores_little_more_than_what_was_written(
    mounted: Mounted, bring: Callable[[Mounted, Path, Path], None]
) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(IMAGE), target)
    contents = [IMAGE]
    for seed in (2, 3):
        contents.append(changed(contents[-1], seed))

        bring(mounted, mounted.image(contents[-1]), target)

        # What a command did is shown a little later.
        assert becomes(lambda: len(mounted.names("web01")) == len(contents), seconds=10)
        assert len(PLACES) * BLOCK < mounted.stored_bytes("web01") < STORED_MAX
    mounted.assert_backups("web01", *contents)
    mounted.remount()
    mounted.assert_backups("web01", *contents)
    assert mounted.command("verify").returncode == 0


def test_differences_outlive_what_they_are_to(mounted: Mounted) -> None:
    target = mounted.staging / "web01.img"
    contents = [IMAGE]
    run("cp", mounted.image(IMAGE), target)
    for seed in (2, 3, 4):
        contents.append(changed(contents[-1], seed))
        run("cp", mounted.image(contents[-1]), target)
    order = list(range(4))
    random.Random(5).shuffle(order)
    names = mounted.names("web01")
    target.unlink()

    for place in order[:3]:
        (mounted.volumes / "web01" / names[place]).unlink()
        mounted.command("gc")
        mounted.remount()
        for left in order[order.index(place) + 1 :]:
            assert_same(mounted.volumes / "web01" / names[left], contents[left])

    mounted.assert_backups("web01", contents[order[3]])
    mounted.command("verify")
