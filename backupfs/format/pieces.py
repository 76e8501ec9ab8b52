"""Which pieces of a chunk are other than those of its base, and a chunk made from both (pure).

A difference holds the pieces that changed, and a map that says which these are. 512 bytes is a disk's
smallest sector: what a disk writes is made of whole ones. Layout in docs/format.md, "Method 3".

In here the map has one byte a piece: 1 where it changed, 0 elsewhere.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Iterator

from backupfs.types import Buffer

PIECE_SIZE = 512
_MAP_BYTE = 8 * PIECE_SIZE  # of a chunk, for one byte of the map as it is stored

_TO_DIGITS = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")


def find_changed(chunk: Buffer, base: Buffer) -> bytes:
    """The map of two chunks of one size."""
    split = _splitter(len(chunk)).unpack
    return bytes(map(operator.ne, split(chunk), split(base)))


def pick(chunk: Buffer, changed: bytes) -> bytes:
    """The pieces that changed, one after the other; of a chunk or of its base."""
    view = memoryview(chunk)
    return b"".join([view[start:end] for start, end in _ranges(changed)])


def put(base: Buffer, changed: bytes, picked: Buffer) -> bytes:
    """The chunk that has ``picked`` where it changed, and is as its base elsewhere."""
    chunk, taken = bytearray(base), 0
    for start, end in _ranges(changed):
        chunk[start:end] = picked[taken : taken + end - start]
        taken += end - start
    return bytes(chunk)


def _ranges(changed: bytes) -> Iterator[tuple[int, int]]:
    """The bytes that changed, from and to; neighbouring pieces as one range."""
    start = changed.find(1)
    while start >= 0:
        end = changed.find(0, start)
        if end < 0:
            end = len(changed)
        yield start * PIECE_SIZE, end * PIECE_SIZE
        start = changed.find(1, end)


def map_size(chunk_size: int) -> int:
    """Bytes that the map of such a chunk takes where it is stored. Raises: ValueError, for a size
    that no chunk has."""
    if not chunk_size or chunk_size % _MAP_BYTE:
        raise ValueError(f"a chunk of {chunk_size} bytes has no pieces")
    return chunk_size // _MAP_BYTE


def pack_map(changed: bytes) -> bytes:
    """The map as it is stored: a bit a piece, the first one in the highest bit of the first byte."""
    return int(changed.translate(_TO_DIGITS), 2).to_bytes(len(changed) // 8, "big")


def unpack_map(stored: Buffer) -> bytes:
    """The map that was stored so."""
    digits = f"{int.from_bytes(stored, 'big'):0{8 * len(stored)}b}"
    return digits.encode().translate(_FROM_DIGITS)


@functools.lru_cache(maxsize=8)
def _splitter(size: int) -> struct.Struct:
    return struct.Struct(f"{PIECE_SIZE}s" * (size // PIECE_SIZE))
