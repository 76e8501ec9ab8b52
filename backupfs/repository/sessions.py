"""Sessions and plans: how writers and gc agree, without a lock on the repository.

A writer announces itself by a lock file in ``sessions/`` before its first look-up. gc writes a plan
that condemns packs and waits until every living session has acknowledged it. A session
acknowledges after it has (1) stopped relying on condemned packs and (2) made durable what it
built before; the acknowledgement names the roots it holds, which gc marks too. The table of
operations against operations is in docs/concurrency.md.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import CorruptObject, ObjectExists, ObjectNotFound, StorageError
from backupfs.format import codec
from backupfs.format.blob import LEVEL_MAX
from backupfs.repository.avoided import Avoided
from backupfs.repository.images import Root
from backupfs.storage.base import Storage
from backupfs.storage.local import LocalStorage
from backupfs.storage.locks import FileLock, is_held, try_lock
from backupfs.types import BLOB_ID_SIZE, PACK_ID_SIZE, BlobId, ObjectName, PackId

log = logging.getLogger(__name__)

SESSIONS = "sessions"
PLANS_PREFIX = "plans/"
ACKS_PREFIX = "sessions/acks/"
PLAN_SIZE_MAX = 64 << 20
ACK_SIZE_MAX = 16 << 20
POLL_SECONDS = 0.1

_PLAN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Packs that a gc means to delete."""

    plan_id: str
    condemned: frozenset[PackId]


def encode_plan(plan: Plan) -> bytes:
    return codec.encode(
        {"version": 1, "id": plan.plan_id, "condemned": b"".join(sorted(plan.condemned))}
    )


def decode_plan(data: bytes, name: str) -> Plan:
    """The plan in the object ``name``. Raises: CorruptObject."""
    try:
        value = codec.decode(data, size_max=PLAN_SIZE_MAX)
        fields = codec.Fields(value)
        if fields.integer("version") != 1:
            raise codec.UndecodableError("its version is unknown")
        packed = value.get("condemned")
        plan_id = fields.text("id", size_max=64)
        # Answers are named by it.
        if not _PLAN_ID.fullmatch(plan_id) or name != plan_name(plan_id):
            raise codec.UndecodableError("its id is not the one in its name")
        if not isinstance(packed, bytes) or len(packed) % PACK_ID_SIZE:
            raise codec.UndecodableError("field 'condemned' is no list of packs")
        condemned = (
            PackId(packed[start : start + PACK_ID_SIZE])
            for start in range(0, len(packed), PACK_ID_SIZE)
        )
        return Plan(plan_id, frozenset(condemned))
    except codec.UndecodableError as error:
        raise CorruptObject(name=name, reason=str(error)) from error


def plan_name(plan_id: str) -> ObjectName:
    return ObjectName(f"{PLANS_PREFIX}{plan_id}.msgpack")


def ack_name(session_id: str, plan_id: str) -> ObjectName:
    return ObjectName(f"{ACKS_PREFIX}{session_id}-{plan_id}.msgpack")


def gc_lock_path(folder: Path) -> Path:
    """The lock under which packs are deleted; who holds it is sure that none is."""
    return folder / "locks" / "gc"


def read_plans(storage: Storage, *, gc_lock: Path) -> list[Plan]:
    """The plans that are under way or were left by a gc that died. Raises: StorageError.

    One that cannot be read, left by a gc that died, is left out: nobody will carry it out.

    Raises:
        CorruptObject: one cannot be read, and a gc is alive that may carry it out.
    """
    plans = []
    for info in storage.list(PLANS_PREFIX):
        try:
            data = storage.get_range(info.name, 0, PLAN_SIZE_MAX + 1)
            plans.append(decode_plan(data, info.name))
        except ObjectNotFound:
            continue  # its gc has ended since
        except CorruptObject as error:
            if is_held(gc_lock):
                raise
            log.warning("%s", error)
    return plans


