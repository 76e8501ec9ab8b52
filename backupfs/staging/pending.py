"""Chunks of a draft that have no id yet: written in part, waiting for a worker, or with one.

Pure bookkeeping, guarded by its owner's lock. A chunk written in part waits for its rest as long as
there is room; then, or at a checkpoint, it goes to the workers, who complete it from what lay there
before. A chunk once *queued* never changes; a later write to its place makes a copy.
"""

from __future__ import annotations

from collections import OrderedDict

from backupfs.repository.workers import Share
from backupfs.staging.extents import Extents
from backupfs.types import Buffer


class PendingChunk:
    """The bytes written so far of one chunk."""

    __slots__ = ("data", "extents", "filling", "queued")

    def __init__(self, data: Buffer, extents: Extents | None, *, filling: bool) -> None:
        self.data = data
        self.extents = extents  # None: all of it was written
        self.filling = filling  # complete means: go; else it was complete before and may change on
        self.queued = False

    def overlay(self, whole: bytearray) -> None:
        """Write what was written over a chunk's earlier bytes."""
        view = memoryview(self.data)
        ranges = [(0, len(view))] if self.extents is None else self.extents.ranges()
        for start, end in ranges:
            whole[start:end] = view[start:end]

    def frozen(self) -> PendingChunk:
        """Itself if it will not change any more, else a copy."""
        if self.queued:
            return self
        extents = self.extents and self.extents.copy()
        return PendingChunk(bytes(self.data), extents, filling=False)


Batch = list[tuple[int, PendingChunk]]


class PendingChunks:
    """All pending chunks of one draft, by chunk index."""

    def __init__(self, *, chunk_size: int, batch_count: int, share: Share) -> None:
        self._chunk_size = chunk_size
        self._batch_count = batch_count
        self._share = share
        self._chunks: dict[int, PendingChunk] = {}
        self._open: OrderedDict[int, PendingChunk] = OrderedDict()  # not queued, oldest first
        self._batch: Batch = []

    def put(self, offset: int, view: memoryview) -> None:
        """Take bytes written at ``offset`` of the image; they must not change afterwards."""
        while view:
            chunk_index, within = divmod(offset, self._chunk_size)
            piece = view[: self._chunk_size - within]
            if len(piece) == self._chunk_size:
                self._close(chunk_index)
                self._queue(chunk_index, PendingChunk(piece, None, filling=True))
            else:
                self._put_part(chunk_index, within, piece)
            offset += len(piece)
            view = view[len(piece) :]

    def take_batches(self, *, everything: bool) -> list[Batch]:
        """Batches that are due for the workers; with ``everything`` also what is not complete."""
        if everything:
            while self._open:
                self._queue_oldest()
        batches = []
        while len(self._batch) >= self._batch_count or (everything and self._batch):
            batches.append(self._batch[: self._batch_count])
            self._batch = self._batch[self._batch_count :]
        return batches

    def current(self, batch: Batch) -> Batch:
        """Those of ``batch`` that were not written again, nor cut off, meanwhile."""
        return [item for item in batch if self._chunks.get(item[0]) is item[1]]

    def settle(self, batch: Batch) -> None:
        """Those of ``batch`` that still count are in the tree now."""
        for chunk_index, _chunk in self.current(batch):
            del self._chunks[chunk_index]

    def drop_from(self, chunk_count: int) -> None:
        """Forget chunks from ``chunk_count`` on; jobs under way find that out by ``current``."""
        for chunk_index in [index for index in self._chunks if index >= chunk_count]:
            self._close(chunk_index)
            del self._chunks[chunk_index]
        self._batch = [item for item in self._batch if item[0] < chunk_count]

    def snapshot(self, first: int, count: int) -> dict[int, PendingChunk]:
        """The pending ones of ``count`` chunks from ``first``, as they are now."""
        return {
            chunk_index: self._chunks[chunk_index].frozen()
            for chunk_index in range(first, first + count)
            if chunk_index in self._chunks
        }

    def _put_part(self, chunk_index: int, within: int, piece: memoryview) -> None:
        chunk = self._chunks.get(chunk_index)
        if chunk is None:
            chunk = PendingChunk(bytearray(self._chunk_size), Extents(), filling=True)
        elif chunk.queued:
            extents = chunk.extents and chunk.extents.copy()
            chunk = PendingChunk(bytearray(chunk.data), extents, filling=extents is not None)
        assert isinstance(chunk.data, bytearray)
        chunk.data[within : within + len(piece)] = piece
        if chunk.extents is not None:
            chunk.extents.add(within, within + len(piece))
            if chunk.extents.covers(self._chunk_size):
                chunk.extents = None
        if chunk.extents is None and chunk.filling:
            self._close(chunk_index)
            self._queue(chunk_index, chunk)
        else:
            self._keep_open(chunk_index, chunk)

    def _queue(self, chunk_index: int, chunk: PendingChunk) -> None:
        chunk.queued = True
        self._chunks[chunk_index] = chunk
        self._batch.append((chunk_index, chunk))

    def _keep_open(self, chunk_index: int, chunk: PendingChunk) -> None:
        if not self._open:
            self._share.join()
        self._chunks[chunk_index] = self._open[chunk_index] = chunk
        self._open.move_to_end(chunk_index)
        while len(self._open) > self._share.part():
            self._queue_oldest()

    def _queue_oldest(self) -> None:
        chunk_index, chunk = next(iter(self._open.items()))
        self._close(chunk_index)
        self._queue(chunk_index, chunk)

    def _close(self, chunk_index: int) -> None:
        """Take a chunk out of the open ones, if it is among them."""
        if self._open.pop(chunk_index, None) is not None and not self._open:
            self._share.leave()
