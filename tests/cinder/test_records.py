"""Records: exporting, importing, and the backups of Cinder in a mount."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from pathlib import Path

import pytest
from cinder import exception, objects
from cinder.db import api as db
from cloud import DRIVER
from oslo_config import cfg
from stand_ins import MIB, eventually, image

from backupfs.cinder import BackupfsBackupDriver

CONF = cfg.CONF


@pytest.mark.parametrize("stay", [True, False], ids=["there", "deleted"])
def test_backups_are_imported_into_an_empty_database_children_first(cloud, stay):
    """Of a lost database, and of backups whose records in the repository are gone as well."""
    data = image(4 * MIB)
    volume = cloud.volume(data, metadata={"purpose": "database"})
    parent = cloud.back_up(volume)
    later = data[: 3 * MIB] + image(MIB, seed=7)
    cloud.path(volume.id).write_bytes(later)
    child = cloud.back_up(volume, parent_id=parent.id)
    records = [cloud.export(child), cloud.export(parent)]
    cloud.new_database()
    if not stay:
        cloud.run("delete", cloud.repository, parent.id, child.id)

    imported = [cloud.import_(record) for record in records]

    assert [backup.id for backup in imported] == [child.id, parent.id]
    assert [backup.status for backup in imported] == ["available"] * 2
    assert (imported[0].parent_id, imported[0].volume_id) == (parent.id, volume.id)
    assert imported[0].display_name == "nightly"
    for backup, content in zip(imported, [later, data], strict=True):
        target = cloud.volume(b"")
        cloud.restore(backup, target, is_new=True)
        assert cloud.path(target.id).read_bytes() == content
        assert db.volume_metadata_get(cloud.context, target.id)["purpose"] == "database"


def test_import_waits_for_a_garbage_collection_within_bounds(cloud):
    CONF.set_override("backup_backupfs_lock_timeout", 1)
    backup = cloud.back_up(cloud.volume(image(MIB)))
    record = cloud.export(backup)
    cloud.new_database()

    with (
        cloud.holding_lock("gc"),
        pytest.raises(exception.InvalidBackup, match="waited 1 s for gc to end"),
    ):
        cloud.import_(record)


def test_key_of_an_encrypted_volume_outlives_the_database(cloud):
    """Cinder makes a key for each backup; who lost its id could restore, and not decrypt."""
    key_id = str(uuid.uuid4())
    backup = cloud.back_up(cloud.volume(image(MIB)), encryption_key_id=key_id)
    cloud.new_database()

    imported = cloud.import_(cloud.record_of(backup.id))

    assert imported.encryption_key_id == key_id


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
    metadata = tmp_path / "metadata.json"
    metadata.write_text('{"of": "a kind that Cinder does not know"}')
    cloud.run("metadata", cloud.repository, "web01", "--set", str(metadata))
    cloud.run("backup", cloud.repository, str(source))
    (stored,) = cloud.stored()
    told = cloud.record_of("web01@latest")

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
        imported = cloud.import_(cloud.record_of("web02@latest"))
        target = cloud.volume(b"")
        cloud.restore(imported, target, is_new=True)
        assert cloud.path(target.id).read_bytes() == data
    finally:
        cloud.run("unmount", str(mountpoint))
