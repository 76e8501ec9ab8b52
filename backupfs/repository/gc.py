"""Collects garbage: deletes packs that nothing reaches, and repacks those that are mostly dead.

Runs beside writers, from any process, and may be killed at any moment. In order: mark; write a plan
that condemns packs; wait until every living session has acknowledged it; mark again, from what
the sessions named, the drafts, then the records, in this order, since what leaves one of these is
in the next; delete what is still dead; copy what is alive out of thin packs, and only when the
copy is durable delete them; remove the plan. Why this is safe stands in docs/concurrency.md.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backupfs.errors import Busy, CorruptObject, DamageError, LockTimeout, StorageFull
from backupfs.format.pack import PackEntry, pack_name
from backupfs.repository.images import Root
from backupfs.repository.marking import Marker, Reached, draft_roots
from backupfs.repository.packer import NewBlob
from backupfs.repository.rebuild import list_packs, read_footer
from backupfs.repository.repository import RESERVE_NAME, RESERVE_SIZE, Repository
from backupfs.repository.sessions import (
    Plan,
    SessionWatch,
    encode_plan,
    plan_name,
    read_plans,
)
from backupfs.storage.locks import holder, try_lock
from backupfs.types import PackId, Progress, ceil_div

log = logging.getLogger(__name__)

ACKNOWLEDGE_SECONDS_MAX = 300.0
ACKNOWLEDGE_POLL_SECONDS = 0.02
# A pack with at least this share of dead bytes is worth copying the rest of.
THIN_DEAD_PERCENT = 30
# Packs smaller than this part of a full one are joined, once there are enough of them.
SMALL_PACK_PARTS = 8
SMALL_PACKS_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one run did."""

    packs_before: int
    packs_deleted: int
    packs_repacked: int
    bytes_before: int
    bytes_after: int


def collect(repository: Repository, progress: Progress) -> Collected:
    """Run gc once; ``progress`` gets the bytes of packs looked at.

    Raises:
        Busy: another gc runs.
        DamageError: a record, draft or node cannot be read: what it reaches is unknown, and
            nothing was deleted.
        LockTimeout: a session did not acknowledge; nothing was deleted.
        StorageError
    """
    path = repository.folder / "locks" / "gc"
    lock = try_lock(path)
    if lock is None:
        raise Busy(what="gc", holder=holder(path))
    lock.describe(f"process {repository.ambient.process_id()}")
    try:
        return _Run(repository, progress).run()
    finally:
        lock.release()


