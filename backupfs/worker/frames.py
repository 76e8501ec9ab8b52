"""What a worker and its client say to each other: frames over a stream socket.

A frame is a header and a payload. Both sides wait for each other by the socket alone, so that an
image takes no more memory than the socket's buffer and one frame. Works with plain sockets and
with those that eventlet puts in their place.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backupfs.errors import StorageUnavailable
from backupfs.types import IMAGE_SIZE_MAX, Buffer

HEADER = struct.Struct("<cQQ")  # kind, offset in the image, size in bytes
assert HEADER.size == 17

REQUEST = b"Q"  # payload: a JSON object
ANSWER = b"A"  # payload: a JSON object; the last frame
REFUSAL = b"X"  # payload: a JSON object that describes an error; the last frame
DATA = b"D"  # payload: bytes of the image
HOLE = b"H"  # no payload: ``size`` zeros of the image
END = b"E"  # no payload: the image is complete and has ``size`` bytes
KINDS = (REQUEST, ANSWER, REFUSAL, DATA, HOLE, END)
DOCUMENTS = (REQUEST, ANSWER, REFUSAL)
WITH_PAYLOAD = (*DOCUMENTS, DATA)

# A record of the largest size, in base64, and its fields.
PAYLOAD_SIZE_MAX = 8 << 20
# How often one who waits looks up.
WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Frame:
    """``size`` is that of the payload, or of what the frame stands for."""

    kind: bytes
    offset: int
    size: int
    payload: Buffer = b""

    def document(self) -> dict[str, Any]:
        """The JSON object in the payload. Raises: StorageUnavailable (there is none)."""
        try:
            value = json.loads(bytes(self.payload))
        except (ValueError, RecursionError) as error:
            raise misunderstood() from error
        if self.kind not in DOCUMENTS or not isinstance(value, dict):
            raise misunderstood()
        return value


def document(kind: bytes, value: dict[str, Any]) -> Frame:
    """A frame with a JSON object."""
    payload = json.dumps(value, default=_as_text).encode()
    return Frame(kind, 0, len(payload), payload)


def data(offset: int, payload: Buffer) -> Frame:
    return Frame(DATA, offset, len(payload), payload)


def misunderstood() -> StorageUnavailable:
    """For who receives what the other side should never send."""
    return StorageUnavailable(reason="a worker and its client do not understand each other")


class Disconnected(Exception):
    """The other side is gone."""


class Channel:
    """One end. ``waiting`` is called every ``WAIT_SECONDS`` while the other side makes us wait;
    what it raises ends the waiting, and the channel with it."""

    def __init__(
        self, connection: socket.socket, waiting: Callable[[], object] | None = None
    ) -> None:
        self._connection = connection
        self._waiting = waiting
        connection.settimeout(None if waiting is None else WAIT_SECONDS)

    def send(self, frame: Frame) -> None:
        """Raises: Disconnected."""
        self._send(HEADER.pack(frame.kind, frame.offset, frame.size))
        if frame.payload:
            self._send(frame.payload)

    def receive(self) -> Frame:
        """Raises: Disconnected, StorageUnavailable (not what either side sends)."""
        kind, offset, size = HEADER.unpack(self._receive(HEADER.size))
        if kind not in KINDS or max(offset, size) > IMAGE_SIZE_MAX:
            raise misunderstood()
        if kind not in WITH_PAYLOAD:
            return Frame(kind, offset, size)
        if size > PAYLOAD_SIZE_MAX:
            raise StorageUnavailable(reason=f"a frame of {size} bytes between two processes")
        return Frame(kind, offset, size, self._receive(size))

    def is_disconnected(self) -> bool:
        """Whether the other side is gone, without waiting; only when it has nothing to say."""
        self._connection.settimeout(0)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, TimeoutError):
            return False
        except ConnectionResetError:
            return True
        finally:
            self._connection.settimeout(None if self._waiting is None else WAIT_SECONDS)

    def close(self) -> None:
        self._connection.close()

    def _send(self, data: Buffer) -> None:
        """Raises: Disconnected."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._connection.send(rest) :]
            except TimeoutError:
                self._wait()
            except OSError as error:
                raise Disconnected from error

    def _receive(self, size: int) -> bytearray:
        """Raises: Disconnected."""
        buffer = bytearray(size)
        rest = memoryview(buffer)
        while rest:
            try:
                count = self._connection.recv_into(rest)
            except TimeoutError:
                self._wait()
                continue
            except OSError as error:
                raise Disconnected from error
            if not count:
                raise Disconnected
            rest = rest[count:]
        return buffer

    def _wait(self) -> None:
        assert self._waiting is not None, "only then a socket has a timeout"
        self._waiting()


def _as_text(value: object) -> str:
    """What JSON has no form for, as in fields of errors."""
    return value.hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)
