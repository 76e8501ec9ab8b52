"""A draft: the content of one staged file, being written over a tree that does not change.

Writes land in *pending* chunks by offset; chunks that are complete go to the workers in batches
of about 1 MiB and become ids in the tree. ``checkpoint`` makes all of it durable and is the only
thing that does. A write that could not be stored undoes the draft to its last checkpoint.

Two locks, always taken in this order: ``_tree_lock`` guards the tree and may be held during I/O,
so only worker threads take it; ``_lock`` guards the rest and is held for moments, so that the event
loop may take it too. Holds: a chunk in ``_pending`` counts instead of what the tree says of it; a
chunk is pending or in the tree, never neither; bytes of the last chunk beyond the size are zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from backupfs.errors import BackupfsError, ImageTooLarge, StorageUnavailable
from backupfs.format import tree
from backupfs.repository.blobs import BlobReader
from backupfs.repository.chunks import ChunkStore
from backupfs.repository.images import EMPTY, Root, TreeEditor, leaf_ids
from backupfs.repository.workers import Credit, Share, Workers
from backupfs.staging.pending import Batch, PendingChunks
from backupfs.types import HOLE, IMAGE_SIZE_MAX, BlobId, Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A draft's content as of a checkpoint: durable, and all that a backup of it needs."""

    root: Root
    size: int  # bytes
    data_count: int  # chunks that are no holes


NO_CONTENT = Content(root=EMPTY, size=0, data_count=0)


