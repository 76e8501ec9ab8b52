"""How the event loop waits for the kernel's next request: pyfuse3's own way, made cheaper.

pyfuse3 spends five system calls and two passes of the event loop on the wait for a request that is
there already. And where a program waits for each of its reads before the next, most of the time of
a read goes by while the processor that was idle wakes up again, at both ends. So here

- a request that is there is taken at once, with a full pass of the loop every millisecond;
- tasks that wait are kept, where pyfuse3 would end and start one for each request beside others, and
  who came last takes the next request;
- after a quick answer the loop watches for the next request for a few microseconds before it sleeps,
  as long as that is worth it: the system's own halt polling does the same.

pyfuse3 takes ``Lock`` and ``wait_readable`` from the name ``trio`` in its module, which is how it
offers asyncio instead (``pyfuse3.asyncio.enable``); the same way is taken here.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pyfuse3
import trio

PASS_SECONDS = 0.001  # other tasks of the loop wait no longer than this and one request
WATCH_SECONDS = 60e-6  # a wake-up costs about as much
WORTH_MAX = 8
RETRY_COUNT = 64  # answers after which a watch that was not worth it is tried again
IDLE_TASKS_MAX = 8  # kept waiting, for ``pyfuse3.main``


class NextRequest:
    """The wait for requests of one mount. Used by the event loop only."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._poll = select.poll()
        self._is_registered = False
        self._passed_at = float("-inf")
        self._is_watching = False
        self._worth = WORTH_MAX  # grows when a watch was met by a request, shrinks when not
        self._skipped = 0

    def install(self) -> None:
        """Have pyfuse3 wait like this, from its next start on."""
        vars(pyfuse3)["trio"] = _Trio(self)

    def is_there(self) -> bool:
        """Whether a request waits to be taken."""
        return self._is_registered and bool(self._poll.poll(0))

    def watch(self) -> None:
        """The answer that comes now is quick, and who gets it may ask again at once."""
        self._is_watching = True

    async def wait_readable(self, file: int) -> None:
        """Return when there is a request to be read from ``file``, or the mount has gone."""
        if not self._is_registered:
            self._poll.register(file, select.POLLIN)
            self._is_registered = True
        now = self._monotonic()
        if now - self._passed_at < PASS_SECONDS and (self._poll.poll(0) or self._watched(now)):
            return
        self._is_watching = False
        await trio.lowlevel.wait_readable(file)
        self._passed_at = self._monotonic()

    def _watched(self, now: float) -> bool:
        """Whether a request came while it was watched for."""
        if not self._is_watching:
            return False
        self._is_watching = False
        if self._worth <= 0:
            self._skipped += 1
            if self._skipped % RETRY_COUNT:
                return False
        end = now + WATCH_SECONDS
        while now < end:
            if self._poll.poll(0):
                self._worth = min(WORTH_MAX, self._worth + 1)
                return True
            now = self._monotonic()
        self._worth = max(0, self._worth - 1)
        return False


class _Trio:
    """trio, as pyfuse3 shall see it."""

    def __init__(self, next_request: NextRequest) -> None:
        self.lowlevel = _LowLevel(next_request)
        self.Lock = LastFirstLock

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _LowLevel:
    def __init__(self, next_request: NextRequest) -> None:
        self.wait_readable = next_request.wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class LastFirstLock:
    """A lock that is taken without a pass of the event loop where it is free.

    Who came last has it next: what its last request used is in the processor's cache still, and of
    tasks that are not needed the buffers, 1 MiB each, stay untouched.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: list[trio.lowlevel.Task] = []

    async def __aenter__(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def give_up(_raise: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.pop())  # it is taken still, by that one now
        else:
            self._is_taken = False
