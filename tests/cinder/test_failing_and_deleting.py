"""What fails, ends or is deleted while a backup is made: nothing of it may stay."""

from __future__ import annotations

import errno
import threading

import pytest
from cinder import exception, objects
from cinder.db import api as db
from cinder.objects import fields
from oslo_config import cfg
from stand_ins import MIB, Pulse, Wrapper, eventually, image, workers_alive

from backupfs.cinder import BackupfsBackupDriver
from backupfs.worker.client import Worker

CONF = cfg.CONF


def volume_status(cloud, volume):
    return objects.Volume.get_by_id(cloud.context, volume.id).status


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

    with pytest.raises(exception.BackupDriverException, match="the cable is out") as caught:
        cloud.make(backup, volume)

    failed = cloud.reread(backup)
    assert failed.status == fields.BackupStatus.ERROR
    assert failed.fail_reason == str(caught.value)
    assert len(failed.fail_reason) <= 255
    assert volume_status(cloud, volume) == "available"
    assert cloud.stored() == []
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


def test_waiting_for_others_that_publish_is_bounded(cloud):
    CONF.set_override("backup_backupfs_lock_timeout", 2)
    volume = cloud.volume(image(MIB))

    with (
        cloud.holding_lock("publish"),
        Pulse() as pulse,
        pytest.raises(exception.BackupDriverException, match="waited 2 s for publishing"),
    ):
        cloud.back_up(volume)

    assert not pulse.was_kept_waiting()
    assert cloud.stored() == []


def test_waiting_for_others_that_publish_ends_with_a_deletion(cloud, monkeypatch):
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("backupfs.worker.client.END_SECONDS_MAX", 0.2)
    volume = cloud.volume(image(MIB))
    backup = cloud.new_backup(volume)
    answer, all_is_sent = Worker._answer, threading.Event()

    def note(worker):
        if worker.may_have_published:
            all_is_sent.set()
        return answer(worker)

    monkeypatch.setattr(Worker, "_answer", note)

    with cloud.holding_lock("publish"):
        thread = cloud.in_background(lambda: cloud.make(backup, volume))
        eventually(all_is_sent.is_set)
        cloud.delete(backup)
        thread.join(60)
        assert not thread.is_alive()

    assert cloud.reread(backup).status == fields.BackupStatus.DELETED
    assert cloud.stored() == []


def test_worker_that_cannot_be_started_is_an_error_of_cinders(cloud, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    volume = cloud.volume(image(MIB))
    monkeypatch.setattr("backupfs.worker.client.socket.socketpair", refuse)

    with pytest.raises(exception.BackupDriverException, match="Too many open files"):
        cloud.back_up(volume)


def test_operation_that_is_ended_from_outside_leaves_nothing(cloud):
    """As eventlet ends a green thread whose service stops: by no Exception."""
    volume = cloud.volume(image(8 * MIB))
    wrapper = Wrapper(cloud.path(volume.id))

    def end(position: int) -> None:
        if position == 4 * MIB:
            raise GeneratorExit

    wrapper.on_read = end

    with pytest.raises(GeneratorExit):
        BackupfsBackupDriver(cloud.context).backup(cloud.new_backup(volume), wrapper)

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


def test_backup_deleted_before_its_end_never_comes_into_being(cloud, monkeypatch):
    """However long ago the last look was, there is one before the backup can be seen."""
    monkeypatch.setattr("backupfs.cinder.LOOK_SECONDS", 1000.0)
    volume = cloud.volume(image(2 * MIB))
    wrapper = Wrapper(cloud.path(volume.id))
    backup = cloud.new_backup(volume)
    answer, published = Worker._answer, []

    def note(worker):
        if worker.may_have_published:
            published.append(worker)
        return answer(worker)

    def delete(position: int) -> None:
        if position == 2 * MIB:
            cloud.delete(backup)

    monkeypatch.setattr(Worker, "_answer", note)
    wrapper.on_read = delete

    assert BackupfsBackupDriver(cloud.context).backup(backup, wrapper) is None

    assert published == []


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
