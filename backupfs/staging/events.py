"""What happened in the staging area, in lines for people and scripts: the last ones, in memory."""

from __future__ import annotations

import logging
import threading
from collections import deque

from backupfs.ambient import Ambient

log = logging.getLogger(__name__)

LINES_MAX = 2000


class EventLog:
    """The newest lines; each also goes to the process's log. Thread-safe."""

    def __init__(self, ambient: Ambient) -> None:
        self._ambient = ambient
        self._lines: deque[str] = deque(maxlen=LINES_MAX)
        self._lock = threading.Lock()

    def add(self, what: str, name: str, detail: str = "") -> None:
        """Note that ``what`` happened to ``name``."""
        # A name may hold a newline; a line of the log must not.
        line = f"{what} {name!r}" + (f": {detail}" if detail else "")
        stamp = self._ambient.now().isoformat(timespec="seconds")
        with self._lock:
            self._lines.append(f"{stamp} {line}")
        log.info("%s", line)

    def text(self) -> str:
        """All lines kept, oldest first."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines)
