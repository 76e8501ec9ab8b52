"""Damage of every object: never wrong bytes, an error only where the damage is, verify names what is
hit, and a new copy of the data heals."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from command_server import CommandServer
from lifecycle_mount import KIB, MIB, Site, assert_same, becomes, content, site_in

from backupfs.ambient import Ambient
from backupfs.errors import StorageUnavailable
from backupfs.format.ids import IdScheme
from backupfs.format.pack import PackEntry, pack_id_of
from backupfs.repository.rebuild import read_footer
from backupfs.service import Service
from backupfs.storage.local import LocalStorage
from backupfs.types import BlobId, ObjectName

CHUNK_SIZE = 64 * KIB
PAGE_SIZE = 4 * KIB
DAMAGE_FOUND = 3


@dataclass(frozen=True)
class Pack:
    """A pack of the repository, and what lies in it."""

    path: Path
    entries: list[PackEntry]

    @property
    def holds_chunks(self) -> bool:
        return self.entries[0].level == 0

    def flip(self, place: int) -> None:
        flip(self.path, place)

    def entry_of(self, data: bytes) -> PackEntry:
        """Where a chunk lies."""
        blob_id = IdScheme().chunk_id(data)
        return next(entry for entry in self.entries if entry.blob_id == blob_id)


def packs(site: Site) -> list[Pack]:
    """All packs, those of chunks first, each with its blobs in their order."""
    storage = LocalStorage(site.repo, Ambient())
    found = []
    for info in storage.list("packs/"):
        pack_id = pack_id_of(info.name)
        assert pack_id is not None
        entries = read_footer(storage, IdScheme(), pack_id, info.size)
        found.append(Pack(site.repo / info.name, sorted(entries, key=lambda item: item.offset)))
    storage.close()
    return sorted(found, key=lambda pack: (not pack.holds_chunks, -len(pack.entries)))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def readable_pages(path: Path, expected: bytes) -> list[bool]:
    """Which pages of a file can be read; those must be right."""
    found = []
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(expected), PAGE_SIZE):
            try:
                data = os.pread(file.fileno(), PAGE_SIZE, start)
            except OSError as error:
                assert error.strerror == "Input/output error"
                found.append(False)
                continue
            assert_same(data, expected[start : start + PAGE_SIZE], f"{path} from {start}")
            found.append(True)
    return found


def readable_chunks(path: Path, expected: bytes) -> list[bool]:
    """Which chunks of a file can be read; a chunk can in every place or in none."""
    pages = readable_pages(path, expected)
    count = CHUNK_SIZE // PAGE_SIZE
    chunks = [set(pages[start : start + count]) for start in range(0, len(pages), count)]
    assert all(len(chunk) == 1 for chunk in chunks)
    return [chunk.pop() for chunk in chunks]


def findings(site: Site) -> list[dict[str, Any]]:
    """What verify finds."""
    ended = site.command("verify", "--json", check=False)
    assert ended.returncode in (0, DAMAGE_FOUND), ended.stderr
    damage: list[dict[str, Any]] = json.loads(ended.stdout)["damage"]
    assert bool(damage) == bool(ended.returncode)
    return damage


def hit_chunks(site: Site, volume: str) -> set[int]:
    """The chunks of a volume's backups that verify names."""
    hit = set()
    for finding in findings(site):
        if finding["volume"] == volume:
            first = finding["offset"] // CHUNK_SIZE
            count = -(-finding["size"] // CHUNK_SIZE)
            hit |= set(range(first, first + count))
    return hit


@pytest.fixture
def site(tmp_path: Path, commands: CommandServer) -> Iterator[Site]:
    """Two volumes of one backup each, not mounted; errors are expected in the log."""
    with site_in(tmp_path / "site", commands) as found:
        found.may_log_errors = True
        found.init()
        found.mount()
        found.copy_in("vm.img", DATA)
        found.copy_in("other.img", OTHER)
        found.unmount()
        yield found


DATA = content(20 * CHUNK_SIZE, 1)
OTHER = content(6 * CHUNK_SIZE, 2)


def chunk(chunk_index: int) -> bytes:
    return DATA[chunk_index * CHUNK_SIZE : (chunk_index + 1) * CHUNK_SIZE]


def assert_other_is_whole(site: Site) -> None:
    assert_same(site.latest("other").read_bytes(), OTHER, "the other volume")


def heal(site: Site) -> None:
    """Copy the same data in again."""
    site.copy_in("again.img", DATA)
    assert_same(site.latest("again").read_bytes(), DATA, "the new copy")
    assert_same(site.latest("vm").read_bytes(), DATA, "the healed backup")
    assert findings(site) == []


# -- packs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["header", "id", "payload", "end"])
def test_flipped_bit_of_a_chunk_costs_that_chunk_only(site: Site, where: str) -> None:
    pack = packs(site)[0]
    hit = {3, 4, 11}
    for chunk_index in hit:
        entry = pack.entry_of(chunk(chunk_index))
        places = {"header": 0, "id": 12, "payload": entry.size // 2, "end": entry.size - 1}
        pack.flip(entry.offset + places[where])
    site.mount()

    readable = readable_chunks(site.latest("vm"), DATA)

    assert {index for index, can_be in enumerate(readable) if not can_be} == hit
    assert_other_is_whole(site)
    (listed,) = site.listed("list", "--volume", "vm")
    assert hit_chunks(site, "vm") == hit
    assert {finding["backup_id"] for finding in findings(site)} == {listed["id"]}
    ended = site.command("restore", "vm@latest", site.folder / "out", check=False)
    assert ended.returncode == DAMAGE_FOUND and ended.stderr.count("\n") == 1
    heal(site)


def test_flipped_bit_of_a_node_costs_its_image_only(site: Site) -> None:
    nodes = [pack for pack in packs(site) if not pack.holds_chunks]
    records = {item["volume"]: item for item in site.listed("list")}
    for pack in nodes:
        pack.flip(pack.entries[0].offset + 100)
    site.mount()

    assert not any(readable_chunks(site.latest("vm"), DATA))
    damage = findings(site)
    assert {(item["volume"], item["backup_id"]) for item in damage} >= {
        (volume, record["id"]) for volume, record in records.items()
    }
    assert hit_chunks(site, "vm") == set(range(20))
    site.copy_in("again.img", DATA)
    assert_same(site.latest("vm").read_bytes(), DATA, "the healed backup")


@pytest.mark.parametrize("has_index", [True, False], ids=["with index", "index lost"])
def test_truncated_pack_costs_what_was_cut_off(site: Site, has_index: bool) -> None:
    """Without its footer a pack is known to the index only; when that is lost too, all of it is."""
    pack = packs(site)[0]
    end = pack.entries[7].offset + 5
    os.truncate(pack.path, end)
    whole = [has_index and pack.entry_of(chunk(index)).offset < end - 5 for index in range(20)]
    if not has_index:
        lose_index(site)
    site.mount()

    readable = readable_chunks(site.latest("vm"), DATA)

    assert readable == whole
    assert_other_is_whole(site)
    assert hit_chunks(site, "vm") == {index for index in range(20) if not whole[index]}
    heal_despite_bad_pack(site, pack)


@pytest.mark.parametrize("has_index", [True, False], ids=["with index", "index lost"])
def test_flipped_bit_of_a_footer_costs_nothing_while_there_is_an_index(
    site: Site, has_index: bool
) -> None:
    pack = packs(site)[0]
    pack.flip(pack.entries[-1].offset + pack.entries[-1].size + 20)
    if not has_index:
        lose_index(site)
    site.mount()

    assert readable_chunks(site.latest("vm"), DATA) == [has_index] * 20
    assert_other_is_whole(site)
    damage = findings(site)
    assert any(pack.path.name in finding["object_name"] for finding in damage)
    assert hit_chunks(site, "vm") == (set() if has_index else set(range(20)))
    heal_despite_bad_pack(site, pack)


def heal_despite_bad_pack(site: Site, pack: Pack) -> None:
    """A new copy brings the chunks back; the pack itself stays bad until it is removed."""
    site.copy_in("again.img", DATA)
    assert_same(site.latest("vm").read_bytes(), DATA, "the healed backup")
    assert {item["backup_id"] for item in findings(site)} == {None}
    pack.path.unlink()
    findings(site)
    site.copy_in("once-more.img", DATA)
    assert_same(site.latest("vm").read_bytes(), DATA, "the healed backup")
    assert findings(site) == []


@pytest.mark.parametrize("kind", ["chunks", "nodes"])
def test_removed_pack_costs_what_lay_in_it(site: Site, kind: str) -> None:
    for pack in packs(site):
        if pack.holds_chunks == (kind == "chunks") and len(pack.entries) in (1, 20):
            pack.path.unlink()
    site.mount()

    assert not any(readable_chunks(site.latest("vm"), DATA))
    assert hit_chunks(site, "vm") == set(range(20))
    site.copy_in("other-again.img", OTHER)
    heal(site)
    assert_other_is_whole(site)


def test_removed_pack_is_noticed_by_a_running_daemon(site: Site) -> None:
    site.mount()
    packs(site)[0].path.unlink()

    assert not any(readable_chunks(site.latest("vm"), DATA))
    assert_other_is_whole(site)
    heal(site)


def test_swapped_packs_give_no_wrong_bytes(site: Site) -> None:
    one, other = packs(site)[:2]
    assert one.holds_chunks and other.holds_chunks
    swap(one.path, other.path)
    site.mount()

    assert not any(readable_chunks(site.latest("vm"), DATA))
    assert not any(readable_chunks(site.latest("other"), OTHER))
    assert hit_chunks(site, "vm") == set(range(20))
    assert hit_chunks(site, "other") == set(range(6))

    site.unmount()
    swap(one.path, other.path)
    site.mount()
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert_other_is_whole(site)
    assert findings(site) == []


def test_swapped_packs_are_healed_by_new_copies(site: Site) -> None:
    one, other = packs(site)[:2]
    swap(one.path, other.path)
    site.mount()
    assert findings(site)

    site.copy_in("again.img", DATA)
    site.copy_in("other-again.img", OTHER)

    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert_other_is_whole(site)


def test_random_flips_anywhere_in_packs_never_give_wrong_bytes(site: Site) -> None:
    rng = random.Random(4)
    site.mount()
    found = packs(site)
    for _ in range(12):
        pack = rng.choice(found)
        pack.flip(rng.randrange(pack.path.stat().st_size))
        site.remount()
        readable_pages(site.latest("vm"), DATA)
        readable_pages(site.latest("other"), OTHER)
    assert findings(site)


class BadSectors:
    """A storage on a disk that cannot read some part of one pack."""

    def __init__(self, storage: Any, name: str, place: int) -> None:
        self._storage = storage
        self._bad = (name, place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        if name == self._bad[0] and offset <= self._bad[1] < offset + size:
            raise StorageUnavailable(reason="Input/output error")
        return bytes(self._storage.get_range(name, offset, size))


@pytest.mark.parametrize("where", ["chunk", "footer"])
def test_what_the_disk_cannot_read_is_named_like_other_damage_and_healed(
    site: Site, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", site.environment["XDG_CACHE_HOME"])
    pack = packs(site)[0]
    entry = pack.entry_of(chunk(3))
    name = str(pack.path.relative_to(site.repo))
    place = entry.offset + 10 if where == "chunk" else pack.path.stat().st_size - 10
    with Service.open(str(site.repo)) as service:
        repository = service.repository
        repository.storage = cast(LocalStorage, BadSectors(repository.storage, name, place))
        monkeypatch.setattr(repository.reader, "_storage", repository.storage)
        report = service.verify()
        hit = {item.offset for item in report.damage if item.volume == "vm"}
        assert hit == ({3 * CHUNK_SIZE} if where == "chunk" else set())
        assert any(name == item.object_name for item in report.damage)

    site.mount()
    site.copy_in("again.img", DATA)
    pack.path.unlink() if where == "chunk" else None
    stored = [IdScheme().chunk_id(chunk(3)) in ids_of(other) for other in packs(site)]
    assert any(stored), "the chunk was stored again, elsewhere"


def ids_of(pack: Pack) -> set[BlobId]:
    return {entry.blob_id for entry in pack.entries}


def test_pack_whose_footer_the_disk_cannot_read_hides_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the index lost every footer must be read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.folder / "elsewhere"))
    pack = packs(site)[0]
    name = str(pack.path.relative_to(site.repo))
    read = LocalStorage.get_range

    def read_or_fail(self: LocalStorage, what: ObjectName, offset: int, size: int) -> bytes:
        if what == name:
            raise StorageUnavailable(reason="Input/output error")
        return read(self, what, offset, size)

    monkeypatch.setattr(LocalStorage, "get_range", read_or_fail)
    with Service.open(str(site.repo)) as service:
        other = service.resolve("other@latest")
        assert_same(service.open_image(other).read(0, len(OTHER)), OTHER, "other")
        report = service.verify()
        assert any(name == item.object_name for item in report.damage)
        assert {item.volume for item in report.damage} == {None, "vm"}


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


# -- records -----------------------------------------------------------------------------------


def record_of(site: Site, volume: str) -> Path:
    (item,) = site.listed("list", "--volume", volume)
    return site.repo / "records" / f"{item['id']}.msgpack"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(2 * MIB))


def fill_with_rubbish(path: Path) -> None:
    path.write_bytes(content(path.stat().st_size, 9))


def flip_in_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


damages = pytest.mark.parametrize(
    "damage", [cut, empty, grow, fill_with_rubbish, flip_in_the_middle], ids=lambda d: d.__name__
)


@damages
def test_damaged_record_hides_its_backup_only_and_its_copy_brings_it_back(
    site: Site, damage: Callable[[Path], None]
) -> None:
    path = record_of(site, "vm")
    backup_id = path.stem
    copy = site.folder / path.name
    shutil.copy(path, copy)
    damage(path)
    site.mount()

    assert os.listdir(site.volumes) == ["other"]
    assert_other_is_whole(site)
    assert any(backup_id in finding["object_name"] for finding in findings(site))
    assert backup_id in str(site.status()["unreadable_records"])
    ended = site.command("gc", check=False)
    assert ended.returncode == DAMAGE_FOUND and backup_id in ended.stderr

    site.run("cp", copy, site.backups)
    assert becomes(lambda: "vm" in os.listdir(site.volumes), seconds=20)
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert findings(site) == []
    site.command("gc")


def test_records_that_changed_places_are_refused(site: Site) -> None:
    swap(record_of(site, "vm"), record_of(site, "other"))
    site.mount()

    assert os.listdir(site.volumes) == []
    assert len(findings(site)) == 2
    assert site.listed("list") == []


def test_lost_record_can_be_had_back_from_its_head(site: Site) -> None:
    record_of(site, "vm").unlink()
    site.mount()
    assert os.listdir(site.volumes) == ["other"]

    site.command("gc")
    (site.staging / "vm.img").rename(site.staging / "vm-found.img")

    assert_same(site.latest("vm-found").read_bytes(), DATA, "what the head had")


# -- configuration -----------------------------------------------------------------------------


@damages
def test_damaged_configuration_is_refused_in_one_line(
    site: Site, damage: Callable[[Path], None]
) -> None:
    path = site.repo / "config"
    copy = path.read_bytes()
    damage(path)

    for ended in (site.try_mount(), site.command("list", check=False)):
        assert ended.returncode != 0
        assert "config" in ended.stderr and ended.stderr.count("\n") == 1
    assert not site.is_mounted()

    path.write_bytes(copy)
    site.mount()
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")


# -- the index ---------------------------------------------------------------------------------


def index_folder(site: Site) -> Path:
    folders = list((site.folder / "cache/backupfs").iterdir())
    (folder,) = [folder for folder in folders if folder.name != "log"]
    return folder


def lose_index(site: Site) -> None:
    shutil.rmtree(site.folder / "cache/backupfs")


def test_lost_index_is_made_again(site: Site) -> None:
    lose_index(site)
    site.mount()

    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert findings(site) == []
    stored = sum(pack.path.stat().st_size for pack in packs(site))
    site.copy_in("again.img", DATA)
    assert sum(pack.path.stat().st_size for pack in packs(site)) < stored + CHUNK_SIZE


def test_index_of_an_earlier_time_is_brought_up_to_date(site: Site) -> None:
    folder = index_folder(site)
    shutil.copytree(folder, site.folder / "earlier")
    site.mount()
    more = content(4 * CHUNK_SIZE, 5)
    site.copy_in("more.img", more)
    (site.volumes / "other" / site.names("other")[0]).unlink()
    (site.staging / "other.img").unlink()
    site.command("gc")
    site.unmount()
    shutil.rmtree(folder)
    shutil.copytree(site.folder / "earlier", folder)

    site.mount()

    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert_same(site.latest("more").read_bytes(), more, "more")
    site.copy_in("other.img", OTHER)
    assert_other_is_whole(site)
    assert findings(site) == []


@pytest.mark.parametrize("damage", [cut, empty, fill_with_rubbish], ids=lambda d: d.__name__)
def test_index_that_cannot_be_read_is_made_again(
    site: Site, damage: Callable[[Path], None]
) -> None:
    for path in index_folder(site).iterdir():
        if path.name.startswith("index-") and "lock" not in path.name:
            damage(path)

    site.mount()

    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert findings(site) == []


def test_flipped_bits_of_the_index_never_give_wrong_bytes(site: Site) -> None:
    """At worst reading fails until the index is removed: it is a cache."""
    (path,) = [
        path
        for path in index_folder(site).iterdir()
        if path.name.startswith("index-") and "lock" not in path.name
    ]
    rng = random.Random(6)
    whole = path.read_bytes()
    used = [place for place, byte in enumerate(whole) if byte]
    failed = 0
    for number in range(30):
        for _ in range(4):
            flip(path, rng.choice(used))
        target = site.folder / f"out-{number}"
        ended = site.command("restore", "vm@latest", target, check=False)
        if ended.returncode == 0:
            assert_same(target.read_bytes(), DATA, "restored")
        else:
            failed += 1
            path.write_bytes(whole)
    print(f"{failed} of 30 restores failed")

    lose_index(site)
    site.mount()
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert findings(site) == []


# -- drafts ------------------------------------------------------------------------------------


@damages
def test_damaged_draft_state_costs_that_draft_only_and_is_told(
    site: Site, damage: Callable[[Path], None]
) -> None:
    states = {path: path.read_bytes() for path in (site.repo / "drafts").glob("*/*.msgpack")}
    (path,) = [path for path, data in states.items() if b"vm.img" in data]
    damage(path)

    site.mount()

    assert os.listdir(site.staging) == ["other.img"]
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    assert_other_is_whole(site)
    assert path.name in json.dumps(site.status())
    ended = site.command("gc", check=False)
    assert ended.returncode == DAMAGE_FOUND and path.name in ended.stderr
    site.run("rm", path)
    site.command("gc")
    site.copy_in("vm.img", DATA)
    assert findings(site) == []


def test_lost_list_of_folders_hides_no_draft(site: Site) -> None:
    site.mount()
    (site.staging / "pool/fast").mkdir(parents=True)
    (site.staging / "pool/fast/db.img").write_bytes(DATA)
    site.unmount()
    (folders,) = (site.repo / "drafts").glob("*/folders")
    folders.write_bytes(b"rubbish")

    site.mount()

    assert_same((site.staging / "pool/fast/db.img").read_bytes(), DATA, "the head")


# -- the rest ----------------------------------------------------------------------------------


@damages
def test_damaged_metadata_is_told_and_can_be_replaced(
    site: Site, damage: Callable[[Path], None]
) -> None:
    source = site.image(b'{"owner": "me"}', "metadata.json")
    site.command("metadata", "vm", "--set", source)
    (path,) = [path for path in (site.repo / "metadata").rglob("*") if path.is_file()]
    damage(path)
    site.mount()

    ended = site.command("metadata", "vm", check=False)

    assert ended.returncode == DAMAGE_FOUND and ended.stderr.count("\n") == 1
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
    site.run("cp", source, site.volumes / "vm/metadata.json")
    assert json.loads(site.command("metadata", "vm").stdout) == {"owner": "me"}
    assert findings(site) == []


@pytest.mark.parametrize("is_mounted", [True, False], ids=["mounted", "not mounted"])
def test_rubbish_in_place_of_a_plan_stops_nothing_but_one_gc(site: Site, is_mounted: bool) -> None:
    plan = site.repo / "plans" / f"{'5' * 32}.msgpack"
    if is_mounted:
        site.mount()
    plan.write_bytes(b"rubbish")
    if not is_mounted:
        site.mount()

    site.copy_in("more.img", OTHER)
    site.command("gc", check=False)
    site.command("gc")

    assert not plan.exists()
    assert findings(site) == []


def test_foreign_files_in_the_repository_disturb_nothing(site: Site) -> None:
    for folder in ("packs", "packs/ab", "records", "metadata", "sessions", "plans", "drafts", "."):
        (site.repo / folder).mkdir(exist_ok=True)
        (site.repo / folder / "README").write_text("not ours")
        (site.repo / folder / ".hidden").write_text("not ours")
    sqlite3.connect(site.repo / "records" / "x.db").close()
    site.mount()

    site.copy_in("more.img", OTHER)
    site.command("gc")
    assert findings(site) == []
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")
