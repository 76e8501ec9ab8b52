"""What is kept of records spares reading them, and never shows what the disk does not have."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.faulty import SteppedStorage
from support.images import back_up, noise
from support.many_backups import further_backups, write_record

from backupfs.catalogue import Catalogue
from backupfs.errors import CorruptObject
from backupfs.format.ids import IdScheme
from backupfs.format.record import encode_record, record_name
from backupfs.repository import record_cache
from backupfs.repository import records as records_module
from backupfs.repository.record_cache import KeptRecord, RecordCache
from backupfs.repository.records import RecordLoader, RecordStore
from backupfs.service import Record, Service

IDS = IdScheme()
COUNT = 100
LIST_BACKUPS = """
import sys
from backupfs.service import Service
for _ in range(20):
    with Service.open(sys.argv[1]) as service:
        assert len(service.backups()) == int(sys.argv[2])
"""


class Host:
    """One host's view of a repository: opened anew each time, with what was kept before."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.storage = SteppedStorage(service.location)
        self.cache_folder = folder
        folder.mkdir(exist_ok=True)
        self._store = RecordStore(self.storage, IDS, service.config)
        self.read: list[str] = []
        self.storage.before = self._note

    def _note(self, verb: str, name: str) -> None:
        if verb == "get":
            self.read.append(name)

    def open(self) -> Catalogue:
        self.read.clear()
        loader = RecordLoader(self._store, self.storage, RecordCache(self.cache_folder, IDS))
        catalogue = Catalogue(loader, self.storage)
        catalogue.refresh()
        return catalogue

    @property
    def cache_file(self) -> Path:
        (file,) = self.cache_folder.iterdir()
        return file


@pytest.fixture
def repository_folder(location: str) -> Path:
    return Path(location)


@pytest.fixture
def records(service: Service, repository_folder: Path) -> list[Record]:
    first = back_up(service, noise(100, seed=1))
    return [first, *further_backups(repository_folder, first, COUNT - 1)]


@pytest.fixture
def host(service: Service, scratch: Path, records: list[Record]) -> Host:
    """A host that has read all records once."""
    found = Host(service, scratch / "host")
    assert found.open().all() == records
    assert len(found.read) == COUNT
    return found


def test_what_was_read_before_is_not_read_again(host, records):
    assert host.open().all() == records
    assert host.read == []


def test_records_with_all_their_fields_come_back_from_what_is_kept(host, records, location):
    full = replace(
        records[0],
        backup_id="ffffffff-0000-4000-8000-000000000000",
        volume="sub/ordner ü",
        parent_id=records[1].backup_id,
        kind="incremental",
        source_mtime_ns=-5,
        source_mode=0o640,
        metadata={"a": [1, 2.5, None, {"b": "ü"}]},
        description=replace(records[0].description, display_name="name", service="x"),
    )
    write_record(Path(location), full)
    host.cache_file.unlink()
    host.open()

    found = host.open()

    assert host.read == []
    assert found.get(full.backup_id) == full


def test_what_was_deleted_is_not_shown(host, records, location):
    for record in records[::2]:
        (Path(location) / record.object_name).unlink()

    assert host.open().all() == records[1::2]
    assert host.read == []


def test_what_was_added_is_read_and_shown(host, records, location):
    added = further_backups(Path(location), records[0], 2 * COUNT, start=COUNT)

    assert host.open().all() == records + added
    assert len(host.read) == len(added)
    assert host.open().all() == records + added
    assert host.read == []


def test_another_record_under_a_known_name_is_shown_as_it_is(host, records, location):
    """As after a delete and a backup under the same id, between two starts."""
    other = replace(records[5], volume="another", host="elsewhere")
    write_record(Path(location), other)

    found = host.open()

    assert found.get(other.backup_id) == other
    assert found.by_name("vm", records[5].name) is None
    assert host.read == [other.object_name]


@pytest.mark.parametrize("keeps_times", [False, True])
def test_damage_written_into_a_record_is_told_though_it_is_kept(
    host, records, location, keeps_times
):
    path = Path(location) / records[5].object_name
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    if keeps_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    found = host.open()

    assert found.all() == records[:5] + records[6:]
    assert [error.name for error in found.unreadable()] == [records[5].object_name]


def test_a_copy_of_the_repository_is_read_by_itself(host, records, location, scratch):
    """What is kept is found under the same ids there, and is of other files."""
    for record in records:
        path = Path(location) / record.object_name
        write_record(Path(location), replace(record, host="the copy's"))
        assert path.exists()

    assert {record.host for record in host.open().all()} == {"the copy's"}
    assert len(host.read) == COUNT


# -- a cache that is lost, damaged or strange -----------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 3] ^= 4
    return bytes(changed)


def claim_much(data: bytes) -> bytes:
    return record_cache.HEAD.pack((1 << 32) - 1, bytes(32)) + data


def block_of(content: dict[str, object]) -> bytes:
    """A block whose digest is right, as a faulty version might write it."""
    body = record_cache.codec.encode(content)
    return record_cache.HEAD.pack(len(body), IDS.digest("state", body)) + body


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(cut, id="cut"),
        pytest.param(flip, id="flipped"),
        pytest.param(claim_much, id="a size that cannot be"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:7], id="cut in the head"),
        pytest.param(lambda data: data + b"xyz", id="followed by more"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: block_of({}), id="a block of nothing"),
        pytest.param(lambda data: block_of({"records": 5}), id="a block of something else"),
        pytest.param(lambda data: block_of({"records": [[1, 2]]}), id="rows of another shape"),
    ],
)
def test_a_spoilt_cache_costs_reading_only(host, records, spoil):
    host.cache_file.write_bytes(spoil(host.cache_file.read_bytes()))

    assert host.open().all() == records
    for _ in range(2):
        host.open()
    assert host.read == []


