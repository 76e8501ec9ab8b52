"""Making backups through Cinder's manager."""

from __future__ import annotations

import threading
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cinder import exception, interface, objects
from cinder.db import api as db
from cinder.objects import fields
from cloud import MIB, Wrapper, eventually, heartbeat, image, workers_alive
from oslo_config import cfg

from backupfs.cinder import BackupfsBackupDriver
from backupfs.worker.client import Worker

CONF = cfg.CONF
GIB = 1 << 30


def volume_status(cloud, volume):
    return objects.Volume.get_by_id(cloud.context, volume.id).status


def changed(data: bytes, offset: int, what: bytes) -> bytes:
    return data[:offset] + what + data[offset + len(what) :]


def test_full_backup_holds_every_byte(cloud):
    data = image(5 * MIB + 12345)
    volume = cloud.volume(data)

    backup = cloud.back_up(volume)

    assert backup.status == fields.BackupStatus.AVAILABLE
    shown = cloud.show(backup)
    assert (shown["volume"], shown["kind"], shown["size"]) == (volume.id, "full", len(data))
    assert backup.service_metadata == f"volumes/{volume.id}/{shown['name']}"
    assert cloud.content(backup) == data
    assert volume_status(cloud, volume) == "available"
    assert workers_alive() == []


def test_incremental_backup_stores_what_changed(cloud):
    data = image(8 * MIB)
    volume = cloud.volume(data)
    full = cloud.back_up(volume)
    later = changed(data, 7 * MIB, b"changed")
    cloud.path(volume.id).write_bytes(later)

    backup = cloud.back_up(volume, parent_id=full.id)

    shown = cloud.show(backup)
    assert (shown["kind"], shown["parent_id"]) == ("incremental", full.id)
    assert shown["stored_bytes"] < 256 << 10
    assert (backup.parent_id, backup.status) == (full.id, fields.BackupStatus.AVAILABLE)
    assert cloud.reread(full).num_dependent_backups == 1
    assert cloud.content(backup) == later


def test_what_cinder_knows_of_a_backup_is_kept_with_it(cloud):
    volume = cloud.volume(image(MIB))

    backup = cloud.back_up(volume, display_name="Grüße\n☃", container="../../etc")

    shown = cloud.show(backup)
    assert shown["description"]["display_name"] == "Grüße\n☃"
    assert shown["description"]["project_id"] == backup.project_id
    assert shown["description"]["container"] == "../../etc"
    assert backup.container == "../../etc"


@pytest.mark.parametrize("is_deleted", [True, False], ids=["gone", "of another size"])
def test_without_a_usable_parent_the_backup_is_full(cloud, is_deleted):
    data = image(2 * MIB)
    volume = cloud.volume(data)
    parent = cloud.back_up(volume)
    if is_deleted:
        cloud.run("delete", cloud.repository, parent.id)
    else:
        data += image(MIB, seed=1)
        cloud.path(volume.id).write_bytes(data)

    backup = cloud.back_up(volume, parent_id=parent.id)

    assert (backup.status, backup.parent_id) == (fields.BackupStatus.AVAILABLE, None)
    assert not backup.is_incremental
    assert (cloud.show(backup)["kind"], cloud.show(backup)["parent_id"]) == ("full", None)
    assert cloud.reread(parent).num_dependent_backups == 0
    assert cloud.content(backup) == data


def test_volume_without_descriptor_and_with_short_reads_is_read_to_its_end(cloud):
    data = image(3 * MIB + 77)
    volume = cloud.volume(data)
    cloud.attach_as(volume, Wrapper(cloud.path(volume.id), read_size_max=100_003))

    backup = cloud.back_up(volume)

    assert cloud.content(backup) == data


def test_empty_and_zero_volumes_are_backed_up(cloud):
    empty = cloud.back_up(cloud.volume(b""))
    zeros = cloud.back_up(cloud.volume(bytes(5 * MIB + 1)))

    assert cloud.show(empty)["size"] == 0
    assert cloud.content(zeros) == bytes(5 * MIB + 1)


def test_metadata_of_the_volume_are_in_the_backup(cloud):
    volume = cloud.volume(image(MIB), metadata={"purpose": "database"})

    backup = cloud.back_up(volume)

    kept = cloud.show(backup)["metadata"]
    assert kept["volume-metadata"] == {"purpose": "database"}
    assert kept["volume-base-metadata"]["display_name"] == "a volume"
    assert kept["version"] == 2


