"""Calls of the system that fail: what a disk does that is full or broken, below all of our code."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.os_calls import Call


@dataclass(frozen=True)
class How:
    """How a call fails."""

    error: int = 0  # errno; 0 stands for a write that takes only half of its bytes
    stays: bool = False  # all later calls that need room fail too
    after: bool = False  # the call had its effect: its answer is lost


NEEDS_ROOM = ("open", "write", "truncate", "sync", "link", "rename", "mkdir")

HOWS = {
    "full from then on": How(errno.ENOSPC, stays=True),
    "broken": How(errno.EIO),
    "broken after its effect": How(errno.EIO, after=True),
    "short": How(),
}


class FailingCalls:
    """For ``watched_calls``: lets call ``number`` fail, once ``is_armed``.

    Calls of the session's own thread come at any time, so they are neither counted nor failed.
    """

    def __init__(self, number: int, how: How) -> None:
        self._number = number
        self._how = how
        self._count = 0
        self.is_armed = False
        self.fired: Call | None = None

    def __call__(self, call: Call, act: Callable[..., Any]) -> Any:
        if not self.is_armed or threading.current_thread().name == "session":
            return act()
        how = self._how
        if not how.error and not (call.kind == "write" and len(call.data) > 1):
            return act()
        self._count += 1
        is_later = self._count > self._number and how.stays and call.kind in NEEDS_ROOM
        if self._count != self._number and not is_later:
            return act()
        self.fired = self.fired or call
        if not how.error:
            return act(len(call.data) // 2)
        if how.after:
            result = act()
            if call.kind == "open":
                os.close(result) if isinstance(result, int) else result.close()
        raise OSError(how.error, os.strerror(how.error), call.path)
