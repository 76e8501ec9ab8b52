"""From the event loop to threads and back.

Reads go over a plain queue to a few threads of their own, so that no flush or publish can keep them
waiting, at a fifth of the cost of ``trio.to_thread``. Long reads, those of a program that reads on and
on, have a queue and threads apart: small ones need not wait for them. Each waits for a decoding process,
or where that does not give a chunk decompresses and proves it. There is one more than there are
processors, which so have work while an answer is on its way; still more would contend for them.
What may take long goes to ``trio.to_thread`` with a limit of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio

from backupfs.repository.workers import Credit, Workers

Result = TypeVar("Result")

READERS = 4
LONG_READERS = min(READERS, os.cpu_count() or 1) + 1
LONG_READ_SIZE = 256 << 10
SLOW_CALLS_MAX = 64


class Threads:
    """The threads that serve one mount; made inside the event loop."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._readers = Workers(READERS, name="reader")
        self._long_readers = Workers(LONG_READERS, name="long-reader")
        self._limiter = trio.CapacityLimiter(SLOW_CALLS_MAX)

    def close(self) -> None:
        self._readers.close()
        self._long_readers.close()

    async def read(self, call: Callable[[int, int], Result], offset: int, size: int) -> Result:
        """Run ``call(offset, size)`` in a reader's thread."""
        readers = self._readers if size < LONG_READ_SIZE else self._long_readers
        task = trio.lowlevel.current_task()

        def deliver(result: outcome.Outcome[Result]) -> None:
            trio.lowlevel.reschedule(task, outcome.Value(result))

        def work() -> None:
            result = outcome.capture(call, offset, size)
            self._token.run_sync_soon(deliver, result)

        readers.submit(work)
        # Not cancellable: the thread will deliver to this task whatever happens.
        result = await trio.lowlevel.wait_task_rescheduled(
            lambda _raise: trio.lowlevel.Abort.FAILED
        )
        return result.unwrap()  # type: ignore[no-any-return]

    def soon(self, work: Callable[[], None]) -> None:
        """Have ``work`` done in a reader's thread; nobody waits for it, and it raises nothing."""
        self._readers.submit(work)

    async def slow(self, call: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Run ``call`` in a thread; it may wait for disks and locks."""

        def work() -> Result:
            return call(*arguments, **named)

        return await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def below(self, credit: Credit) -> None:
        """Wait until less than the credit's limit is taken."""
        event = trio.Event()
        if credit.call_when_below(lambda: self._token.run_sync_soon(event.set)):
            await event.wait()
