"""The backup driver for Cinder: ``backup_driver = backupfs.cinder.BackupfsBackupDriver``.

Cinder's words and nothing else: its objects, its statuses, its exceptions. The engine runs in a
worker process, one for each operation, because locks, queues and sockets of a service under
eventlet are not those that the engine's threads need; in threading mode it is the same. So a
service's memory does not grow with its backups, and an operation that is not wanted any more is
ended by ending its process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from cinder import exception, interface, utils
from cinder.backup import driver
from cinder.objects import fields
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import excutils

from backupfs.ambient import Ambient
from backupfs.cinder.exceptions import cinder_exception, translated
from backupfs.cinder.options import backupfs_opts, list_opts
from backupfs.errors import (
    BackupfsError,
    InvalidMetadata,
    InvalidOption,
    InvalidRecord,
    RepositoryNotFound,
    UnsupportedFormat,
)
from backupfs.openvolume import VolumeSource, VolumeTarget
from backupfs.worker.client import Worker

__all__ = ["BackupfsBackupDriver", "list_opts"]

CONF = cfg.CONF
LOG = logging.getLogger(__name__)

# Between two looks at what Cinder's database says of a backup that is under way.
LOOK_SECONDS = 2.0

# Fields of a backup that the worker is told.
BACKUP_FIELDS = (
    "id",
    "volume_id",
    "parent_id",
    "display_name",
    "display_description",
    "availability_zone",
    "user_id",
    "project_id",
    "container",
    "snapshot_id",
    "service",
    "encryption_key_id",
)

# The keys of which Cinder's ``get_metadata`` writes at least one.
METADATA_KEYS = (
    driver.BackupMetadataAPI.TYPE_TAG_VOL_BASE_META,
    driver.BackupMetadataAPI.TYPE_TAG_VOL_META,
    driver.BackupMetadataAPI.TYPE_TAG_VOL_GLANCE_META,
)


@interface.backupdriver
class BackupfsBackupDriver(driver.BackupDriver):
    """Backups in a backupfs repository. Keeps no state: Cinder makes one for each operation."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.support_force_delete = True

    @staticmethod
    def get_driver_options() -> list[Any]:
        return backupfs_opts

    def check_for_setup_error(self) -> None:
        """Raises: InvalidConfigurationValue, BackupDriverException."""
        try:
            with self._worker() as worker:
                worker.ask("check")
        except (RepositoryNotFound, InvalidOption, UnsupportedFormat) as error:
            LOG.error("The backupfs repository cannot be used: %s", error)
            raise exception.InvalidConfigurationValue(
                option="backup_backupfs_repository", value=CONF.backup_backupfs_repository
            ) from error
        except BackupfsError as error:
            raise cinder_exception(error) from error

    # -- backing up ------------------------------------------------------------------------------

    def backup(
        self, backup: Any, volume_file: Any, backup_metadata: bool = True
    ) -> dict[str, Any] | None:
        """Back up all bytes of ``volume_file``; what Cinder is to note of the backup.

        None if the backup is being deleted, or was, meanwhile. Then, and if anything is raised,
        nothing of it is left but garbage that gc takes.
        """
        watch = _Watch(lambda: self._raise_if_deleted(backup))
        metadata = self._metadata(backup.volume_id) if backup_metadata else None
        source = VolumeSource(volume_file, backup.volume_id, look=watch)
        with translated(), self._worker(watch) as worker:
            try:
                answer = worker.backup(
                    _described(backup),
                    source,
                    metadata=metadata,
                    before_end=watch.look,
                )
                watch.look()
                _note_parent(backup, answer)
            except _NotWantedError:
                LOG.info("Backup %s is deleted while it is made: it ends here.", backup.id)
                self._discard(backup, worker)
                return None
            except BaseException:  # however it ends, nothing of it may stay visible
                with excutils.save_and_reraise_exception():
                    self._discard(backup, worker)
        LOG.info(
            "Backup %(id)s: %(kind)s, %(stored)d bytes stored of %(size)d.",
            {
                "id": backup.id,
                "kind": answer["kind"],
                "stored": answer["stored_bytes"],
                "size": answer["size"],
            },
        )
        # Where it is in a mount of the repository, for people.
        return {"service_metadata": f"volumes/{answer['volume']}/{answer['name']}"}

    def _metadata(self, volume_id: str) -> dict[str, Any]:
        metadata = json.loads(self.get_metadata(volume_id))
        if not isinstance(metadata, dict):
            raise cinder_exception(InvalidMetadata(reason="it must be a JSON object"))
        return metadata

    def _raise_if_deleted(self, backup: Any) -> None:
        with backup.as_read_deleted():
            backup.refresh()
        if backup.status in (fields.BackupStatus.DELETING, fields.BackupStatus.DELETED):
            raise _NotWantedError

    def _discard(self, backup: Any, worker: Worker) -> None:
        """See to it that nothing of a backup can be seen, now or later."""
        worker.close()
        if not worker.may_have_published:
            return
        try:
            self.delete_backup(backup)
        except exception.CinderException:
            # What brought us here is what the caller has to know.
            LOG.exception("Backup %s may still be in the repository: delete it.", backup.id)

    # -- restoring -------------------------------------------------------------------------------

    def restore(self, backup: Any, volume_id: str, volume_file: Any, volume_is_new: bool) -> None:
        """Write the backup over the start of ``volume_file``, then its metadata to the volume.

        What lies behind the backup's end is not touched. The holes of a backup are not written to
        a new volume, which reads as zeros.

        Raises: BackupRestoreCancel, InvalidBackup, BackupDriverException.
        """
        watch = _Watch(lambda: self._raise_if_cancelled(backup, volume_id))
        watch()
        target = VolumeTarget(
            volume_file,
            volume_id,
            is_new=volume_is_new,
            sync=utils.tpool_wrap(os.fsync),
            look=watch,
        )
        with translated(), self._worker(watch) as worker:
            answer = worker.restore(_described(backup), target)
        self._restore_metadata(volume_id, answer["metadata"])

    def _raise_if_cancelled(self, backup: Any, volume_id: str) -> None:
        with backup.as_read_deleted():
            backup.refresh()
        if backup.status != fields.BackupStatus.RESTORING:
            raise exception.BackupRestoreCancel(back_id=backup.id, vol_id=volume_id)

    def _restore_metadata(self, volume_id: str, metadata: dict[str, Any] | None) -> None:
        # A backup that was not made by Cinder may have metadata of its own kind, or none.
        if metadata is None or not any(key in metadata for key in METADATA_KEYS):
            return
        try:
            self.put_metadata(volume_id, json.dumps(metadata))
        except exception.BackupMetadataUnsupportedVersion as error:
            LOG.error("Metadata restore failed due to incompatible version.")
            raise exception.BackupOperationError() from error

    # -- deleting, exporting, importing ----------------------------------------------------------

    def delete_backup(self, backup: Any) -> None:
        """Delete a backup; one without data is no error. Raises: BackupDriverException."""
        with translated(), self._worker() as worker:
            worker.ask("delete", backup=_described(backup))

    def export_record(self, backup: Any) -> dict[str, Any]:
        """What ``import_record`` needs. Raises: InvalidBackup, BackupDriverException."""
        with translated(), self._worker() as worker:
            return worker.ask("export", backup=_described(backup))

    def import_record(self, backup: Any, driver_info: Any) -> None:
        """Take in a backup whose data are in the repository; its parent need not be there.

        Raises: InvalidBackup, BackupDriverException.
        """
        with translated(), self._worker() as worker:
            if not isinstance(driver_info, dict):
                raise InvalidRecord(reason="it is no JSON object")
            worker.ask("import", backup={"id": backup.id}, driver_info=driver_info)

    def _worker(self, waiting: Callable[[], object] | None = None) -> Worker:
        """Raises: InvalidOption, StorageUnavailable."""
        location = CONF.backup_backupfs_repository
        if not location:
            raise InvalidOption(option="backup_backupfs_repository", reason="it is not set")
        return Worker(
            location,
            compression_level=CONF.backup_backupfs_compression_level,
            lock_seconds_max=CONF.backup_backupfs_lock_timeout,
            waiting=waiting,
        )


class _NotWantedError(Exception):
    """The backup that is being made is deleted."""


class _Watch:
    """Looks from time to time whether an operation is still wanted; ``look`` raises if not."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look
        self._ambient = Ambient()
        self._looked_at = float("-inf")

    def __call__(self) -> None:
        now = self._ambient.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self.look()
        # Under eventlet, this lets others run; time.sleep is theirs then.
        utils.cooperative_yield()


def _described(backup: Any) -> dict[str, Any]:
    """A backup's fields in types that JSON has."""
    described = {name: getattr(backup, name, None) for name in BACKUP_FIELDS}
    moment = getattr(backup, "data_timestamp", None)
    described["data_timestamp"] = None if moment is None else moment.isoformat()
    return described


def _note_parent(backup: Any, answer: dict[str, Any]) -> None:
    """Tell Cinder of a backup that became a full one: its parent is gone, or of another size."""
    if backup.parent_id and answer["parent_id"] is None:
        LOG.info("Backup %s is a full one: its parent is gone or of another size.", backup.id)
        backup.parent = None
        backup.parent_id = None
        backup.save()
