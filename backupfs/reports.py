"""What the verbs take and give back, apart from records: sources, targets and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from backupfs.format.record import Record
from backupfs.types import Buffer


class ImageSource(Protocol):
    """An image to be backed up, read once from start to end."""

    name: str  # for messages
    size_hint: int | None  # bytes expected, for progress; None where unknown

    def extents(self) -> Iterable[tuple[int, Buffer]]:
        """(offset, data) in ascending order; what lies between is zeros (a hole).

        Raises:
            SourceFailed: the source could not be read; no backup may be made.
        """

    def size(self) -> int:
        """The image's size in bytes; asked after ``extents`` is used up."""


class ImageTarget(Protocol):
    """Where a restored image is written, from start to end."""

    name: str  # for messages

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``. Raises: TargetFailed."""

    def write_hole(self, offset: int, size: int) -> None:
        """Make ``size`` bytes at ``offset`` read as zeros. Raises: TargetFailed."""

    def finish(self, size: int) -> None:
        """Everything is written: set the final size and make it durable. Raises: TargetFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftInfo:
    """Something staged that is not (or not wholly) a backup, and why."""

    name: str  # below staging/
    volume: str | None  # None for a temporary name
    state: str  # open, settling, held, publishing, published
    reason: str  # why it is held or waits; empty otherwise
    size: int
    changed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    kept: Sequence[Record]
    deleted: Sequence[Record]  # with dry_run: that would be


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    packs_before: int
    packs_deleted: int
    packs_repacked: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is wrong, and what it hits."""

    object_name: str  # pack, record…
    reason: str
    backup_id: str | None  # None: no backup is hit
    volume: str | None
    offset: int | None  # the range of the image that cannot be read
    size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    backups_checked: int
    bytes_checked: int
    damage: Sequence[Damage]
    complete: bool  # False with quick: data were looked up, not read


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOutcome:
    record: Record
    already_there: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryStats:
    repository_id: str
    location: str
    created_at: datetime
    chunk_size: int
    pack_size: int
    compression_level: int
    volumes: int
    backups: int
    packs: int
    stored_bytes: int  # size of all packs
    image_bytes: int  # sum of the sizes of all backups
    data_bytes: int  # the same without holes
