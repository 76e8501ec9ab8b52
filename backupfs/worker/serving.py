"""The worker's side: takes one request, has the backup driver do it, answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from backupfs.driver import BackupDriver, give, take
from backupfs.errors import BackupfsError, Cancelled, StorageUnavailable
from backupfs.service import Record
from backupfs.types import Buffer
from backupfs.worker import frames
from backupfs.worker.frames import Channel, Disconnected

log = logging.getLogger(__name__)

SEND_SIZE = 1 << 20


def serve(channel: Channel) -> None:
    """Serve the one request that ``channel`` brings. All that happens is told to the client."""
    try:
        frame = channel.receive()
        try:
            answer = frames.document(frames.ANSWER, _done(frame.document(), channel))
        except BackupfsError as error:
            answer = _refusal(error)
        except Exception as error:  # a mistake of ours; the client must hear of it all the same
            log.exception("a worker failed")
            answer = _refusal(StorageUnavailable(reason=f"{type(error).__name__}: {error}"))
        channel.send(answer)
    except Disconnected:
        # The client has lost interest: whatever was not published never will be.
        log.info("the client of this worker is gone")


def _done(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    with BackupDriver(
        request["location"],
        compression_level=request["compression_level"],
        lock_seconds_max=request["lock_seconds_max"],
    ) as driver:
        return VERBS[request["verb"]](driver, request, channel)


def _refusal(error: BackupfsError) -> frames.Frame:
    return frames.document(
        frames.REFUSAL, {"error": type(error).__name__, "fields": error.fields, "text": str(error)}
    )


# -- verbs -----------------------------------------------------------------------------------------


def _check(driver: BackupDriver, _request: dict[str, Any], _channel: Channel) -> dict[str, Any]:
    """Whether the repository can be read and written to."""
    driver.service.repository.writer()
    return {"repository_id": driver.service.config.repository_id}


def _backup(driver: BackupDriver, request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    backup, metadata = request["backup"], request["metadata"]
    source = _ReceivedSource(channel, str(backup["volume_id"]))
    record = take(driver.service, backup, source, metadata=metadata, cancelled=source.is_unwanted)
    if source.is_unwanted():  # since this may have waited long for others that publish
        driver.service.delete(record)
        raise Cancelled(what=f"backup of {source.name!r}")
    if metadata is not None:
        _keep_metadata(driver, record, metadata)
    return _answer(record)


def _keep_metadata(driver: BackupDriver, record: Record, metadata: dict[str, Any]) -> None:
    """Keep them for the volume too, where a mount shows them; without that there is no backup."""
    try:
        driver.service.put_metadata(record.volume, metadata)
    except BaseException:  # however it failed, no backup may stay that Cinder was not told of
        driver.service.delete(record)
        raise


def _restore(driver: BackupDriver, request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    target = _SendingTarget(channel, str(request["backup"]["id"]))
    return _answer(give(driver.service, request["backup"], target))


def _delete(driver: BackupDriver, request: dict[str, Any], _channel: Channel) -> dict[str, Any]:
    driver.delete_backup(request["backup"])
    return {}


def _export(driver: BackupDriver, request: dict[str, Any], _channel: Channel) -> dict[str, Any]:
    return driver.export_record(request["backup"])


def _import(driver: BackupDriver, request: dict[str, Any], _channel: Channel) -> dict[str, Any]:
    driver.import_record(request["backup"], request["driver_info"])
    return {}


VERBS: dict[str, Callable[[BackupDriver, dict[str, Any], Channel], dict[str, Any]]] = {
    "check": _check,
    "backup": _backup,
    "restore": _restore,
    "delete": _delete,
    "export": _export,
    "import": _import,
}


def _answer(record: Record) -> dict[str, Any]:
    return {
        "volume": record.volume,
        "name": record.name,
        "kind": record.kind,
        "parent_id": record.parent_id,
        "size": record.size,
        "stored_bytes": record.stored_bytes,
        "metadata": record.metadata,
    }


# -- images ----------------------------------------------------------------------------------------


class _ReceivedSource:
    """An image that the client sends."""

    def __init__(self, channel: Channel, name: str) -> None:
        self.name = name
        self.size_hint: int | None = None
        self._channel = channel
        self._size: int | None = None  # None: its end has not come yet

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        while True:
            try:
                frame = self._channel.receive()
            except Disconnected as error:
                raise Cancelled(what=f"backup of {self.name!r}") from error
            if frame.kind == frames.END:
                self._size = frame.size
                return
            if frame.kind != frames.DATA:
                raise frames.misunderstood()
            yield frame.offset, frame.payload

    def size(self) -> int:
        assert self._size is not None, "asked before the end"
        return self._size

    def is_unwanted(self) -> bool:
        """Whether the client is gone after it sent all: nobody would know of the backup."""
        return self._size is not None and self._channel.is_disconnected()


class _SendingTarget:
    """An image that the client receives, in frames of ``SEND_SIZE``: each costs it a few calls."""

    def __init__(self, channel: Channel, name: str) -> None:
        self.name = name
        self._channel = channel
        self._parts: list[Buffer] = []  # not sent yet
        self._start = self._end = 0  # of what is not sent yet
        self._hole: tuple[int, int] | None = None  # one not sent yet: offset, size

    def write(self, offset: int, data: Buffer) -> None:
        self._send_hole()
        if offset != self._end or self._end - self._start >= SEND_SIZE:
            self._send_data()
        if not self._parts:
            self._start = offset
        self._parts.append(data)
        self._end = offset + len(data)

    def write_hole(self, offset: int, size: int) -> None:
        self._send_data()
        if self._hole is not None and sum(self._hole) != offset:
            self._send_hole()
        start, before = self._hole or (offset, 0)
        self._hole = (start, before + size)

    def finish(self, size: int) -> None:
        self._send_data()
        self._send_hole()
        self._send(frames.Frame(frames.END, 0, size))

    def _send_data(self) -> None:
        if self._parts:
            self._send(frames.data(self._start, b"".join(self._parts)))
            self._parts.clear()

    def _send_hole(self) -> None:
        if self._hole is not None:
            self._send(frames.Frame(frames.HOLE, *self._hole))
            self._hole = None

    def _send(self, frame: frames.Frame) -> None:
        try:
            self._channel.send(frame)
        except Disconnected as error:
            raise Cancelled(what=f"restore of {self.name!r}") from error
