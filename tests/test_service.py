"""The verbs of the service, as far as no other test goes through them."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.ambients import SetClock
from support.images import (
    CHUNK_SIZE,
    PACK_SIZE,
    BytesSource,
    BytesTarget,
    SparseSource,
    back_up,
    is_clean,
    noise,
    restored,
)

from backupfs import importing
from backupfs.errors import (
    AmbiguousBackup,
    BackupExists,
    BackupNotFound,
    Cancelled,
    CorruptObject,
    ForeignRecord,
    ImageTooLarge,
    ImageTooSmall,
    InvalidMetadata,
    InvalidName,
    InvalidOption,
    InvalidRecord,
    MissingData,
    RepositoryExists,
    RepositoryNotFound,
    SourceFailed,
    StorageError,
    VolumeNamed,
    VolumeNotFound,
)
from backupfs.format.pack import pack_name
from backupfs.format.record import record_name
from backupfs.service import Record, RetentionPolicy, Service, init

MIB = 1 << 20
MOMENT = datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)
IDS = [f"{start}-0000-4000-8000-000000000000" for start in ("abc00000", "abd00000", "b0000000")]


def take(service: Service, data: bytes = b"data", **arguments: Any) -> Record:
    return service.backup(BytesSource(data), **{"volume": "vm", **arguments})


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def packs(location: str) -> list[Path]:
    return [path for path in (Path(location) / "packs").rglob("*") if path.is_file()]


# -- init and open ---------------------------------------------------------------------------------


def test_init_makes_what_open_opens(scratch):
    folder = str(scratch / "new" / "repository")

    config = init(folder, chunk_size=1 << 20, pack_size=8 << 20, compression_level=3)

    with Service.open(folder) as service:
        assert service.config == config
        assert service.config.chunk_size == 1 << 20
        assert service.backups() == []


def test_init_refuses_a_folder_in_use_and_leaves_it(scratch):
    (scratch / "mine").write_text("mine")

    with pytest.raises(RepositoryExists):
        init(str(scratch))

    assert [path.name for path in scratch.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 5000}, {"chunk_size": 8 << 20}, {"pack_size": 1}, {"compression_level": 99}],
)
def test_init_refuses_impossible_options(scratch, options):
    with pytest.raises(InvalidOption):
        init(str(scratch / "new"), **options)

    assert not (scratch / "new").exists()


def test_open_of_what_is_no_repository_says_so(scratch):
    for folder in (scratch, scratch / "absent"):
        with pytest.raises(RepositoryNotFound):
            Service.open(str(folder))


# -- backing up ------------------------------------------------------------------------------------


def test_next_backup_is_taken_over_the_latest(service):
    first, second = take(service, b"one1"), take(service, b"two2")
    larger = take(service, b"three")
    full = take(service, b"four4", parent=None)

    assert [record.parent_id for record in (first, second, larger, full)] == [
        None,
        first.backup_id,
        None,
        None,
    ]
    assert [record.kind for record in (first, second, larger, full)] == [
        "full",
        "incremental",
        "full",
        "full",
    ]


def test_backups_of_one_second_are_numbered(location):
    with Service.open(location, ambient=SetClock(MOMENT)) as service:
        names = [take(service, b"%d" % number).name for number in range(3)]

    assert names == [
        "2026-11-22T142503Z.img",
        "2026-11-22T142503Z-2.img",
        "2026-11-22T142503Z-3.img",
    ]


def test_the_newest_of_one_second_is_the_latest_whatever_was_deleted_before(location):
    with Service.open(location, ambient=SetClock()) as service:
        first, second = (back_up(service, noise(1000, seed=seed)) for seed in (1, 2))
        service.delete(first)

        third = back_up(service, noise(1000, seed=3))

        assert service.backups() == [second, third]
        assert service.resolve("vm@latest") == third


def test_what_the_caller_tells_is_recorded(service):
    record = take(
        service,
        backup_id=IDS[0].upper(),
        data_timestamp=MOMENT,
        source_mtime_ns=-5,
        source_mode=0o640,
    )

    assert record.backup_id == IDS[0]
    assert record.data_timestamp == MOMENT
    assert (record.source_mtime_ns, record.source_mode) == (-5, 0o640)
    service.refresh()
    assert service.backups() == [record]


def test_time_with_another_zone_is_kept_as_utc(service):
    record = take(service, data_timestamp=datetime.fromisoformat("2026-11-22T16:25:03.9+02:00"))

    assert record.data_timestamp == MOMENT
    assert record.name == "2026-11-22T142503Z.img"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (13_569_465_600 * 10**9, (1 << 63) - 1),  # the year 2400
        (221_845_392_000 * 10**9, (1 << 63) - 1),  # 9000: no number of 64 bits
        (-11_676_096_000 * 10**9, -(1 << 63)),  # 1600
        ((1 << 63) - 1, (1 << 63) - 1),
        (-(1 << 63), -(1 << 63)),
    ],
)
def test_modification_time_that_no_record_holds_is_kept_as_the_nearest(service, told, kept):
    """A file of such a time could not be backed up, and that was said once it was read."""
    record = take(service, source_mtime_ns=told)

    assert record.source_mtime_ns == kept
    service.refresh()
    assert service.backups() == [record]


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:00:00-05:00"], ids=["early", "late"]
)
def test_time_that_is_none_in_utc_is_refused(service, moment):
    with pytest.raises(InvalidOption, match=r"data_timestamp.*UTC"):
        take(service, data_timestamp=datetime.fromisoformat(moment))

    assert service.backups() == []


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00", "9999-12-31T23:59:59+00:00"])
def test_first_and_last_time_of_all_are_kept(service, moment):
    record = take(service, data_timestamp=datetime.fromisoformat(moment))

    assert record.name.startswith(moment[:10])
    service.refresh()
    assert service.backups() == [record]


def test_only_what_is_new_counts_as_stored(service):
    image = noise(40 * CHUNK_SIZE, seed=1)
    first = take(service, image)
    second = take(service, image[:-1] + b"!")
    third = take(service, image, volume="other")

    assert first.stored_bytes > len(image)
    assert 0 < second.stored_bytes < CHUNK_SIZE, "a node, and what differs of one chunk"
    assert third.stored_bytes == 0


def test_holes_are_neither_stored_nor_counted(service):
    size = 1000 * CHUNK_SIZE
    record = service.backup(
        SparseSource(size, [(5 * CHUNK_SIZE, noise(CHUNK_SIZE, seed=1)), (size - 1, b"x")]),
        volume="vm",
    )

    assert record.size == size
    assert record.data_size == 2 * CHUNK_SIZE
    image = service.open_image(record)
    assert image.read(5 * CHUNK_SIZE - 1, 3)[:1] == b"\0"
    assert image.read(size - 2, 10) == b"\0x"
    assert image.read(size, 10) == b""


@pytest.mark.parametrize("read", ["read", "read_cached"])
@pytest.mark.parametrize("offset", [0, 1, CHUNK_SIZE])
@pytest.mark.parametrize("size", [1, CHUNK_SIZE, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_any_number_of_bytes_of_holes_are_that_many_zeros(service, read, offset, size):
    hole = 4 * MIB
    record = service.backup(
        SparseSource(hole + CHUNK_SIZE, [(hole, noise(CHUNK_SIZE, seed=1))]), volume="vm"
    )
    image = service.open_image(record)
    image.read(0, CHUNK_SIZE)  # so that its nodes are in memory

    assert getattr(image, read)(offset, size) == bytes(size)
    assert getattr(image, read)(hole - 1, 1) == b"\0"
    assert image.read(hole - size, size + 1) == bytes(size) + noise(CHUNK_SIZE, seed=1)[:1]


def test_progress_is_told_all_bytes(service):
    image = noise(10 * CHUNK_SIZE + 5, seed=1)
    backed_up: list[int] = []
    written: list[int] = []

    record = take(service, image, progress=backed_up.append)
    service.restore(record, BytesTarget(), progress=written.append)

    assert sum(backed_up) == sum(written) == len(image)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_cancelled_backup_is_none(service, after):
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > after

    with pytest.raises(Cancelled):
        take(service, noise(150_000, seed=1), cancelled=cancelled)

    service.refresh()
    assert service.backups() == []


def test_cancelled_restore_is_not_finished(service):
    record = take(service, noise(150_000, seed=1))
    target = BytesTarget()

    with pytest.raises(Cancelled):
        service.restore(record, target, cancelled=lambda: True)

    assert not target.is_finished


def test_source_that_fails_passes_through_and_leaves_nothing(service):
    class Failing(BytesSource):
        def extents(self):
            yield 0, noise(CHUNK_SIZE, seed=1)
            raise SourceFailed(name="image", reason="gone")

    with pytest.raises(SourceFailed, match="gone"):
        service.backup(Failing(b""), volume="vm")

    assert service.backups() == []
    service.gc()
    assert service.stats().packs == 0


def test_image_too_large_is_refused(service):
    with pytest.raises(ImageTooLarge):
        service.backup(SparseSource((1 << 50) + 1, []), volume="vm")

    assert service.backups() == []


def test_image_smaller_than_the_caller_wants_is_refused_once_it_is_read(service):
    image = noise(3 * CHUNK_SIZE, seed=1)

    with pytest.raises(ImageTooSmall, match=f"'image' has {len(image)} bytes"):
        take(service, image, size_min=len(image) + 1)

    assert service.backups() == []
    service.gc()
    assert service.stats().packs == 0
    assert restored(service, take(service, image, size_min=len(image))) == image


@pytest.mark.parametrize("volume", ["", "a//b", "..", "latest.img", "a\0b"])
def test_volume_with_an_impossible_name_is_refused(service, volume):
    with pytest.raises(InvalidName):
        take(service, volume=volume)
    with pytest.raises(InvalidName):
        service.put_metadata(volume, {})


def test_id_that_is_taken_or_no_uuid_is_refused(service):
    take(service, backup_id=IDS[0])

    with pytest.raises(BackupExists):
        take(service, b"other", backup_id=IDS[0])
    with pytest.raises(InvalidRecord):
        take(service, backup_id="backup-1")


def test_metadata_of_the_volume_go_into_the_record_unless_told(service):
    service.put_metadata("vm", {"name": "then"})

    assert take(service).metadata == {"name": "then"}
    assert take(service, with_metadata=False).metadata is None
    assert take(service, volume="other").metadata in ({}, None)


# -- selecting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (IDS[0], 0),
        (IDS[0].upper(), 0),
        ("abc", 0),
        ("ABD", 1),
        ("b", 2),
        ("vm@latest", 1),
        ("vm@latest.img", 1),
        ("vm@2026-11-22T142503Z", 0),
        ("vm@2026-11-22T142503Z.img", 0),
        ("vm@2026-11-22", 0),
        ("vm@2026-11-22T14:25:03Z", 0),
        ("vm@2026-11-22T16:25:03+02:00", 0),
        ("vm@2026-11-23", 1),
        ("odd@name@latest", 2),
    ],
)
def test_selector_stands_for_one_backup(service, selector, expected):
    records = [
        take(service, backup_id=IDS[0], data_timestamp=MOMENT),
        take(service, backup_id=IDS[1], data_timestamp=MOMENT + timedelta(days=1)),
        take(service, backup_id=IDS[2], volume="odd@name"),
    ]

    assert service.resolve(selector) == records[expected]


def test_name_of_a_volume_is_no_beginning_of_an_id(location):
    """Nobody means that: another volume's image would be restored."""
    with Service.open(location) as service:
        other = take(service)
        back_up(service, b"of the volume", volume=other.backup_id[:2])

        with pytest.raises(VolumeNamed, match=f"{other.backup_id[:2]}@latest"):
            service.resolve(other.backup_id[:2])

        assert service.resolve(other.backup_id[:3]) == other