class Session:
    """This process's presence as a writer; a thread of its own watches for plans."""

    def __init__(
        self,
        *,
        folder: Path,
        storage: LocalStorage,
        ambient: Ambient,
        avoided: Avoided,
        refresh: Callable[[], object],
    ) -> None:
        self.session_id = ambient.random_bytes(16).hex()
        # Called before all checkpoints: makes sure that nobody can go on relying on condemned packs.
        self.settle: Callable[[], None] = lambda: None
        self._storage = storage
        self._gc_lock = gc_lock_path(folder)
        self._avoided = avoided
        self._refresh = refresh
        self._held: Counter[Root] = Counter()
        self._checkpoints: list[Callable[[], set[Root]]] = []
        self._lock = threading.Lock()
        self._acknowledged: frozenset[str] = frozenset()
        self._plans_mark: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="session", daemon=True)
        self._file = take_session_lock(folder / SESSIONS / self.session_id, ambient)
        try:
            self._file.describe(f"process {ambient.process_id()} on {ambient.host_name()}")
            # After the lock, before any look-up: a gc either sees us or we see its plan.
            self._follow_plans()
            # And of a gc that ended since the index was last in line, the index must learn.
            self._refresh()
        except BaseException:  # gc would wait for a session that nobody has
            self._file.release(remove=True)
            raise
        self._thread.start()

    def stop_watching(self) -> None:
        """No checkpoint is called from now on; a gc that comes waits until ``close``."""
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        """Leave: from now on gc does not wait for this process."""
        self.stop_watching()
        self._delete_acks(self._acknowledged)
        self._file.release(remove=True)

    @contextlib.contextmanager
    def holding(self, root: Root) -> Iterator[None]:
        """Keep what ``root`` reaches from gc, for as long as this process lives and the block runs."""
        self.hold(root)
        try:
            yield
        finally:
            self.let_go(root)

    def hold(self, root: Root) -> None:
        """Keep what ``root`` reaches from gc until ``let_go``."""
        with self._lock:
            self._held[root] += 1

    def let_go(self, root: Root) -> None:
        with self._lock:
            self._held[root] -= 1
            if not self._held[root]:
                del self._held[root]

    def add_checkpoint(self, checkpoint: Callable[[], set[Root]]) -> None:
        """Have ``checkpoint`` called before a plan is acknowledged: it makes durable what its
        owner has built, and returns the roots that then must not be collected."""
        with self._lock:
            self._checkpoints.append(checkpoint)

    def remove_checkpoint(self, checkpoint: Callable[[], set[Root]]) -> None:
        with self._lock:
            self._checkpoints.remove(checkpoint)

    def _watch(self) -> None:
        told = ""
        while not self._stop.wait(POLL_SECONDS):
            problem = ""
            try:
                self._follow_plans()
            except Exception as error:  # gc waits for us meanwhile, and nothing is lost
                problem = f"{type(error).__name__}: {error}"
                if problem != told:  # it is tried ten times a second
                    log.exception("gc's plans cannot be followed; trying on")
            told = problem

    def _follow_plans(self) -> None:
        mark = self._storage.change_mark(PLANS_PREFIX)
        if mark is not None and mark == self._plans_mark:
            return
        plans = read_plans(self._storage, gc_lock=self._gc_lock)
        condemned = frozenset(pack_id for plan in plans for pack_id in plan.condemned)
        # Grown first, shrunk last: packs of a plan that ended may be gone, and the index must know.
        is_to_shrink = bool(self._avoided.packs - condemned)
        self._avoided.packs |= condemned
        present = frozenset(plan.plan_id for plan in plans)
        if is_to_shrink:
            self._refresh()
        self._delete_acks(self._acknowledged - present)
        for plan_id in sorted(present - self._acknowledged):
            self._acknowledge(plan_id)
        self._avoided.packs = condemned
        self._acknowledged = present
        self._plans_mark = mark

    def _acknowledge(self, plan_id: str) -> None:
        self.settle()
        # Only now: who comes later relies on nothing that is condemned.
        with self._lock:
            checkpoints = list(self._checkpoints)
        roots: set[Root] = set()
        for checkpoint in checkpoints:
            roots |= checkpoint()
        with self._lock:
            roots.update(self._held)
        # There already: an earlier try succeeded unknown to us, and what it said still holds.
        with contextlib.suppress(ObjectExists):
            self._storage.put_new(ack_name(self.session_id, plan_id), encode_ack(roots))

    def _delete_acks(self, plan_ids: Iterable[str]) -> None:
        for plan_id in plan_ids:
            with contextlib.suppress(StorageError):
                self._storage.delete(ack_name(self.session_id, plan_id))


