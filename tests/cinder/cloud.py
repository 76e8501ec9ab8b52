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
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
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

from backupfs.cinder.options import backupfs_opts

CONF = cfg.CONF
MIB = 1 << 20
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
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        set_up_once()
        self.folder = folder
        self.repository = str(folder / "repository")
        self.run("init", self.repository)
        CONF.set_override("state_path", str(folder))
        CONF.set_override("lock_path", str(folder / "locks"), group="oslo_concurrency")
        CONF.set_override("backup_driver", DRIVER)
        CONF.set_override("backup_backupfs_repository", self.repository)
        self._forget_database: Callable[[], object] = lambda: None
        self.new_database()
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
        self._forget_database()
        facade = enginefacade.transaction_context()
        path = self.folder / f"cinder-{uuid.uuid4()}.sqlite"
        facade.configure(connection=f"sqlite:///{path}", sqlite_fk=False)
        models.BASE.metadata.create_all(facade.writer.get_engine())
        self._forget_database = main_context_manager.patch_factory(facade)
        db.volume_type_create(context.get_admin_context(), {"name": "__DEFAULT__"})

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
            size=max(1, -(-len(image) // (1 << 30))),
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

    def make(self, backup: Any, volume: Any) -> Any:
        """Run the manager's two halves of making a backup; the backup as the database has it."""
        db.volume_update(self.context, volume.id, {"status": "backing-up"})
        self.manager.create_backup(self.context, backup)
        device = objects.BackupDeviceInfo()
        device.volume = objects.Volume.get_by_id(self.context, volume.id)
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
    def holding_the_publish_lock(self) -> Iterator[None]:
        """As if another process were publishing, for long."""
        path = Path(self.repository) / "locks" / "publish"
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


# -- images, and files that behave in their own way --------------------------------------------------


def image(size: int, *, seed: int = 0, holes: bool = True) -> bytes:
    """Data that do not compress, with a hole in the middle and one at the end."""
    data = bytearray(random.Random(seed).randbytes(size))
    if holes:
        data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
        data[-size // 8 :] = bytes(size - (size - size // 8))
    return bytes(data)


class Wrapper:
    """A volume as libraries of storage systems give it: no descriptor, ``write`` says nothing."""

    def __init__(self, path: Path, *, read_size_max: int = 1 << 30) -> None:
        self._file = path.open("r+b")
        self._read_size_max = read_size_max
        self.on_read: Callable[[int], None] = lambda _offset: None
        self.on_write: Callable[[int], None] = lambda _offset: None

    def read(self, size: int) -> bytes:
        self.on_read(self._file.tell())
        return self._file.read(min(size, self._read_size_max))

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.on_write(self._file.tell())
        self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> None:
        self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        raise OSError("fileno() not supported by a wrapper")


@contextlib.contextmanager
def heartbeat(interval: float = 0.05) -> Iterator[list[float]]:
    """A thread that beats as services do; the pauses between its beats, in seconds."""
    pauses: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        last = time.monotonic()
        while not stop.is_set():
            time.sleep(interval)
            now = time.monotonic()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield pauses
    finally:
        stop.set()
        thread.join()


def eventually(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def workers_alive() -> list[int]:
    """Worker processes that this process has started and that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if parent == os.getpid() and b"backupfs.worker" in words:
                    found.append(int(entry.name))
    return found