def test_latest_is_not_an_older_backup_where_a_record_is_damaged(location):
    """It may be that of the latest one: of which volume it is, nobody can tell."""
    with Service.open(location) as service:
        older, newer = take(service), take(service)
    path = Path(location) / record_name(newer.backup_id)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    with Service.open(location) as service:
        with pytest.raises(CorruptObject, match="by its time or id"):
            service.resolve("vm@latest")
        with pytest.raises(CorruptObject):
            service.resolve(newer.backup_id)
        assert service.resolve(older.backup_id) == older
        assert service.resolve(f"vm@{older.name}") == older

        path.write_bytes(whole)
        service.refresh()
        assert service.resolve("vm@latest") == newer


@pytest.mark.parametrize(
    "selector", ["", "c", "vm@", "@latest", "other@latest", "vm@2025", "vm@nonsense", "\0"]
)
def test_selector_that_stands_for_nothing_says_so(service, selector):
    take(service, backup_id=IDS[0], data_timestamp=MOMENT)

    with pytest.raises(BackupNotFound):
        service.resolve(selector)


@pytest.mark.parametrize(
    ("selector", "count"), [("ab", 2), ("vm@2026-11", 2), ("vm@2026-11-22T", 2)]
)
def test_selector_that_stands_for_several_says_how_many(service, selector, count):
    take(service, backup_id=IDS[0], data_timestamp=MOMENT)
    take(service, backup_id=IDS[1], data_timestamp=MOMENT + timedelta(hours=1))

    with pytest.raises(AmbiguousBackup, match=str(count)):
        service.resolve(selector)


