"""Making backups through Cinder's manager."""

from __future__ import annotations

import pytest
from cinder import objects
from cinder.objects import fields
from cloud import DRIVER, PROJECT, USER
from oslo_config import cfg
from stand_ins import MIB, Pulse, image

CONF = cfg.CONF


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

    backup = cloud.back_up(volume, display_name="Grüße\n☃", display_description="d" * 255)

    description = cloud.show(backup)["description"]
    assert description["display_name"] == "Grüße\n☃"
    assert description["display_description"] == "d" * 255
    assert (description["user_id"], description["project_id"]) == (USER, PROJECT)
    assert description["service"] == DRIVER


CONTAINERS = ["../../../escape", "/escape", "..", "", ".", "a/b", "%2e%2e/escape", "-rf", "c" * 255]


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda name: repr(name)[:20])
def test_container_is_text_and_no_path(cloud, container):
    """A tenant chooses it, and Cinder does not check it."""
    volume = cloud.volume(image(MIB))
    before = paths_around(cloud)

    backup = cloud.back_up(volume, container=container)
    cloud.restore(backup, volume, is_new=False)

    assert cloud.show(backup)["description"]["container"] == container
    assert backup.container == container
    cloud.delete(backup)
    assert cloud.stored() == []
    assert paths_around(cloud) == before


def paths_around(cloud) -> set[str]:
    """All that lies beside the repository, and what is named after a container anywhere near."""
    near = [cloud.folder, *cloud.folder.parents]
    return {str(path) for path in cloud.folder.iterdir()} | {
        str(folder / "escape") for folder in near if (folder / "escape").exists()
    }


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


# -- several, and the service around them ----------------------------------------------------------


def test_several_backups_at_once_and_the_service_stays_alive(cloud):
    images = [image(24 * MIB, seed=seed) for seed in range(4)]
    volumes = [cloud.volume(data) for data in images]
    backups = [cloud.new_backup(volume) for volume in volumes]

    with Pulse() as pulse:
        threads = [
            cloud.in_background(lambda pair=pair: cloud.make(*pair))
            for pair in zip(backups, volumes, strict=True)
        ]
        for thread in threads:
            thread.join(120)

    assert [cloud.reread(backup).status for backup in backups] == ["available"] * 4
    assert [cloud.content(backup) for backup in backups] == images
    assert not pulse.was_kept_waiting()
    assert cloud.run("verify", cloud.repository)


def test_compression_level_counts(cloud):
    text = b"".join(b"line %d of a log that goes on and on\n" % number for number in range(60_000))
    sizes = []
    for level in (1, 19):
        CONF.set_override("backup_backupfs_compression_level", level)
        backup = cloud.back_up(cloud.volume(bytes([level]) + text))
        sizes.append(cloud.show(backup)["stored_bytes"])

    assert sizes[1] < sizes[0]
