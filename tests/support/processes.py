"""Other processes: one that does something and dies in the middle of it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

DIED = 9


def in_a_child(act: Callable[[], None]) -> int:
    """Run ``act`` in a child of this process, which must have no repository open; its exit code.

    0: ``act`` returned; 1: it raised; anything else it chose itself by ``os._exit``.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """End this process as SIGKILL would: nothing is cleaned up."""
    os._exit(DIED)
