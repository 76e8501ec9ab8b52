"""The clock and the source of randomness: the one place where either enters backupfs.

Whatever needs the time or a fresh id takes an ``Ambient``, so that a test can give it a fixed one.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import uuid
from datetime import UTC, datetime


class Ambient:
    """Time, randomness and the host's name as the machine has them."""

    def now(self) -> datetime:
        """The current time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, for measuring waits."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread."""
        time.sleep(seconds)

    def random_bytes(self, size: int) -> bytes:
        """``size`` bytes nobody can guess."""
        return secrets.token_bytes(size)

    def new_uuid(self) -> str:
        """A random UUID as text."""
        return str(uuid.uuid4())

    def host_name(self) -> str:
        """This host's name, cut to 255 bytes."""
        return socket.gethostname()[:255]

    def process_id(self) -> int:
        """The number of this process."""
        return os.getpid()
