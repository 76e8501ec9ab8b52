"""Ctrl-C during work that knows how to stop: ask it to, instead of breaking into it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def cancellable() -> Iterator[Callable[[], bool]]:
    """Gives the question "should this stop?", which a signal answers with yes.

    The first signal lets the work end in its own way, with nothing half-done left behind; the
    second breaks into it. A signal that the caller's shell ignores (``nohup``) stays ignored.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    noted = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in noted:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number in noted:
            signal.signal(number, before[number])