def test_a_kept_record_that_no_record_can_be_is_read_from_the_disk(host, records):
    record = records[3]
    stamp = host.storage.stamp(record.object_name)
    host.cache_file.unlink()
    cache = RecordCache(host.cache_folder, IDS)
    for data in (b"", b"\x80", b"\xc0", b"\x81\xa2id\x01"):
        cache.add([KeptRecord(record.backup_id, stamp, data)])

    assert host.open().all() == records
    assert len(host.read) == COUNT


def test_a_cache_that_cannot_be_written_or_read_is_done_without(host, records):
    file = host.cache_file
    file.unlink()
    file.mkdir()

    assert host.open().all() == records
    assert host.open().all() == records


def test_a_flip_of_any_byte_of_the_cache_is_never_seen(service, scratch, location):
    first = back_up(service, noise(100, seed=1))
    records = [first, *further_backups(Path(location), first, 39)]
    host = Host(service, scratch / "host")
    host.open()
    whole = host.cache_file.read_bytes()
    choice = random.Random(4)

    for place in choice.sample(range(len(whole)), 200):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << choice.randrange(8)
        (host.cache_folder / f"records-{record_cache.VERSION}").write_bytes(spoilt)
        assert host.open().all() == records


def test_what_is_of_no_use_any_more_is_thrown_away(host, records, location, monkeypatch):
    monkeypatch.setattr(records_module, "USELESS_COUNT_MAX", 10)
    size = host.cache_file.stat().st_size
    for record in records[40:]:
        (Path(location) / record.object_name).unlink()

    host.open()
    host.open()

    assert host.cache_file.stat().st_size < size / 2
    assert host.open().all() == records[:40]
    assert host.read == []


def test_few_records_are_read_without_a_cache(service, scratch, location):
    first = back_up(service, noise(100, seed=1))
    further_backups(Path(location), first, 5)
    host = Host(service, scratch / "host")

    host.open()

    assert list(host.cache_folder.iterdir()) == []


# -- at the same time as others -------------------------------------------------------------------


def test_a_record_replaced_while_it_is_read_is_not_kept_as_what_it_was(service, scratch, records):
    """Its stamp is taken first: that of the new file can never stand beside the old bytes."""
    host = Host(service, scratch / "host")
    changed = replace(records[7], host="new")

    def replace_it(verb: str, name: str) -> None:
        if verb == "get" and name == changed.object_name:
            write_record(Path(service.location), changed)

    host.storage.after = replace_it
    assert host.open().get(changed.backup_id) == records[7]
    host.storage.after = lambda _verb, _name: None

    assert host.open().get(changed.backup_id) == changed


def test_random_changes_between_starts_are_all_seen(service, scratch, records, location):
    """Deleted, added, replaced, damaged; the cache spoilt now and then: what a start shows is what
    reading everything shows."""
    host = Host(service, scratch / "host")
    choice = random.Random(11)
    spare = further_backups(Path(location), records[0], COUNT, start=COUNT)
    for record in spare:
        (Path(location) / record.object_name).unlink()
    acts: list[Callable[[Path, Record], object]] = [
        lambda path, record: path.unlink(missing_ok=True),
        lambda path, record: write_record(Path(location), record),
        lambda path, record: write_record(Path(location), replace(record, host=str(len(acts)))),
        lambda path, record: path.exists() and path.write_bytes(flip(path.read_bytes())),
    ]

    for round_number in range(40):
        for record in choice.sample([*records, *spare], 20):
            choice.choice(acts)(Path(location) / record.object_name, record)
        if round_number % 7 == 3:
            for file in host.cache_folder.iterdir():
                file.write_bytes(choice.choice([cut, flip])(file.read_bytes()))
        found = host.open()
        truth, unreadable = service.repository.records.get_all()

        assert {record.backup_id: record for record in found.all()} == truth
        assert {error.name for error in found.unreadable()} == set(unreadable)


def test_processes_that_open_a_repository_at_once_all_see_everything(location, records):
    programs = [
        subprocess.Popen([sys.executable, "-c", LIST_BACKUPS, location, str(COUNT)])
        for _ in range(3)
    ]

    assert [program.wait(timeout=60) for program in programs] == [0, 0, 0]


# -- what asks the disk all the same --------------------------------------------------------------


def test_verify_and_export_find_what_rotted_under_a_kept_record(service, location, records):
    """The disk lost it without anybody's writing: here by a stamp that does not change."""
    with Service.open(location) as opened:
        opened.backups()
    path = Path(location) / records[5].object_name
    storage = service.repository.storage
    stamps = {record.object_name: storage.stamp(record.object_name) for record in records}
    path.write_bytes(flip(path.read_bytes()))

    with Service.open(location) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened.repository.storage, "stamp", stamps.get)
        opened.catalogue = Catalogue(opened.repository.loader, opened.repository.storage)
        opened.catalogue.refresh()
        assert opened.backups() == records
        with pytest.raises(CorruptObject) as caught:
            opened.export_record(records[5])
        damage = opened.verify(quick=True).damage
        opened.import_record(encode_record(records[5], IDS))
        healed = opened.export_record(records[5])

    assert caught.value.name == record_name(records[5].backup_id)
    assert [found.object_name for found in damage] == [records[5].object_name]
    assert healed == encode_record(records[5], IDS)
