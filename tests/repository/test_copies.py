"""Chunks that several packs hold, as differences to others: the copy that can be read is the one that counts.

Two hosts that have not heard of each other yet store the same chunk, each as a difference to what
its own volume had before. Either base may go, and the index lists one copy only.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import flip
from support.differences import IDS, as_difference
from support.images import CHUNK_SIZE, BytesSource, back_up, is_clean, noise, restored
from support.parts import Parts

from backupfs.ambient import Ambient
from backupfs.format.blob import DIFFERENCES_MAX, BlobEncoder
from backupfs.format.ids import IdScheme
from backupfs.format.pack import PackEntry, encode_footer, pack_name
from backupfs.repository import gc
from backupfs.repository.byte_cache import ByteCache
from backupfs.repository.chunks import ChunkStore
from backupfs.repository.decoders import decoding
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.pack_scan import PackScan
from backupfs.repository.rebuild import list_packs, refresh_index
from backupfs.service import Record, Service
from backupfs.storage import local
from backupfs.types import BlobId, PackId

IMAGE = noise(40 * CHUNK_SIZE, seed=3)
PLACES = (3, 17)  # of the chunks that change


def edited(image: bytes, *places: int, seed: int) -> bytes:
    """Something small is other in some chunks."""
    for place in places or PLACES:
        at = place * CHUNK_SIZE + 3000
        image = image[:at] + noise(100, seed=seed + place) + image[at + 100 :]
    return image


UPDATED = edited(IMAGE, seed=9)  # what both hosts come to have


def ids_of(service: Service, record: Record) -> list[BlobId]:
    root = Root(record.root, record.height)
    return leaf_ids(service.repository.reader, root, 0, -(-record.size // CHUNK_SIZE))


# -- the index ---------------------------------------------------------------------------------

CHUNKS = [bytes([number]) * 32 for number in range(1, 5)]
# Of some packs: which chunks each holds, and what each is a difference to (itself: it is whole).
PACKS = st.lists(
    st.dictionaries(st.sampled_from(CHUNKS), st.sampled_from(CHUNKS), min_size=1),
    min_size=1,
    max_size=6,
)


def entries_of(held: dict[bytes, bytes]) -> list[PackEntry]:
    return [
        PackEntry(
            blob_id=BlobId(chunk),
            offset=100 * place,
            size=100,
            level=0,
            base=None if base == chunk else BlobId(base),
        )
        for place, (chunk, base) in enumerate(held.items())
    ]


def put_pack(parts: Parts, number: int, held: dict[bytes, bytes]) -> PackId:
    pack_id = PackId(bytes([number]) * 16)
    size = 100 * len(held)
    footer = encode_footer(pack_id, entries_of(held), blobs_size=size, ids=IDS)
    parts.storage.put_new(pack_name(pack_id), bytes(size) + footer)
    return pack_id


def readable(packs: list[dict[bytes, bytes]]) -> set[bytes]:
    """The chunks that can be read from some copy, by whatever way."""
    found: set[bytes] = set()
    for _ in CHUNKS:
        for held in packs:
            found |= {chunk for chunk, base in held.items() if base == chunk or base in found}
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    packs=PACKS,
    gone=st.sets(st.integers(0, 5)),
    seen_before=st.integers(0, 6),
)
def test_what_some_copies_allow_to_be_read_is_listed_so(parts, packs, gone, seen_before):
    for pack_id in list_packs(parts.storage):
        parts.storage.delete(pack_name(pack_id))
    parts.index.clear()
    pack_ids = []
    for number, held in enumerate(packs):
        pack_ids.append(put_pack(parts, 255 - number, held))
        if number < seen_before:  # in this order; the rest all at once
            refresh_index(parts.storage, parts.ids, parts.index)
    for number in gone:
        if number < len(packs):
            parts.storage.delete(pack_name(pack_ids[number]))

    refresh_index(parts.storage, parts.ids, parts.index)

    left = [held for number, held in enumerate(packs) if number not in gone]
    for chunk in readable(left):
        place = parts.index.find(BlobId(chunk))
        for _ in range(DIFFERENCES_MAX):
            assert place is not None
            if place.base is None:
                break
            place = parts.index.find(place.base)
        assert place is not None and place.base is None
    assert parts.index.gaps() is None


A, B, C, D = CHUNKS


@pytest.mark.parametrize(
    "packs",
    [
        pytest.param([{A: B}, {A: C, C: C}], id="the first that comes cannot be read"),
        pytest.param([{A: C, C: C}, {A: B}], id="the last that comes cannot be read"),
        pytest.param([{A: B}, {A: C}, {C: D}, {D: D}], id="bases that come later"),
        pytest.param([{D: D}, {C: D}, {A: C}, {A: B}], id="bases that come before"),
        pytest.param([{A: B, B: A}, {A: C, C: C}], id="a circle"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_of_two_differences_the_one_that_can_be_read_is_listed(parts, packs, at_once):
    for number, held in enumerate(packs, start=1):
        put_pack(parts, number, held)
        if not at_once:
            refresh_index(parts.storage, parts.ids, parts.index)

    refresh_index(parts.storage, parts.ids, parts.index)

    assert parts.index.find(BlobId(A)).base == C
    assert parts.index.gaps() is None, "once"


def test_a_base_that_is_found_after_what_needs_it_counts(parts):
    packs = ({A: C}, {A: B}, {C: C}, {C: C})
    for number, held in enumerate(packs, start=1):
        last = put_pack(parts, number, held)
        parts.index.add_pack(last, entries_of(held))
    parts.storage.delete(pack_name(last))

    refresh_index(parts.storage, parts.ids, parts.index)

    assert parts.index.find(BlobId(A)).base == C
    assert parts.index.find(BlobId(C)).base is None


def test_copies_as_the_same_difference_are_no_doubt(parts):
    """gc makes those whenever it moves one."""
    for number in (1, 2):
        parts.index.add_pack(PackId(bytes([number]) * 16), entries_of({A: B, C: C}))

    assert parts.index.gaps() is None


def test_two_differences_in_one_pack_are_a_doubt(parts):
    first, second = (
        PackEntry(blob_id=BlobId(A), offset=offset, size=100, level=0, base=BlobId(base))
        for offset, base in ((0, B), (100, C))
    )

    parts.index.add_pack(PackId(b"p" * 16), [first, second])

    assert parts.index.gaps() is not None


# -- two hosts ---------------------------------------------------------------------------------


@pytest.fixture
def on_host(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Service]:
    """Opens the repository as one of several hosts, each with an index of its own."""
    Service.open(location).close()

    def open_there(number: int) -> Service:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host-{number}"))
        return Service.open(location)

    return open_there


def stored_twice(on_host: Callable[[int], Service]) -> tuple[Record, Record, Record]:
    """A backup of each of two hosts with the same chunks, as differences to other ones; and the one
    before of the first. Much else lies with the first one's."""
    lasting = noise(12 * CHUNK_SIZE, seed=5)
    with ExitStack() as open_services:
        hosts = [open_services.enter_context(on_host(number)) for number in (1, 2)]
        before = [
            back_up(host, edited(IMAGE, seed=100 * number), volume=f"vm{number}")
            for number, host in enumerate(hosts, start=1)
        ]
        one = hosts[0].backup(
            BytesSource(UPDATED + lasting), volume="vm1", parent=before[0].backup_id
        )
        two = back_up(hosts[1], UPDATED, volume="vm2")
        back_up(hosts[0], lasting, volume="lasting")
    return before[0], one, two


