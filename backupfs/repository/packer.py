"""Appends blobs to packs and makes packs durable: one packer thread, one sealer thread.

A blob is *pending* from the moment a writer claims its id until its pack is durable and in the
index. A second writer of the same chunk meanwhile finds the claim and stores nothing; should the
pack then fail, ``failures`` has moved, and every writer that relied on anything pending since
it last looked must give up what it wrote. That is coarse on purpose: a repository's disk that
fails or is full fails for all, and what waits behind a pack that has failed is dropped with it.

Order, always: blobs and footer written, file synced, object in place and its folder synced, index.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import BackupfsError, StorageUnavailable
from backupfs.format.blob import base_of
from backupfs.format.ids import IdScheme
from backupfs.format.pack import ENTRY_COUNT_MAX, PackEntry, encode_footer, pack_name
from backupfs.repository.index import BlobLocation, Index
from backupfs.storage.base import SpooledFile, Storage
from backupfs.storage.local import read_all, write_all
from backupfs.storage.oserrors import storage_error
from backupfs.storage.ownership import make_file
from backupfs.types import BlobId, PackId

log = logging.getLogger(__name__)

QUEUE_JOBS_MAX = 16  # of up to 1 MiB each
SEALING_PACKS_MAX = 4
UNLISTED_PACKS_MAX = 16  # kept open to be read while the index cannot be written
ALIVE_SECONDS = 1.0  # after which who waits for a seal asks whether the threads still run
# A pack of small blobs ends here, so that its footer stays small and can always be read.
PACK_ENTRIES_MAX = 1 << 16
WRITE_PARTS_MAX = 512  # buffers of one writev(2); the system allows 1024
assert PACK_ENTRIES_MAX + WRITE_PARTS_MAX <= ENTRY_COUNT_MAX


@dataclass(slots=True)
class _OpenPack:
    pack_id: PackId
    path: Path
    file: int
    size: int = 0
    entries: list[PackEntry] = field(default_factory=list)
    is_durable: bool = False


@dataclass(slots=True, eq=False)
class _Pending:
    blob: bytes | None = None  # set once compressed, dropped once written
    pack: _OpenPack | None = None
    location: BlobLocation | None = None


@dataclass(slots=True)
class _Seal:
    """Passes through both threads behind all that was appended before it."""

    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBlob:
    """A blob to be appended: its header and payload are in ``data``."""

    blob_id: BlobId
    level: int
    data: bytes


class Packer:
    """The open packs of one process."""

    def __init__(
        self,
        *,
        storage: Storage,
        ids: IdScheme,
        index: Index,
        pack_size: int,
        spool: Path,
        ambient: Ambient,
    ) -> None:
        self._storage = storage
        self._ids = ids
        self._index = index
        self._pack_size = pack_size
        self._spool = spool
        self._ambient = ambient
        self._lock = threading.Lock()
        self._pending: dict[BlobId, _Pending] = {}
        self._claimed: dict[BlobId, _Pending] = {}  # those of the pending that are not appended yet
        self._claims_changed = threading.Condition(self._lock)
        self._unlisted: deque[_OpenPack] = deque()  # durable, and the index did not take them
        self._open: dict[bool, _OpenPack] = {}  # data chunks under False, nodes under True
        self._failures = 0
        self._is_closed = False
        self._failure: BackupfsError = StorageUnavailable(reason="unknown")
        self._jobs: queue.Queue[list[NewBlob] | _Seal | None] = queue.Queue(QUEUE_JOBS_MAX)
        self._kept_jobs: deque[_Seal | None] = deque()  # to be done before those of the queue
        self._sealing: queue.Queue[_OpenPack | _Seal | None] = queue.Queue(SEALING_PACKS_MAX)
        self._threads = [
            threading.Thread(target=self._run_packer, name="packer", daemon=True),
            threading.Thread(target=self._run_sealer, name="sealer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def failures(self) -> int:
        """Moves whenever something pending was lost; see the module's head."""
        return self._failures

    def claim(self, blob_ids: list[BlobId]) -> set[BlobId]:
        """Those of ``blob_ids`` that are not pending yet; they are now, and the caller's to append
        or to ``abandon``."""
        claimed = set()
        with self._lock:
            for blob_id in blob_ids:
                pending = self._pending.setdefault(blob_id, _Pending())
                if blob_id not in self._claimed and _is_to_be_stored(pending):
                    self._claimed[blob_id] = pending
                    claimed.add(blob_id)
        return claimed

    def abandon(self, blob_ids: set[BlobId], reason: BackupfsError) -> None:
        """Claimed blobs will never come: whoever relied on them learns of it by ``failures``."""
        with self._lock:
            self._lose(blob_ids, reason)

    def append(self, blobs: list[NewBlob]) -> None:
        """Hand over claimed blobs; waits while the packer has more than it may hold."""
        claims = {}
        with self._lock:
            self._check_open()
            for blob in blobs:
                pending = self._claimed.get(blob.blob_id)
                if pending is not None:
                    # It may have had a place that nobody may rely on, and have left with it since.
                    pending.blob, pending.pack, pending.location = blob.data, None, None
                    self._pending[blob.blob_id] = pending
                    claims[blob.blob_id] = pending
        self._jobs.put(blobs)
        with self._lock:
            for blob_id in claims.keys() & self._claimed.keys():
                if self._claimed[blob_id] is claims[blob_id]:
                    del self._claimed[blob_id]
            self._claims_changed.notify_all()

    def is_pending(self, blob_id: BlobId) -> bool:
        """Whether a blob is on its way into the repository."""
        with self._lock:
            return blob_id in self._pending

    def read_pending(self, blob_id: BlobId) -> bytes | None:
        """A pending blob's header and payload; None where it is not pending or not there yet."""
        with self._lock:
            pending = self._pending.get(blob_id)
            if pending is None:
                return None
            if pending.blob is not None:
                return pending.blob
            if pending.pack is None or pending.location is None:
                return None
            try:
                return read_all(pending.pack.file, pending.location.offset, pending.location.size)
            except OSError as error:
                raise storage_error(error) from error

    def seal(self, *, since: int) -> None:
        """Wait until all that was claimed, by whomever, before this call is durable.

        Raises:
            StorageError: something pending was lost after ``failures`` was ``since``.
        """
        with self._lock:
            self._check_open()
            # The caller may rely on them, and their writers are still compressing.
            claims = dict(self._claimed)
            self._claims_changed.wait_for(lambda: not claims.items() & self._claimed.items())
        token = _Seal()
        self._jobs.put(token)
        while not token.done.wait(ALIVE_SECONDS):
            # Closed by somebody else meanwhile: nothing behind its end is done any more.
            if not self._threads[-1].is_alive() and not token.done.is_set():
                raise StorageUnavailable(reason="the repository was closed")
        self.check(since=since)

    def check(self, *, since: int) -> None:
        """Raise the last failure if there was one after ``failures`` was ``since``."""
        if self._failures != since:
            raise self._failure

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageUnavailable(reason="the repository was closed")

    def close(self) -> None:
        """Seal what is open and end the threads; whoever appends or seals later is told."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        token = _Seal()
        self._jobs.put(token)
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    # -- packer thread -------------------------------------------------------------------------

    def _run_packer(self) -> None:
        while (job := self._next_job()) is not None:
            if isinstance(job, _Seal):
                for kind in list(self._open):
                    self._sealing.put(self._open.pop(kind))
                self._sealing.put(job)
            else:
                self._pack(job)
        self._sealing.put(None)

    def _next_job(self) -> list[NewBlob] | _Seal | None:
        return self._kept_jobs.popleft() if self._kept_jobs else self._jobs.get()

    def _pack(self, blobs: list[NewBlob]) -> None:
        for start in range(0, len(blobs), WRITE_PARTS_MAX):
            part = blobs[start : start + WRITE_PARTS_MAX]
            is_node = part[0].level > 0
            try:
                self._write(is_node, part)
            except Exception as error:  # whatever it is must fail the writers, not hang them
                self._fail_open(is_node, blobs[start:], _reason(error))
                break

    def _write(self, is_node: bool, blobs: list[NewBlob]) -> None:
        pack = self._open.get(is_node)
        if pack is None:
            pack = self._open[is_node] = self._new_pack()
        write_all_parts(pack.file, [blob.data for blob in blobs])
        with self._lock:
            for blob in blobs:
                self._place(pack, blob)
        if pack.size >= self._pack_size or len(pack.entries) >= PACK_ENTRIES_MAX:
            self._sealing.put(self._open.pop(is_node))

    def _place(self, pack: _OpenPack, blob: NewBlob) -> None:
        entry = PackEntry(
            blob_id=blob.blob_id,
            offset=pack.size,
            size=len(blob.data),
            level=blob.level,
            base=base_of(blob.data),
        )
        pack.entries.append(entry)
        pack.size += entry.size
        pending = self._pending.get(blob.blob_id)
        if pending is not None:
            pending.pack = pack
            pending.location = BlobLocation(
                pack_id=pack.pack_id, offset=entry.offset, size=entry.size
            )
            pending.blob = None

    def _new_pack(self) -> _OpenPack:
        pack_id = PackId(self._ambient.random_bytes(16))
        path = self._spool / pack_id.hex()
        file = make_file(path, access=os.O_RDWR)
        return _OpenPack(pack_id=pack_id, path=path, file=file)

    def _fail_open(self, is_node: bool, blobs: list[NewBlob], error: BackupfsError) -> None:
        pack = self._open.pop(is_node, None)
        lost = {blob.blob_id for blob in blobs} | self._drop_waiting()
        if pack is not None:
            lost.update(entry.blob_id for entry in pack.entries)
        with self._lock:
            self._lose(lost, error)
        if pack is not None:
            self._drop_file(pack)

    def _drop_waiting(self) -> set[BlobId]:
        """The blobs that were waiting: their writers have failed with those before them, so what is
        left of a full disk is not for them."""
        dropped: set[BlobId] = set()
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if isinstance(job, list):
                    dropped.update(blob.blob_id for blob in job)
                else:
                    self._kept_jobs.append(job)
        return dropped

    # -- sealer thread -------------------------------------------------------------------------

    def _run_sealer(self) -> None:
        while (item := self._sealing.get()) is not None:
            if isinstance(item, _Seal):
                item.done.set()
            else:
                self._seal_pack(item)

    def _seal_pack(self, pack: _OpenPack) -> None:
        try:
            write_all(
                pack.file,
                encode_footer(pack.pack_id, pack.entries, blobs_size=pack.size, ids=self._ids),
            )
            os.fsync(pack.file)
            self._storage.put_new(
                pack_name(pack.pack_id),
                SpooledFile(path=pack.path, size=os.fstat(pack.file).st_size),
            )
        except Exception as error:  # whatever it is must fail the writers, not hang them
            reason = _reason(error)
            with self._lock:
                self._lose({entry.blob_id for entry in pack.entries}, reason)
            self._drop_file(pack)
            return
        with self._lock:
            pack.is_durable = True
        self._enter_index(pack)

    def _enter_index(self, pack: _OpenPack) -> None:
        try:
            self._index.add_pack(pack.pack_id, pack.entries)
        except Exception as error:  # any failure of the cache: the pack is safe and stays pending
            log.warning("index not updated for pack %s: %s", pack.pack_id.hex(), error)
            self._unlisted.append(pack)
            if len(self._unlisted) > UNLISTED_PACKS_MAX:
                self._forget(self._unlisted.popleft())
            return
        self._forget(pack)
        while self._unlisted:  # from now on readers find them, by bringing the index in line
            self._forget(self._unlisted.popleft())

    def _forget(self, pack: _OpenPack) -> None:
        """What lies in a durable pack is pending no more."""
        with self._lock:
            for entry in pack.entries:
                pending = self._pending.get(entry.blob_id)
                if pending is not None and pending.pack is pack:
                    del self._pending[entry.blob_id]
            with contextlib.suppress(OSError):
                os.close(pack.file)

    # -- both ----------------------------------------------------------------------------------

    def _lose(self, blob_ids: set[BlobId], reason: BackupfsError) -> None:
        for blob_id in blob_ids:
            self._pending.pop(blob_id, None)
            self._claimed.pop(blob_id, None)
        self._claims_changed.notify_all()
        # After the entries are gone: a writer that still found one has the older number.
        self._failure = reason
        self._failures += 1
        log.info("blobs were not stored: %s", reason)  # who relied on them says so

    def _drop_file(self, pack: _OpenPack) -> None:
        # Where storing it failed this may as well, and must not end the thread.
        with self._lock, contextlib.suppress(OSError):
            os.close(pack.file)
        with contextlib.suppress(OSError):
            pack.path.unlink()


def _is_to_be_stored(pending: _Pending) -> bool:
    """Whether a blob has no place yet, or one that nobody may rely on."""
    if pending.pack is None:
        return pending.blob is None
    # In place, but not in the index: gc may have condemned the pack without our knowing.
    return pending.pack.is_durable


def _reason(error: Exception) -> BackupfsError:
    if isinstance(error, BackupfsError):
        return error
    if isinstance(error, OSError):
        return storage_error(error)
    return StorageUnavailable(reason=f"{type(error).__name__}: {error}")


def write_all_parts(file: int, parts: list[bytes]) -> None:
    """Write every part, in order: one call may take only some."""
    written = os.writev(file, parts)
    if written == sum(map(len, parts)):
        return
    for part in parts:
        if written >= len(part):
            written -= len(part)
        else:
            write_all(file, memoryview(part)[written:])
            written = 0
