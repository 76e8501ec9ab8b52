"""Images for tests: bytes to back up, and what a restore gave back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from backupfs.service import Record, Service

CHUNK_SIZE = 16 << 10  # the smallest: small images get tall trees
PACK_SIZE = 1 << 20


def noise(size: int, *, seed: int) -> bytes:
    """``size`` bytes that do not compress; the same for the same seed."""
    return random.Random(seed).randbytes(size)


def alike(family: int, number: int) -> bytes:
    """A chunk that differs in little from the others of its family."""
    chunk = bytearray(noise(CHUNK_SIZE, seed=family))
    start = number * 3001
    chunk[start : start + 700 * number] = noise(700 * number, seed=number)
    return bytes(chunk)


class BytesSource:
    """An image in memory, as ``ImageSource``: ``data`` from offset 0, handed out in pieces."""

    def __init__(self, data: bytes, *, piece_size: int = 100_000, name: str = "image") -> None:
        self.name = name
        self.size_hint: int | None = len(data)
        self._data = data
        self._piece_size = piece_size

    def extents(self) -> Iterator[tuple[int, bytes]]:
        for offset in range(0, len(self._data), self._piece_size):
            yield offset, self._data[offset : offset + self._piece_size]

    def size(self) -> int:
        return len(self._data)


class SparseSource:
    """An image of ``size`` bytes with some pieces of data, (offset, bytes), in ascending order."""

    def __init__(self, size: int, pieces: Sequence[tuple[int, bytes]]) -> None:
        self.name = "sparse image"
        self.size_hint: int | None = None
        self._size = size
        self._pieces = pieces

    def extents(self) -> Iterator[tuple[int, bytes]]:
        yield from self._pieces

    def size(self) -> int:
        return self._size


class BytesTarget:
    """What a restore writes, as ``ImageTarget``; checks that it comes from start to end."""

    def __init__(self) -> None:
        self.name = "target"
        self.data = bytearray()
        self.is_finished = False

    def write(self, offset: int, data: bytes) -> None:
        assert offset == len(self.data)
        self.data += data

    def write_hole(self, offset: int, size: int) -> None:
        self.write(offset, bytes(size))

    def finish(self, size: int) -> None:
        assert size == len(self.data)
        self.is_finished = True


def back_up(service: Service, data: bytes, *, volume: str = "vm") -> Record:
    """Back ``data`` up as the next backup of ``volume``."""
    return service.backup(BytesSource(data), volume=volume)


def restored(service: Service, record: Record) -> bytes:
    """A backup's whole image."""
    target = BytesTarget()
    service.restore(record, target)
    assert target.is_finished
    return bytes(target.data)


def is_clean(service: Service) -> bool:
    """Whether every byte of every backup, read from the packs, is what it should be."""
    report = service.verify()
    return report.complete and not report.damage