@pytest.mark.parametrize("collects", [1, 2, 3])
def test_what_two_hosts_stored_is_read_by_all_when_one_base_is_gone(on_host, collects):
    before, one, two = stored_twice(on_host)
    with on_host(collects) as service:
        service.delete(before)
        assert service.gc().packs_deleted

    for number in (1, 2, 4):
        with on_host(number) as service:
            assert restored(service, two) == UPDATED, f"host {number}"
            assert restored(service, one)[: len(UPDATED)] == UPDATED, f"host {number}"
            assert is_clean(service)
    with on_host(2) as service:
        service.delete(one)
        service.gc()
    for number in (1, 2, 5):
        with on_host(number) as service:
            assert restored(service, two) == UPDATED, f"host {number}"
            assert is_clean(service)


def test_an_index_made_anew_lists_the_copy_that_can_be_read(on_host):
    before, one, two = stored_twice(on_host)
    with on_host(1) as service:
        service.delete(before)
        service.delete(one)
        service.gc()
        repository = service.repository
        wanted = ids_of(service, two)[PLACES[0]]
        for order in itertools.permutations(list_packs(repository.storage)):
            repository.index.clear()
            for pack_id in order:
                size = list_packs(repository.storage)[pack_id]
                entries = gc.read_footer(repository.storage, repository.ids, pack_id, size)
                repository.index.add_pack(pack_id, entries)
            repository.refresh_index()
            place = repository.index.find(wanted)
            assert place.base is None or repository.index.find(place.base) is not None
        service.gc()
        assert restored(service, two) == UPDATED
        assert is_clean(service)