def test_backups_come_by_volume_and_time(service):
    late = take(service, data_timestamp=MOMENT)
    early = take(service, data_timestamp=MOMENT - timedelta(days=400))
    other = take(service, volume="a")

    assert service.backups() == [other, early, late]
    assert service.backups("vm") == [early, late]
    with pytest.raises(VolumeNotFound):
        service.backups("absent")


def test_refresh_takes_in_what_another_process_did(service, location):
    gone = take(service)
    with Service.open(location) as other:
        other.delete(gone)
        new = take(other, b"new")

    service.refresh()

    assert service.backups() == [new]
    assert restored(service, new) == b"new"


# -- deleting and pruning --------------------------------------------------------------------------


def test_delete_of_what_is_gone_says_so(service, location):
    record = take(service)
    with Service.open(location) as other:
        other.delete(record)

    with pytest.raises(BackupNotFound):
        service.delete(record)

    assert service.backups() == []


def test_deleting_and_collecting_leaves_the_others_whole(service, location):
    image = noise(40 * CHUNK_SIZE, seed=1)
    records = [take(service, image[:number] + b"!" + image[number + 1 :]) for number in range(4)]
    service.delete(records[0])
    service.delete(records[2])

    report = service.gc()

    assert report.bytes_after <= report.bytes_before
    assert report.bytes_after == service.stats().stored_bytes
    for number in (1, 3):
        assert restored(service, records[number])[number : number + 1] == b"!"
    assert is_clean(service)