class Draft:
    """Content being written. Thread-safe; ``write`` and ``size`` never wait."""

    def __init__(
        self,
        *,
        reader: BlobReader,
        store: ChunkStore,
        workers: Workers,
        credit: Credit,
        share: Share,
        content: Content = NO_CONTENT,
        alike: Root = EMPTY,
    ) -> None:
        """``alike``: see ``resembles``."""
        self._reader = reader
        self._store = store
        self._workers = workers
        self._credit = credit
        self._chunk_size = store.chunk_size
        self._lock = threading.Lock()
        self._tree_lock = threading.Lock()
        self._checkpoint_lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._tree = self._tree_of(content)
        self._saved = content
        self._alike = alike
        self._size = content.size
        self._pending = PendingChunks(
            chunk_size=store.chunk_size, batch_count=store.batch_count, share=share
        )
        self._jobs: set[int] = set()
        self._job_number = 0
        self._changes = 0
        self._saved_changes = 0
        self._since = store.failures
        self._error: BackupfsError | None = None
        self._added_size = 0

    @property
    def size(self) -> int:
        """Bytes of the image as written so far."""
        return self._size

    @property
    def saved(self) -> Content:
        """What the last checkpoint made durable."""
        return self._saved

    @property
    def is_dirty(self) -> bool:
        """Whether something was written after the last checkpoint."""
        return self._changes != self._saved_changes

    @property
    def error(self) -> BackupfsError | None:
        """Why something written was lost; until ``forgive`` every write and checkpoint says so."""
        return self._error

    def resembles(self, root: Root) -> None:
        """What will be written is likely much like that image, so it is stored as differences to it.

        Only a hint: the image may go. Content that is cleared keeps it.
        """
        self._alike = root

    def forgive(self) -> None:
        """Take writes again after an error; the content is that of the last checkpoint."""
        self._roll_back()
        with self._lock:
            self._error = None

    def take_added_size(self) -> int:
        """Bytes the repository grew by since this was last asked."""
        with self._lock:
            added, self._added_size = self._added_size, 0
        with self._tree_lock:
            added += self._tree.added_size
            self._tree.added_size = 0
        return added

    # -- writing -------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``. Never waits: callers bound themselves by the credit.

        ``data`` must not change afterwards. Nothing is durable before ``checkpoint``.

        Raises:
            ImageTooLarge: nothing was written.
            StorageError: something written earlier was lost.
        """
        end = offset + len(data)
        if end > IMAGE_SIZE_MAX:
            raise ImageTooLarge(size=end, limit=IMAGE_SIZE_MAX)
        with self._lock:
            self._check_error()
            self._begin_change()
            self._pending.put(offset, memoryview(data))
            self._size = max(self._size, end)
            self._submit(self._pending.take_batches(everything=False))

    def truncate(self, size: int) -> None:
        """Set the size; what is cut off, or lies between, is zeros. May wait for I/O.

        Raises:
            ImageTooLarge: nothing was changed.
            DamageError, StorageError: the content is that of the last checkpoint.
        """
        if size > IMAGE_SIZE_MAX:
            raise ImageTooLarge(size=size, limit=IMAGE_SIZE_MAX)
        try:
            self._truncate(size)
        except BackupfsError as error:
            self._fail(error)
            self._roll_back()
            raise

    def _truncate(self, size: int) -> None:
        with self._tree_lock:
            with self._lock:
                self._check_error()
                if size == self._size:
                    return
                self._begin_change()
                if size >= self._size:
                    self._size = size
                    return
                self._pending.drop_from(tree.chunk_count(size, chunk_size=self._chunk_size))
            self._tree.cut(tree.chunk_count(size, chunk_size=self._chunk_size))
            with self._lock:
                within = size % self._chunk_size
                if within:
                    self._pending.put(size, memoryview(bytes(self._chunk_size - within)))
                self._size = size
                self._submit(self._pending.take_batches(everything=False))

    def clear(self) -> None:
        """Become empty, as O_TRUNC wants it; forgets an earlier error. May wait for I/O."""
        with self._tree_lock, self._lock:
            self._pending.drop_from(0)
            self._tree.cut(0)
            self._error = None
            self._since = self._store.failures  # nothing stored before is relied on any more
            self._changes += 1
            self._size = 0

    def checkpoint(self) -> Content:
        """Make all that was written before this call durable; may wait long.

        On an error the content is what the last checkpoint made durable. Raises: BackupfsError.
        """
        with self._checkpoint_lock:
            try:
                return self._checkpoint()
            except BackupfsError as error:
                self._fail(error)
                self._roll_back()
                raise

    def _checkpoint(self) -> Content:
        with self._lock:
            self._check_error()
            if not self.is_dirty:
                return self._saved
            changes, since = self._changes, self._since
            self._submit(self._pending.take_batches(everything=True))
            waiting = set(self._jobs)
            self._idle.wait_for(lambda: not waiting & self._jobs)
            self._check_error()
        with self._tree_lock:
            with self._lock:
                size = self._size
            self._tree.fit(tree.height(size, chunk_size=self._chunk_size))
            root = self._tree.flush()
            content = Content(root=root, size=size, data_count=self._tree.data_count)
        self._store.seal(since=since)
        with self._lock:
            self._saved = content
            self._saved_changes = changes
        return content

    def _begin_change(self) -> None:
        if not self.is_dirty:
            self._since = self._store.failures
        self._changes += 1

    def _check_error(self) -> None:
        if self._error is None and self.is_dirty:
            # Who copies for hours is to hear of a full disk now, and not when it is closed.
            try:
                self._store.check(since=self._since)
            except BackupfsError as error:
                self._error = error
        if self._error is not None:
            raise self._error

    def _submit(self, batches: list[Batch]) -> None:
        for batch in batches:
            self._job_number += 1
            number = self._job_number
            self._jobs.add(number)
            self._credit.take(len(batch) * self._chunk_size)
            try:
                self._workers.submit(partial(self._work, number, batch))
            except BackupfsError:
                self._jobs.discard(number)
                self._credit.give(len(batch) * self._chunk_size)
                raise

    # -- in a worker's thread ------------------------------------------------------------------

    def _work(self, number: int, batch: Batch) -> None:
        size = len(batch) * self._chunk_size
        try:
            with self._lock:
                self._check_error()  # or it is lost with what came before it
            self._store_batch(batch)
        except BackupfsError as error:
            self._fail(error)
        except Exception as error:  # a bug must fail this draft, not hang its flush
            self._fail(StorageUnavailable(reason=f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._credit.give(size)
            with self._lock:
                self._jobs.discard(number)
                self._idle.notify_all()

    def _store_batch(self, batch: Batch) -> None:
        with self._lock:
            batch = self._pending.current(batch)
        stored = self._store.store_chunks(
            self._completed(batch), find_earlier=partial(self._earlier, batch)
        )
        ids = dict(zip((chunk_index for chunk_index, _chunk in batch), stored.ids, strict=True))
        with self._tree_lock:
            with self._lock:
                self._added_size += stored.added_size
                batch = self._pending.current(batch)
            self._tree.put([(chunk_index, ids[chunk_index]) for chunk_index, _chunk in batch])
            with self._lock:
                # Written again meanwhile: the newer one stays, over what was just put.
                self._pending.settle(batch)

    def _earlier(self, batch: Batch, numbers: Sequence[int]) -> list[BlobId]:
        """What the image that this one resembles has at the places of some chunks of ``batch``."""
        alike = self._alike
        try:
            return [leaf_ids(self._reader, alike, batch[number][0], 1)[0] for number in numbers]
        except BackupfsError:  # it was deleted, or is damaged: then this is stored without it
            self._alike = EMPTY
            return [HOLE] * len(numbers)

    def _completed(self, batch: Batch) -> list[Buffer]:
        """The whole chunks; of those written in part, the rest is what lay there before."""
        partial_indexes = [index for index, chunk in batch if chunk.extents is not None]
        with self._tree_lock:
            ids = [self._tree.ids(index, 1)[0] for index in partial_indexes]
        before = dict(zip(partial_indexes, self._reader.chunks(ids), strict=True))
        completed: list[Buffer] = []
        for chunk_index, chunk in batch:
            if chunk.extents is None:
                completed.append(chunk.data)
            else:
                whole = bytearray(before[chunk_index])
                chunk.overlay(whole)
                completed.append(whole)
        return completed

    def _fail(self, error: BackupfsError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    def _roll_back(self) -> None:
        with self._lock:
            self._idle.wait_for(lambda: not self._jobs)
        with self._tree_lock, self._lock:
            self._pending.drop_from(0)
            self._tree.give_up()
            self._tree = self._tree_of(self._saved)
            self._size = self._saved.size
            self._saved_changes = self._changes

    def _tree_of(self, content: Content) -> TreeEditor:
        return TreeEditor(self._reader, self._store, content.root, content.data_count)

    # -- reading -------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Bytes as written so far; fewer only at the end. May wait for I/O.

        Raises: DamageError, StorageError.
        """
        size = max(0, min(size, self._size - offset))
        if not size:
            return b""
        first = offset // self._chunk_size
        count = (offset + size - 1) // self._chunk_size - first + 1
        chunks = self._chunks(first, count)
        start = offset - first * self._chunk_size
        if count == 1:
            return bytes(memoryview(chunks[0])[start : start + size])
        return bytes(memoryview(b"".join(chunks))[start : start + size])

    def _chunks(self, first: int, count: int) -> list[Buffer]:
        # Pending first, then the tree: a chunk may move from the one to the other meanwhile.
        with self._lock:
            pending = self._pending.snapshot(first, count)
        if all(
            chunk_index in pending and pending[chunk_index].extents is None
            for chunk_index in range(first, first + count)
        ):
            return [pending[chunk_index].data for chunk_index in range(first, first + count)]
        with self._tree_lock:
            ids = self._tree.ids(first, count)
        chunks: list[Buffer] = list(self._reader.chunks(ids))
        for chunk_index, chunk in pending.items():
            whole = bytearray(chunks[chunk_index - first])
            chunk.overlay(whole)
            chunks[chunk_index - first] = whole
        return chunks
