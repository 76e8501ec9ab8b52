"""A head that is patched, truncated and grown while others read it through the mount.

A reader gets, at each place, bytes that were there at some time, and no error; who opens the file
afterwards, and each backup, has what the writer left.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, random_bytes, run

SIZE = 3 * MIB + 1000
SECTOR = 512
SECONDS = float(os.environ.get("BACKUPFS_HEAD_SECONDS", "4"))
SEED = int(os.environ.get("BACKUPFS_TEST_SEED", "7"))


class Head:
    """What the head holds, and all that each of its sectors ever held: a number, in every byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = bytearray(b"\x01" * SIZE)
        self.seen = [{0, 1} for _ in range(2 * SIZE // SECTOR)]
        self.changes = 0

    def change(self, descriptor: int, rng: random.Random) -> None:
        """Once, and the model before it, so that no reader is ahead of the model."""
        self.changes += 1
        what = rng.choices(("patch", "shrink", "grow", "empty"), (12, 3, 3, 1))[0]
        if what == "patch":
            first = rng.randrange(max(1, len(self.content) // SECTOR))
            count = rng.choice((1, 3, 128, 400))
            value = self.changes % 255 + 1
            data = bytes([value]) * (SECTOR * count)
            start = first * SECTOR
            for sector in range(first, first + count):
                self.seen[sector].add(value)
            self.content[len(self.content) :] = bytes(max(0, start - len(self.content)))
            self.content[start : start + len(data)] = data
            os.pwrite(descriptor, data, start)
        else:
            size = {"shrink": len(self.content) // 2, "grow": SIZE, "empty": 0}[what]
            size -= size % SECTOR
            del self.content[size:]
            self.content += bytes(size - len(self.content))
            os.ftruncate(descriptor, size)

    def check(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), SECTOR):
            piece = data[start : start + SECTOR]
            sector = (offset + start) // SECTOR
            assert set(piece) <= self.seen[sector], (sector, set(piece), self.seen[sector])


def read_until(
    head: Head, is_over: Callable[[], bool], seed: int, problems: list[str], how: str
) -> None:
    """Reads at random, through one descriptor for a while, or whole files."""
    rng = random.Random(seed)
    try:
        while not is_over() and not problems:
            with head.path.open("rb", buffering=0) as file:
                for _ in range(rng.randint(1, 20)):
                    if how == "whole":
                        os.lseek(file.fileno(), 0, os.SEEK_SET)
                        offset = 0
                        while data := os.read(file.fileno(), 128 * 1024):
                            head.check(offset, data)
                            offset += len(data)
                        break
                    offset = rng.randrange(SIZE // SECTOR) * SECTOR
                    head.check(offset, os.pread(file.fileno(), rng.choice((4096, 1 << 17)), offset))
    except Exception as error:
        problems.append(f"{how}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR], ids=["write-only", "read-write"])
def test_readers_of_a_head_that_changes_see_what_was_there_at_some_time(
    mounted: Mounted, flags: int
) -> None:
    rng = random.Random(SEED)
    head = Head(mounted.staging / "vm.img")
    run("cp", mounted.image(bytes(head.content)), head.path)
    first = mounted.latest("vm").resolve()
    deadline = time.monotonic() + SECONDS
    problems: list[str] = []
    readers = [
        threading.Thread(
            target=read_until,
            args=(head, lambda: time.monotonic() > deadline, SEED + n, problems, how),
        )
        for n, how in enumerate(("places", "places", "whole"))
    ]
    for reader in readers:
        reader.start()
    while time.monotonic() < deadline and not problems:
        descriptor = os.open(head.path, flags)
        try:
            for _ in range(rng.randint(1, 12)):
                head.change(descriptor, rng)
                if rng.random() < 0.1:
                    os.fsync(descriptor)
        finally:
            os.close(descriptor)
        assert_same(head.path, bytes(head.content))
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive(), "a reader hangs"

    assert problems == []
    assert head.changes > 20
    assert_same(first, b"\x01" * SIZE)
    draft = mounted.drafts().get("vm.img")
    if draft is None:
        assert_same(mounted.latest("vm"), bytes(head.content))
    else:
        assert draft["state"] in ("held", "settling"), draft
    mounted.remount()
    assert_same(head.path, bytes(head.content))
    mounted.command("verify")


def test_a_reader_that_holds_on_sees_the_end_of_all_changes(mounted: Mounted) -> None:
    """Through a descriptor that was opened, and read in full, before the file was changed."""
    content = random_bytes(SIZE)
    path = mounted.staging / "vm.img"
    run("cp", mounted.image(content), path)
    with path.open("rb", buffering=0) as reader:
        assert reader.read() == content
        with path.open("r+b", buffering=0) as writer:
            writer.seek(MIB)
            writer.write(b"\x77" * MIB)
            writer.truncate(2 * MIB + 5)
            writer.truncate(SIZE)
        expected = content[:MIB] + b"\x77" * MIB + content[2 * MIB : 2 * MIB + 5]

        found = os.pread(reader.fileno(), SIZE + 1, 0)

        assert found == expected.ljust(SIZE, b"\0")
    mounted.assert_kept("vm", content, expected.ljust(SIZE, b"\0"))
