"""Small types that every layer shares; imports nothing of ours.

Ids are distinct types over ``bytes`` so that the type checker refuses one where another is due.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NewType

Buffer = bytes | bytearray | memoryview

BlobId = NewType(
    "BlobId", bytes
)  # 32 bytes: keyed BLAKE3 of a chunk or node as it was before storing
PackId = NewType("PackId", bytes)  # 16 random bytes
ObjectName = NewType("ObjectName", str)  # a relative path of plain ASCII parts, "packs/ab/abcd…"

BLOB_ID_SIZE = 32
PACK_ID_SIZE = 16

# The id that stands for zeros, of a chunk and of a node of any level: never stored nor looked up.
HOLE = BlobId(bytes(BLOB_ID_SIZE))

# Images beyond this are refused (1 PiB); it keeps every offset far inside 63 bits.
IMAGE_SIZE_MAX = 1 << 50

# Called with the number of bytes done since the last call; must return quickly.
Progress = Callable[[int], None]


def no_progress(_size: int) -> None:
    """A ``Progress`` for callers that do not watch."""


def ceil_div(dividend: int, divisor: int) -> int:
    """Quotient rounded up, for counts of pieces that must cover a whole."""
    return -(-dividend // divisor)