def test_a_damaged_base_costs_nothing_where_another_copy_needs_another_one(location, on_host):
    _, one, two = stored_twice(on_host)
    with on_host(3) as service:
        index = service.repository.index
        flip(location, index.find(index.find(ids_of(service, two)[PLACES[0]]).base))
        service.repository.reader._chunks = ByteCache(64)

        assert restored(service, two) == UPDATED
        assert restored(service, one)[: len(UPDATED)] == UPDATED


def test_a_copy_that_came_while_gc_took_the_whole_chunk_is_found(location, service, monkeypatch):
    """Its writer avoids the condemned pack; this index has the chunk whole until the pack is gone."""
    encode = ChunkStore._encode

    def encode_of_another_host(store, new, ids, level, _known, find_earlier):
        return encode(store, new, ids, level, frozenset(), find_earlier)

    monkeypatch.setattr(ChunkStore, "_encode", encode_of_another_host)
    image = edited(IMAGE, *range(40), seed=500)
    whole = back_up(service, image, volume="whole")
    back_up(service, IMAGE, volume="vm")
    service.delete(whole)
    marked, mark = [], gc._Run._mark
    new: list[Record] = []

    def mark_then_back_up(run: gc._Run, acknowledged: set[Root]) -> gc.Reached:
        reached = mark(run, acknowledged)
        marked.append(reached)
        if len(marked) == 2:
            with Service.open(location) as other:
                new.append(back_up(other, image, volume="vm"))
            service.repository.refresh_index()
        return reached

    monkeypatch.setattr(gc._Run, "_mark", mark_then_back_up)
    assert service.gc().packs_deleted
    service.repository.refresh_index()

    places = service.repository.index.find_many(ids_of(service, new[0]))
    assert all(place is not None and place.base is not None for place in places)
    assert restored(service, new[0]) == image
    assert is_clean(service)


def test_what_a_pack_holds_already_is_stored_again_whole(service):
    """gc leaves dead differences in packs that are mostly alive, and takes their bases elsewhere."""
    lasting = noise(8 * CHUNK_SIZE, seed=5)
    first = back_up(service, IMAGE)
    mixed = service.backup(BytesSource(UPDATED + lasting), volume="vm", parent=first.backup_id)
    back_up(service, lasting, volume="lasting")
    service.delete(first)
    service.delete(mixed)
    service.gc()
    back_up(service, edited(IMAGE, seed=70), volume="again")

    again = back_up(service, UPDATED, volume="again")

    places = service.repository.index.find_many([ids_of(service, again)[at] for at in PLACES])
    assert [place.base for place in places] == [None, None]
    assert restored(service, again) == UPDATED


# -- a base that the disk cannot read ----------------------------------------------------------


@pytest.fixture
def unreadable_base(
    location: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> tuple[Record, Record]:
    """Two backups; the second is a difference to chunks of the first, one of which gives EIO. With the
    differences lies much that nothing needs."""
    first = back_up(service, IMAGE)
    dead = service.backup(
        BytesSource(UPDATED + noise(60 * CHUNK_SIZE, seed=4)),
        volume="vm",
        parent=first.backup_id,
    )
    second = back_up(service, UPDATED)
    service.delete(dead)
    base = service.repository.index.find(ids_of(service, first)[PLACES[0]])
    number = os.stat(Path(location) / pack_name(base.pack_id)).st_ino
    read = local.read_all

    def read_all(file: int, offset: int, size: int) -> bytes:
        is_hit = offset < base.offset + base.size and base.offset < offset + size
        if is_hit and os.fstat(file).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, offset, size)

    monkeypatch.setattr(local, "read_all", read_all)
    service.repository.reader._chunks = ByteCache(64)
    return first, second


