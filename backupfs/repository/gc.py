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
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from backupfs.errors import (
    Busy,
    CorruptObject,
    DamageError,
    LockTimeout,
    StorageFull,
    StorageUnavailable,
)
from backupfs.format.pack import TAIL_SIZE, PackEntry, pack_name
from backupfs.repository.images import Root
from backupfs.repository.marking import Marker, Reached, draft_roots, with_bases
from backupfs.repository.packer import NewBlob
from backupfs.repository.rebuild import list_packs, read_footer
from backupfs.repository.repository import RESERVE_NAME, RESERVE_SIZE, Repository
from backupfs.repository.sessions import (
    PLANS_PREFIX,
    Plan,
    SessionWatch,
    encode_plan,
    gc_lock_path,
    plan_name,
)
from backupfs.storage.local import write_all
from backupfs.storage.locks import FileLock, holder, try_lock
from backupfs.storage.oserrors import is_want_of_resources, translated
from backupfs.storage.ownership import make_file
from backupfs.types import BlobId, PackId, Progress

log = logging.getLogger(__name__)

ACKNOWLEDGE_SECONDS_MAX = 300.0
ACKNOWLEDGE_POLL_SECONDS = 0.02
# A writer that takes longer may lack the room for its answer.
ROOM_FOR_ANSWERS_SECONDS = 5.0
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
    reserve = _Reserve(repository)
    lock = _take_lock(repository, reserve)
    try:
        return _Run(repository, progress, reserve).run()
    finally:
        reserve.restore()
        lock.release()


def _take_lock(repository: Repository, reserve: _Reserve) -> FileLock:
    path = gc_lock_path(repository.folder)
    try:
        lock = try_lock(path)
    except StorageFull:
        reserve.give_up()
        lock = try_lock(path)
    if lock is None:
        raise Busy(what="gc", holder=holder(path))
    lock.describe(f"process {repository.ambient.process_id()}")
    return lock


