"""Processes that read, decompress and prove for a daemon, beside the interpreter's lock.

Whoever reads an image on and on keeps two threads busy, and the lock that they share with the event
loop, which holds it while it copies answers to the kernel, is what they wait for. A process has
a lock of its own; what it has proven it leaves in memory that both see.

They are forked before the daemon opens anything and has threads: that takes some milliseconds, and next to
no memory. They end when the daemon does, in whatever way. If one is gone, or says no to what it
was asked for, then the daemon reads for itself, and finds out what is wrong.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import queue
import socket
import weakref
from collections.abc import Iterator, Sequence

from backupfs.ambient import Ambient
from backupfs.repository import decoder_process
from backupfs.repository.blobs import BlobReader
from backupfs.repository.decoder_process import DONE, JOB_SIZE_MAX, Job, pack_job
from backupfs.repository.index import BlobLocation
from backupfs.types import BlobId

log = logging.getLogger(__name__)

ANSWER_SIZE_MAX = 1 << 20  # the most that the kernel asks for at a time
ANSWERS_MAX = 4  # of each process, that are not with the kernel yet
END_SECONDS_MAX = 2.0


class _Decoder:
    """One process, as the daemon sees it. Used by one thread at a time."""

    def __init__(self, process_id: int, jobs: socket.socket, memory: mmap.mmap) -> None:
        self.process_id = process_id
        self._jobs = jobs
        self._memory = memoryview(memory)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(ANSWERS_MAX):
            self._free.put(number * ANSWER_SIZE_MAX)
        self._given: dict[int, weakref.ref[memoryview]] = {}

    def read(
        self,
        blob_ids: Sequence[BlobId],
        places: dict[BlobId, BlobLocation],
        *,
        size: int,
        chunk_size: int,
    ) -> memoryview | None:
        """See ``Decoders.read``. After any error it may not be asked again, as it would still answer
        what it was asked for then. Raises: OSError, EOFError (the process is gone)."""
        try:
            start = self._free.get_nowait()
        except queue.Empty:
            return None
        job = pack_job(Job(start, chunk_size, blob_ids, places))
        if len(job) > JOB_SIZE_MAX or not self._has_done(job):
            self._free.put(start)
            return None
        answer = self._memory[start : start + size]
        # Its place is free again when nobody has it any more, pyfuse3 last.
        self._given[start] = weakref.ref(answer, lambda _: self._free.put(start))
        return answer

    def _has_done(self, job: bytes) -> bool:
        self._jobs.send(job)
        answer = self._jobs.recv(1)
        if not answer:
            raise EOFError
        return answer == DONE

    def close(self) -> None:
        """Have it end; ``is_ended`` says when it has."""
        self._jobs.close()

    def is_ended(self) -> bool:
        try:
            return os.waitpid(self.process_id, os.WNOHANG) != (0, 0)
        except ChildProcessError:  # who started us has the system see to it (SIGCHLD ignored)
            return True


class Decoders:
    """The decoding processes of one daemon. Thread-safe."""

    def __init__(self, decoders: Sequence[_Decoder]) -> None:
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for decoder in decoders:
            self._idle.put(decoder)

    def read(self, blob_ids: Sequence[BlobId], size: int, reader: BlobReader) -> memoryview | None:
        """The first ``size`` bytes of chunks in their order, proven, holes as zeros; None: they are
        to be read by ``reader``.

        The memory is used again when nobody has the view any more. A slice of it does not count:
        copy what is to be kept. Raises: StorageError.
        """
        chunk_size = len(reader.zeros)
        if len(blob_ids) * chunk_size > ANSWER_SIZE_MAX:
            return None
        places = reader.locate(blob_ids)
        if places is None:
            return None
        try:
            decoder = self._idle.get_nowait()
        except queue.Empty:
            return None
        try:
            answer = decoder.read(blob_ids, places, size=size, chunk_size=chunk_size)
        except (OSError, EOFError) as error:
            log.warning("decoding process %d is gone: %s", decoder.process_id, error or "it died")
            return None
        self._idle.put(decoder)
        return answer


@contextlib.contextmanager
def decoding(location: str, count: int, ambient: Ambient) -> Iterator[Decoders]:
    """Have ``count`` processes that decode, for a repository; fewer where the system has no more.

    To be entered while this process has one thread, and nothing open that must not be shared.
    """
    decoders: list[_Decoder] = []
    try:
        for _ in range(count):
            decoders.append(_fork(location))
    except OSError as error:
        log.warning("%d of %d decoding processes: %s", len(decoders), count, error.strerror)
    try:
        yield Decoders(decoders)
    finally:
        for decoder in decoders:
            decoder.close()
        _await_ends(decoders, ambient)


def _fork(location: str) -> _Decoder:
    memory = mmap.mmap(-1, ANSWERS_MAX * ANSWER_SIZE_MAX)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process_id = os.fork()
        except OSError:
            ours.close()
            raise
        if not process_id:
            _be_decoder(theirs, memory, location)
    return _Decoder(process_id, ours, memory)


def _be_decoder(jobs: socket.socket, memory: mmap.mmap, location: str) -> None:
    """The child's whole life: never returns."""
    status = 1
    try:
        decoder_process.serve(jobs, memory, location)
        status = 0
    finally:
        os._exit(status)


def _await_ends(decoders: Sequence[_Decoder], ambient: Ambient) -> None:
    """One that waits for a disk which does not answer is left behind."""
    living = list(decoders)
    ends_at = ambient.monotonic() + END_SECONDS_MAX
    while living and ambient.monotonic() < ends_at:
        living = [decoder for decoder in living if not decoder.is_ended()]
        if living:
            ambient.sleep(0.002)
