"""What Cinder hands over as a volume: devices, files, libraries' wrappers, and snapshots."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cinder import objects
from cinder.objects import fields
from os_brick.initiator import linuxrbd
from stand_ins import MIB, FakeRbdImage, Wrapper, image


def rbd(cloud, volume):
    """The volume as os-brick gives those of Ceph to Cinder."""
    fake = FakeRbdImage(cloud.path(volume.id))
    metadata = linuxrbd.RBDImageMetadata(fake, "volumes", "cinder", "/etc/ceph/ceph.conf")
    return linuxrbd.RBDVolumeIOWrapper(metadata)


def test_volume_of_ceph_is_backed_up_and_restored(cloud):
    """Its ``write`` says nothing and wants bytes, it has no descriptor, and reads end where it ends."""
    data = image(3 * MIB + 4096)
    volume = cloud.volume(data)
    cloud.attach_as(volume, rbd(cloud, volume))
    backup = cloud.back_up(volume)
    cloud.path(volume.id).write_bytes(b"\xff" * len(data))
    wrapper = rbd(cloud, volume)
    cloud.attach_as(volume, wrapper)

    cloud.restore(backup, volume, is_new=False)

    assert cloud.content(backup) == data
    assert cloud.path(volume.id).read_bytes() == data
    assert wrapper.rbd_image.flushes > 0


@pytest.mark.parametrize("room", [0, 5 * MIB])
def test_new_volume_of_ceph_gets_no_holes_and_nothing_behind_the_backup(cloud, room):
    data = image(3 * MIB + 4096)
    backup = cloud.back_up(cloud.volume(data))
    target = cloud.volume(bytes(len(data) + room))
    wrapper = rbd(cloud, target)
    written = []
    write = wrapper.rbd_image.write

    def note(piece: bytes, offset: int) -> int:
        written.append((offset, offset + len(piece)))
        return write(piece, offset)

    wrapper.rbd_image.write = note
    cloud.attach_as(target, wrapper)

    cloud.restore(backup, target, is_new=True)

    assert cloud.path(target.id).read_bytes() == data + bytes(room)
    assert max(end for _, end in written) == len(data)
    assert sum(end - start for start, end in written) < len(data)


def test_volume_without_descriptor_and_with_short_reads_is_read_to_its_end(cloud):
    data = image(3 * MIB + 77)
    volume = cloud.volume(data)
    cloud.attach_as(volume, Wrapper(cloud.path(volume.id), read_size_max=100_003))

    backup = cloud.back_up(volume)

    assert cloud.content(backup) == data


def test_snapshot_gives_its_time_to_its_backup(cloud):
    """And is what the next incremental backup is compared with, in Cinder's order of time."""
    data = image(3 * MIB)
    volume = cloud.volume(data)
    moment = datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)
    snapshot = objects.Snapshot(
        context=cloud.context,
        volume_id=volume.id,
        volume_size=volume.size,
        user_id=volume.user_id,
        project_id=volume.project_id,
        status=fields.SnapshotStatus.BACKING_UP,
        display_name="before the upgrade",
    )
    snapshot.create()
    cloud.path(snapshot.id).write_bytes(data)
    cloud.path(volume.id).write_bytes(bytes(3 * MIB))
    backup = cloud.new_backup(volume, snapshot_id=snapshot.id)
    backup.data_timestamp = moment
    backup.save()

    made = cloud.make(backup, volume, snapshot=snapshot)

    shown = cloud.show(made)
    assert (made.status, shown["name"]) == ("available", "2026-11-22T142503Z.img")
    assert shown["description"]["snapshot_id"] == snapshot.id
    assert cloud.content(made) == data
    snapshot = objects.Snapshot.get_by_id(cloud.context, snapshot.id)
    assert snapshot.status == fields.SnapshotStatus.AVAILABLE
