"""One process's use of a repository, and what a user was promised of what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.images import BytesSource

from backupfs.service import Policy, Record, Service, StagingArea
from backupfs.staging.write_handle import WriteHandle

PIECE_SIZE = 50_000

Backups = dict[str, tuple[str, bytes]]  # id -> volume, image
Staged = dict[str, bytes]  # name -> content
Act = Callable[["Run"], object]


def nothing(_run: Run) -> None:
    """Nothing is to be done again."""


@dataclass(frozen=True)
class Promise:
    """What is to be found after a power cut."""

    what: str = "nothing done yet"
    must: Backups = field(default_factory=dict)
    must_once_mounted: Backups = field(default_factory=dict)
    may: Backups = field(default_factory=dict)
    staged: tuple[Staged, ...] = ({},)  # one of these
    folders: frozenset[str] = frozenset()  # at least these
    metadata: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # volume -> one of these
    again: Act = nothing  # what was under way, to be tried again
    aim: Promise | None = None  # what is to be found when it was tried again
    gone: str = ""  # a staged name that is no more then


class Run:
    """One process's use of a repository: commands, and the staging area of a mount."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.service = Service.open(location, beside_mount=False)
        self._area: StagingArea | None = None

    def mount(self) -> None:
        """Do what a mount does when it starts."""
        self._area = self.service.open_staging(Policy(settle_seconds=0), mountpoint=None)

    def close(self) -> None:
        if self._area is not None:
            self._area.close()
        self.service.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def area(self) -> StagingArea:
        assert self._area is not None
        return self._area

    def record(self, backup_id: str) -> Record:
        self.service.refresh()
        return self.service.resolve(backup_id)

    def has(self, backup_id: str) -> bool:
        self.service.refresh()
        return self.service.catalogue.get(backup_id) is not None

    def back_up(self, volume: str, image: bytes, backup_id: str) -> None:
        self.service.backup(BytesSource(image), volume=volume, backup_id=backup_id)

    def gc(self) -> None:
        """As another process than this one."""
        with Service.open(self.location, beside_mount=False) as service:
            service.gc()

    # -- what the clients of a mount do ----------------------------------------------------------

    def open(self, name: str, *, truncate: bool) -> WriteHandle:
        staged = self.area.find(name)
        if staged is None:
            return self.area.create(name, mode=0o644, uid=0, gid=0)
        return self.area.open_write(staged, truncate=truncate)

    def write(self, handle: WriteHandle, offset: int, data: bytes) -> None:
        for start in range(0, len(data), PIECE_SIZE):
            if handle.staged.wants_mark:
                self.area.begin_writing(handle)
            self.area.note_write(handle)
            handle.staged.draft.write(offset + start, data[start : start + PIECE_SIZE])

    def end(self, handle: WriteHandle, *, killed: bool) -> None:
        self.area.flush(handle, interrupted=killed)
        self.area.release(handle, interrupted=killed)

    def staged(self) -> Staged:
        return {file.name: file.draft.read(0, file.size) for file in self.area.files()}
