"""Writes, truncations and mappings in any order, through several handles, against a bytearray.

Handles that only write go past the kernel's page cache, the others through it: both must be one
file.
"""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same

SIZE_MAX = 3 * MIB
STEPS = 150
FLAGS = {
    "writer": os.O_WRONLY | os.O_CREAT,
    "both": os.O_RDWR | os.O_CREAT,
    "reader": os.O_RDONLY,
}


class Actor:
    """Does one thing after the other to a file and to its model."""

    def __init__(self, path: Path, chance: random.Random, kinds: list[str]) -> None:
        self.path = path
        self.chance = chance
        self.kinds = kinds
        self.model = bytearray()
        self.descriptors: dict[str, int] = {}
        self.done: list[tuple[object, ...]] = []

    def act(self) -> None:
        actions = [self.write] * 9 + [self.close]
        if self.path.exists():
            actions += [self.truncate, self.truncate, self.read, self.read, self.read, self.look]
            if "both" in self.kinds:
                actions += [self.map, self.map]
        self.chance.choice(actions)()

    def descriptor(self, kind: str) -> int:
        if kind not in self.descriptors:
            self.descriptors[kind] = os.open(self.path, FLAGS[kind], 0o644)
        return self.descriptors[kind]

    def write(self) -> None:
        offset, size = self.chance.randrange(SIZE_MAX), self.size()
        data = self.chance.randbytes(size) if self.chance.random() < 0.8 else bytes(size)
        kind = self.chance.choice(self.kinds)
        os.pwrite(self.descriptor(kind), data, offset)
        self.model.extend(bytes(max(0, offset - len(self.model))))
        self.model[offset : offset + size] = data
        self.done.append(("write", kind, offset, size))

    def truncate(self) -> None:
        nearby = len(self.model) + self.chance.randrange(-100_000, 100_000)
        size = self.chance.choice([max(1, nearby), self.chance.randrange(1, SIZE_MAX)])
        kind = self.chance.choice(self.kinds)
        os.ftruncate(self.descriptor(kind), size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.done.append(("truncate", kind, size))

    def map(self) -> None:
        descriptor = self.descriptor("both")
        if not self.model:
            return
        offset = self.chance.randrange(len(self.model))
        data = self.chance.randbytes(min(self.size(), len(self.model) - offset))
        with mmap.mmap(descriptor, len(self.model)) as mapped:
            mapped[offset : offset + len(data)] = data
            self.model[offset : offset + len(data)] = data
            if self.chance.random() < 0.5:
                mapped.flush()
            assert mapped[:] == self.model, self.done[-8:]
        self.done.append(("map", offset, len(data)))

    def read(self) -> None:
        kind = self.chance.choice(["reader", *(kind for kind in self.kinds if kind == "both")])
        offset, size = self.chance.randrange(SIZE_MAX), self.size()
        found = os.pread(self.descriptor(kind), size, offset)
        assert found == self.model[offset : offset + size], (kind, offset, size, self.done[-8:])
        assert os.fstat(self.descriptor(kind)).st_size == len(self.model), self.done[-8:]

    def look(self) -> None:
        assert self.path.read_bytes() == self.model, self.done[-8:]

    def close(self) -> None:
        if self.descriptors:
            kind = self.chance.choice(sorted(self.descriptors))
            os.close(self.descriptors.pop(kind))
            self.done.append(("close", kind))

    def close_all(self) -> None:
        while self.descriptors:
            self.close()

    def size(self) -> int:
        return self.chance.choice([1, 100, 4096, 65536, self.chance.randrange(1, 300_000)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kinds", [["writer"], ["both"], ["writer", "both"]])
def test_file_is_what_was_written(mounted: Mounted, kinds: list[str], seed: int) -> None:
    target = mounted.staging / "web01.img"
    actor = Actor(target, random.Random(seed), kinds)

    for step in range(STEPS):
        actor.act()
        if step % 50 == 49:
            actor.close_all()
            mounted.remount()
    actor.write()
    actor.close_all()

    assert_same(target, bytes(actor.model))
    if mounted.drafts():
        mounted.command("publish", "web01.img")
    assert_same(mounted.latest("web01"), bytes(actor.model))
