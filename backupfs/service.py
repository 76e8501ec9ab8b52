"""The verbs of backupfs: what the command line, the mount, the Python API and Cinder all call.

A ``Service`` is one open repository. Every verb is synchronous and thread-safe; none knows of
FUSE, trio, click or Cinder. A verb that returns has made its effect durable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from backupfs.ambient import Ambient
from backupfs.catalogue import Catalogue
from backupfs.copying import back_up, never, restore
from backupfs.deleting import delete, prune
from backupfs.errors import (
    BackupExists,
    BackupNotFound,
    DamageError,
    InvalidName,
    InvalidOption,
    MissingBlob,
    ObjectNotFound,
    VolumeNotFound,
)
from backupfs.format.config import (
    CHUNK_SIZE_DEFAULT,
    COMPRESSION_LEVEL_DEFAULT,
    PACK_SIZE_DEFAULT,
    RepositoryConfig,
)
from backupfs.format.names import check_volume_name
from backupfs.format.record import (
    Description,
    Record,
    canonical_backup_id,
    encode_record,
    storable_time,
)
from backupfs.image import Image
from backupfs.importing import import_record
from backupfs.repairing import Repaired, adopt, repair
from backupfs.reports import (
    Damage,
    DraftInfo,
    GcReport,
    ImageSource,
    ImageTarget,
    ImportOutcome,
    PruneReport,
    RepositoryStats,
    VerifyReport,
)
from backupfs.repository import gc as garbage
from backupfs.repository.metadata import check_metadata
from backupfs.repository.rebuild import list_packs
from backupfs.repository.repository import Repository, init_repository
from backupfs.retention import RetentionPolicy
from backupfs.selecting import select
from backupfs.staging.area import StagingArea
from backupfs.staging.drafts import (
    list_drafts,
    mount_of,
    publish_through_mount,
    wait_for_mount,
)
from backupfs.staging.events import EventLog
from backupfs.staging.lifecycle import Policy
from backupfs.staging.publish import LATEST, Publication
from backupfs.staging.state_store import StateStore
from backupfs.types import Progress, no_progress
from backupfs.verifying import verify

__all__ = [
    "LATEST",
    "Damage",
    "Description",
    "DraftInfo",
    "GcReport",
    "Image",
    "ImageSource",
    "ImageTarget",
    "ImportOutcome",
    "Policy",
    "PruneReport",
    "Record",
    "Repaired",
    "RepositoryStats",
    "RetentionPolicy",
    "Service",
    "StagingArea",
    "VerifyReport",
    "init",
]


log = logging.getLogger(__name__)


def init(
    location: str,
    *,
    chunk_size: int = CHUNK_SIZE_DEFAULT,
    pack_size: int = PACK_SIZE_DEFAULT,
    compression_level: int = COMPRESSION_LEVEL_DEFAULT,
    ambient: Ambient | None = None,
) -> RepositoryConfig:
    """Make a repository in a folder that is absent or empty; durable on return.

    Raises:
        InvalidOption, RepositoryExists, StorageError: nothing was made.
    """
    return init_repository(
        location,
        chunk_size=chunk_size,
        pack_size=pack_size,
        compression_level=compression_level,
        ambient=ambient or Ambient(),
    )


class Service:
    """An open repository and what can be done with it. Use as a context manager."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.config = repository.config
        self.location = repository.location
        self.catalogue = Catalogue(repository.loader, repository.storage)
        self.catalogue.refresh()

    @classmethod
    def open(
        cls,
        location: str,
        *,
        ambient: Ambient | None = None,
        beside_mount: bool = True,
        compression_level: int | None = None,
        lock_seconds_max: float | None = None,
    ) -> Service:
        """Open a repository; with ``beside_mount`` all that was closed in a mount of it on this host
        before is seen as backups. Only the mount itself must not wait for itself.

        ``compression_level`` counts in place of the repository's own; other processes' locks are
        waited for at most ``lock_seconds_max``.

        Raises: RepositoryNotFound, InvalidOption, CorruptObject, UnsupportedFormat, StorageError.
        """
        repository = Repository.open(
            location,
            ambient or Ambient(),
            compression_level=compression_level,
            lock_seconds_max=lock_seconds_max,
        )
        try:
            if beside_mount:
                wait_for_mount(repository)
            return cls(repository)
        except BaseException:  # the caller gets no service that it could close
            repository.close()
            raise

    def close(self) -> None:
        """End all threads; everything that was acknowledged is durable."""
        self.repository.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Take in what other processes published, deleted or found damaged. Raises: StorageError."""
        self.repository.storage.close_deleted()
        self.catalogue.refresh()
        self.repository.avoided.blobs = self.repository.index.damaged()

    # -- looking ---------------------------------------------------------------------------------

    def backups(self, volume: str | None = None) -> list[Record]:
        """All backups, or a volume's, by volume, then oldest first. Raises: VolumeNotFound."""
        if volume is None:
            return self.catalogue.all()
        backups = self.catalogue.backups(volume)
        if not backups:
            raise VolumeNotFound(volume=volume)
        return backups

    def resolve(self, selector: str) -> Record:
        """The one backup that a user's words mean: an id, the unique start of one,
        ``VOLUME@latest`` or ``VOLUME@TIMESTAMP`` (or the start of a timestamp); as the disk has it now.

        Raises: BackupNotFound, AmbiguousBackup, VolumeNamed, CorruptObject, StorageError.
        """
        record = self.catalogue.current(select(self.catalogue, selector).backup_id)
        if record is None:
            raise BackupNotFound(selector=selector)
        return record

    def stats(self) -> RepositoryStats:
        """Counts and sizes of the whole repository. Raises: StorageError."""
        packs = list_packs(self.repository.storage)
        backups = self.catalogue.all()
        return RepositoryStats(
            repository_id=self.config.repository_id,
            location=self.location,
            created_at=self.config.created_at,
            chunk_size=self.config.chunk_size,
            pack_size=self.config.pack_size,
            compression_level=self.config.compression_level,
            volumes=len(self.catalogue.volumes()),
            backups=len(backups),
            packs=len(packs),
            stored_bytes=sum(packs.values()),
            image_bytes=sum(record.size for record in backups),
            data_bytes=sum(record.data_size for record in backups),
        )

    # -- backing up and restoring ------------------------------------------------------------------

    def backup(
        self,
        source: ImageSource,
        *,
        volume: str,
        parent: str | None = LATEST,
        backup_id: str | None = None,
        data_timestamp: datetime | None = None,
        description: Description | None = None,
        with_metadata: bool = True,
        metadata: dict[str, Any] | None = None,
        source_mtime_ns: int | None = None,
        source_mode: int | None = None,
        size_min: int = 0,
        progress: Progress = no_progress,
        cancelled: Callable[[], bool] = never,
    ) -> Record:
        """Back ``source`` up as the next backup of ``volume``.

        ``parent`` is ``LATEST`` (the volume's latest backup), the id of a backup, or None for a
        full one; a parent of another size, or one that is gone, gives a full backup as well. A
        ``data_timestamp`` without a zone is UTC. ``metadata``
        go into the backup in place of those that are kept for the volume. An image of less than
        ``size_min`` bytes, as a stream has that was cut short, becomes no backup.
        ``source_mtime_ns`` is kept as near as from 1677 to 2262 is possible.

        Raises:
            InvalidName, InvalidOption, InvalidMetadata, ImageTooLarge, ImageTooSmall, BackupExists,
            SourceFailed, Cancelled, StorageError: there is no backup; what was stored for it is
            garbage for gc.
        """
        _check_volume(volume)
        if metadata is not None:
            check_metadata(metadata)
        elif with_metadata:
            metadata = self._metadata_for_backup(volume)
        if backup_id is not None:
            backup_id = canonical_backup_id(backup_id)
            self.catalogue.refresh()
            if self.catalogue.get(backup_id) is not None:
                raise BackupExists(backup_id=backup_id)
        ambient = self.repository.ambient
        publication = Publication(
            volume=volume,
            parent=parent,
            backup_id=backup_id or ambient.new_uuid(),
            data_timestamp=_in_utc(data_timestamp or ambient.now()),
            source_mtime_ns=None if source_mtime_ns is None else storable_time(source_mtime_ns),
            source_mode=source_mode,
            stored_bytes=0,
            metadata=metadata,
            description=description or Description(),
        )
        return back_up(
            self.repository,
            self.catalogue,
            source,
            publication,
            size_min=size_min,
            progress=progress,
            cancelled=cancelled,
        )

    def _metadata_for_backup(self, volume: str) -> dict[str, Any] | None:
        """A backup without its volume's metadata is better than none."""
        try:
            return self.get_metadata(volume) or None
        except DamageError as error:
            log.error("backed up without metadata: %s", error)
            return None

    def restore(
        self,
        record: Record,
        target: ImageTarget,
        *,
        progress: Progress = no_progress,
        cancelled: Callable[[], bool] = never,
    ) -> None:
        """Write a backup's image to ``target``, every byte proven before it is written.

        Raises:
            BackupNotFound: it was deleted, and its data collected, before they were all read.
            DamageError, TargetFailed, Cancelled, StorageError: the target is not complete.
        """
        try:
            restore(self.open_image(record), target, progress=progress, cancelled=cancelled)
        except MissingBlob as error:
            # What is missing because nobody needs it any more is no damage.
            if self.repository.records.exists(record.backup_id):
                raise
            raise BackupNotFound(selector=record.backup_id) from error

    def open_image(self, record: Record) -> Image:
        """A backup's bytes, to be read at any place."""
        return Image(self.repository.reader, record)

    # -- deleting and tidying ----------------------------------------------------------------------

    def delete(self, record: Record) -> None:
        """Delete a backup; its space is free after gc. Raises: BackupNotFound, StorageError."""
        delete(self.repository, self.catalogue, record)

    def prune(
        self, policy: RetentionPolicy, *, volume: str | None = None, dry_run: bool = False
    ) -> PruneReport:
        """Delete what ``policy`` does not keep, volume by volume.

        Raises:
            InvalidOption: a rule keeps less than nothing, or all together keep nothing.
            VolumeNotFound, StorageError: backups already deleted stay deleted.
        """
        return prune(self.repository, self.catalogue, policy, volume=volume, dry_run=dry_run)

    def gc(self, *, progress: Progress = no_progress) -> GcReport:
        """Free what no backup and no draft reaches. See ``repository.gc`` for errors."""
        collected = garbage.collect(self.repository, progress)
        return GcReport(
            packs_before=collected.packs_before,
            packs_deleted=collected.packs_deleted,
            packs_repacked=collected.packs_repacked,
            bytes_before=collected.bytes_before,
            bytes_after=collected.bytes_after,
        )

    def verify(
        self,
        records: Sequence[Record] | None = None,
        *,
        quick: bool = False,
        progress: Progress = no_progress,
    ) -> VerifyReport:
        """Compare the bytes of some backups, or all, with their ids; report what is wrong.

        With ``quick`` data are looked up but not read. Raises: StorageError.
        """
        return verify(self.repository, self.catalogue, records, quick=quick, progress=progress)

    def repair(self, *, dry_run: bool = False, progress: Progress = no_progress) -> Repaired:
        """Save what is whole in damaged packs, make the index anew, find images without a record;
        with ``dry_run`` only look. Deletes nothing. What is damaged for good is for ``verify``.

        Raises: LockTimeout, StorageError.
        """
        return repair(self.repository, progress, dry_run=dry_run)

    def adopt(self, root: str, *, volume: str, size: int | None = None) -> Record:
        """Make an image without a record, found by ``repair``, a backup of ``volume``.

        Raises: InvalidName, InvalidOption, DamageError, LockTimeout, StorageError.
        """
        _check_volume(volume)
        return adopt(self.repository, self.catalogue, root, volume=volume, size=size)

    # -- records and metadata ----------------------------------------------------------------------

    def export_record(self, record: Record) -> bytes:
        """The record as it is stored: with the packs, all that is needed to have the backup back.

        Read anew: what is handed out to be kept shall say that the stored one is damaged.

        Raises: BackupNotFound, CorruptObject, StorageError.
        """
        try:
            return self.repository.records.get_with_data(record.backup_id)[1]
        except ObjectNotFound as error:
            raise BackupNotFound(selector=record.backup_id) from error

    def record_size(self, record: Record) -> int:
        """Bytes of what ``export_record`` gives; from memory."""
        return len(encode_record(record, self.repository.ids))

    def import_record(self, data: bytes) -> ImportOutcome:
        """Take a backup in from its record; nothing changes on failure.

        Raises: InvalidRecord, ForeignRecord, MissingData, BackupExists, StorageError.
        """
        record, already_there = import_record(self.repository, self.catalogue, data)
        return ImportOutcome(record=record, already_there=already_there)

    def get_metadata(self, volume: str) -> dict[str, Any]:
        """A volume's metadata, {} where none was put.

        Raises: InvalidName, CorruptObject, StorageError.
        """
        _check_volume(volume)
        return self.repository.metadata.get(volume)

    def put_metadata(self, volume: str, metadata: dict[str, Any]) -> None:
        """Replace a volume's metadata.

        Raises: InvalidName, InvalidMetadata, CorruptObject, StorageError.
        """
        _check_volume(volume)
        self.repository.metadata.put(volume, metadata)

    # -- staging -----------------------------------------------------------------------------------

    def open_staging(self, policy: Policy | None, *, mountpoint: str | None) -> StagingArea:
        """Take this host's staging area, for a mount; or, without a policy, for a moment.

        Raises: Busy, StorageError.
        """
        states = self._take_states(mountpoint)
        try:
            return StagingArea(
                self.repository,
                self.catalogue,
                states,
                policy,
                EventLog(self.repository.ambient),
            )
        except BaseException:  # the next who wants the staging area must get it
            states.close()
            raise

    def drafts(self) -> list[DraftInfo]:
        """What is staged on this host and is not, or not wholly, a backup. Raises: StorageError."""
        return list_drafts(self.repository)

    def publish(self, name: str) -> Record:
        """Publish what is staged as ``name``, whatever speaks against it.

        Raises: DraftNotFound, InvalidName, NothingToPublish, Busy, StorageError.
        """
        mount = mount_of(self.repository)
        if mount is not None:
            backup_id = publish_through_mount(mount, name)
            self.catalogue.refresh()
            return self.resolve(backup_id)
        area = self.open_staging(None, mountpoint=None)
        try:
            return area.publish_now(name)
        finally:
            area.close()

    def _take_states(self, mountpoint: str | None) -> StateStore:
        return StateStore.open(
            self.repository.folder,
            self.repository.ids,
            chunk_size=self.config.chunk_size,
            ambient=self.repository.ambient,
            mountpoint=mountpoint,
        )


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        reason = f"{moment.isoformat()} is in UTC before the year 1 or after 9999"
        raise InvalidOption(option="data_timestamp", reason=reason) from error


def _check_volume(volume: str) -> None:
    problem = check_volume_name(volume)
    if problem:
        raise InvalidName(name=volume, reason=problem)
