"""Restoring and deleting through Cinder's manager."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from cinder import exception, objects
from cinder.db import api as db
from cinder.objects import fields
from oslo_config import cfg
from stand_ins import MIB, Pulse, Wrapper, image, workers_alive

from backupfs.cinder import BackupfsBackupDriver

CONF = cfg.CONF


def volume_of(cloud, volume):
    return objects.Volume.get_by_id(cloud.context, volume.id)


def test_restore_to_the_source_volume_writes_every_byte_zeros_too(cloud):
    data = image(5 * MIB + 12345)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)
    cloud.attach_as(volume, Wrapper(cloud.path(volume.id)))
    cloud.path(volume.id).write_bytes(b"\xff" * len(data))

    cloud.restore(backup, volume, is_new=False)

    assert cloud.path(volume.id).read_bytes() == data
    assert volume_of(cloud, volume).status == "available"
    assert cloud.reread(backup).status == fields.BackupStatus.AVAILABLE


def test_restore_to_a_new_volume_leaves_holes_out(cloud):
    data = image(16 * MIB)
    backup = cloud.back_up(cloud.volume(data))
    target = cloud.volume(b"")

    cloud.restore(backup, target, is_new=True)

    assert cloud.path(target.id).read_bytes() == data
    assert cloud.path(target.id).stat().st_blocks * 512 < 13 * MIB
    assert volume_of(cloud, target).launched_at is not None
    assert db.volume_metadata_get(cloud.context, target.id)["src_backup_id"] == backup.id


@pytest.mark.parametrize("is_new", [True, False])
def test_restore_to_a_larger_volume_stays_within_the_backup(cloud, is_new):
    data = image(3 * MIB + 5)
    backup = cloud.back_up(cloud.volume(data))
    room = b"\0" * len(data) if is_new else b"\xff" * len(data)
    target = cloud.volume(room + b"behind" * 1000)
    written = []
    wrapper = Wrapper(cloud.path(target.id))
    wrapper.on_write = written.append
    cloud.attach_as(target, wrapper)

    cloud.restore(backup, target, is_new=is_new)

    assert cloud.path(target.id).read_bytes() == data + b"behind" * 1000
    assert written == sorted(written)


def test_restore_works_when_the_source_volume_and_the_parent_are_gone(cloud):
    data = image(3 * MIB)
    volume = cloud.volume(data)
    parent = cloud.back_up(volume)
    backup = cloud.back_up(volume, parent_id=parent.id)
    cloud.delete(parent)
    db.volume_destroy(cloud.context, volume.id)
    cloud.run("gc", cloud.repository)
    target = cloud.volume(b"")

    cloud.restore(backup, target, is_new=True)

    assert cloud.path(target.id).read_bytes() == data


def test_restore_brings_the_metadata_back(cloud):
    volume = cloud.volume(image(MIB), metadata={"purpose": "database"})
    backup = cloud.back_up(volume)
    target = cloud.volume(b"")
    db.volume_update(cloud.context, target.id, {"display_name": f"restore_backup_{backup.id}"})

    cloud.restore(backup, target, is_new=True)

    assert db.volume_metadata_get(cloud.context, target.id)["purpose"] == "database"
    assert volume_of(cloud, target).display_name == "a volume"


def test_metadata_of_a_later_cinder_fail_the_restore(cloud):
    """As with Cinder's own drivers: what its version means is unknown."""
    CONF.set_override("backup_metadata_version", 3)
    backup = cloud.back_up(cloud.volume(image(MIB)))
    CONF.clear_override("backup_metadata_version")

    with pytest.raises(exception.BackupOperationError):
        cloud.restore(backup, cloud.volume(b""), is_new=True)

    assert cloud.reread(backup).status == fields.BackupStatus.AVAILABLE


def test_cancelled_restore_stops(cloud, monkeypatch):
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 0.0)
    data = image(40 * MIB, holes=False)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)
    wrapper = Wrapper(cloud.path(volume.id))
    written = []

    def cancel(offset: int) -> None:
        written.append(offset)
        if offset >= 10 * MIB and len(written) < 12:
            db.backup_update(cloud.context, backup.id, {"status": "error"})

    wrapper.on_write = cancel
    cloud.attach_as(volume, wrapper)

    cloud.restore(backup, volume, is_new=False)

    assert max(written) < 13 * MIB
    assert volume_of(cloud, volume).status == "error"
    assert cloud.reread(backup).status == fields.BackupStatus.AVAILABLE
    assert cloud.content(backup) == data


