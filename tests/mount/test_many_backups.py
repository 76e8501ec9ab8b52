"""A mount of many backups: ready from what was kept, and right whatever was changed behind its back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from mounted import MIB, Mounted, becomes, random_bytes, run
from support.many_backups import further_backups, write_record

from backupfs.format.ids import IdScheme
from backupfs.format.record import decode_record
from backupfs.service import Record

IMAGE = random_bytes(MIB)
COUNT = 200


@pytest.fixture
def records(mounted: Mounted) -> list[Record]:
    """The backups of volume "vm"; the mount has shown all of them once, and is unmounted."""
    run("cp", mounted.image(IMAGE), mounted.staging / "vm.img")
    mounted.unmount()
    (path,) = (mounted.repo / "records").iterdir()
    first = decode_record(path.read_bytes(), IdScheme())
    found = [first, *further_backups(mounted.repo, first, COUNT - 1)]
    mounted.mount()
    assert mounted.names("vm") == [record.name for record in found]
    mounted.unmount()
    assert cache_of(mounted).stat().st_size > COUNT * 100
    return found


def cache_of(mounted: Mounted) -> Path:
    (file,) = (mounted.folder / "cache").rglob("records-*")
    return file


def path_of(mounted: Mounted, record: Record) -> Path:
    return mounted.repo / record.object_name


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_changed_between_two_mounts_is_shown(
    mounted: Mounted, records: list[Record]
) -> None:
    mounted.expects_errors = True  # of the damaged record
    added = further_backups(mounted.repo, records[0], 1, start=COUNT)
    path_of(mounted, records[3]).unlink()
    damage(path_of(mounted, records[5]))

    mounted.mount()

    expected = [*records[:3], records[4], *records[6:], *added]
    assert mounted.names("vm") == [record.name for record in expected]
    (unreadable,) = mounted.status()["unreadable_records"]
    assert records[5].backup_id in unreadable
    assert (mounted.volumes / "vm" / records[9].name).read_bytes() == IMAGE


def test_what_is_changed_behind_a_mount_is_shown(mounted: Mounted, records: list[Record]) -> None:
    mounted.mount()
    mounted.names("vm")
    added = further_backups(mounted.repo, records[0], 1, start=COUNT)
    path_of(mounted, records[3]).unlink()
    expected = [record.name for record in (*records[:3], *records[4:], *added)]

    assert becomes(lambda: mounted.names("vm") == expected, seconds=20)


def test_a_spoilt_cache_hides_and_invents_nothing(mounted: Mounted, records: list[Record]) -> None:
    cache = cache_of(mounted)
    for spoilt in (cache.read_bytes()[:-9], b"\0" * 5000, random_bytes(5000)):
        cache.write_bytes(spoilt)
        mounted.mount()
        assert mounted.names("vm") == [record.name for record in records]
        assert mounted.latest("vm").read_bytes() == IMAGE
        mounted.unmount()


def test_a_copy_over_a_head_follows_the_backups_that_were_kept(
    mounted: Mounted, records: list[Record]
) -> None:
    """Publishing relies on what is known of parents and names."""
    mounted.mount()

    run("cp", mounted.image(IMAGE[::-1]), mounted.staging / "vm.img")

    known = {record.name for record in records}
    (name,) = [name for name in mounted.names("vm") if name not in known]
    path = mounted.volumes / "vm" / name
    assert mounted.xattr(path, "parent") == records[-1].backup_id
    assert path.read_bytes() == IMAGE[::-1]


def test_whoever_reads_a_sidecar_is_told_that_the_stored_record_is_damaged(
    mounted: Mounted, records: list[Record]
) -> None:
    mounted.expects_errors = True
    mounted.mount()
    sidecar = mounted.backups / f"{records[5].backup_id}.msgpack"
    whole = sidecar.read_bytes()
    damage(path_of(mounted, records[5]))

    with pytest.raises(OSError) as caught:
        sidecar.read_bytes()
    assert caught.value.errno == errno.EIO
    assert sidecar.stat().st_size == len(whole)
    write_record(mounted.repo, records[5])
    assert sidecar.read_bytes() == whole


def test_a_whole_copy_of_a_damaged_record_takes_its_place_though_it_is_known(
    mounted: Mounted, records: list[Record]
) -> None:
    mounted.mount()
    path = path_of(mounted, records[5])
    whole = path.read_bytes()
    copy = mounted.image(whole, path.name)
    damage(path)

    run("cp", copy, mounted.backups)

    assert path.read_bytes() == whole
    assert len(mounted.names("vm")) == COUNT