# -- failures --------------------------------------------------------------------------------------


def fail_at(offset: int):
    def on_read(position: int) -> None:
        if position >= offset:
            raise OSError(5, "the cable is out" + " and out" * 100)

    return on_read


def test_failing_volume_leaves_nothing_and_gc_frees_the_space(cloud):
    volume = cloud.volume(image(80 * MIB, holes=False))
    wrapper = Wrapper(cloud.path(volume.id))
    wrapper.on_read = fail_at(70 * MIB)
    cloud.attach_as(volume, wrapper)
    backup = cloud.new_backup(volume)

    with pytest.raises(exception.BackupDriverException, match="the cable is out"):
        cloud.make(backup, volume)

    failed = cloud.reread(backup)
    assert failed.status == fields.BackupStatus.ERROR
    assert "the cable is out" in failed.fail_reason
    assert len(failed.fail_reason) <= 255
    assert volume_status(cloud, volume) == "available"
    assert cloud.stored() == []
    assert workers_alive() == []
    cloud.run("gc", cloud.repository)
    assert cloud.pack_size() == 0


def test_killed_worker_is_a_failed_backup(cloud):
    volume = cloud.volume(image(30 * MIB))
    wrapper = Wrapper(cloud.path(volume.id))

    def kill(position: int) -> None:
        if position == 20 * MIB:
            cloud.kill(workers_alive())

    wrapper.on_read = kill
    cloud.attach_as(volume, wrapper)

    with pytest.raises(exception.BackupDriverException, match="worker process ended"):
        cloud.back_up(volume)

    assert cloud.stored() == []
    cloud.run("gc", cloud.repository)
    assert cloud.pack_size() == 0
    wrapper.on_read = lambda _position: None
    assert cloud.back_up(volume).status == fields.BackupStatus.AVAILABLE


def test_failure_after_publishing_takes_the_backup_back(cloud, monkeypatch):
    """Cinder could not note that the backup has no parent: for Cinder it failed."""
    volume = cloud.volume(image(2 * MIB))
    parent = cloud.back_up(volume)
    cloud.run("delete", cloud.repository, parent.id)

    def refuse(*_):
        raise exception.ServiceUnavailable("no database")

    monkeypatch.setattr("backupfs.cinder._note_parent", refuse)

    with pytest.raises(exception.ServiceUnavailable):
        cloud.back_up(volume, parent_id=parent.id)

    assert cloud.stored() == []


def test_taken_id_is_refused_and_what_has_it_stays(cloud):
    volume = cloud.volume(image(2 * MIB))
    backup = cloud.back_up(volume)
    backup.status = fields.BackupStatus.CREATING
    backup.save()
    cloud.path(volume.id).write_bytes(image(2 * MIB, seed=9))

    with pytest.raises(exception.InvalidBackup, match="already"):
        cloud.make(backup, volume)

    assert [stored["id"] for stored in cloud.stored()] == [backup.id]


def test_waiting_for_a_lock_is_bounded(cloud):
    CONF.set_override("backup_backupfs_lock_timeout", 1)
    volume = cloud.volume(image(MIB))

    with (
        cloud.holding_the_publish_lock(),
        heartbeat() as pauses,
        pytest.raises(exception.BackupDriverException, match="waited 1 s for publishing"),
    ):
        cloud.back_up(volume)

    assert max(pauses) < 1
    assert cloud.stored() == []


# -- deleting while it is made ---------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 10 * MIB, 20 * MIB], ids=["start", "middle", "end"])
def test_backup_that_is_deleted_while_it_is_made_leaves_nothing(cloud, offset, monkeypatch):
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 0.0)
    volume = cloud.volume(image(20 * MIB, holes=False))
    wrapper = Wrapper(cloud.path(volume.id))
    backup = cloud.new_backup(volume)
    read = []

    def delete(position: int) -> None:
        read.append(position)
        if position == offset:
            cloud.delete(backup)

    wrapper.on_read = delete
    cloud.attach_as(volume, wrapper)

    cloud.make(backup, volume)

    assert cloud.reread(backup).status == fields.BackupStatus.DELETED
    assert max(read) <= offset + MIB
    assert volume_status(cloud, volume) == "available"
    assert cloud.stored() == []
    assert workers_alive() == []


