"""``python -m backupfs.worker DESCRIPTOR``: serve one request over the socket of that number."""

from __future__ import annotations

import logging
import signal
import socket
import sys

from backupfs.worker.frames import Channel
from backupfs.worker.serving import serve


def main() -> None:
    # A service that is told to stop finishes what it is doing, and we with it; its end is ours.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="backupfs worker: %(message)s")
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(Channel(connection))


if __name__ == "__main__":
    main()