class _Reserve:
    """A file whose only use is to be deleted: room for gc, and who answers it, on a full disk."""

    def __init__(self, repository: Repository) -> None:
        self._path = repository.folder / "spool" / RESERVE_NAME
        self._ambient = repository.ambient

    def give_up(self) -> None:
        with translated():
            self._path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Make it again where it is gone, or not whole; without room, the next gc will."""
        with contextlib.suppress(OSError):
            if not self._path.exists() or self._path.stat().st_size < RESERVE_SIZE:
                self._path.unlink(missing_ok=True)
                file = make_file(self._path)
                try:
                    write_all(file, self._ambient.random_bytes(RESERVE_SIZE))
                finally:
                    os.close(file)


class _Run:
    def __init__(self, repository: Repository, progress: Progress, reserve: _Reserve) -> None:
        self._repository = repository
        self._storage = repository.storage
        self._progress = progress
        self._reserve = reserve
        self._watch = SessionWatch(repository.folder, repository.storage)
        self._missing: set[BlobId] = set()  # reached, and in no pack even by a new index

    def run(self) -> Collected:
        self._clean_after_the_dead()
        self._repository.refresh_index()
        self._repository.check_packs_stay()
        packs = list_packs(self._storage)
        condemned = self._choose(packs)
        deleted: set[PackId] = set()
        repacked: set[PackId] = set()
        if condemned:
            deleted, repacked = self._carry_out(condemned, packs)
            self._repository.refresh_index()
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
        for info in list(self._storage.list(PLANS_PREFIX)):
            self._storage.delete(info.name)
        spool = self._repository.folder / "spool"
        # Listed before the sessions: a session takes its lock first, then makes its folder.
        spooled = [path for path in spool.iterdir() if path.is_dir()] if spool.is_dir() else []
        living = self._watch.clean()
        for path in spooled:
            if path.name not in living:
                shutil.rmtree(path, ignore_errors=True)
        self._storage.clean_temporary()

    def _choose(self, packs: dict[PackId, int]) -> set[PackId]:
        """The packs to condemn, by an index that agrees with the packs.

        An entry that was lost or is wrong would make what lies there look dead, so at the first
        doubt the index is brought up to date, then made anew. What is missing even then is damage.
        """
        for make_sure in (None, self._repository.refresh_index, self._repository.renew_index):
            if make_sure is not None:
                log.warning("the index does not agree with the packs: looking at these again")
                make_sure()
            reached = self._mark(set())
            # Only what the index lists can be told dead from alive; a pack with a bad footer stays.
            known = self._repository.index.pack_ids() & packs.keys()
            condemned, agrees = self._condemn(known, packs, reached)
            if agrees and not reached.missing:
                return condemned
        if not agrees:
            raise StorageUnavailable(reason="the index does not agree with the packs")
        log.warning("%d blobs are missing (see verify)", len(reached.missing))
        self._missing = reached.missing
        return condemned

    def _mark(self, acknowledged: set[Root]) -> Reached:
        repository = self._repository
        marker = Marker(repository.reader, repository.index)
        marker.mark(acknowledged)
        marker.mark(
            draft_roots(repository.folder, repository.ids, chunk_size=repository.config.chunk_size)
        )
        records, unreadable = repository.records.get_all()
        if unreadable:
            raise next(iter(unreadable.values()))
        marker.mark(Root(record.root, record.height) for record in records.values())
        # Not by marking again: others may publish faster than that.
        marker.look_again(repository.refresh_index)
        return marker.reached

    def _condemn(
        self, known: set[PackId], packs: dict[PackId, int], reached: Reached
    ) -> tuple[set[PackId], bool]:
        """The packs to condemn, and whether all that was reached lies where the index says."""
        condemned, small = set(), set()
        agrees = True
        suspects = self._repository.index.suspects()
        for pack_id in known:
            alive = self._alive(pack_id, packs[pack_id], reached)
            size = packs[pack_id]
            self._progress(size)
            if alive is None:
                continue
            agrees &= len(alive) == len(reached.offsets(pack_id))
            # What the pack would be without its dead.
            alive_size = TAIL_SIZE + sum(entry.size + entry.listed_size for entry in alive)
            is_thin = (size - alive_size) * 100 >= size * THIN_DEAD_PERCENT
            if is_thin or not alive or pack_id in suspects:
                condemned.add(pack_id)
            elif size < self._repository.config.pack_size // SMALL_PACK_PARTS:
                small.add(pack_id)
        if len(small) >= SMALL_PACKS_MIN:
            condemned |= small
        return condemned, agrees

    def _alive(self, pack_id: PackId, size: int, reached: Reached) -> list[PackEntry] | None:
        """The blobs of a pack that were reached; None where its footer cannot be read now."""
        offsets = reached.offsets(pack_id)
        if not offsets:
            return []
        try:
            entries = self._entries(pack_id, size)
        except CorruptObject as error:
            log.warning("left alone: %s", error)
            return None
        return [entry for entry in entries if entry.offset in offsets]

    def _entries(self, pack_id: PackId, size: int) -> list[PackEntry]:
        """What a pack holds. Raises: CorruptObject, also where the disk cannot read it; StorageError."""
        try:
            return read_footer(self._storage, self._repository.ids, pack_id, size)
        except StorageUnavailable as error:
            if is_want_of_resources(error):
                raise
            raise CorruptObject(name=pack_name(pack_id), reason=error.reason) from error

    def _carry_out(
        self, condemned: set[PackId], packs: dict[PackId, int]
    ) -> tuple[set[PackId], set[PackId]]:
        plan = Plan(self._repository.ambient.random_bytes(16).hex(), frozenset(condemned))
        self._publish(plan)
        try:
            self._wait_for_sessions(plan)
            reached = self._mark(self._watch.acknowledged_roots(plan.plan_id))
            self._repository.check_packs_stay()
            if reached.missing - self._missing:
                raise StorageUnavailable(reason="blobs are missing that were there (see verify)")
            self._keep_better_copies(condemned, packs, reached)
            dead = {pack_id for pack_id in condemned if not reached.offsets(pack_id)}
            self._delete(dead)
            thin = sorted(condemned - dead)
            return dead, self._repack(thin, packs, reached)
        finally:
            self._storage.delete(plan_name(plan.plan_id))

    def _keep_better_copies(
        self, condemned: set[PackId], packs: dict[PackId, int], reached: Reached
    ) -> None:
        """Have a copy of what was reached elsewhere count as reached too, if the one there is damaged.

        The index names one copy of a blob; it may be the damaged one, as after a heal when an index
        is made anew. So of what has two copies none is given up before the other one was read.
        """
        offsets: dict[PackId, set[int]] = {}
        for pack_id in condemned:
            try:
                entries = self._entries(pack_id, packs[pack_id])
            except CorruptObject:
                continue  # told before; what it holds cannot be told
            here = reached.offsets(pack_id)
            others = [entry for entry in entries if entry.offset not in here]
            places = self._repository.index.find_many([entry.blob_id for entry in others])
            for entry, place in zip(others, places, strict=True):
                if place is None or (place.pack_id, place.offset) == (pack_id, entry.offset):
                    continue
                if place.pack_id not in offsets:
                    offsets[place.pack_id] = reached.offsets(place.pack_id)
                if place.offset not in offsets[place.pack_id]:
                    continue
                there = replace(entry, offset=place.offset, size=place.size, base=place.base)
                if (
                    self._raw(place.pack_id, there) is None
                    and self._raw(pack_id, entry) is not None
                ):
                    self._repository.reader.note_damage([entry.blob_id])
                    reached.add(pack_id, entry.offset)
                    bases = [] if entry.base is None else [entry.base]
                    for _, below in with_bases(self._repository.index, bases):
                        if below is not None:
                            reached.add(below.pack_id, below.offset)

    def _raw(self, pack_id: PackId, entry: PackEntry) -> bytes | None:
        """A blob's header and payload, proven; None where it cannot be read."""
        try:
            return self._repository.reader.raw_at(pack_id, entry)
        except DamageError as error:
            log.warning("left alone: %s", error)
        except StorageUnavailable as error:  # the disk cannot read it, or what it differs from
            if is_want_of_resources(error):
                raise
            log.warning("left alone: %s: %s", pack_name(pack_id), error)
        return None

    def _publish(self, plan: Plan) -> None:
        data = encode_plan(plan)
        try:
            self._storage.put_new(plan_name(plan.plan_id), data)
        except StorageFull:
            self._reserve.give_up()
            self._storage.put_new(plan_name(plan.plan_id), data)

    def _wait_for_sessions(self, plan: Plan) -> None:
        ambient = self._repository.ambient
        started = ambient.monotonic()
        while waiting := self._watch.waiting_for(plan.plan_id, but=None):
            waited = ambient.monotonic() - started
            if waited > ROOM_FOR_ANSWERS_SECONDS:
                self._reserve.give_up()
            if waited > ACKNOWLEDGE_SECONDS_MAX:
                raise LockTimeout(
                    seconds=ACKNOWLEDGE_SECONDS_MAX,
                    what="a writer to acknowledge gc",
                    holder=holder(waiting[0]),
                )
            ambient.sleep(ACKNOWLEDGE_POLL_SECONDS)

    def _delete(self, pack_ids: Iterable[PackId]) -> None:
        try:
            for pack_id in pack_ids:
                self._storage.delete(pack_name(pack_id))
        finally:
            # Also where a deletion failed: it may have had its effect, and what is still there is
            # taken in again by the next refresh. Nothing that was reached lay there, but somebody
            # may have come to need a copy of it in another pack meanwhile.
            self._repository.index.forget_packs(pack_ids, leaves_gaps=True)

    def _repack(
        self, thin: list[PackId], packs: dict[PackId, int], reached: Reached
    ) -> set[PackId]:
        """Copy what is alive out of ``thin`` packs, then delete them; those so treated."""
        done: set[PackId] = set()
        # As much as makes one full pack at a time, so that a nearly full disk needs room for one.
        for group in _groups(thin, packs, size_min=self._repository.config.pack_size):
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
        if alive is None or len(alive) != len(reached.offsets(pack_id)):
            return False
        packer = self._repository.writer().packer
        for entry in alive:
            data = self._raw(pack_id, entry)
            if data is None:
                return False
            if packer.claim([entry.blob_id]):
                packer.append([NewBlob(blob_id=entry.blob_id, level=entry.level, data=data)])
        return True


def _groups(
    pack_ids: Iterable[PackId], sizes: dict[PackId, int], *, size_min: int
) -> Iterator[list[PackId]]:
    """Packs in groups of at least ``size_min`` bytes, but for the last."""
    group: list[PackId] = []
    group_size = 0
    for pack_id in pack_ids:
        group.append(pack_id)
        group_size += sizes[pack_id]
        if group_size >= size_min:
            yield group
            group, group_size = [], 0
    if group:
        yield group
