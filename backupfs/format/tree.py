"""The shape of an image's tree: levels, spans and the bytes of a node (pure).

A node is a row of ``FANOUT`` ids of the level below; level 0 are the chunks, level 1 the nodes right
above them. A node all of whose ids are holes is itself the hole, so absent ranges cost nothing
at any level. An image of ``size`` bytes has the least height, at least 1, whose root spans it.
"""

from __future__ import annotations

from collections.abc import Sequence

from backupfs.types import BLOB_ID_SIZE, HOLE, BlobId, Buffer, ceil_div

FANOUT = 128
NODE_SIZE = FANOUT * BLOB_ID_SIZE
HOLE_NODE = bytes(NODE_SIZE)


def chunk_count(size: int, *, chunk_size: int) -> int:
    """Chunks that an image of ``size`` bytes has; the last may reach past its end, filled with zeros."""
    return ceil_div(size, chunk_size)


def height(size: int, *, chunk_size: int) -> int:
    """Levels of nodes above the chunks of an image of ``size`` bytes, at least 1."""
    levels = 1
    while span(levels) < chunk_count(size, chunk_size=chunk_size):
        levels += 1
    return levels


def span(level: int) -> int:
    """Chunks below one blob of ``level``."""
    return int(FANOUT**level)


def slot(chunk_index: int, *, level: int) -> int:
    """Which entry of its level-``level`` node leads to a chunk."""
    return chunk_index // span(level - 1) % FANOUT


def node_index(chunk_index: int, *, level: int) -> int:
    """Which of the nodes of ``level``, counted from the image's start, lies above a chunk."""
    return chunk_index // span(level)


def node_entry(node: Buffer, index: int) -> BlobId:
    """The id at place ``index`` of a node's bytes."""
    start = index * BLOB_ID_SIZE
    return BlobId(bytes(node[start : start + BLOB_ID_SIZE]))


def node_entries(node: Buffer) -> list[BlobId]:
    """All ids of a node's bytes, holes among them."""
    data = bytes(node)
    return [
        BlobId(data[start : start + BLOB_ID_SIZE]) for start in range(0, NODE_SIZE, BLOB_ID_SIZE)
    ]


def encode_node(entries: Sequence[BlobId]) -> bytes:
    """A node's bytes; missing entries at the end are holes."""
    assert len(entries) <= FANOUT
    return b"".join(entries).ljust(NODE_SIZE, b"\0")


def data_count(node: Buffer) -> int:
    """Entries of a node that are no holes."""
    return FANOUT - node_entries(node).count(HOLE)