def test_collecting_with_nothing_left_frees_everything(service, location):
    service.delete(take(service, noise(3 * PACK_SIZE, seed=1)))

    report = service.gc()

    assert report.packs_deleted == report.packs_before > 0
    assert report.bytes_after == 0
    assert packs(location) == []


HOURLY = [MOMENT - timedelta(hours=number) for number in range(72)]
WEEKLY = [MOMENT - timedelta(weeks=number) for number in range(80)]


@pytest.mark.parametrize(
    ("moments", "policy", "kept"),
    [
        (HOURLY[:5], {"last": 3}, HOURLY[:3]),
        (HOURLY[:5], {"last": 9}, HOURLY[:5]),
        (HOURLY[:30], {"hourly": 2}, HOURLY[:2]),
        # The newest of each day: 14:25 of the 22nd, then 23:25 of the days before.
        (HOURLY, {"daily": 3}, [HOURLY[0], HOURLY[15], HOURLY[39]]),
        (HOURLY, {"last": 2, "daily": 2}, [HOURLY[0], HOURLY[1], HOURLY[15]]),
        # The 22nd of November 2026 is a Sunday, the last day of its ISO week.
        (HOURLY, {"weekly": 2}, [HOURLY[0]]),
        (WEEKLY[:10], {"weekly": 3}, WEEKLY[:3]),
        (WEEKLY[:10], {"monthly": 2}, [WEEKLY[0], WEEKLY[4]]),
        (WEEKLY, {"yearly": 5}, [WEEKLY[0], WEEKLY[47]]),
        # Two of one second count as two, the one of the higher number as the newer.
        ([MOMENT, MOMENT], {"daily": 1}, [MOMENT]),
    ],
)
def test_prune_keeps_what_the_rules_say(service, moments, policy, kept):
    for moment in moments:
        take(service, data_timestamp=moment)

    planned = service.prune(RetentionPolicy(**policy), dry_run=True)
    assert len(service.backups()) == len(moments)
    done = service.prune(RetentionPolicy(**policy))

    assert sorted(record.data_timestamp for record in service.backups()) == sorted(kept)
    assert done == planned
    assert list(done.kept) == service.backups()
    assert len(done.deleted) == len(moments) - len(kept)