class _Run:
    def __init__(self, repository: Repository, progress: Progress) -> None:
        self._repository = repository
        self._storage = repository.storage
        self._progress = progress
        self._watch = SessionWatch(repository.folder, repository.storage)

    def run(self) -> Collected:
        self._clean_after_the_dead()
        self._repository.refresh_index()
        packs = list_packs(self._storage)
        # Only what the index lists can be told dead from alive; a pack with a bad footer stays.
        known = self._repository.index.pack_ids() & packs.keys()
        condemned = self._condemn(known, packs, self._mark(set()))
        deleted: set[PackId] = set()
        repacked: set[PackId] = set()
        if condemned:
            deleted, repacked = self._carry_out(condemned, packs)
        after = list_packs(self._storage)
        return Collected(
            packs_before=len(packs),
            packs_deleted=len(deleted),
            packs_repacked=len(repacked),
            bytes_before=sum(packs.values()),
            bytes_after=sum(after.values()),
        )

    def _clean_after_the_dead(self) -> None:
        """What a gc or a writer left that was killed: stale plans, sessions, spooled packs."""
        for plan in read_plans(self._storage):
            self._storage.delete(plan_name(plan.plan_id))
        spool = self._repository.folder / "spool"
        # Listed before the sessions: a session takes its lock first, then makes its folder.
        spooled = [path for path in spool.iterdir() if path.is_dir()] if spool.is_dir() else []
        living = self._watch.clean()
        for path in spooled:
            if path.name not in living:
                shutil.rmtree(path, ignore_errors=True)
        self._storage.clean_temporary()

    def _mark(self, acknowledged: set[Root]) -> Reached:
        repository = self._repository
        marker = Marker(repository.reader, repository.index)
        marker.mark(acknowledged)
        marker.mark(
            draft_roots(repository.folder, repository.ids, chunk_size=repository.config.chunk_size)
        )
        records, damage = repository.records.get_all()
        if damage:
            raise damage[0]
        marker.mark(Root(record.root, record.height) for record in records.values())
        if marker.reached.missing:
            log.warning("%d blobs are missing (see verify)", len(marker.reached.missing))
        return marker.reached

    def _condemn(
        self, known: set[PackId], packs: dict[PackId, int], reached: Reached
    ) -> set[PackId]:
        condemned, small = set(), set()
        for pack_id in known:
            alive = self._alive(pack_id, packs[pack_id], reached)
            size = packs[pack_id]
            self._progress(size)
            if alive is None:
                continue
            alive_size = sum(entry.size for entry in alive)
            if (size - alive_size) * 100 >= size * THIN_DEAD_PERCENT:
                condemned.add(pack_id)
            elif size < self._repository.config.pack_size // SMALL_PACK_PARTS:
                small.add(pack_id)
        if len(small) >= SMALL_PACKS_MIN:
            condemned |= small
        return condemned

    def _alive(self, pack_id: PackId, size: int, reached: Reached) -> list[PackEntry] | None:
        """The blobs of a pack that were reached; None where its footer cannot be read now."""
        offsets = reached.offsets(pack_id)
        if not offsets:
            return []
        try:
            entries = read_footer(self._storage, self._repository.ids, pack_id, size)
        except CorruptObject as error:
            log.warning("left alone: %s", error)
            return None
        return [entry for entry in entries if entry.offset in offsets]

    def _carry_out(
        self, condemned: set[PackId], packs: dict[PackId, int]
    ) -> tuple[set[PackId], set[PackId]]:
        plan = Plan(self._repository.ambient.random_bytes(16).hex(), frozenset(condemned))
        self._publish(plan)
        try:
            self._wait_for_sessions(plan)
            acknowledged = self._watch.acknowledged_roots(plan.plan_id)
            reached = self._mark(acknowledged)
            dead = {pack_id for pack_id in condemned if not reached.offsets(pack_id)}
            self._delete(dead)
            thin = sorted(condemned - dead)
            return dead, self._repack(thin, packs, reached)
        finally:
            self._storage.delete(plan_name(plan.plan_id))
            self._restore_reserve()

    def _publish(self, plan: Plan) -> None:
        data = encode_plan(plan)
        try:
            self._storage.put_new(plan_name(plan.plan_id), data)
        except StorageFull:
            # This is what the reserve is for.
            self._reserve.unlink(missing_ok=True)
            self._storage.put_new(plan_name(plan.plan_id), data)

    def _wait_for_sessions(self, plan: Plan) -> None:
        ambient = self._repository.ambient
        started = ambient.monotonic()
        while waiting := self._watch.waiting_for(plan.plan_id, but=None):
            if ambient.monotonic() - started > ACKNOWLEDGE_SECONDS_MAX:
                raise LockTimeout(
                    seconds=ACKNOWLEDGE_SECONDS_MAX,
                    what="a writer to acknowledge gc",
                    holder=holder(waiting[0]),
                )
            ambient.sleep(ACKNOWLEDGE_POLL_SECONDS)

    def _delete(self, pack_ids: Iterable[PackId]) -> None:
        for pack_id in pack_ids:
            self._storage.delete(pack_name(pack_id))
        self._repository.index.forget_packs(pack_ids)

    def _repack(
        self, thin: list[PackId], packs: dict[PackId, int], reached: Reached
    ) -> set[PackId]:
        """Copy what is alive out of ``thin`` packs, then delete them; those so treated."""
        done: set[PackId] = set()
        # A few at a time, so that a nearly full disk needs room for few.
        group_count = max(1, ceil_div(SMALL_PACKS_MIN, 4))
        for start in range(0, len(thin), group_count):
            group = thin[start : start + group_count]
            try:
                done |= self._repack_group(group, packs, reached)
            except StorageFull as error:
                log.warning("not repacked: %s", error)
                break
        return done

    def _repack_group(
        self, group: list[PackId], packs: dict[PackId, int], reached: Reached
    ) -> set[PackId]:
        packer = self._repository.writer().packer
        since = packer.failures
        copied = {
            pack_id for pack_id in group if self._copy_alive(pack_id, packs[pack_id], reached)
        }
        packer.seal(since=since)
        self._delete(copied)
        return copied

    def _copy_alive(self, pack_id: PackId, size: int, reached: Reached) -> bool:
        """Hand what is alive in a pack to the packer; False where some of it is damaged."""
        alive = self._alive(pack_id, size, reached)
        if alive is None:
            return False
        packer = self._repository.writer().packer
        for entry in alive:
            try:
                data = self._repository.reader.raw_at(pack_id, entry)
            except DamageError as error:
                log.warning("left alone: %s", error)
                return False
            if packer.claim([entry.blob_id]):
                packer.append([NewBlob(blob_id=entry.blob_id, level=entry.level, data=data)])
        return True

    @property
    def _reserve(self) -> Path:
        return self._repository.folder / "spool" / RESERVE_NAME

    def _restore_reserve(self) -> None:
        if not self._reserve.exists():
            with contextlib.suppress(OSError):
                self._reserve.write_bytes(self._repository.ambient.random_bytes(RESERVE_SIZE))