def test_verify_names_what_an_unreadable_base_hits(service, unreadable_base):
    first, second = unreadable_base

    report = service.verify()

    at = PLACES[0] * CHUNK_SIZE
    assert report.complete
    assert {(hit.backup_id, hit.offset) for hit in report.damage} == {
        (first.backup_id, at),
        (second.backup_id, at),
    }
    assert all("Input/output error" in hit.reason for hit in report.damage)


def test_gc_leaves_a_difference_alone_whose_base_it_cannot_read(
    service, unreadable_base, monkeypatch
):
    _, second = unreadable_base

    assert service.gc().packs_repacked == service.gc().packs_repacked == 0
    monkeypatch.undo()
    assert service.gc().packs_repacked
    assert restored(service, second) == UPDATED


def test_repair_goes_on_past_an_unreadable_base(location, service, unreadable_base, monkeypatch):
    _, second = unreadable_base
    other = back_up(service, noise(3 * CHUNK_SIZE, seed=77), volume="other")
    index = service.repository.index
    without_footer = {
        index.find(ids_of(service, record)[at]).pack_id
        for record, at in ((second, PLACES[0]), (other, 0))
    }
    for pack_id in without_footer:
        path = Path(location) / pack_name(pack_id)
        os.truncate(path, path.stat().st_size - 30)

    aside = {pack.object_name: pack.set_aside for pack in service.repair().packs}

    assert len(aside) == 2
    assert list(aside.values()).count(None) == 1, "what may be readable tomorrow stays"
    monkeypatch.undo()
    service.repair()
    assert restored(service, second) == UPDATED
    assert is_clean(service)


# -- packs that lost their footers -------------------------------------------------------------


def scanned(parts: Parts, body: bytes) -> tuple[list[BlobId], list[BlobId]]:
    """The blobs found in a pack without a footer, and what was looked for elsewhere."""
    pack_id = PackId(b"s" * 16)
    parts.storage.put_new(pack_name(pack_id), body)
    asked: list[BlobId] = []

    def elsewhere(blob_id: BlobId) -> bytes:
        asked.append(blob_id)
        return parts.reader.base(blob_id)

    scan = PackScan(parts.storage, IdScheme(), pack_id, len(body), find_base=elsewhere)
    return [blob.blob_id for blob in scan.blobs()], asked


def whole(chunk: bytes) -> bytes:
    return BlobEncoder(compression_level=1).encode_many([chunk], [IDS.chunk_id(chunk)], level=0)[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_differences_to_differences_are_found_in_any_order(parts, order):
    versions = [edited(IMAGE, seed=seed)[: 4 * CHUNK_SIZE][-CHUNK_SIZE:] for seed in range(3)]
    blobs = [
        whole(versions[0]),
        as_difference(versions[1], versions[0]),
        as_difference(versions[2], versions[1]),
    ]

    found, asked = scanned(parts, b"".join(blobs[place] for place in order))

    assert sorted(found) == sorted(map(IDS.chunk_id, versions))
    assert asked == []


def test_what_is_not_in_the_pack_is_looked_for_elsewhere_last(parts):
    base, middle, top = (
        edited(IMAGE, seed=seed)[: 4 * CHUNK_SIZE][-CHUNK_SIZE:] for seed in range(3)
    )
    (base_id,) = parts.store.store_chunks([base]).ids
    parts.store.seal(since=0)

    found, asked = scanned(parts, as_difference(top, middle) + as_difference(middle, base))

    assert set(found) == {IDS.chunk_id(middle), IDS.chunk_id(top)}
    assert base_id in asked


# -- decoding processes ------------------------------------------------------------------------


def test_who_has_no_word_of_its_children_ends_well(location):
    """SIGCHLD is ignored where who started us ignores it."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with decoding(location, 2, Ambient()):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)
