"""The threads that hash and compress, and the bounds of what waits in memory."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from backupfs.errors import StorageUnavailable

log = logging.getLogger(__name__)


class Workers:
    """Threads that run jobs from one queue; who submits bounds what it submits by ``Credit``."""

    def __init__(self, count: int, *, name: str = "worker") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon, in some thread; it keeps its errors to itself.

        Raises:
            StorageUnavailable: closed; it will not be run.
        """
        with self._lock:
            if self._is_closed:
                raise StorageUnavailable(reason="the repository was closed")
            self._jobs.put(job)

    def close(self) -> None:
        """Finish what was submitted, then end."""
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a job that breaks its promise must not take the thread along
                log.exception("a job failed")
            del job  # its buffers must not live until the next one comes


class Credit:
    """Bytes accepted and not worked off yet, against a limit. Thread-safe.

    Taking never waits: a caller takes for what it has accepted already, then waits, in its own
    way, until the sum is below the limit again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._condition = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []

    def take(self, size: int) -> None:
        with self._condition:
            self._taken += size

    def give(self, size: int) -> None:
        with self._condition:
            self._taken -= size
            if self._taken >= self._limit:
                return
            callbacks, self._callbacks = self._callbacks, []
            self._condition.notify_all()
        for callback in callbacks:
            callback()

    def wait(self) -> None:
        """Block until less than the limit is taken."""
        with self._condition:
            self._condition.wait_for(lambda: self._taken < self._limit)

    def call_when_below(self, callback: Callable[[], None]) -> bool:
        """Have ``callback`` called once, from any thread, when below the limit.

        False, and it is not called, where that is so already.
        """
        with self._condition:
            if self._taken < self._limit:
                return False
            self._callbacks.append(callback)
            return True


class Share:
    """How many things of a kind each user may keep in memory, of what all may. Thread-safe.

    One writer alone gets all of it; many at once must not make the process grow.
    """

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._users = 0
        self._lock = threading.Lock()

    def join(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1

    def part(self) -> int:
        """How many for each of those that have joined; always room for two."""
        return max(2, self._count_max // max(1, self._users))
