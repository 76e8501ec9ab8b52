"""The contract of the backup driver: every method, with the volumes and failures Cinder knows."""

from __future__ import annotations

import base64
import errno
import io
import itertools
import json
import os
import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import CHUNK_SIZE, is_clean

from backupfs.driver import BackupDriver
from backupfs.errors import (
    BackupExists,
    BackupNotFound,
    CorruptObject,
    ForeignRecord,
    InvalidMetadata,
    InvalidName,
    InvalidOption,
    InvalidRecord,
    MissingData,
    RepositoryNotFound,
    SourceFailed,
    TargetFailed,
)
from backupfs.service import Record, init

MIB = 1 << 20


@pytest.fixture
def driver(location: str) -> Iterator[BackupDriver]:
    with BackupDriver(location) as opened:
        yield opened


def make_backup(volume_id: str = "volume-1", **fields: Any) -> dict[str, Any]:
    """A backup as Cinder has it before the driver is called."""
    return {
        "id": str(uuid.uuid4()),
        "volume_id": volume_id,
        "parent_id": None,
        "status": "creating",
        "size": 1,
        **fields,
    }


def make_image(size: int, *, seed: int = 0) -> bytes:
    """Random bytes with a hole of some chunks in them."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
    return bytes(data)


def changed(image: bytes, offset: int, data: bytes) -> bytes:
    return image[:offset] + data + image[offset + len(data) :]


def take(driver: BackupDriver, image: bytes, volume_id: str = "volume-1", **fields: Any) -> dict:
    """Back ``image`` up; the backup as Cinder has it."""
    backup = make_backup(volume_id, **fields)
    driver.backup(backup, io.BytesIO(image))
    return backup


def restored(driver: BackupDriver, backup: dict, volume_id: str = "volume-2") -> bytes:
    target = io.BytesIO()
    driver.restore(backup, volume_id, target)
    return target.getvalue()


def record_of(driver: BackupDriver, backup: dict) -> Record:
    return driver.service.resolve(backup["id"])


# -- full and incremental --------------------------------------------------------------------------


def test_driver_opens_only_what_is_a_repository(tmp_path):
    with pytest.raises(RepositoryNotFound):
        BackupDriver(str(tmp_path))


def test_full_backup_is_restored_byte_for_byte(driver):
    image = make_image(MIB + 12345)

    backup = take(driver, image)

    record = record_of(driver, backup)
    assert (record.volume, record.kind, record.parent_id) == ("volume-1", "full", None)
    assert record.size == len(image)
    assert restored(driver, backup) == image


def test_backup_with_a_parent_is_incremental_and_complete(driver):
    image = make_image(4 * MIB)
    later = changed(image, 3 * MIB, b"changed")
    parent = take(driver, image)

    child = take(driver, later, parent_id=parent["id"])

    record = record_of(driver, child)
    assert (record.kind, record.parent_id) == ("incremental", parent["id"])
    assert record.stored_bytes < 2 * CHUNK_SIZE
    assert restored(driver, child) == later
    assert restored(driver, parent) == image


def test_backup_without_a_parent_is_full_however_many_there_are(driver):
    take(driver, make_image(MIB))

    second = take(driver, make_image(MIB), parent_id=None)

    assert record_of(driver, second).kind == "full"


@pytest.mark.parametrize("size", [MIB - 1, MIB + 1, 2 * MIB, 1])
def test_parent_of_another_size_gives_a_full_backup_without_parent(driver, size):
    parent = take(driver, make_image(MIB))
    image = make_image(size, seed=1)

    child = take(driver, image, parent_id=parent["id"])

    record = record_of(driver, child)
    assert (record.kind, record.parent_id) == ("full", None)
    assert restored(driver, child) == image


@pytest.mark.parametrize(
    "parent_id", [str(uuid.UUID(int=7)), "latest", "", "volume-1@latest", "no id at all"]
)
def test_parent_that_is_not_here_gives_a_full_backup_without_parent(driver, parent_id):
    take(driver, make_image(MIB))

    child = take(driver, make_image(MIB), parent_id=parent_id)

    record = record_of(driver, child)
    assert (record.kind, record.parent_id) == ("full", None)


def test_parent_deleted_by_another_process_gives_a_full_backup(driver, location):
    image = make_image(MIB)
    parent = take(driver, image)
    with BackupDriver(location) as other:
        other.delete_backup(parent)

    child = take(driver, image, parent_id=parent["id"])

    assert record_of(driver, child).parent_id is None
    assert restored(driver, child) == image


def test_parent_need_not_be_the_latest(driver):
    image = make_image(MIB)
    first = take(driver, image)
    take(driver, changed(image, 0, b"second"), parent_id=first["id"])

    third = take(driver, changed(image, 0, b"third"), parent_id=first["id"].upper())

    assert record_of(driver, third).parent_id == first["id"]


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * MIB + 1])
@pytest.mark.parametrize("fill", [b"\0", b"x"])
def test_images_of_any_size_come_back_with_it(driver, size, fill):
    backup = take(driver, fill * size)

    assert restored(driver, backup) == fill * size


def test_file_is_read_from_its_start_wherever_it_stood(driver):
    file = io.BytesIO(make_image(MIB))
    file.seek(777)
    backup = make_backup()

    driver.backup(backup, file)

    assert restored(driver, backup) == file.getvalue()


def test_id_that_is_taken_is_refused(driver):
    first = take(driver, make_image(MIB))

    with pytest.raises(BackupExists):
        take(driver, make_image(MIB, seed=1), id=first["id"])

    assert restored(driver, first) == make_image(MIB)


def test_backup_may_be_an_object_with_attributes(driver):
    backup = SimpleNamespace(**make_backup(display_name="nightly"))

    driver.backup(backup, io.BytesIO(b"data"))
    driver_info = driver.export_record(backup)
    driver.delete_backup(backup)
    driver.import_record(backup, driver_info)

    target = io.BytesIO()
    driver.restore(backup, "volume-2", target)
    assert target.getvalue() == b"data"
    assert driver.service.resolve(backup.id).description.display_name == "nightly"


def test_two_fields_make_a_backup(driver):
    backup = {"id": str(uuid.uuid4()), "volume_id": "volume-1"}

    driver.backup(backup, io.BytesIO(b"data"))

    assert restored(driver, backup) == b"data"


@pytest.mark.parametrize("backup_id", ["", "backup-1", None, 7, "0b0e4f2c"])
def test_backup_id_that_is_no_uuid_is_refused(driver, backup_id):
    with pytest.raises(InvalidRecord):
        take(driver, b"data", id=backup_id)

    assert driver.service.backups() == []


# -- what a record tells ---------------------------------------------------------------------------


def test_descriptive_fields_are_kept(driver):
    fields = {
        "display_name": "nightly \N{SNOWMAN}",
        "display_description": "before the upgrade",
        "availability_zone": "nova",
        "user_id": "7f3a",
        "project_id": "demo",
        "container": "volumebackups",
        "snapshot_id": str(uuid.uuid4()),
        "service": "backupfs.driver.BackupDriver",
    }

    backup = take(driver, b"data", **fields)

    description = record_of(driver, backup).description
    assert {name: getattr(description, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("given_text", "kept"),
    [
        (None, None),
        ("", ""),
        (17, "17"),
        ("x" * 5000, "x" * 4096),
        ("é" * 5000, "é" * 2048),
        ("x" + "é" * 5000, "x" + "é" * 2047),
        ("half \ud800 pair", "half ? pair"),
    ],
)
def test_long_and_odd_descriptions_are_cut_not_refused(driver, given_text, kept):
    backup = take(driver, b"data", display_description=given_text)

    assert record_of(driver, backup).description.display_description == kept


@pytest.mark.parametrize(
    "given_time",
    [
        datetime(2026, 11, 22, 14, 25, 3, 999, UTC),
        datetime(2026, 11, 22, 14, 25, 3),
        datetime(2026, 11, 22, 16, 25, 3, tzinfo=timezone(timedelta(hours=2))),
        "2026-11-22T14:25:03Z",
        "2026-11-22T14:25:03.250000",
        "2026-11-22 16:25:03+02:00",
    ],
)
def test_time_of_the_data_names_the_backup(driver, given_time):
    backup = take(driver, b"data", data_timestamp=given_time)

    record = record_of(driver, backup)
    assert record.data_timestamp == datetime(2026, 11, 22, 14, 25, 3, tzinfo=UTC)
    assert record.name == "2026-11-22T142503Z.img"


def test_without_a_time_of_the_data_it_is_now(driver):
    before = datetime.now(UTC).replace(microsecond=0)

    backup = take(driver, b"data")

    assert before <= record_of(driver, backup).data_timestamp <= datetime.now(UTC)


@pytest.mark.parametrize("given_time", ["yesterday", "", 17, "0001-01-01T00:00:00+14:00"])
def test_time_that_is_none_is_refused(driver, given_time):
    with pytest.raises(InvalidOption, match="data_timestamp"):
        take(driver, b"data", data_timestamp=given_time)

    assert driver.service.backups() == []


# -- names of volumes ------------------------------------------------------------------------------

ODD_VOLUMES = ["-v", "a b", "x\ny", "Größe", "日本語", "100/disk-0", "v@latest", "v.img", "é" * 127]
BAD_VOLUMES = ["", ".", "..", "/abs", "a//b", "a/", "../up", "a\0b", "latest.img", "x" * 256]
NO_TEXT = [None, 17, b"bytes", "\ud800"]


@pytest.mark.parametrize("volume_id", ODD_VOLUMES)
def test_odd_volume_ids_work_throughout(driver, volume_id):
    driver.put_metadata(volume_id, '{"of": "it"}')
    image = make_image(MIB)
    backup = take(driver, image, volume_id)
    driver_info = json.loads(json.dumps(driver.export_record(backup)))
    driver.delete_backup(backup)

    driver.import_record(backup, driver_info)

    assert driver_info["volume"] == volume_id
    assert json.loads(driver.get_metadata(volume_id))["of"] == "it"
    assert restored(driver, backup, volume_id) == image


@pytest.mark.parametrize("volume_id", [*BAD_VOLUMES, *NO_TEXT])
def test_what_is_no_volume_name_is_refused_everywhere(driver, volume_id):
    backup = take(driver, b"data")
    target = io.BytesIO(b"untouched")

    for attempt in (
        lambda: take(driver, b"data", volume_id),
        lambda: driver.restore(backup, volume_id, target),
        lambda: driver.get_metadata(volume_id),
        lambda: driver.put_metadata(volume_id, "{}"),
    ):
        with pytest.raises(InvalidName):
            attempt()

    assert [record.volume for record in driver.service.backups()] == ["volume-1"]
    assert target.getvalue() == b"untouched"


# -- metadata --------------------------------------------------------------------------------------


def test_metadata_without_any_is_an_object_with_the_version(driver):
    assert json.loads(driver.get_metadata("volume-1")) == {"version": 2}


@pytest.mark.parametrize("version", [{}, {"version": 1}, {"version": 2}])
def test_metadata_are_put_and_got(driver, version):
    metadata = {"volume-base-metadata": {"name": "data \N{SNOWMAN}", "size": 1}, "tags": [1, None]}

    driver.put_metadata("volume-1", json.dumps({**metadata, **version}))

    assert json.loads(driver.get_metadata("volume-1")) == {**metadata, "version": 2}
    assert driver.service.get_metadata("volume-1") == metadata
    assert json.loads(driver.get_metadata("volume-2")) == {"version": 2}


def test_metadata_are_replaced_whole(driver):
    driver.put_metadata("volume-1", '{"one": 1, "both": 1}')

    driver.put_metadata("volume-1", '{"two": 2, "both": 2}')

    assert json.loads(driver.get_metadata("volume-1")) == {"two": 2, "both": 2, "version": 2}


def test_what_get_gives_put_takes(driver):
    driver.put_metadata("volume-1", '{"a": {"b": [1.5, "c"]}}')

    driver.put_metadata("volume-2", driver.get_metadata("volume-1"))

    assert driver.get_metadata("volume-2") == driver.get_metadata("volume-1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        '{"version": 0}',
        '{"version": 3}',
        '{"version": "2"}',
        '{"version": 2.0}',
        '{"version": true}',
        '{"version": null}',
        '{"n": NaN}',
        "[" * 100_000,
        b"\xff",
        None,
        {"version": 2},
        json.dumps({"long": "x" * 300_000}),
    ],
    ids=lambda text: repr(text)[:20],
)
def test_what_is_no_metadata_is_refused_and_changes_nothing(driver, text):
    driver.put_metadata("volume-1", '{"kept": true}')

    with pytest.raises(InvalidMetadata):
        driver.put_metadata("volume-1", text)

    assert json.loads(driver.get_metadata("volume-1")) == {"kept": True, "version": 2}


def test_metadata_go_into_the_backup_and_come_back_where_it_is_restored(driver):
    driver.put_metadata("volume-1", '{"name": "then", "version": 1}')
    backup = make_backup()
    driver.backup(backup, io.BytesIO(b"data"), backup_metadata=True)
    driver.put_metadata("volume-1", '{"name": "now"}')
    driver.put_metadata("volume-2", '{"other": true}')

    driver.restore(backup, "volume-2", io.BytesIO())

    assert json.loads(driver.get_metadata("volume-2")) == {"name": "then", "version": 2}
    assert json.loads(driver.get_metadata("volume-1")) == {"name": "now", "version": 2}


def test_metadata_survive_export_wipe_and_import(driver):
    driver.put_metadata("volume-1", '{"name": "then"}')
    backup = make_backup()
    driver.backup(backup, io.BytesIO(b"data"), backup_metadata=True)
    driver_info = driver.export_record(backup)
    driver.delete_backup(backup)
    driver.put_metadata("volume-1", "{}")

    driver.import_record(backup, driver_info)
    driver.restore(backup, "volume-1", io.BytesIO())

    assert json.loads(driver.get_metadata("volume-1")) == {"name": "then", "version": 2}


@pytest.mark.parametrize("backup_metadata", [False, True])
def test_backup_without_metadata_leaves_those_of_the_volume(driver, backup_metadata):
    if not backup_metadata:
        driver.put_metadata("volume-1", '{"name": "not asked for"}')
    backup = make_backup()
    driver.backup(backup, io.BytesIO(b"data"), backup_metadata=backup_metadata)
    driver.put_metadata("volume-1", '{"name": "now"}')

    driver.restore(backup, "volume-1", io.BytesIO())

    assert json.loads(driver.get_metadata("volume-1")) == {"name": "now", "version": 2}


# -- restore ---------------------------------------------------------------------------------------


def test_restore_writes_zeros_over_old_data_and_nothing_behind_the_image(driver, tmp_path):
    image = make_image(2 * MIB + 100)
    backup = take(driver, image)
    path = tmp_path / "volume"
    path.write_bytes(b"\xff" * (3 * MIB))

    with path.open("r+b") as file:
        file.seek(12345)
        driver.restore(backup, "volume-2", file)

    assert path.read_bytes() == image + b"\xff" * (3 * MIB - len(image))


def test_restore_is_on_the_disk_when_it_returns(driver, tmp_path, monkeypatch):
    backup = take(driver, b"data")
    synced = []
    monkeypatch.setattr(
        "backupfs.openvolume.os.fsync",
        lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")),
    )

    with (tmp_path / "volume").open("w+b") as file:
        driver.restore(backup, "volume-2", file)

        assert synced == [str(tmp_path / "volume")]
        assert (tmp_path / "volume").read_bytes() == b"data"


def test_target_that_can_never_be_synced_is_no_failure(driver):
    backup = take(driver, b"data")
    reader, writer = os.pipe()

    with open(reader, "rb") as output, open(writer, "wb") as file:  # noqa: PTH123  # a descriptor

        class Pipe:
            """Only what a pipe can do, with a seek to where it is."""

            write, flush, fileno = file.write, file.flush, file.fileno

            def seek(self, offset: int) -> None:
                assert offset == 0

        driver.restore(backup, "volume-2", Pipe())
        file.close()

        assert output.read() == b"data"


class FailingTarget(io.BytesIO):
    """A volume that fails at one call; ``fileno`` is there for that of fsync."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call

    def _fail(self, call: str) -> None:
        if call == self.call:
            raise OSError(errno.EIO, "the cable is out")

    def seek(self, *arguments):
        self._fail("seek")
        return super().seek(*arguments)

    def write(self, data):
        self._fail("write")
        return 0 if self.call == "full" else super().write(data)

    def flush(self):
        self._fail("flush")

    def fileno(self):
        return 1 << 30 if self.call == "fsync" else super().fileno()


