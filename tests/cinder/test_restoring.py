"""Restoring, deleting, exporting and importing through Cinder's manager."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cinder import exception, objects
from cinder.db import api as db
from cinder.objects import fields
from cloud import DRIVER, MIB, Wrapper, eventually, heartbeat, image, workers_alive

from backupfs.cinder import BackupfsBackupDriver


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
    assert workers_alive() == []


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
    assert workers_alive() == []
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

    with heartbeat() as pauses:
        cloud.restore(backup, volume, is_new=False)

    assert max(pauses) < 2
    assert cloud.path(volume.id).read_bytes() == data


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


# -- export and import -----------------------------------------------------------------------------


def test_backups_are_imported_into_an_empty_database_children_first(cloud):
    data = image(4 * MIB)
    volume = cloud.volume(data, metadata={"purpose": "database"})
    parent = cloud.back_up(volume)
    child = cloud.back_up(volume, parent_id=parent.id)
    records = [cloud.export(child), cloud.export(parent)]
    cloud.new_database()
    cloud.run("delete", cloud.repository, parent.id, child.id)

    imported = [cloud.import_(record) for record in records]

    assert [backup.id for backup in imported] == [child.id, parent.id]
    assert [backup.status for backup in imported] == ["available"] * 2
    assert (imported[0].parent_id, imported[0].volume_id) == (parent.id, volume.id)
    assert imported[0].display_name == "nightly"
    target = cloud.volume(b"")
    cloud.restore(imported[0], target, is_new=True)
    assert cloud.path(target.id).read_bytes() == data
    assert db.volume_metadata_get(cloud.context, target.id)["purpose"] == "database"


def test_damaged_record_is_refused(cloud):
    backup = cloud.back_up(cloud.volume(image(MIB)))
    record = cloud.export(backup)
    told = objects.Backup.decode_record(record["backup_url"])
    info = told["driver_info"]["record"]
    told["driver_info"]["record"] = info[:100] + ("A" if info[100] != "A" else "B") + info[101:]
    cloud.new_database()
    cloud.run("delete", cloud.repository, backup.id)

    with pytest.raises(exception.InvalidBackup):
        cloud.import_(cloud.as_record(told))

    assert cloud.stored() == []


@pytest.mark.parametrize("info", [{}, None, [], {"record": 5}, {"record": "%%%"}])
def test_nonsense_is_refused(cloud, info):
    backup = cloud.new_backup(cloud.volume(b""))

    with pytest.raises(exception.InvalidBackup):
        BackupfsBackupDriver(cloud.context).import_record(backup, info)


def test_record_whose_data_are_gone_is_refused(cloud):
    backup = cloud.back_up(cloud.volume(image(MIB)))
    record = cloud.export(backup)
    cloud.delete(backup)
    cloud.run("gc", cloud.repository)
    cloud.new_database()

    with pytest.raises(exception.InvalidBackup, match="data of backup"):
        cloud.import_(record)


def test_exported_record_is_text(cloud):
    backup = cloud.back_up(cloud.volume(image(MIB)))

    info = BackupfsBackupDriver(cloud.context).export_record(backup)

    assert json.loads(json.dumps(info)) == info
    assert info["id"] == backup.id


def test_backup_made_without_cinder_is_imported_from_its_record(cloud, tmp_path):
    data = image(3 * MIB)
    source = tmp_path / "web01.img"
    source.write_bytes(data)
    cloud.run("backup", cloud.repository, str(source))
    (stored,) = cloud.stored()
    command = [sys.executable, "-m", "backupfs.cinder_url", cloud.repository, "web01@latest"]
    told = json.loads(subprocess.check_output(command, text=True))

    assert told["backup_service"] == DRIVER
    backup = cloud.import_(told)

    assert (backup.id, backup.display_name, backup.size) == (stored["id"], "web01", 1)
    target = cloud.volume(b"")
    cloud.restore(backup, target, is_new=True)
    assert cloud.path(target.id).read_bytes() == data
    cloud.delete(backup)
    assert cloud.stored() == []


@pytest.mark.skipif(
    not Path("/dev/fuse").exists() or importlib.util.find_spec("pyfuse3") is None,
    reason="a mount needs /dev/fuse and pyfuse3",
)
def test_backup_is_seen_in_a_mount_with_its_name(cloud, tmp_path):
    data = image(3 * MIB)
    volume = cloud.volume(data)
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    cloud.run("mount", cloud.repository, str(mountpoint))
    try:
        backup = cloud.back_up(volume)
        path = mountpoint / backup.service_metadata
        eventually(path.exists, seconds=4)

        assert path.read_bytes() == data
        assert os.getxattr(path, "user.backupfs.display_name") == b"nightly"
        assert os.getxattr(path, "user.backupfs.id") == backup.id.encode()
        kept = json.loads((path.parent / "metadata.json").read_text())
        assert kept["volume-base-metadata"]["display_name"] == "a volume"

        (mountpoint / "staging" / "web02.img").write_bytes(data)
        command = [sys.executable, "-m", "backupfs.cinder_url", cloud.repository, "web02@latest"]
        imported = cloud.import_(json.loads(subprocess.check_output(command, text=True)))
        target = cloud.volume(b"")
        cloud.restore(imported, target, is_new=True)
        assert cloud.path(target.id).read_bytes() == data
    finally:
        cloud.run("unmount", str(mountpoint))


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
