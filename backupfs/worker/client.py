"""The client's side of a worker: starts the process, feeds it, and sees it end.

Starts nothing of the engine. Waits only in ways that eventlet knows: on sockets, and asleep.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from backupfs import errors
from backupfs.ambient import Ambient
from backupfs.errors import BackupfsError, LockTimeout, StorageError, StorageUnavailable
from backupfs.reports import ImageSource, ImageTarget
from backupfs.worker import frames
from backupfs.worker.frames import Channel, Disconnected

log = logging.getLogger(__name__)

# A worker whose connection is closed has this long to tidy up before it is killed; what it leaves
# then is garbage for gc.
END_SECONDS_MAX = 5.0
END_POLL_SECONDS = 0.01
# One that hangs in the kernel, on a network file system say, ends when that lets it.
KILL_SECONDS_MAX = 10.0
# What a verb without an image may take beyond its waiting for locks.
ANSWER_SECONDS_MAX = 600.0


class Worker:
    """A worker for one request. Use as a context manager: at its end the process is gone."""

    def __init__(
        self,
        location: str,
        *,
        compression_level: int | None = None,
        lock_seconds_max: float,
        waiting: Callable[[], object] | None = None,
        ambient: Ambient | None = None,
    ) -> None:
        """``waiting`` is called about every second while the worker makes us wait; it may raise.

        Raises: StorageUnavailable.
        """
        self._options = {
            "location": location,
            "compression_level": compression_level,
            "lock_seconds_max": lock_seconds_max,
        }
        self._ambient = ambient or Ambient()
        self._waiting = waiting or self._give_up_late
        self._answer_at_most = self._ambient.monotonic() + lock_seconds_max + ANSWER_SECONDS_MAX
        # True from when a backup may come into being until it is known that it did not.
        self.may_have_published = False
        try:
            self._process, connection = _start()
        except OSError as error:  # no descriptor, process or memory is left
            raise StorageUnavailable(reason=f"cannot start a worker process: {error}") from error
        self._channel = Channel(connection, self._waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing; waits for that ``END_SECONDS_MAX``, then
        ``KILL_SECONDS_MAX``."""
        self._channel.close()
        if not self._has_ended(END_SECONDS_MAX):
            self._process.kill()
            if not self._has_ended(KILL_SECONDS_MAX):
                log.warning("worker process %d hangs; it was killed", self._process.pid)

    def _has_ended(self, seconds_max: float) -> bool:
        """Whether the process ends within that time."""
        started = self._ambient.monotonic()
        while self._process.poll() is None:
            if self._ambient.monotonic() - started > seconds_max:
                return False
            # Not Popen.wait: this sleep is one that eventlet replaces, for others to go on.
            self._ambient.sleep(END_POLL_SECONDS)
        return True

    # -- requests --------------------------------------------------------------------------------

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Raises: what the verb raises; StorageUnavailable, LockTimeout."""
        self._request(verb, arguments)
        return self._answer()

    def backup(
        self,
        backup: Mapping[str, Any],
        source: ImageSource,
        *,
        metadata: dict[str, Any] | None,
        before_end: Callable[[], object],
    ) -> dict[str, Any]:
        """Back ``source`` up. ``before_end`` is called when all is sent and nothing is published;
        what it raises leaves no backup.

        Raises: SourceFailed; what the verb raises; StorageUnavailable.
        """
        self._request("backup", {"backup": dict(backup), "metadata": metadata})
        try:
            for offset, data in source.extents():
                self._channel.send(frames.data(offset, data))
            before_end()
            self.may_have_published = True
            self._channel.send(frames.Frame(frames.END, 0, source.size()))
        except Disconnected:
            pass  # it has said why
        return self._answer()

    def restore(self, backup: Mapping[str, Any], target: ImageTarget) -> dict[str, Any]:
        """Write a backup to ``target``.

        Raises: TargetFailed; what the verb raises; StorageUnavailable.
        """
        self._request("restore", {"backup": dict(backup)})
        while True:
            frame = self._receive()
            if frame.kind == frames.DATA:
                target.write(frame.offset, frame.payload)
            elif frame.kind == frames.HOLE:
                target.write_hole(frame.offset, frame.size)
            elif frame.kind == frames.END:
                target.finish(frame.size)
            else:
                return self._answered(frame)

    def _request(self, verb: str, arguments: dict[str, Any]) -> None:
        request = {"verb": verb, **self._options, **arguments}
        with contextlib.suppress(Disconnected):  # whoever waits for the answer is told
            self._channel.send(frames.document(frames.REQUEST, request))

    def _answer(self) -> dict[str, Any]:
        return self._answered(self._receive())

    def _receive(self) -> frames.Frame:
        try:
            return self._channel.receive()
        except Disconnected as error:
            reason = (
                "a worker process ended before its work was done; the service's log may say why"
            )
            raise StorageUnavailable(reason=reason) from error

    def _answered(self, frame: frames.Frame) -> dict[str, Any]:
        answer = frame.document()
        if frame.kind == frames.REFUSAL:
            error = _error_of(answer)
            # Of a storage that fails it is unknown whether the record was written, or taken back.
            self.may_have_published &= isinstance(error, StorageError)
            raise error
        return answer

    def _give_up_late(self) -> None:
        if self._ambient.monotonic() > self._answer_at_most:
            seconds = float(self._options["lock_seconds_max"] or 0) + ANSWER_SECONDS_MAX
            raise LockTimeout(seconds=seconds, what="an answer", holder="a worker process")


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A worker process, and our end of the connection to it. Raises: OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptor = theirs.fileno()
        try:
            # A session of its own: signals for the service's group are for the service to act on.
            # -P: a file in the service's folder must not come before the libraries.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "backupfs.worker", str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,
            )
        except BaseException:  # whoever gets none cannot close its end either
            ours.close()
            raise
    return process, ours


def _error_of(told: dict[str, Any]) -> BackupfsError:
    """The error that a worker told of."""
    kind, fields = getattr(errors, str(told.get("error")), None), told.get("fields")
    if isinstance(kind, type) and issubclass(kind, BackupfsError) and isinstance(fields, dict):
        error = kind(**fields)
        with contextlib.suppress(KeyError, ValueError):  # fields that its sentence does not have
            str(error)
            return error
    return StorageUnavailable(reason=str(told.get("text")))
