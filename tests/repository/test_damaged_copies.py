"""Blobs that several packs hold, one copy of which is damaged: the good one is found, and never given up."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.damage import flip
from support.images import CHUNK_SIZE, back_up, is_clean, noise, restored

from backupfs.errors import StorageUnavailable
from backupfs.format.pack import pack_name
from backupfs.repository import gc, rebuild, repository
from backupfs.repository.byte_cache import ByteCache
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.index import BlobLocation
from backupfs.repository.rebuild import list_packs
from backupfs.service import Record, Service
from backupfs.types import BlobId, PackId

IMAGE = noise(20 * CHUNK_SIZE, seed=1)
AT = 3  # of the chunk that is damaged
TRIES = 4  # pack ids are random, and in what order an index is made anew depends on them

OnHost = Callable[[int], Service]


def chunk_id(service: Service, record: Record, at: int = AT) -> BlobId:
    reader = service.repository.reader
    return leaf_ids(reader, Root(record.root, record.height), at, 1)[0]


def place_of(service: Service, record: Record, at: int = AT) -> BlobLocation:
    place = service.repository.index.find(chunk_id(service, record, at))
    assert place is not None
    return place


def forget_what_was_read(service: Service) -> None:
    service.repository.reader._chunks = ByteCache(64)


@pytest.fixture
def on_host(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    """Opens the repository as one of several hosts, each with an index of its own."""
    Service.open(location).close()

    def open_there(number: int) -> Service:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host-{number}"))
        return Service.open(location)

    return open_there


@pytest.mark.parametrize("attempt", range(TRIES))
@pytest.mark.parametrize("then", ["a blob is missing for good", "the index is lost", "nothing"])
def test_gc_does_not_give_up_what_was_healed(location, on_host, tmp_path, then, attempt):
    with on_host(1) as service:
        first = back_up(service, IMAGE)
        other = back_up(service, noise(5 * CHUNK_SIZE, seed=2), volume="other")
        flip(location, place_of(service, first))
        forget_what_was_read(service)
        assert not is_clean(service)
        back_up(service, IMAGE)
        assert restored(service, first) == IMAGE
        if then == "a blob is missing for good":
            (Path(location) / pack_name(place_of(service, other).pack_id)).unlink()
    if then == "the index is lost":
        shutil.rmtree(tmp_path / "host-1")

    with on_host(1) as service:
        service.gc()

    with on_host(2) as service:
        assert restored(service, first) == IMAGE


def two_copies(location: str, on_host: OnHost) -> Record:
    """A backup whose chunk another pack holds too; the copy that host 1 has listed is damaged."""
    with on_host(1) as one, on_host(2) as two:
        one.repository.writer(), two.repository.writer()
        record = back_up(one, IMAGE)
        back_up(two, IMAGE + noise(CHUNK_SIZE, seed=8), volume="of two")
    with on_host(1) as service:
        flip(location, place_of(service, record))
    return record


def test_a_reader_finds_the_other_copy(location, on_host):
    record = two_copies(location, on_host)
    with on_host(1) as service:
        assert restored(service, record) == IMAGE
        assert service.repository.index.damaged() == frozenset()
        service.gc()
        assert is_clean(service)
    with on_host(3) as service:
        assert restored(service, record) == IMAGE


def test_verify_counts_no_damage_of_what_another_pack_holds_whole(location, on_host):
    two_copies(location, on_host)
    with on_host(1) as service:
        assert is_clean(service)


def test_gc_reads_the_listed_copy_before_it_gives_up_the_other(location, on_host):
    record = two_copies(location, on_host)
    with on_host(1) as service:
        service.gc()
        for kept in service.backups():
            if kept.volume == "of two":
                service.delete(kept)
        service.gc()
    with on_host(3) as service:
        assert restored(service, record) == IMAGE


def test_a_heal_by_a_process_that_has_not_heard_of_the_damage_lasts(location, on_host):
    """A difference would, by an index that prefers what is whole."""
    with on_host(1) as finder, on_host(1) as writer:
        base = back_up(writer, IMAGE)
        start = AT * CHUNK_SIZE
        image = IMAGE[:start] + noise(50, seed=5) + IMAGE[start + 50 :]
        record = back_up(writer, image, volume="other")  # whole: this volume had nothing before
        flip(location, place_of(writer, record))
        forget_what_was_read(finder)
        assert not is_clean(finder)
        heal = back_up(writer, image, volume="vm")

        assert place_of(writer, heal).base is None
        finder.repository.refresh_index()
        forget_what_was_read(finder)
        assert restored(finder, heal) == restored(finder, record) == image
        finder.gc()
        assert is_clean(finder)
        assert restored(finder, base) == IMAGE


@pytest.mark.parametrize("between", ["repair", "renewal"])
def test_a_backup_heals_although_the_index_was_made_anew(location, service, between):
    first = back_up(service, IMAGE)
    flip(location, place_of(service, first))
    forget_what_was_read(service)
    assert not is_clean(service)

    if between == "repair":
        service.repair()
    else:
        service.repository.renew_index()
    back_up(service, IMAGE)

    forget_what_was_read(service)
    assert restored(service, first) == IMAGE
    assert is_clean(service)


def test_what_another_host_came_to_need_while_gc_deleted_its_copy_is_listed(on_host, monkeypatch):
    lasting = noise(45 * CHUNK_SIZE, seed=2)
    with on_host(1) as one, on_host(2) as two:
        one.repository.writer(), two.repository.writer()
        with_more = back_up(two, IMAGE + lasting, volume="two")
        back_up(two, lasting, volume="lasting")
        alone = back_up(one, IMAGE, volume="one")
        theirs = place_of(two, with_more).pack_id
        index, packs = one.repository.index, list_packs(one.repository.storage)
        index.clear()
        for pack_id in sorted(packs, key=lambda pack_id: pack_id != theirs):  # theirs came first
            entries = rebuild.read_footer(
                one.repository.storage, one.repository.ids, pack_id, packs[pack_id]
            )
            index.add_pack(pack_id, entries)
        assert place_of(one, alone).pack_id != theirs, "the case at hand"
        one.delete(with_more)
        one.delete(alone)
        two.refresh()
        marks, mark = [], gc._Run._mark
        new: list[Record] = []

        def mark_then_back_up(run: gc._Run, acknowledged: set[Root]) -> gc.Reached:
            marks.append(mark(run, acknowledged))
            if len(marks) == 2:
                new.append(back_up(two, IMAGE, volume="new"))
            return marks[-1]

        monkeypatch.setattr(gc._Run, "_mark", mark_then_back_up)
        assert one.gc().packs_deleted

        one.refresh()
        assert restored(two, new[0]) == IMAGE
        assert restored(one, new[0]) == IMAGE


def unreadable_footer(monkeypatch: pytest.MonkeyPatch, wanted: PackId) -> None:
    read = rebuild.read_footer

    def read_footer(storage, ids, pack_id, size):
        if pack_id == wanted:
            raise StorageUnavailable(reason=os.strerror(errno.EIO))
        return read(storage, ids, pack_id, size)

    monkeypatch.setattr(rebuild, "read_footer", read_footer)
    monkeypatch.setattr(gc, "read_footer", read_footer)


def test_verify_reports_damage_where_the_other_copy_cannot_be_read_either(
    location, on_host, monkeypatch
):
    record = two_copies(location, on_host)
    with on_host(1) as service:
        damaged = place_of(service, record)
        raw_at = service.repository.reader.raw_at

        def raw_elsewhere(pack_id, entry):
            if pack_id != damaged.pack_id:
                raise StorageUnavailable(reason=os.strerror(errno.EIO))
            return raw_at(pack_id, entry)

        monkeypatch.setattr(service.repository.reader, "raw_at", raw_elsewhere)

        report = service.verify()

        assert report.complete
        assert record.backup_id in {hit.backup_id for hit in report.damage}


def test_readers_of_damage_go_through_all_packs_for_a_twentieth_of_the_time(service, monkeypatch):
    now, went_through = [service.repository.ambient.monotonic() + 1000], []

    def refresh_index(*_parts, fills_gaps, **_named):
        now[0] += 1.0
        if fills_gaps:
            went_through.append(now[0])
            now[0] += 2.0
        return []

    monkeypatch.setattr(repository, "refresh_index", refresh_index)
    monkeypatch.setattr(service.repository.ambient, "monotonic", lambda: now[0])

    for _ in range(300):
        service.repository._refresh_for_reader(is_known=False)

    assert 3 <= len(went_through) <= 8
    assert all(later - one > 40 for one, later in itertools.pairwise(went_through))


def test_gaps_stay_noted_while_a_footer_cannot_be_read(service, monkeypatch):
    record = back_up(service, IMAGE)
    index = service.repository.index
    unreadable_footer(monkeypatch, place_of(service, record).pack_id)
    index.mark_damaged([chunk_id(service, record)])

    service.repository.refresh_index()
    assert index.gaps() is not None

    monkeypatch.undo()
    service.repository.refresh_index()
    assert index.gaps() is None


def test_gc_leaves_a_pack_alone_whose_footer_it_cannot_read(service, monkeypatch):
    record = back_up(service, IMAGE)
    doomed = back_up(service, noise(30 * CHUNK_SIZE, seed=7), volume="doomed")
    service.delete(doomed)
    unreadable_footer(monkeypatch, place_of(service, record).pack_id)

    assert service.gc().packs_deleted
    assert restored(service, record) == IMAGE
