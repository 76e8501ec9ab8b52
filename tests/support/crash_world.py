"""Acts on a repository, each with what it promises should the power go during it or after it.

A ``World`` does the acts and keeps account. What it notes is compared with what a power cut left by
``crash_check``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from support.crash_run import Act, Backups, Promise, Run, Staged, nothing

from backupfs.ambient import Ambient
from backupfs.errors import BackupfsError, BackupNotFound, DraftNotFound
from backupfs.format.names import volume_of
from backupfs.format.record import encode_record
from backupfs.service import Record, RetentionPolicy
from backupfs.staging.keeper import _name_aside
from backupfs.staging.lifecycle import State, is_temporary
from backupfs.staging.staged_file import StagedFile
from backupfs.staging.write_handle import WriteHandle


def overlaid(content: bytes, pieces: Sequence[tuple[int, bytes]]) -> bytes:
    """``content`` with pieces written over it."""
    whole = bytearray(content)
    for offset, data in pieces:
        whole.extend(bytes(max(0, offset - len(whole))))
        whole[offset : offset + len(data)] = data
    return bytes(whole)


@dataclass
class _Open:
    """A copy that is under way while other things are done."""

    handle: WriteHandle
    name: str
    base: bytes
    pieces: list[tuple[int, bytes]]
    options: list[bytes | None]  # what may be found of it


def _without(alternatives: tuple[Staged, ...], name: str) -> tuple[Staged, ...]:
    return tuple(
        {other: data for other, data in staged.items() if other != name} for staged in alternatives
    )


class World:
    """Acts through a ``Run``; ``note`` is told what is promised, whenever that changes."""

    def __init__(self, run: Run, note: Callable[[Promise], None], promise: Promise) -> None:
        """``promise`` says what is there: one way for each thing."""
        assert len(promise.staged) == 1 and not promise.may and not promise.must_once_mounted
        self.run = run
        self.promise = promise
        self.deleted: Backups = {}  # those that can be had back: gc has not run since
        self._records: dict[str, Record] = {}
        self._open: _Open | None = None
        self._is_closing = False
        self._noted = note
        note(promise)

    def _note(self, promise: Promise) -> None:
        """Tell what is promised; of a copy under way any state that it had may be left."""
        if self._open is not None:
            name, options = self._open.name, self._open.options
            promise = replace(
                promise,
                staged=tuple(
                    {key: value for key, value in staged.items() if key != name}
                    | ({} if content is None else {name: content})
                    for staged in promise.staged
                    for content in options
                ),
                aim=promise.aim and replace(promise.aim, staged=_without(promise.aim.staged, name)),
            )
        self._noted(promise)

    @property
    def staged(self) -> Staged:
        return self.promise.staged[0]

    @property
    def backups(self) -> Backups:
        return self.promise.must

    # -- commands --------------------------------------------------------------------------------

    def back_up(self, volume: str, image: bytes) -> str:
        backup_id = Ambient().new_uuid()
        made = {backup_id: (volume, image)}

        def act(run: Run) -> None:
            if not run.has(backup_id):
                run.back_up(volume, image, backup_id)

        self._do(f"backup of {volume}", act, replace(self.promise, must=self.backups | made))
        return backup_id

    def delete(self, backup_id: str) -> None:
        def act(run: Run) -> None:
            with contextlib.suppress(BackupNotFound):
                run.service.delete(run.record(backup_id))

        self._delete(f"delete {backup_id}", act, [backup_id])

    def prune(self, volume: str) -> None:
        """Keep a volume's last backup only."""
        policy = RetentionPolicy(last=1)
        doomed = self.run.service.prune(policy, volume=volume, dry_run=True).deleted

        def act(run: Run) -> None:
            run.service.prune(policy, volume=volume)

        self._delete(f"prune {volume}", act, [record.backup_id for record in doomed])

    def _delete(self, what: str, act: Act, doomed: list[str]) -> None:
        for backup_id in doomed:
            self.deleted[backup_id] = self.backups[backup_id]
            self._records[backup_id] = self.run.record(backup_id)
        kept = {key: value for key, value in self.backups.items() if key not in doomed}
        self._do(what, act, replace(self.promise, must=kept))

    def import_back(self, backup_id: str) -> None:
        """Have a deleted backup back from its record."""
        record = self._records[backup_id]
        data = encode_record(record, self.run.service.repository.ids)
        if self.run.service.catalogue.by_name(record.volume, record.name) is not None:
            return  # another of the same second has its name now

        def act(run: Run) -> None:
            run.service.import_record(data)

        had = self.backups | {backup_id: self.deleted.pop(backup_id)}
        self._do(f"import {backup_id}", act, replace(self.promise, must=had), is_lost_by_gc=True)

    def gc(self) -> None:
        self.deleted.clear()
        self._do("gc", Run.gc, self.promise)

    def put_metadata(self, volume: str, value: dict[str, Any]) -> None:
        def act(run: Run) -> None:
            run.service.put_metadata(volume, value)

        known = self.promise.metadata | {volume: (value,)}
        self._do(f"metadata of {volume}", act, replace(self.promise, metadata=known))

    # -- in staging/ -----------------------------------------------------------------------------

    def write(
        self,
        name: str,
        *pieces: tuple[int, bytes],
        truncate: bool = False,
        synced: int | None = None,
        killed: bool = False,
    ) -> None:
        """Write pieces and close; ``synced``: with an fsync after so many of them."""
        base = b"" if truncate else self.staged.get(name, b"")
        whole = overlaid(base, pieces)
        again, closed = self._writing_again(name, whole), self.staged | {name: whole}
        now = [self.staged] if name in self.staged else [self.staged, self.staged | {name: b""}]
        self._begin(f"write {name}", again, now, aim=closed)
        handle = self.run.open(name, truncate=truncate)
        try:
            made = self._write(handle, name, base, pieces, now, again, synced, killed=killed)
        except BackupfsError:
            # The program gives up, and what it had open is closed.
            if not self._is_closing:
                with contextlib.suppress(BackupfsError):
                    self.run.area.flush(handle, interrupted=killed)
            self.run.area.release(handle, interrupted=killed)
            raise
        self._begin(f"release {name}", again, [closed], must_once_mounted=made)
        self.run.area.release(handle, interrupted=killed)
        is_made = handle.staged.published_id in made
        assert is_made == bool(made), (name, handle.staged.state, handle.staged.reason)
        self._end(f"write {name}", closed, made)

    def _write(
        self,
        handle: WriteHandle,
        name: str,
        base: bytes,
        pieces: tuple[tuple[int, bytes], ...],
        now: list[Staged],
        again: Act,
        synced: int | None,
        *,
        killed: bool,
    ) -> Backups:
        """Up to the return of close; the backup that is to come of it."""
        self._is_closing = False
        closed = self.staged | {name: overlaid(base, pieces)}
        for number, (offset, data) in enumerate(pieces):
            if number == synced:
                part = self.staged | {name: overlaid(base, pieces[:number])}
                self._begin(f"sync {name}", again, [*now, part], aim=closed)
                self.run.area.sync(handle)
                now = [part]
                self._begin(f"write on {name}", again, now, aim=closed)
            self.run.write(handle, offset, data)
        made = self._to_be_made(name, closed[name], handle.staged, killed=killed)
        self._begin(f"flush {name}", again, [*now, closed], may=made)
        self._is_closing = True
        self.run.area.flush(handle, interrupted=killed)
        return made

    def begin(self, name: str, *pieces: tuple[int, bytes], truncate: bool = False) -> None:
        """Write pieces and go on to do other things; one copy at a time."""
        old = self.staged.get(name)
        base = b"" if truncate or old is None else old
        handle = self.run.open(name, truncate=truncate)
        options = [None, b""] if old is None else [old]
        self._open = _Open(handle, name, base, list(pieces), options)
        self._note(self.promise)
        for offset, data in pieces:
            self.run.write(handle, offset, data)

    def sync(self) -> None:
        """fsync what is being written."""
        assert self._open is not None
        part = overlaid(self._open.base, self._open.pieces)
        self._open.options.append(part)
        self._note(replace(self.promise, what=f"sync {self._open.name}"))
        self.run.area.sync(self._open.handle)
        self._open.options = [part]
        self._note(replace(self.promise, what=f"sync {self._open.name}, done"))

    def beside(self, offset: int, data: bytes) -> None:
        """Another program writes into what is being written, and closes."""
        assert self._open is not None
        handle = self.run.open(self._open.name, truncate=False)
        self.run.write(handle, offset, data)
        self._open.pieces.append((offset, data))
        part = overlaid(self._open.base, self._open.pieces)
        self._open.options.append(part)
        self._note(replace(self.promise, what=f"a second close of {self._open.name}"))
        self.run.area.flush(handle, interrupted=False)
        self._open.options = [part]
        self._note(replace(self.promise, what=f"a second close of {self._open.name}, done"))
        self.run.area.release(handle, interrupted=False)

    def finish(self, *pieces: tuple[int, bytes]) -> None:
        """Write some more, then close."""
        assert self._open is not None
        handle, name, base = self._open.handle, self._open.name, self._open.base
        whole = overlaid(base, [*self._open.pieces, *pieces])
        again, closed = self._writing_again(name, whole), self.staged | {name: whole}
        for offset, data in pieces:
            self.run.write(handle, offset, data)
        made = self._to_be_made(name, whole, handle.staged)
        self._open.options.append(whole)
        self._begin(f"flush {name} at last", again, [self.staged], may=made, aim=closed)
        self._open.options = [whole]
        self.run.area.flush(handle, interrupted=False)
        self._begin(f"release {name} at last", again, [closed], must_once_mounted=made)
        self.run.area.release(handle, interrupted=False)
        assert (handle.staged.published_id in made) == bool(made), handle.staged.reason
        self._open = None
        self._end(f"write {name} at last", closed, made)

    @property
    def open_name(self) -> str | None:
        """What is being written."""
        return None if self._open is None else self._open.name

    def truncate(self, name: str, size: int) -> None:
        """Set the size by name, as truncate(1) does."""
        old = self.staged[name]
        whole = old[:size] + bytes(max(0, size - len(old)))
        staged = self.run.area.find(name)
        assert staged is not None
        made = self._to_be_made(name, whole, staged) if whole != old else {}
        done = self.staged | {name: whole}
        again = self._writing_again(name, whole)
        self._begin(f"truncate {name}", again, [self.staged, done], may=made)
        self.run.area.truncate(staged, size, None)
        assert (staged.published_id in made) == bool(made), (name, staged.state, staged.reason)
        self._end(f"truncate {name}", done, made)

    def rename(self, old: str, new: str) -> None:
        staged = self.run.area.find(old)
        assert staged is not None
        content = self.staged[old]
        done = {name: data for name, data in self.staged.items() if name != old} | {new: content}
        may = {staged.next_id: (volume_of(new), content)}

        def again(run: Run) -> None:
            with contextlib.suppress(DraftNotFound):
                run.area.rename(old, new)

        alternatives = [self.staged, done]
        replaced = self.run.area.find(new)
        if replaced is not None and replaced.changed:
            # Never published: should the rename be cut short, it is not thrown away.
            alternatives.append(done | {_name_aside(replaced): self.staged[new]})
        self._begin(f"rename {old} to {new}", again, alternatives, may=may, aim=done, gone=old)
        self.run.area.rename(old, new)
        made = may if staged.published_id in may else {}
        self._end(f"rename {old} to {new}", done, made)

    def unlink(self, name: str) -> None:
        done = {other: data for other, data in self.staged.items() if other != name}

        def again(run: Run) -> None:
            with contextlib.suppress(DraftNotFound):
                run.area.unlink(name)

        self._begin(f"rm {name}", again, [self.staged, done], aim=done, gone=name)
        self.run.area.unlink(name)
        self._end(f"rm {name}", done, {})

    def publish(self, name: str) -> None:
        """Publish what is held."""
        staged = self.run.area.find(name)
        assert staged is not None
        made = {staged.next_id: (volume_of(name), self.staged[name])}
        again = self._writing_again(name, self.staged[name])
        self._begin(f"publish {name}", again, [self.staged], may=made)
        self.run.area.publish_now(name)
        self._end(f"publish {name}", self.staged, made)

    def is_held(self, name: str) -> bool:
        staged = self.run.area.find(name)
        return staged is not None and staged.state is State.HELD

    def make_folder(self, path: str) -> None:
        def act(run: Run) -> None:
            run.area.make_folder(path)

        self._do(f"mkdir {path}", act, replace(self.promise, folders=self.promise.folders | {path}))

    def _to_be_made(
        self, name: str, content: bytes, staged: StagedFile, *, killed: bool = False
    ) -> Backups:
        """The backup that a close of ``name`` with this content makes, if it does."""
        # Who writes into what somebody else left half done does not complete it.
        killed |= staged.interrupted or staged.left_partial
        if killed or any(is_temporary(part) for part in name.split("/")):
            return {}
        latest = self.run.service.catalogue.latest(volume_of(name))
        if latest is not None and latest.size > len(content):
            return {}
        return {staged.next_id: (volume_of(name), content)}

    def _writing_again(self, name: str, whole: bytes) -> Act:
        def act(run: Run) -> None:
            handle = run.open(name, truncate=True)
            run.write(handle, 0, whole)
            run.end(handle, killed=False)

        return act

    # -- accounts --------------------------------------------------------------------------------

    def _do(self, what: str, act: Act, done: Promise, *, is_lost_by_gc: bool = False) -> None:
        """An act that leaves what is staged alone."""
        before = self.promise
        old, new = before.must, done.must
        volumes = before.metadata.keys() | done.metadata.keys()
        self._note(
            replace(
                before,
                what=what,
                must={key: old[key] for key in old.keys() & new.keys()},
                may={**old, **new},
                folders=before.folders & done.folders,
                metadata={
                    volume: before.metadata.get(volume, ({},)) + done.metadata.get(volume, ({},))
                    for volume in volumes
                },
                again=nothing if is_lost_by_gc else act,
                aim=None if is_lost_by_gc else done,
            )
        )
        act(self.run)
        self.promise = replace(done, what=f"{what}, done")
        self._note(self.promise)

    def _begin(
        self,
        what: str,
        again: Act,
        staged: list[Staged],
        *,
        may: Backups | None = None,
        must_once_mounted: Backups | None = None,
        aim: Staged | None = None,
        gone: str = "",
    ) -> None:
        self._note(
            replace(
                self.promise,
                what=what,
                may=may or {},
                must_once_mounted=must_once_mounted or {},
                staged=tuple(staged),
                again=again,
                aim=replace(self.promise, staged=(staged[-1] if aim is None else aim,)),
                gone=gone,
            )
        )

    def _end(self, what: str, staged: Staged, made: Backups) -> None:
        self.promise = replace(
            self.promise, what=f"{what}, done", must=self.backups | made, staged=(staged,)
        )
        self._note(self.promise)