@pytest.mark.parametrize("call", ["seek", "write", "full", "flush", "fsync"])
def test_volume_that_fails_to_be_written_is_told(driver, call):
    backup = take(driver, b"data")

    with pytest.raises(TargetFailed, match="volume-2") as caught:
        driver.restore(backup, "volume-2", FailingTarget(call))

    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("backup_id", [str(uuid.UUID(int=7)), "volume-1@latest", "", None, "0"])
def test_restore_and_export_of_what_is_not_there_say_so(driver, backup_id):
    take(driver, b"data", id="0b0e4f2c-0000-4000-8000-000000000001")

    with pytest.raises(BackupNotFound):
        driver.restore({"id": backup_id}, "volume-2", io.BytesIO())
    with pytest.raises(BackupNotFound):
        driver.export_record({"id": backup_id})


# -- volumes of other storage systems --------------------------------------------------------------


class RbdLikeVolume:
    """As Ceph's wrapper in Cinder: short reads, ``write`` returns None and takes bytes only."""

    def __init__(self, content: bytes = b"", *, read_max: int = 10_007) -> None:
        self.content = bytearray(content)
        self.position = 0
        self.read_max = read_max

    def read(self, size: int | None = None) -> bytes:
        size = min(self.read_max, len(self.content) if size is None else size)
        data = bytes(self.content[self.position : self.position + size])
        self.position += len(data)
        return data

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.content[self.position : self.position + len(data)] = data
        self.position += len(data)

    def seek(self, offset: int, whence: int = 0) -> None:
        assert whence == 0
        self.position = offset

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise OSError("fileno() not supported by RBD()")


