"""From Cinder's posix driver to this one, as docs/cinder.md describes it."""

from __future__ import annotations

import pytest
from cinder import exception, objects
from cinder.backup import api
from cinder.backup.drivers import posix  # noqa: F401  # for its options
from cinder.objects import fields
from cinder.scheduler.host_manager import HostManager
from cloud import DRIVER
from oslo_config import cfg
from stand_ins import MIB, image

CONF = cfg.CONF
POSIX = "cinder.backup.drivers.posix.PosixBackupDriver"


def use(cloud, driver: str) -> None:
    """Go on with a service that has another driver."""
    CONF.set_override("backup_driver", driver)
    cloud.manager = cloud.new_manager()


@pytest.fixture
def backup_of_posix(cloud):
    """A volume and its backup by the posix driver, and a service that has the new one."""
    CONF.set_override("backup_posix_path", str(cloud.folder / "posix"))
    use(cloud, POSIX)
    volume = cloud.volume(image(4 * MIB))
    backup = cloud.back_up(volume, service=POSIX)
    assert backup.status == fields.BackupStatus.AVAILABLE
    use(cloud, DRIVER)
    yield volume, backup
    CONF.clear_override("backup_posix_path")


def test_incremental_backup_after_one_of_the_posix_driver_is_full(cloud, backup_of_posix):
    volume, old = backup_of_posix

    backup = cloud.back_up(volume, parent_id=old.id)

    assert (backup.status, backup.parent_id) == (fields.BackupStatus.AVAILABLE, None)
    assert cloud.show(backup)["kind"] == "full"
    assert cloud.content(backup) == cloud.path(volume.id).read_bytes()


def test_backups_of_the_posix_driver_need_its_service(cloud, backup_of_posix):
    volume, old = backup_of_posix
    with pytest.raises(exception.InvalidBackup, match="not the backup service"):
        cloud.restore(old, volume, is_new=False)
    data = cloud.path(volume.id).read_bytes()
    cloud.path(volume.id).write_bytes(bytes(len(data)))

    use(cloud, POSIX)
    cloud.restore(cloud.reread(old), volume, is_new=False)

    assert cloud.path(volume.id).read_bytes() == data


def test_cinder_sends_an_incremental_backup_after_one_of_posix_to_its_host(
    cloud, backup_of_posix, monkeypatch
):
    """Why docs/cinder.md has the first backup of each volume be a full one."""
    volume, old = backup_of_posix
    sent = []
    backups = api.API()
    monkeypatch.setattr(
        backups.scheduler_rpcapi, "create_backup", lambda _context, backup: sent.append(backup)
    )

    backups.create(cloud.context, None, None, volume.id, None, incremental=True)

    assert [backup.host for backup in sent] == [old.host]


def test_scheduler_goes_on_with_a_service_that_was_disabled(cloud):
    """Why docs/cinder.md has the old service stopped and the scheduler started again."""
    old = {"backend_state": True, "driver_name": POSIX, "availability_zone": "nova"}
    objects.Service(
        cloud.context, host="old", binary="cinder-backup", topic="cinder-backup", disabled=True
    ).create()
    scheduler = HostManager()

    scheduler.update_service_capabilities("backup", "old", old, None, None)

    assert scheduler.get_backup_host(cloud.volume(b""), None) == "old"
