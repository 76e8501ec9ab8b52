"""Small reads here and there, by one program and by several at once, with nothing in any cache."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

from mounted import MIB, Mounted, random_bytes, run

PAGE_SIZE = 4096
CONTENT = b"".join(
    random_bytes(256 << 10, seed) + bytes(64 << 10) + bytes([seed]) * (192 << 10)
    for seed in range(48)
)


def wrong_pages(path: Path, content: bytes, *, seed: int, count: int = 400) -> list[int]:
    """Offsets that did not read as ``content``."""
    rng = random.Random(seed)
    offsets = [rng.randrange(len(content) // PAGE_SIZE) * PAGE_SIZE for _ in range(count)]
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return [
            offset
            for offset in offsets
            if os.pread(file, PAGE_SIZE, offset) != content[offset : offset + PAGE_SIZE]
        ]
    finally:
        os.close(file)


def readers_at_once(path: Path, content: bytes, *, count: int) -> list[list[int]]:
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda n=number: found.append(wrong_pages(path, content, seed=n)))
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_reads_at_once_get_the_right_bytes(mounted: Mounted) -> None:
    run("cp", mounted.image(CONTENT), mounted.staging / "vm.img")
    mounted.remount()

    assert readers_at_once(mounted.latest("vm"), CONTENT, count=4) == [[]] * 4


def test_reads_while_something_is_written_get_the_right_bytes(mounted: Mounted) -> None:
    run("cp", mounted.image(CONTENT), mounted.staging / "vm.img")
    mounted.remount()
    latest = mounted.latest("vm")
    assert wrong_pages(latest, CONTENT, seed=1) == []

    with (mounted.staging / "other.img").open("wb") as writer:
        writer.write(random_bytes(MIB, 99))
        writer.flush()
        assert readers_at_once(latest, CONTENT, count=2) == [[]] * 2

    assert wrong_pages(latest, CONTENT, seed=2) == []


def test_reads_of_chunks_that_gc_has_moved_get_the_right_bytes(mounted: Mounted) -> None:
    """Their places, and descriptors of the packs they lay in, are in the mount's memory."""
    run("cp", mounted.image(CONTENT + random_bytes(40 * MIB, 100)), mounted.staging / "whole.img")
    run("cp", mounted.image(CONTENT), mounted.staging / "part.img")
    mounted.remount()
    part = mounted.latest("part")
    assert wrong_pages(part, CONTENT, seed=1) == []
    (mounted.staging / "whole.img").unlink()
    mounted.latest("whole").resolve().unlink()

    mounted.command("gc")

    assert readers_at_once(part, CONTENT, count=2) == [[]] * 2
