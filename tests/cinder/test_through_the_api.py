"""The whole way from Cinder's API to the driver and back, with nothing left out but the messages
between the services, which become calls."""

from __future__ import annotations

import pytest
from cinder import exception, objects
from cinder.backup import api
from cinder.objects import fields
from cloud import HOST
from stand_ins import MIB, Wrapper, image


@pytest.fixture
def backups(cloud, monkeypatch):
    """Cinder's API for backups, with one backup service."""
    objects.Service(
        cloud.context,
        host=HOST,
        binary="cinder-backup",
        topic="cinder-backup",
        availability_zone="nova",
    ).create()
    made = api.API()

    def create(context, backup):
        backup.host = HOST
        backup.save()
        cloud.make(backup, objects.Volume.get_by_id(context, backup.volume_id), is_by_api=True)

    def restore(context, _host, backup, volume_id, volume_is_new):
        cloud.manager.restore_backup(context, backup, volume_id, volume_is_new)

    def import_record(context, _host, backup, service, url, hosts):
        cloud.manager.import_record(context, backup, service, url, hosts)

    monkeypatch.setattr(made.scheduler_rpcapi, "create_backup", create)
    for name, act in {
        "restore_backup": restore,
        "import_record": import_record,
        "delete_backup": cloud.manager.delete_backup,
        "export_record": cloud.manager.export_record,
        "check_support_to_force_delete": lambda context, _host: (
            cloud.manager.check_support_to_force_delete(context)
        ),
    }.items():
        monkeypatch.setattr(made.backup_rpcapi, name, act)
    return made


def create(cloud, backups, volume, *, incremental: bool = False):
    """A new backup as the database has it when all is done."""
    made = backups.create(
        cloud.context, "nightly", "made by a test", volume.id, None, incremental=incremental
    )
    return cloud.reread(made)


def test_life_of_a_volume_and_its_backups(cloud, backups):
    data = image(4 * MIB)
    volume = cloud.volume(data, metadata={"purpose": "database"})
    full = create(cloud, backups, volume)
    later = data[: 3 * MIB] + image(MIB, seed=7)
    cloud.path(volume.id).write_bytes(later)
    child = create(cloud, backups, volume, incremental=True)

    assert [full.status, child.status] == [fields.BackupStatus.AVAILABLE] * 2
    assert (full.is_incremental, child.parent_id) == (False, full.id)
    assert cloud.show(child)["kind"] == "incremental"

    cloud.path(volume.id).write_bytes(b"\xff" * len(data))
    backups.restore(cloud.context, full.id, volume.id)
    assert cloud.path(volume.id).read_bytes() == data

    records = [backups.export_record(cloud.context, backup.id) for backup in (child, full)]
    backups.delete(cloud.context, child)
    backups.delete(cloud.context, cloud.reread(full))
    assert cloud.stored() == []
    for record in records:
        backups.import_record(cloud.context, record["backup_service"], record["backup_url"])
    again = [cloud.reread(backup) for backup in (child, full)]
    assert [backup.status for backup in again] == [fields.BackupStatus.AVAILABLE] * 2
    assert again[0].parent_id == full.id
    assert cloud.content(child) == later

    backups.delete(cloud.context, again[0])
    backups.delete(cloud.context, again[1])
    cloud.run("gc", cloud.repository)
    assert cloud.pack_size() == 0


@pytest.mark.parametrize("is_deleted", [True, False], ids=["gone", "of another size"])
def test_incremental_without_a_usable_parent_becomes_full_and_cinder_is_told(
    cloud, backups, is_deleted
):
    data = image(2 * MIB)
    volume = cloud.volume(data)
    parent = create(cloud, backups, volume)
    if is_deleted:
        cloud.run("delete", cloud.repository, parent.id)
    else:
        data += image(MIB, seed=1)
        cloud.path(volume.id).write_bytes(data)

    backup = create(cloud, backups, volume, incremental=True)

    assert (backup.status, backup.parent_id) == (fields.BackupStatus.AVAILABLE, None)
    assert (backup.is_incremental, backup.parent) == (False, None)
    assert cloud.reread(parent).num_dependent_backups == 0
    assert cloud.show(backup)["kind"] == "full"
    assert cloud.content(backup) == data
    # Nothing depends on it, so Cinder lets it be deleted.
    backups.delete(cloud.context, cloud.reread(parent))


def test_backup_is_deleted_by_force_while_it_is_made(cloud, backups, monkeypatch):
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 0.0)
    volume = cloud.volume(image(8 * MIB))
    wrapper = Wrapper(cloud.path(volume.id))

    def delete(position: int) -> None:
        if position == 4 * MIB:
            (backup,) = objects.BackupList.get_all(cloud.context)
            with pytest.raises(exception.InvalidBackup, match="available or error"):
                backups.delete(cloud.context, backup)
            backups.delete(cloud.context, backup, force=True)

    wrapper.on_read = delete
    cloud.attach_as(volume, wrapper)

    backup = create(cloud, backups, volume)

    assert backup.status == fields.BackupStatus.DELETED
    assert objects.Volume.get_by_id(cloud.context, volume.id).status == "available"
    assert cloud.stored() == []


def test_backup_that_exists_is_not_imported_over(cloud, backups):
    volume = cloud.volume(image(MIB))
    backup = create(cloud, backups, volume)
    record = backups.export_record(cloud.context, backup.id)

    with pytest.raises(exception.InvalidBackup, match="already exists"):
        backups.import_record(cloud.context, record["backup_service"], record["backup_url"])

    assert [stored["id"] for stored in cloud.stored()] == [backup.id]