def test_prune_of_one_volume_leaves_the_others(service):
    for volume in ("a", "b"):
        for number in range(3):
            take(service, volume=volume, data_timestamp=MOMENT + timedelta(days=number))

    report = service.prune(RetentionPolicy(last=1), volume="a")

    assert [record.volume for record in service.backups()] == ["a", "b", "b", "b"]
    assert {record.volume for record in (*report.kept, *report.deleted)} == {"a"}
    with pytest.raises(VolumeNotFound):
        service.prune(RetentionPolicy(last=1), volume="absent")


# -- records ---------------------------------------------------------------------------------------


def test_record_goes_out_and_comes_back(service):
    record = take(service, noise(100_000, seed=1))
    exported = service.export_record(record)
    service.delete(record)

    outcome = service.import_record(exported)
    again = service.import_record(exported)

    assert (outcome.record, outcome.already_there) == (record, False)
    assert (again.record, again.already_there) == (record, True)
    assert restored(service, record) == noise(100_000, seed=1)


def test_exported_record_is_what_is_stored(service, location):
    record = take(service)

    stored = Path(location) / "records" / f"{record.backup_id}.msgpack"
    assert service.export_record(record) == stored.read_bytes()


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_import_over_a_damaged_record_leaves_the_one_or_the_other(location, monkeypatch, fails):
    """While the damaged one is there gc deletes nothing; once it is gone its packs are."""
    with Service.open(location) as service:
        record = take(service)
        exported = service.export_record(record)
    path = Path(location) / record_name(record.backup_id)
    path.write_bytes(exported[:50])
    calls = iter(range(1, 100))

    def broken(real):
        def call(*arguments, **named):
            if next(calls) == fails:
                raise OSError(errno.EIO, "broken")
            return real(*arguments, **named)

        return call

    with Service.open(location) as service:
        with monkeypatch.context() as context:
            context.setattr(os, "fsync", broken(os.fsync))
            context.setattr(Path, "replace", broken(Path.replace))
            with contextlib.suppress(StorageError):
                service.import_record(exported)
        assert path.read_bytes() in (exported, exported[:50])

        assert service.import_record(exported).record == record
    with Service.open(location) as service:
        service.gc()
        assert is_clean(service)


