"""The life of one decoding process: a job from its socket, proven chunks into memory, and again.

It knows nothing but the packs: the daemon says where everything lies. It uses the same reader, so it
proves what it reads by the same rules; only what is unusual it does not look into, but says no.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import signal
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from backupfs.ambient import Ambient
from backupfs.errors import DamageError, StorageError
from backupfs.format.ids import IdScheme
from backupfs.repository.avoided import Avoided
from backupfs.repository.blobs import BlobReader
from backupfs.repository.index import BlobLocation
from backupfs.storage.base import Storage
from backupfs.storage.locate import open_storage
from backupfs.types import BLOB_ID_SIZE, HOLE, BlobId, PackId

JOB_SIZE_MAX = 128 << 10
DONE = b"+"
DECLINED = b"-"

_HEAD = struct.Struct("<III")  # where the answer goes, the chunk size, count of chunks
_PLACE = struct.Struct("<32s16sII32s")  # blob, pack, offset, size, base or the hole
_PROCESS_NAME = "backupfs-decode"  # what ps and top show; the system takes 15 bytes


class Job(NamedTuple):
    """Chunks to read, one after the other into the shared memory."""

    start: int  # in the memory
    chunk_size: int
    blob_ids: Sequence[BlobId]  # holes among them are zeros
    places: dict[BlobId, BlobLocation]  # of all that is no hole, and of what that differs from


def pack_job(job: Job) -> bytes:
    return b"".join(
        (
            _HEAD.pack(job.start, job.chunk_size, len(job.blob_ids)),
            *job.blob_ids,
            *(
                _PLACE.pack(blob_id, place.pack_id, place.offset, place.size, place.base or HOLE)
                for blob_id, place in job.places.items()
            ),
        )
    )


def unpack_job(data: bytes) -> Job:
    start, chunk_size, count = _HEAD.unpack_from(data)
    middle = _HEAD.size + count * BLOB_ID_SIZE
    blob_ids = [
        BlobId(data[offset : offset + BLOB_ID_SIZE])
        for offset in range(_HEAD.size, middle, BLOB_ID_SIZE)
    ]
    places = {
        BlobId(blob_id): BlobLocation(
            pack_id=PackId(pack_id),
            offset=offset,
            size=size,
            base=None if base == HOLE else BlobId(base),
        )
        for blob_id, pack_id, offset, size, base in _PLACE.iter_unpack(data[middle:])
    }
    return Job(start, chunk_size, blob_ids, places)


def serve(jobs: socket.socket, memory: mmap.mmap, location: str) -> None:
    """Do what the daemon asks for, until it has closed its end of ``jobs`` or died."""
    _forget_the_daemon(jobs)
    storage = open_storage(location, Ambient())
    while data := jobs.recv(JOB_SIZE_MAX):
        answer = DONE
        try:
            _read(unpack_job(data), memory, storage)
        except (DamageError, StorageError):
            answer = DECLINED
        storage.close()  # a pack that gc deletes would take room for as long as it is open
        jobs.send(answer)


def _read(job: Job, memory: mmap.mmap, storage: Storage) -> None:
    # A new one for each job: nothing that was read before may hide what has become of it.
    reader = BlobReader(
        storage=storage,
        ids=IdScheme(),
        index=_Listed(job.places),
        chunk_size=job.chunk_size,
        avoided=Avoided(),
        refresh=_know_no_more,
    )
    starts: dict[BlobId, list[int]] = {}
    for number, blob_id in enumerate(job.blob_ids):
        starts.setdefault(blob_id, []).append(job.start + number * job.chunk_size)
    for start in starts.pop(HOLE, ()):
        memory[start : start + job.chunk_size] = reader.zeros
    for blob_id, chunk in reader.each_chunk(starts):
        for start in starts[blob_id]:
            memory[start : start + job.chunk_size] = chunk


def _forget_the_daemon(jobs: socket.socket) -> None:
    """Give up what was inherited, above all the others' sockets: their ends must be seen."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all of a group: the daemon is to end first
    logging.disable(logging.CRITICAL)  # what is wrong the daemon finds as well, and says
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, jobs.fileno())
    os.closerange(jobs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(_PROCESS_NAME)
    gc.freeze()  # else a collection would copy the daemon's pages


class _Listed:
    """Where the blobs of one job lie, in place of an index."""

    def __init__(self, places: dict[BlobId, BlobLocation]) -> None:
        self._places = places

    def find(self, blob_id: BlobId) -> BlobLocation | None:
        return self._places.get(blob_id)

    def find_many(self, blob_ids: Sequence[BlobId]) -> list[BlobLocation | None]:
        return [self._places.get(blob_id) for blob_id in blob_ids]

    def is_damaged(self, blob_id: BlobId) -> bool:
        return False

    def mark_damaged(self, blob_ids: Iterable[BlobId]) -> None:
        """The daemon will, if it finds the same."""

    def damaged(self) -> frozenset[BlobId]:
        return frozenset()


def _know_no_more(*, is_known: bool) -> None:
    """Where something is not where it should be, the daemon looks for it."""
