"""Deletes backups: one, or those that a rule of retention does not keep."""

from __future__ import annotations

import contextlib

from backupfs.catalogue import Catalogue
from backupfs.errors import BackupNotFound, VolumeNotFound
from backupfs.format.record import Record
from backupfs.reports import PruneReport
from backupfs.repository.repository import Repository
from backupfs.retention import RetentionPolicy, check_policy, kept_ids


def delete(repository: Repository, catalogue: Catalogue, record: Record) -> None:
    """Delete a backup; its space is free after gc. Raises: BackupNotFound, StorageError."""
    if not repository.records.exists(record.backup_id):
        catalogue.refresh()
        raise BackupNotFound(selector=record.backup_id)
    repository.records.delete(record.backup_id)
    catalogue.remove(record)


def prune(
    repository: Repository,
    catalogue: Catalogue,
    policy: RetentionPolicy,
    *,
    volume: str | None,
    dry_run: bool,
) -> PruneReport:
    """Delete what ``policy`` does not keep, volume by volume, or of one.

    Raises:
        InvalidOption: a rule keeps less than nothing, or all together keep nothing.
        VolumeNotFound, StorageError: backups already deleted stay deleted.
    """
    check_policy(policy)
    kept: list[Record] = []
    deleted: list[Record] = []
    catalogue.refresh()
    if volume is not None and not catalogue.backups(volume):
        raise VolumeNotFound(volume=volume)
    for name in [volume] if volume is not None else catalogue.volumes():
        backups = catalogue.backups(name)
        keep = kept_ids(backups, policy, repository.ambient.now())
        for record in backups:
            (kept if record.backup_id in keep else deleted).append(record)
    if not dry_run:
        for record in deleted:
            with contextlib.suppress(BackupNotFound):
                delete(repository, catalogue, record)
    return PruneReport(kept=kept, deleted=deleted)
