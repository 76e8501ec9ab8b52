"""The bytes of one backup, read at any place; every one of them proven."""

from __future__ import annotations

from collections.abc import Iterator

from backupfs.format.record import Record
from backupfs.format.tree import FANOUT
from backupfs.repository.blobs import BlobReader
from backupfs.repository.images import Root, cached_leaf_ids, leaf_ids, leaf_places
from backupfs.types import HOLE, BlobId

# Offset, data (None for a hole) and size in bytes.
ImageExtent = tuple[int, bytes | None, int]

ZEROS = bytes(1 << 20)  # the most that the kernel asks for at a time, answered without a copy


class Image:
    """Thread-safe; needs no closing."""

    def __init__(self, reader: BlobReader, record: Record) -> None:
        self._reader = reader
        self.root = Root(record.root, record.height)
        self.chunk_size = record.chunk_size
        self.size = record.size

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer only at the image's end.

        Raises: DamageError, StorageError.
        """
        first, count, start, size = self._range(offset, size)
        if not size:
            return b""
        ids = self.chunk_ids(first, count)
        return _zeros(ids, size) or _slice(self._reader.chunks(ids), start, size)

    def read_cached(self, offset: int, size: int) -> bytes | None:
        """The same if all of it is in memory, or None. Never waits."""
        first, count, start, size = self._range(offset, size)
        if not size:
            return b""
        ids = cached_leaf_ids(self._reader, self.root, first, count)
        if ids is None:
            return None
        if zeros := _zeros(ids, size):
            return zeros
        chunks = []
        for blob_id in ids:
            chunk = self._reader.cached_chunk(blob_id)
            if chunk is None:
                return None
            chunks.append(chunk)
        return _slice(chunks, start, size)

    def piece_of_chunk(self, offset: int, size: int) -> tuple[int, int, int] | None:
        """A range, cut to the image, as chunk index, place within the chunk and size; None where it
        lies in more than one chunk, or in none."""
        first, count, start, size = self._range(offset, size)
        return (first, start, size) if count == 1 else None

    def whole_chunks(self, offset: int, size: int) -> tuple[int, int, int] | None:
        """A range, cut to the image, as first chunk, count of chunks and size, where it is made of
        whole chunks, but for the image's end; else None."""
        first, count, start, size = self._range(offset, size)
        ends_whole = not size % self.chunk_size or offset + size == self.size
        return (first, count, size) if count and not start and ends_whole else None

    def chunk_ids(self, first: int, count: int) -> list[BlobId]:
        """Ids of chunks, for reading ahead. Raises: DamageError, StorageError."""
        return leaf_ids(self._reader, self.root, first, count)

    def extents(self, offset: int, size: int) -> list[ImageExtent]:
        """What a range holds that begins at a multiple of the chunk size, in order.

        Raises: DamageError, StorageError.
        """
        first, count, _start, size = self._range(offset, size)
        end = offset + size
        ids = self.chunk_ids(first, count)
        chunks = iter(self._reader.chunks([blob_id for blob_id in ids if blob_id != HOLE]))
        found: list[ImageExtent] = []
        for place, blob_id in enumerate(ids):
            start = (first + place) * self.chunk_size
            length = min(self.chunk_size, end - start)
            data = None if blob_id == HOLE else next(chunks)[:length]
            found.append((start, data, length))
        return found

    def data_runs(self, *, gap_min: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the stretches that may hold data, in order and in whole leaves of the tree;
        between them lie holes of at least ``gap_min`` bytes. No leaf is read for it.

        Raises: DamageError, StorageError.
        """
        start = end = 0
        for first in leaf_places(self._reader, self.root):
            offset = first * self.chunk_size
            if offset >= self.size:
                break
            if offset - end >= gap_min:
                if start < end:
                    yield start, end
                start = offset
            end = min(self.size, offset + FANOUT * self.chunk_size)
        if start < end:
            yield start, end

    def _range(self, offset: int, size: int) -> tuple[int, int, int, int]:
        """First chunk, count of chunks, offset within them, and size cut to the image."""
        size = max(0, min(size, self.size - offset))
        first = offset // self.chunk_size
        count = (offset + size - 1) // self.chunk_size - first + 1 if size else 0
        return first, count, offset - first * self.chunk_size, size


def _zeros(ids: list[BlobId], size: int) -> bytes | None:
    """``size`` bytes of nothing but holes, mostly without making them; None where there are data."""
    if ids.count(HOLE) < len(ids):
        return None
    return ZEROS[:size] if size <= len(ZEROS) else bytes(size)


def _slice(chunks: list[bytes], start: int, size: int) -> bytes:
    if len(chunks) == 1:
        return chunks[0][start : start + size]
    whole = b"".join(chunks)
    return whole if len(whole) == size else whole[start : start + size]