def take_session_lock(path: Path, ambient: Ambient) -> FileLock:
    """Take the lock of a new session. The name is nobody else's; only a gc that looks whether a
    session is alive is in the way, for a moment."""
    while (lock := try_lock(path)) is None:
        ambient.sleep(0.001)
    return lock


def encode_ack(roots: set[Root]) -> bytes:
    ordered = sorted(roots, key=lambda root: (root.root, root.height))
    return codec.encode(
        {"version": 1, "roots": [[bytes(root.root), root.height] for root in ordered]}
    )


def decode_ack(data: bytes, name: str) -> set[Root]:
    """Raises: CorruptObject."""
    try:
        fields = codec.Fields(codec.decode(data, size_max=ACK_SIZE_MAX))
        if fields.integer("version") != 1:
            raise codec.UndecodableError("its version is unknown")
        roots = set()
        for item in fields.sequence("roots", length_max=1 << 18):
            blob_id, height = item
            if not isinstance(blob_id, bytes) or len(blob_id) != BLOB_ID_SIZE:
                raise codec.UndecodableError("field 'roots' holds other than ids")
            if not isinstance(height, int) or not 1 <= height <= LEVEL_MAX:
                raise codec.UndecodableError("field 'roots' holds an impossible height")
            roots.add(Root(BlobId(blob_id), height))
        return roots
    except (codec.UndecodableError, ValueError, TypeError) as error:
        raise CorruptObject(name=name, reason=str(error)) from error


class SessionWatch:
    """gc's view of the sessions of a repository."""

    def __init__(self, folder: Path, storage: Storage) -> None:
        self._folder = folder / SESSIONS
        self._storage = storage

    def waiting_for(self, plan_id: str, *, but: str | None) -> list[Path]:
        """Lock files of living sessions, other than ``but``, that have not acknowledged."""
        acknowledged = {info.name for info in self._storage.list(ACKS_PREFIX)}
        return [
            path
            for path in self._living()
            if path.name != but and ack_name(path.name, plan_id) not in acknowledged
        ]

    def acknowledged_roots(self, plan_id: str) -> set[Root]:
        """The roots that sessions named for a plan. Raises: CorruptObject, StorageError."""
        roots: set[Root] = set()
        for info in self._storage.list(ACKS_PREFIX):
            if not info.name.endswith(f"-{plan_id}.msgpack"):
                continue
            # Gone: its session has ended, and what it published is in its records.
            with contextlib.suppress(ObjectNotFound):
                data = self._storage.get(info.name, size_max=ACK_SIZE_MAX)
                roots |= decode_ack(data, info.name)
        return roots

    def clean(self) -> set[str]:
        """Remove what dead sessions left; the ids of the living."""
        living = {path.name for path in self._living()}
        for info in list(self._storage.list(ACKS_PREFIX)):
            if info.name.removeprefix(ACKS_PREFIX).partition("-")[0] not in living:
                self._storage.delete(info.name)
        return living

    def _living(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        living = []
        for path in self._folder.iterdir():
            if not path.is_file():
                continue
            # Removed only under its lock: a session may have made it and be about to take it.
            lock = try_lock(path)
            if lock is None:
                living.append(path)
            else:
                lock.release(remove=True)
        return living