def test_volume_with_short_reads_and_without_descriptor(driver):
    image = make_image(2 * MIB + 17)
    backup = make_backup()
    driver.backup(backup, RbdLikeVolume(image))
    target = RbdLikeVolume(b"\xff" * (len(image) + 5))

    driver.restore(backup, "volume-2", target)

    assert target.content == image + b"\xff" * 5


def test_chunks_stay_whole_under_short_reads(driver):
    """What was read a little at a time is stored as the same chunks as what was read at once."""
    image = make_image(MIB)
    take(driver, image)
    again = make_backup()

    driver.backup(again, RbdLikeVolume(image, read_max=1000))

    assert record_of(driver, again).stored_bytes == 0


def test_writes_that_take_only_a_part_go_on(driver):
    class Reluctant(io.BytesIO):
        def write(self, data: bytes) -> int:
            return super().write(data[: max(1, len(data) // 2)])

    image = make_image(MIB)
    backup = take(driver, image)
    target = Reluctant()

    driver.restore(backup, "volume-2", target)

    assert target.getvalue() == image


class VolumeError(Exception):
    """What a storage system's library raises: no OSError."""


class FailingVolume(RbdLikeVolume):
    """A volume whose reads fail, or go wrong, from some byte on."""

    def __init__(self, content: bytes, outcome: Any, *, after: int) -> None:
        super().__init__(content)
        self.outcome, self.after = outcome, after

    def read(self, size: int | None = None) -> Any:
        if self.position < self.after:
            return super().read(size)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    "outcome", [VolumeError("gone"), OSError(errno.EIO, "bad"), None, "text", 17], ids=repr
)
@pytest.mark.parametrize("after", [0, MIB // 2, 3 * MIB])
def test_volume_that_fails_half_way_leaves_no_backup(driver, outcome, after):
    first = take(driver, make_image(3 * MIB))

    with pytest.raises(SourceFailed, match="volume-1") as caught:
        driver.backup(
            make_backup(parent_id=first["id"]),
            FailingVolume(make_image(3 * MIB, seed=1), outcome, after=after),
        )

    if isinstance(outcome, BaseException):
        assert caught.value.__cause__ is outcome
    driver.service.refresh()
    assert [record.backup_id for record in driver.service.backups()] == [first["id"]]
    driver.service.gc()
    assert is_clean(driver.service)
    assert restored(driver, first) == make_image(3 * MIB)


def test_failed_backup_can_be_tried_again_under_its_id(driver):
    image = make_image(MIB)
    backup = make_backup()
    with pytest.raises(SourceFailed):
        driver.backup(backup, FailingVolume(image, VolumeError(), after=MIB // 2))

    driver.backup(backup, io.BytesIO(image))

    assert restored(driver, backup) == image


def test_volume_that_cannot_be_read_from_its_start_is_refused(driver):
    class Stream(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

    with pytest.raises(SourceFailed):
        driver.backup(make_backup(), Stream(b"data"))

    assert driver.service.backups() == []


def test_interruption_passes_through_and_leaves_no_backup(driver):
    with pytest.raises(KeyboardInterrupt):
        driver.backup(make_backup(), FailingVolume(make_image(MIB), KeyboardInterrupt(), after=MIB))

    assert driver.service.backups() == []


# -- delete ----------------------------------------------------------------------------------------


def test_delete_removes_the_backup_and_is_content_with_its_absence(driver):
    backup = take(driver, b"data")

    driver.delete_backup(backup)
    driver.delete_backup(backup)

    assert driver.service.backups() == []
    with pytest.raises(BackupNotFound):
        restored(driver, backup)


@pytest.mark.parametrize("backup_id", [str(uuid.UUID(int=7)), "", None, "0", "volume-1@latest"])
def test_delete_of_what_never_came_to_be_deletes_nothing(driver, backup_id):
    take(driver, b"data", id="0b0e4f2c-0000-4000-8000-000000000001")

    driver.delete_backup(make_backup(id=backup_id))

    assert len(driver.service.backups()) == 1


def test_backup_with_a_damaged_record_is_neither_deleted_nor_not_there(driver, location):
    """It would be back when its bytes are readable again, and Cinder had forgotten it."""
    backup = make_backup()
    driver.backup(backup, io.BytesIO(b"kept" * 5000))
    (path,) = Path(location, "records").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])

    with BackupDriver(location) as other:
        for call in (
            lambda: other.delete_backup(backup),
            lambda: other.restore(backup, "volume-1", io.BytesIO()),
            lambda: other.export_record(backup),
        ):
            with pytest.raises(CorruptObject):
                call()

    path.write_bytes(whole)
    target = io.BytesIO()
    driver.restore(backup, "volume-1", target)
    assert target.getvalue() == b"kept" * 5000


def test_id_that_was_used_again_means_the_backup_that_is_there(driver, location):
    backup = make_backup()
    driver.backup(backup, io.BytesIO(b"first" * 5000))
    with BackupDriver(location) as other:
        other.delete_backup(backup)
        other.backup(backup, io.BytesIO(b"second" * 5000))
        exported = other.export_record(backup)

    target = io.BytesIO()
    driver.restore(backup, "volume-1", target)

    assert target.getvalue() == b"second" * 5000
    assert driver.export_record(backup) == exported
    driver.import_record(backup, exported)


def test_what_another_process_does_is_seen(driver, location):
    with BackupDriver(location) as other:
        backup = take(other, b"data")
        assert restored(driver, backup) == b"data"

        driver.delete_backup(backup)

        with pytest.raises(BackupNotFound):
            restored(other, backup)
        other.delete_backup(backup)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_deleting_in_any_order_leaves_the_others_whole(driver, order):
    images = [make_image(MIB)]
    backups = [take(driver, images[0])]
    for number in (1, 2):
        images.append(changed(images[-1], number * 100_000, b"%d" % number * 1000))
        backups.append(take(driver, images[-1], parent_id=backups[-1]["id"]))

    for number in order:
        driver.delete_backup(backups[number])
        backups[number] = None
        driver.service.gc()
        for backup, image in zip(backups, images, strict=True):
            assert backup is None or restored(driver, backup) == image

    assert driver.service.stats().packs == 0


# -- export and import -----------------------------------------------------------------------------


def chain(driver: BackupDriver) -> list[tuple[dict, bytes]]:
    """A full backup and two incremental ones on it, with their images."""
    images = [make_image(MIB)]
    images.append(changed(images[0], 5000, b"one"))
    images.append(changed(images[1], 500_000, b"two"))
    backups: list[dict] = []
    for image in images:
        parent_id = backups[-1]["id"] if backups else None
        backups.append(take(driver, image, parent_id=parent_id))
    return list(zip(backups, images, strict=True))


def wipe(location: str) -> None:
    for path in (Path(location) / "records").iterdir():
        path.unlink()


def test_everything_comes_back_from_exported_records_children_first(driver, location):
    taken = chain(driver)
    exported = json.dumps([driver.export_record(backup) for backup, _ in taken])
    wipe(location)
    driver.service.refresh()
    assert driver.service.backups() == []

    for (backup, _), driver_info in reversed(list(zip(taken, json.loads(exported), strict=True))):
        assert driver.import_record(backup, driver_info) is None

    assert [record_of(driver, backup).kind for backup, _ in taken] == [
        "full",
        "incremental",
        "incremental",
    ]
    for backup, image in taken:
        assert restored(driver, backup) == image


def test_import_into_a_repository_opened_after_the_wipe(location):
    with BackupDriver(location) as before:
        taken = chain(before)
        exported = [before.export_record(backup) for backup, _ in taken]
    wipe(location)

    with BackupDriver(location) as driver:
        for (backup, image), driver_info in zip(taken, exported, strict=True):
            driver.import_record(backup, driver_info)
            assert restored(driver, backup) == image


def test_import_again_is_success(driver):
    backup = take(driver, b"data")
    driver_info = driver.export_record(backup)

    driver.import_record(backup, driver_info)
    driver.import_record(backup, {"record": driver_info["record"]})

    assert len(driver.service.backups()) == 1


def test_exported_record_says_what_it_is_of(driver):
    backup = take(driver, b"data", data_timestamp="2026-11-22T14:25:03Z")

    driver_info = driver.export_record(backup)

    assert json.loads(json.dumps(driver_info)) == driver_info
    assert driver_info["id"] == backup["id"]
    assert driver_info["volume"] == "volume-1"
    assert driver_info["name"] == "2026-11-22T142503Z.img"
    assert (driver_info["size"], driver_info["kind"]) == (4, "full")


def flipped(text: str, place: int) -> str:
    """The base64 text with one bit of what it stands for changed."""
    data = bytearray(base64.b64decode(text))
    data[place % len(data)] ^= 1
    return base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: flipped(text, 0),
        lambda text: flipped(text, 300),
        lambda text: flipped(text, -1),
        lambda text: text[:-4],
        lambda text: text + "AAAA",
        lambda text: text[:-1],
        lambda text: "*" + text,
        lambda text: "é",
        lambda _: "",
        lambda _: None,
        lambda _: 17,
    ],
)
def test_damaged_record_is_refused_and_changes_nothing(driver, damage):
    backup = take(driver, b"data")
    driver_info = driver.export_record(backup)
    driver.delete_backup(backup)

    with pytest.raises(InvalidRecord):
        driver.import_record(backup, {**driver_info, "record": damage(driver_info["record"])})

    assert driver.service.backups() == []


@pytest.mark.parametrize("driver_info", [{}, None, "text", [], {"other": 1}])
def test_what_is_no_exported_record_is_refused(driver, driver_info):
    with pytest.raises(InvalidRecord):
        driver.import_record(make_backup(), driver_info)


def test_record_of_another_backup_is_refused(driver):
    first, second = take(driver, b"first"), take(driver, b"second")
    driver_info = driver.export_record(first)
    driver.delete_backup(first)

    with pytest.raises(InvalidRecord):
        driver.import_record(second, driver_info)
    with pytest.raises(InvalidRecord):
        driver.import_record(make_backup(), {**driver_info, "id": None})

    assert [record.backup_id for record in driver.service.backups()] == [second["id"]]


def test_record_under_the_label_of_another_backup_is_refused(driver, monkeypatch):
    """Parts of two exports put together: nothing appears, not for a moment, and what is there stays."""
    first, second = take(driver, b"first"), take(driver, b"second")
    mixed = {**driver.export_record(second), "record": driver.export_record(first)["record"]}
    monkeypatch.setattr(driver.service, "import_record", lambda _: pytest.fail("it was taken in"))

    with pytest.raises(InvalidRecord):
        driver.import_record(second, mixed)
    driver.delete_backup(first)
    with pytest.raises(InvalidRecord):
        driver.import_record(second, mixed)

    assert [record.backup_id for record in driver.service.backups()] == [second["id"]]


def test_record_of_another_repository_is_refused(driver, scratch):
    init(str(scratch / "other"), chunk_size=CHUNK_SIZE)
    with BackupDriver(str(scratch / "other")) as other:
        backup = take(other, b"data")
        driver_info = other.export_record(backup)

    with pytest.raises(ForeignRecord):
        driver.import_record(backup, driver_info)


def test_record_whose_data_are_collected_is_refused(driver):
    backup = take(driver, make_image(MIB))
    driver_info = driver.export_record(backup)
    driver.delete_backup(backup)
    driver.service.gc()

    with pytest.raises(MissingData):
        driver.import_record(backup, driver_info)

    assert driver.service.backups() == []


# -- many, large, any ------------------------------------------------------------------------------


def test_backups_of_many_threads_at_once(driver):
    images = {f"volume-{number % 4}/{number}": make_image(MIB, seed=number) for number in range(8)}
    images |= {"shared": make_image(2 * MIB, seed=99)}
    jobs = [*images.items(), ("shared", images["shared"]), ("shared", images["shared"])]

    with ThreadPoolExecutor(len(jobs)) as pool:
        backups = list(pool.map(lambda job: take(driver, job[1], job[0]), jobs))
        found = list(pool.map(lambda backup: restored(driver, backup), backups))

    assert found == [image for _, image in jobs]
    names = [(record.volume, record.name) for record in driver.service.backups()]
    assert len(names) == len(set(names)) == len(jobs)
    assert is_clean(driver.service)


class SparseVolume(RbdLikeVolume):
    """A large volume with one piece of data in it; a write must repeat what it holds."""

    def __init__(self, size: int, offset: int, data: bytes) -> None:
        super().__init__()
        self.size, self.offset, self.data = size, offset, data

    def _bytes(self, start: int, size: int) -> bytes:
        size = max(0, min(size, self.size - start))
        first = max(self.offset, start)
        piece = self.data[first - self.offset : max(0, start + size - self.offset)]
        if first >= start + size or not piece:
            return bytes(size)
        return bytes(first - start) + piece + bytes(start + size - first - len(piece))

    def read(self, size: int | None = None) -> bytes:
        data = self._bytes(self.position, size or 0)
        self.position += len(data)
        return data

    def write(self, data: bytes) -> None:
        assert data == self._bytes(self.position, len(data))
        self.position += len(data)


def test_sparse_image_of_4_gib_comes_back_whole(driver):
    size = 4 << 30
    volume = SparseVolume(size, (3 << 30) + 5000, make_image(MIB))
    backup = make_backup()

    driver.backup(backup, volume)
    volume.position = 0
    driver.restore(backup, "volume-2", volume)

    assert volume.position == size
    record = record_of(driver, backup)
    assert record.size == size
    assert record.stored_bytes < 2 * MIB


@st.composite
def histories(draw: st.DrawFn) -> list[bytes]:
    """An image and what random writes, and now and then another size, make of it."""
    size = draw(st.integers(0, 6 * CHUNK_SIZE))
    image = bytearray(draw(st.randoms(use_true_random=False)).randbytes(size))
    states = [bytes(image)]
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0:
            size = draw(st.integers(0, 6 * CHUNK_SIZE))
            image = image[:size] + bytes(size - len(image[:size]))
        for _ in range(draw(st.integers(0, 4))):
            offset = draw(st.integers(0, max(0, len(image) - 1)))
            length = min(draw(st.integers(1, 2 * CHUNK_SIZE)), len(image) - offset)
            fill = draw(st.sampled_from([b"\0", b"\xff", b"ab"]))
            image[offset : offset + length] = (fill * length)[:length]
        states.append(bytes(image))
    return states


def test_any_history_of_a_volume_is_restored_exactly(driver):
    @settings(max_examples=60, deadline=None)
    @given(states=histories(), read_max=st.integers(1000, 100_000))
    def check(states: list[bytes], read_max: int) -> None:
        backups: list[dict] = []
        for state in states:
            parent_id = backups[-1]["id"] if backups else None
            backups.append(make_backup(parent_id=parent_id))
            driver.backup(backups[-1], RbdLikeVolume(state, read_max=read_max))
        for backup, state in zip(backups, states, strict=True):
            target = RbdLikeVolume(b"\xee" * (len(state) + 9))
            driver.restore(backup, "volume-2", target)
            assert target.content == state + b"\xee" * 9

    check()

    assert is_clean(driver.service)