def test_import_does_not_keep_others_from_publishing(location, monkeypatch):
    """To see that the data of a large image are there takes minutes."""
    with Service.open(location) as service, Service.open(location) as other:
        record = take(service)
        exported = service.export_record(record)
        service.delete(record)
        made = []
        check = importing._check_reachable

        def checked(*arguments):
            made.append(back_up(other, b"meanwhile", volume="other"))
            check(*arguments)

        monkeypatch.setattr(importing, "_check_reachable", checked)
        other.repository.lock_seconds_max = 0.2

        assert service.import_record(exported).record == record
        assert len(made) == 1


def test_damaged_record_is_refused_wherever_it_is_hit(service):
    record = take(service)
    exported = service.export_record(record)
    service.delete(record)

    for offset in range(0, len(exported), 7):
        damaged = bytearray(exported)
        damaged[offset] ^= 0x10
        with pytest.raises(InvalidRecord):
            service.import_record(bytes(damaged))

    assert service.backups() == []


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 100, bytes(2 << 20)])
def test_what_is_no_record_is_refused(service, data):
    with pytest.raises(InvalidRecord):
        service.import_record(data)


def test_record_of_another_repository_is_refused(service, scratch):
    init(str(scratch / "other"), chunk_size=CHUNK_SIZE)
    with Service.open(str(scratch / "other")) as other:
        exported = other.export_record(take(other))

    with pytest.raises(ForeignRecord):
        service.import_record(exported)


def test_record_whose_data_are_gone_is_refused(service):
    record = take(service, noise(100_000, seed=1))
    exported = service.export_record(record)
    service.delete(record)
    service.gc()

    with pytest.raises(MissingData):
        service.import_record(exported)

    assert service.backups() == []


def test_record_whose_id_or_name_is_taken_is_refused(service):
    first = take(service, b"first", backup_id=IDS[0], data_timestamp=MOMENT)
    exported = service.export_record(first)
    service.delete(first)
    with_its_id = take(service, b"second", backup_id=IDS[0], volume="other")
    with pytest.raises(BackupExists):
        service.import_record(exported)
    service.delete(with_its_id)
    with_its_name = take(service, b"third", backup_id=IDS[1], data_timestamp=MOMENT)

    with pytest.raises(BackupExists):
        service.import_record(exported)

    assert service.backups() == [with_its_name]


# -- metadata --------------------------------------------------------------------------------------


def test_metadata_are_put_got_and_removed(service, location):
    assert service.get_metadata("vm") == {}

    service.put_metadata("vm", {"a": 1})
    service.put_metadata("vm", {"b": {"c": [None, "\ud800"]}})

    assert service.get_metadata("vm") == {"b": {"c": [None, "\ud800"]}}
    with Service.open(location) as other:
        assert other.get_metadata("vm") == {"b": {"c": [None, "\ud800"]}}
    service.put_metadata("vm", {})
    assert service.get_metadata("vm") == {}


@pytest.mark.parametrize(
    "metadata", [[], None, {"n": float("nan")}, {"o": object()}, {"long": "x" * 300_000}]
)
def test_what_is_no_metadata_is_refused(service, metadata):
    service.put_metadata("vm", {"kept": True})

    with pytest.raises(InvalidMetadata):
        service.put_metadata("vm", metadata)

    assert service.get_metadata("vm") == {"kept": True}


# -- verify and stats ------------------------------------------------------------------------------


def test_verify_of_whole_backups_finds_nothing(service):
    take(service, noise(100_000, seed=1))
    take(service, noise(200_000, seed=2), volume="other")

    report = service.verify()
    quick = service.verify(quick=True)

    assert (report.backups_checked, report.damage, report.complete) == (2, [], True)
    assert report.bytes_checked >= 300_000
    assert (quick.damage, quick.complete, quick.bytes_checked) == ([], False, 0)


