"""Small reads of backups answered in the event loop, as long as the disk is quick.

A read that needs the disk costs 80 us for the disk and 50 us for the proof, and with a thread about
as much again: the way there, the interpreter's lock, the processor that wakes up. So the loop begins
the read, takes whatever requests wait meanwhile, and looks whether the data have come.

It never sleeps for a disk: it asks without waiting, for a fraction of a millisecond at most while
nothing else is to be done. A disk that was slower than that is left to the reader's threads, at
first for a moment, then for longer and longer, until it is quick again. So is every read while
something is written: with the disk's queue full even beginning to read takes long.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from backupfs.errors import DamageError, StorageError
from backupfs.fuse.next_request import NextRequest
from backupfs.fuse.threads import Threads
from backupfs.repository.images import Root
from backupfs.repository.quick_reads import QuickRead, QuickReads

ALONE_SECONDS_MAX = 200e-6  # the loop asks for no longer: twice the way to a thread and back
BESIDE_SECONDS_MAX = 2e-3  # the same while others are served in between
PAUSE_SECONDS_MIN = 0.01
PAUSE_SECONDS_MAX = 1.0


class Pace:
    """Whether a disk is quick, by how it did the last time."""

    def __init__(self) -> None:
        self._pause = 0.0  # seconds; none while it is quick
        self._resumes_at = float("-inf")

    def is_quick(self, now: float) -> bool:
        return now >= self._resumes_at

    def was_quick(self) -> None:
        self._pause = 0.0

    def was_slow(self, now: float) -> None:
        self._pause = min(PAUSE_SECONDS_MAX, max(PAUSE_SECONDS_MIN, 2 * self._pause))
        self._resumes_at = now + self._pause


class QuickReader:
    """Reads for the handlers of one mount; used by the event loop only."""

    def __init__(
        self,
        reads: QuickReads,
        threads: Threads,
        next_request: NextRequest,
        monotonic: Callable[[], float],
    ) -> None:
        self._reads = reads
        self._threads = threads
        self._next_request = next_request
        self._monotonic = monotonic
        self._pace = Pace()
        self._under_way = 0
        self._is_learning = False

    async def read(self, root: Root, chunk_index: int) -> bytes | None:
        """A chunk of an image; None: it is to be read in a thread."""
        if not self._pace.is_quick(self._monotonic()):
            return None
        begun = self._reads.begin(root, chunk_index)
        if not isinstance(begun, QuickRead):
            return begun
        self._under_way += 1
        try:
            return await self._finish(begun)
        finally:
            self._under_way -= 1
            begun.close()

    async def _finish(self, read: QuickRead) -> bytes | None:
        began = self._monotonic()
        alone_since: float | None = None
        while True:
            asked_at = self._monotonic()
            is_done = read.attempt()
            now = self._monotonic()
            if now - asked_at > BESIDE_SECONDS_MAX:  # that it does not wait is the system's promise
                self._pace.was_slow(now)
                return read.chunk
            if is_done:
                self._pace.was_quick()
                if self._under_way == 1:
                    self._next_request.watch()
                return read.chunk
            if self._under_way > 1 or self._next_request.is_there():
                alone_since = None
                if now - began > BESIDE_SECONDS_MAX:
                    break
                await trio.lowlevel.checkpoint()
            elif alone_since is None:
                alone_since = now
            elif now - alone_since > ALONE_SECONDS_MAX:
                break
        self._pace.was_slow(now)
        return None

    def learn(self, root: Root, chunk_index: int) -> None:
        """A chunk was read in a thread: be quick next time, and with those around it."""
        if self._is_learning or self._reads.is_known(root, chunk_index):
            return
        self._is_learning = True

        def work() -> None:
            try:
                self._reads.learn(root, chunk_index)
            except (DamageError, StorageError):
                pass  # of a chunk nobody asked for; who does will be told
            finally:
                self._is_learning = False

        self._threads.soon(work)
