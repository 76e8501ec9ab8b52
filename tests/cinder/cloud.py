"""A small cloud: Cinder's own backup manager, objects and database, with files as volumes.

What stands in for other services: attaching a volume is opening its file, and messages to the
volume service go nowhere. The repository is looked at through the command line only, since the
engine does not run in a process that eventlet has patched.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cinder import context, objects, rpc
from cinder.backup import manager
from cinder.db import api as db
from cinder.db import models
from cinder.db.api import main_context_manager
from cinder.objects import fields
from oslo_config import cfg
from oslo_db.sqlalchemy import enginefacade
from stand_ins import GIB

from backupfs.cinder.options import backupfs_opts

CONF = cfg.CONF
DRIVER = "backupfs.cinder.BackupfsBackupDriver"
HOST = "testhost"
PROJECT = str(uuid.uuid4())
USER = str(uuid.uuid4())
CONFIGURATION = f"""
[DEFAULT]
transport_url = fake:/
host = {HOST}
[oslo_messaging_notifications]
driver = noop
"""

_is_set_up = False


def set_up_once() -> None:
    """What Cinder does once in a process."""
    global _is_set_up
    if _is_set_up:
        return
    _is_set_up = True
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(CONFIGURATION)
        file.flush()
        CONF(["--config-file", file.name], project="cinder")
    rpc.init(CONF)


class Cloud:
    """Everything in ``folder``. Another process can be a second service of the same ``database``."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, database: Path | None = None
    ) -> None:
        set_up_once()
        self.folder = folder
        self.repository = str(folder / "repository")
        if database is None:
            self.run("init", self.repository)
        CONF.set_override("state_path", str(folder))
        CONF.set_override("lock_path", str(folder / "locks"), group="oslo_concurrency")
        CONF.set_override("backup_driver", DRIVER)
        CONF.set_override("backup_backupfs_repository", self.repository)
        self._forget_database: Callable[[], object] = lambda: None
        if database is None:
            self.new_database()
        else:
            self._use_database(database)
        self._stand_in(monkeypatch)
        self.context = context.RequestContext(
            USER, PROJECT, is_admin=True, auth_token="token", roles=["admin"]
        )
        self.manager = self.new_manager()
        self._files: dict[str, Any] = {}

    def close(self) -> None:
        self._forget_database()
        for name in ("backup_driver", *(option.name for option in backupfs_opts)):
            CONF.clear_override(name)

    def new_database(self) -> None:
        """An empty one, as after a loss."""
        facade = self._use_database(self.folder / f"cinder-{uuid.uuid4()}.sqlite")
        models.BASE.metadata.create_all(facade.writer.get_engine())
        db.volume_type_create(context.get_admin_context(), {"name": "__DEFAULT__"})

    def _use_database(self, path: Path) -> Any:
        self._forget_database()
        self.database = path
        facade = enginefacade.transaction_context()
        facade.configure(connection=f"sqlite:///{path}", sqlite_fk=False)
        self._forget_database = main_context_manager.patch_factory(facade)
        return facade

    def new_manager(self) -> manager.BackupManager:
        made = manager.BackupManager(host=HOST)
        made.is_initialized = True
        return made

    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "cinder.volume.volume_utils.brick_get_connector_properties", lambda *_, **__: {}
        )
        monkeypatch.setattr(
            "cinder.volume.rpcapi.VolumeAPI.secure_file_operations_enabled", lambda *_: True
        )
        monkeypatch.setattr("cinder.volume.rpcapi.VolumeAPI.get_backup_device", mock.Mock())
        monkeypatch.setattr(manager.BackupManager, "_attach_device", self._attach)
        monkeypatch.setattr(manager.BackupManager, "_detach_device", mock.Mock())

    def _attach(self, _context: Any, volume: Any, *_: Any, **__: Any) -> dict[str, Any]:
        path = self._files.get(volume.id) or str(self.path(volume.id))
        return {"device": {"path": path}}

    # -- volumes ---------------------------------------------------------------------------------

    def path(self, volume_id: str) -> Path:
        return self.folder / f"volume-{volume_id}"

    def volume(self, image: bytes, *, status: str = "available", **more: Any) -> Any:
        """A volume that holds ``image``."""
        volume = objects.Volume(
            context=self.context,
            size=max(1, -(-len(image) // GIB)),
            host=HOST,
            user_id=USER,
            project_id=PROJECT,
            status=status,
            previous_status="available",
            attach_status=fields.VolumeAttachStatus.DETACHED,
            availability_zone="nova",
            display_name="a volume",
            volume_type_id=db.volume_type_get_by_name(self.context, "__DEFAULT__")["id"],
            **more,
        )
        volume.create()
        self.path(volume.id).write_bytes(image)
        return volume

    def attach_as(self, volume: Any, file: Any) -> None:
        """Let Cinder get ``file``, an object, when it attaches the volume."""
        self._files[volume.id] = file

    # -- what the manager is asked for -------------------------------------------------------------

    def new_backup(self, volume: Any, **more: Any) -> Any:
        """A backup's row, as the API makes it."""
        backup = objects.Backup(
            context=self.context,
            **{
                "user_id": USER,
                "project_id": PROJECT,
                "volume_id": volume.id,
                "host": HOST,
                "display_name": "nightly",
                "display_description": "made by a test",
                "container": None,
                "status": fields.BackupStatus.CREATING,
                "size": volume.size,
                "parent_id": None,
                "service": DRIVER,
                "metadata": {},
                **more,
            },
        )
        backup.create()
        backup.data_timestamp = backup.created_at
        backup.save()
        return backup

    def make(
        self, backup: Any, volume: Any, *, snapshot: Any = None, is_by_api: bool = False
    ) -> Any:
        """Run the manager's two halves of making a backup; the backup as the database has it."""
        if not is_by_api:  # which has done that
            db.volume_update(self.context, volume.id, {"status": "backing-up"})
        self.manager.create_backup(self.context, backup)
        device = objects.BackupDeviceInfo()
        if snapshot is None:
            device.volume = objects.Volume.get_by_id(self.context, volume.id)
        else:
            device.snapshot = snapshot
        device.secure_enabled = True
        self.manager.continue_backup(self.context, backup, device)
        return self.reread(backup)

    def back_up(self, volume: Any, **more: Any) -> Any:
        return self.make(self.new_backup(volume, **more), volume)

    def restore(self, backup: Any, volume: Any, *, is_new: bool) -> None:
        backup.status = fields.BackupStatus.RESTORING
        backup.restore_volume_id = volume.id
        backup.save()
        db.volume_update(
            self.context, volume.id, {"status": "creating" if is_new else "restoring-backup"}
        )
        self.manager.restore_backup(self.context, backup, volume.id, is_new)

    def delete(self, backup: Any) -> None:
        """Delete it, by force if it is not available: for the manager that is the same."""
        backup = self.reread(backup)
        backup.status = fields.BackupStatus.DELETING
        backup.save()
        self.manager.delete_backup(self.context, backup)

    def export(self, backup: Any) -> dict[str, str]:
        return self.manager.export_record(self.context, backup)

    def import_(self, record: dict[str, str], *, backup_id: str | None = None) -> Any:
        """What the API does for an import, then the manager's part."""
        told = objects.Backup.decode_record(record["backup_url"])
        backup = objects.BackupImport(
            context=self.context,
            id=backup_id or told["id"],
            user_id=USER,
            project_id=PROJECT,
            volume_id="00000000-0000-0000-0000-000000000000",
            status=fields.BackupStatus.CREATING,
            deleted_at=None,
            deleted=False,
            metadata={},
        )
        backup.create()
        self.manager.import_record(
            self.context, backup, record["backup_service"], record["backup_url"], []
        )
        return self.reread(backup)

    def reread(self, backup: Any) -> Any:
        """The backup as the database has it, deleted or not."""
        return objects.Backup.get_by_id(self.context.elevated(read_deleted="yes"), backup.id)

    # -- the repository ----------------------------------------------------------------------------

    def run(self, command: str, *words: str, status: int = 0) -> str:
        """A backupfs command's output."""
        result = subprocess.run(
            [sys.executable, "-m", "backupfs.cli.main", command, *words],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == status, result.stderr
        return result.stdout

    def stored(self) -> list[dict[str, Any]]:
        """The backups that exist."""
        return json.loads(self.run("list", self.repository, "--json"))

    def show(self, backup: Any) -> dict[str, Any]:
        return json.loads(self.run("show", self.repository, backup.id, "--json"))

    def content(self, backup: Any) -> bytes:
        """The backup's image, as the command line restores it."""
        path = self.folder / f"restored-{uuid.uuid4()}"
        self.run("restore", self.repository, backup.id, str(path))
        content = path.read_bytes()
        path.unlink()
        return content

    @contextlib.contextmanager
    def holding_lock(self, name: str) -> Iterator[None]:
        """As if another process published, or collected garbage, for long."""
        path = Path(self.repository) / "locks" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def kill(self, processes: list[int]) -> None:
        for process in processes:
            os.kill(process, signal.SIGKILL)

    def in_background(self, act: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=act)
        thread.start()
        return thread

    def record_of(self, selector: str) -> dict[str, str]:
        """What Cinder imports of a backup that it does not know, as backupfs.cinder_url tells."""
        command = [sys.executable, "-m", "backupfs.cinder_url", self.repository, selector]
        return json.loads(subprocess.check_output(command, text=True, timeout=60))

    def as_record(self, told: dict[str, Any]) -> dict[str, str]:
        """What an export would have given that said ``told``."""
        url = base64.b64encode(json.dumps(told).encode()).decode()
        return {"backup_service": DRIVER, "backup_url": url}

    def pack_size(self) -> int:
        """Bytes in all packs, and what lies in the spool."""
        repository = Path(self.repository)
        return sum(
            path.stat().st_size
            for folder in ("packs", "spool")
            for path in (repository / folder).rglob("*")
            if path.is_file() and path.name != "reserve"
        )