def test_driver_raises_cancelled_as_cinder_wants_it(cloud):
    backup = cloud.back_up(cloud.volume(image(MIB)))

    with pytest.raises(exception.BackupRestoreCancel):
        BackupfsBackupDriver(cloud.context).restore(backup, backup.volume_id, None, False)


def test_failing_target_fails_the_restore(cloud):
    volume = cloud.volume(image(4 * MIB))
    backup = cloud.back_up(volume)
    wrapper = Wrapper(cloud.path(volume.id))

    def fail(_offset: int) -> None:
        raise OSError(28, "no room")

    wrapper.on_write = fail
    cloud.attach_as(volume, wrapper)

    with pytest.raises(exception.BackupDriverException, match="no room"):
        cloud.restore(backup, volume, is_new=False)

    assert volume_of(cloud, volume).status == "error_restoring"
    assert cloud.reread(backup).status == fields.BackupStatus.AVAILABLE


def test_damage_fails_the_restore_and_says_so(cloud):
    backup = cloud.back_up(cloud.volume(image(4 * MIB, holes=False)))
    for pack in (Path(cloud.repository) / "packs").rglob("*"):
        if pack.is_file() and pack.stat().st_size > MIB:
            content = bytearray(pack.read_bytes())
            content[len(content) // 2] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)

    with pytest.raises(exception.InvalidBackup, match="damaged"):
        cloud.restore(backup, cloud.volume(b""), is_new=True)


def test_killed_worker_is_a_failed_restore(cloud):
    data = image(30 * MIB, holes=False)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)
    wrapper = Wrapper(cloud.path(volume.id))

    def kill(offset: int) -> None:
        if offset == 4 * MIB:
            cloud.kill(workers_alive())

    wrapper.on_write = kill
    cloud.attach_as(volume, wrapper)

    with pytest.raises(exception.BackupDriverException, match="worker process ended"):
        cloud.restore(backup, volume, is_new=False)

    assert volume_of(cloud, volume).status == "error_restoring"
    wrapper.on_write = lambda _offset: None
    cloud.restore(cloud.reread(backup), volume, is_new=False)
    assert cloud.path(volume.id).read_bytes() == data


def test_restore_of_what_is_not_there_fails(cloud):
    volume = cloud.volume(image(MIB))
    backup = cloud.back_up(volume)
    cloud.run("delete", cloud.repository, backup.id)

    with pytest.raises(exception.InvalidBackup, match=backup.id):
        cloud.restore(backup, volume, is_new=False)


def test_service_stays_alive_during_a_restore(cloud):
    data = image(60 * MIB, holes=False)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)

    with Pulse() as pulse:
        cloud.restore(backup, volume, is_new=False)

    assert not pulse.was_kept_waiting()
    assert cloud.path(volume.id).read_bytes() == data


def test_restore_and_backup_at_once(cloud):
    data = image(20 * MIB)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)
    other = cloud.volume(image(20 * MIB, seed=3))
    target = cloud.volume(b"")
    made = cloud.new_backup(other)

    threads = [
        threading.Thread(target=cloud.restore, args=(backup, target), kwargs={"is_new": True}),
        threading.Thread(target=cloud.make, args=(made, other)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert cloud.path(target.id).read_bytes() == data
    assert cloud.reread(made).status == fields.BackupStatus.AVAILABLE


# -- deleting --------------------------------------------------------------------------------------


def test_deleted_backup_is_gone_and_gc_frees_its_space(cloud):
    backup = cloud.back_up(cloud.volume(image(4 * MIB)))

    cloud.delete(backup)

    assert cloud.stored() == []
    assert cloud.reread(backup).status == fields.BackupStatus.DELETED
    cloud.run("gc", cloud.repository)
    assert cloud.pack_size() == 0


def test_backup_without_data_is_deleted(cloud):
    backup = cloud.new_backup(cloud.volume(b""))

    cloud.delete(backup)

    assert cloud.reread(backup).status == fields.BackupStatus.DELETED


def test_parent_is_deleted_before_its_child(cloud):
    data = image(4 * MIB)
    volume = cloud.volume(data)
    parent = cloud.back_up(volume)
    child = cloud.back_up(volume, parent_id=parent.id)

    cloud.delete(parent)
    cloud.run("gc", cloud.repository)

    assert cloud.content(child) == data


def test_deletion_without_a_repository_is_an_error_cinder_understands(cloud):
    backup = cloud.back_up(cloud.volume(image(MIB)))
    Path(cloud.repository).rename(cloud.repository + "-elsewhere")

    with pytest.raises(exception.BackupDriverException):
        cloud.delete(backup)

    assert len(cloud.reread(backup).fail_reason) <= 255