def test_verify_names_the_backups_and_the_range_that_a_flipped_byte_hits(location):
    """Two backups share all chunks but two; the bit lies in the first's own third chunk."""
    image = noise(10 * CHUNK_SIZE, seed=1)
    own = noise(CHUNK_SIZE, seed=2)
    with Service.open(location) as writer:
        kept = take(writer, image, volume="kept")
    before = set(packs(location))
    with Service.open(location) as writer:
        hit = take(writer, image[: 3 * CHUNK_SIZE] + own + image[4 * CHUNK_SIZE :], volume="hit")
    new = max(set(packs(location)) - before, key=lambda path: path.stat().st_size)
    flip(new, 1000)

    with Service.open(location) as reader:
        [damage] = reader.verify().damage
        assert (damage.backup_id, damage.volume) == (hit.backup_id, "hit")
        assert (damage.offset, damage.size) == (3 * CHUNK_SIZE, CHUNK_SIZE)
        assert new.name in damage.object_name

        assert reader.verify([kept]).damage == []
        assert restored(reader, kept) == image
        assert reader.open_image(hit).read(0, 3 * CHUNK_SIZE) == image[: 3 * CHUNK_SIZE]
        healed = take(reader, own, volume="healed")
        assert restored(reader, hit)[3 * CHUNK_SIZE : 4 * CHUNK_SIZE] == own
        assert restored(reader, healed) == own
        assert is_clean(reader)


def test_verify_names_a_range_once_where_one_damaged_chunk_fills_it(location):
    """A disk wiped with ones: a finding for each of its chunks would fill the memory."""
    wiped = b"\xff" * (300 * CHUNK_SIZE)
    image = wiped + noise(CHUNK_SIZE, seed=1) + wiped[:-5]
    with Service.open(location) as service:
        record = back_up(service, image)
        wiped_id = service.open_image(record).chunk_ids(0, 1)[0]
        place = service.repository.index.find(wiped_id)
    pack = Path(location) / pack_name(place.pack_id)
    damaged = bytearray(pack.read_bytes())
    damaged[place.offset + place.size - 1] ^= 1
    pack.write_bytes(damaged)

    with Service.open(location) as service:
        found = [(damage.offset, damage.size) for damage in service.verify().damage]

    assert found == [(0, 300 * CHUNK_SIZE), (301 * CHUNK_SIZE, 299 * CHUNK_SIZE)]


def test_verify_names_a_damaged_record(service, location):
    record, other = take(service), take(service, b"other", volume="other")
    flip(Path(location) / "records" / f"{record.backup_id}.msgpack", 100)

    with Service.open(location) as reader:
        [damage] = reader.verify().damage

        assert record.backup_id in damage.object_name
        assert reader.backups() == [other]


def test_verify_names_backups_whose_pack_is_gone(location):
    with Service.open(location) as writer:
        hit = take(writer, noise(3 * CHUNK_SIZE, seed=1))
    before = set(packs(location))
    with Service.open(location) as writer:
        kept = take(writer, noise(3 * CHUNK_SIZE, seed=2), volume="kept")
    for path in before:
        path.unlink()

    with Service.open(location) as reader:
        report = reader.verify(quick=True)

        assert {damage.backup_id for damage in report.damage} == {hit.backup_id}
        assert restored(reader, kept) == noise(3 * CHUNK_SIZE, seed=2)


def test_stats_count_what_is_there(service, location):
    back_up(service, noise(10 * CHUNK_SIZE, seed=1))
    back_up(service, noise(10 * CHUNK_SIZE, seed=1) + bytes(5 * CHUNK_SIZE))
    back_up(service, b"x", volume="other")

    stats = service.stats()

    assert (stats.volumes, stats.backups) == (2, 3)
    assert stats.packs == len(packs(location))
    assert stats.stored_bytes == sum(path.stat().st_size for path in packs(location))
    assert stats.image_bytes == 25 * CHUNK_SIZE + 1
    assert stats.data_bytes == 20 * CHUNK_SIZE + 1
    assert (stats.chunk_size, stats.pack_size) == (CHUNK_SIZE, PACK_SIZE)
    assert stats.location == location
    assert uuid.UUID(stats.repository_id)