def test_backup_deleted_while_it_is_published_leaves_nothing(cloud, monkeypatch):
    """The deletion finds no backup yet, so it is the making that must take it back."""
    answer = Worker._answer
    volume = cloud.volume(image(2 * MIB))
    backup = cloud.new_backup(volume)

    def delete_before(worker):
        monkeypatch.setattr(Worker, "_answer", answer)
        cloud.delete(backup)
        return answer(worker)

    monkeypatch.setattr(Worker, "_answer", delete_before)
    db.volume_update(cloud.context, volume.id, {"status": "backing-up"})
    driver = BackupfsBackupDriver(cloud.context)

    with cloud.path(volume.id).open("rb") as file:
        assert driver.backup(backup, file) is None

    assert cloud.stored() == []


def test_driver_says_that_it_can_delete_by_force(cloud):
    assert cloud.manager.check_support_to_force_delete(cloud.context)


def test_stalled_volume_does_not_keep_a_deletion_waiting(cloud, monkeypatch):
    """The volume is read by Cinder's thread; the deletion needs neither it nor the worker."""
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 0.2)
    volume = cloud.volume(image(8 * MIB))
    wrapper = Wrapper(cloud.path(volume.id))
    go_on, stalled = threading.Event(), threading.Event()

    def stall(position: int) -> None:
        if position == 4 * MIB:
            stalled.set()
            go_on.wait(60)

    wrapper.on_read = stall
    backup = cloud.new_backup(volume)
    thread = cloud.in_background(
        lambda: BackupfsBackupDriver(cloud.context).backup(backup, wrapper)
    )
    eventually(stalled.is_set)

    cloud.delete(backup)
    go_on.set()
    thread.join(30)

    assert not thread.is_alive()
    assert cloud.stored() == []


# -- several, and the service around them ----------------------------------------------------------


def test_several_backups_at_once_and_the_service_stays_alive(cloud):
    images = [image(24 * MIB, seed=seed) for seed in range(4)]
    volumes = [cloud.volume(data) for data in images]
    backups = [cloud.new_backup(volume) for volume in volumes]

    with heartbeat() as pauses:
        threads = [
            cloud.in_background(lambda pair=pair: cloud.make(*pair))
            for pair in zip(backups, volumes, strict=True)
        ]
        for thread in threads:
            thread.join(120)

    assert [cloud.reread(backup).status for backup in backups] == ["available"] * 4
    assert [cloud.content(backup) for backup in backups] == images
    assert max(pauses) < 2, "a heartbeat was kept waiting"
    assert cloud.run("verify", cloud.repository)


# -- set-up ----------------------------------------------------------------------------------------


def test_repository_that_is_fine_passes_the_check(cloud):
    BackupfsBackupDriver(context=cloud.context).check_for_setup_error()


@pytest.mark.parametrize("what", ["unset", "missing", "empty", "a file"])
def test_what_is_no_repository_fails_the_check(cloud, tmp_path, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    CONF.set_override(
        "backup_backupfs_repository", None if what == "unset" else str(tmp_path / what)
    )

    with pytest.raises((exception.InvalidConfigurationValue, exception.BackupDriverException)):
        BackupfsBackupDriver(cloud.context).check_for_setup_error()


def test_damaged_repository_fails_the_check(cloud):
    config = Path(cloud.repository) / "config"
    config.chmod(0o600)
    config.write_bytes(b"nothing")

    with pytest.raises(exception.BackupDriverException):
        BackupfsBackupDriver(cloud.context).check_for_setup_error()


def test_manager_begins_to_work_with_the_driver(cloud):
    cloud.manager.is_initialized = False

    cloud.manager.setup_backup_backend(cloud.context)

    eventually(cloud.manager.is_working)


def test_compression_level_counts(cloud):
    text = b"".join(b"line %d of a log that goes on and on\n" % number for number in range(60_000))
    sizes = []
    for level in (1, 19):
        CONF.set_override("backup_backupfs_compression_level", level)
        backup = cloud.back_up(cloud.volume(bytes([level]) + text))
        sizes.append(cloud.show(backup)["stored_bytes"])

    assert sizes[1] < sizes[0]


def test_driver_is_registered_and_lists_its_options():
    names = {option.name for option in BackupfsBackupDriver.get_driver_options()}
    (listed,) = entry_points(group="oslo.config.opts", name="backupfs.cinder")

    assert BackupfsBackupDriver in interface._backup_register
    assert "backup_backupfs_repository" in names
    assert {option.name for option in listed.load()()[0][1]} == names
