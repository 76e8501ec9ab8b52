"""Chunks stored as differences: small, whole again in every way, and never without their base."""

from __future__ import annotations

import itertools
import logging
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import flip
from support.differences import as_difference, as_whole_difference
from support.images import CHUNK_SIZE, BytesSource, back_up, is_clean, noise, restored
from support.parts import Parts

from backupfs.errors import CorruptBlob, DamageError, MissingData
from backupfs.format import blob as blob_format
from backupfs.format.config import CONFIG_NAME, DIFFERENCES, PIECES, encode_config
from backupfs.format.ids import IdScheme
from backupfs.format.pack import PackEntry, encode_footer, pack_name
from backupfs.repository.byte_cache import ByteCache
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.index import BlobLocation
from backupfs.repository.packer import NewBlob
from backupfs.repository.rebuild import list_packs
from backupfs.service import Policy, Record, Service
from backupfs.staging.draft import Draft
from backupfs.types import HOLE, BlobId, PackId

BASE = noise(CHUNK_SIZE, seed=1)
OTHER = noise(CHUNK_SIZE, seed=2)
IMAGE = noise(40 * CHUNK_SIZE, seed=3)
IDS = IdScheme()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def changed(chunk: bytes, *, at: int = 5000, size: int = 100, seed: int = 9) -> bytes:
    return chunk[:at] + noise(size, seed=seed) + chunk[at + size :]


def store(parts: Parts, chunk: bytes, *, earlier: BlobId = HOLE) -> tuple[BlobId, int]:
    """A chunk's id, and what the repository grew by; not sealed."""
    stored = parts.store.store_chunks([chunk], find_earlier=lambda _: [earlier])
    return stored.ids[0], stored.added_size


def sealed(parts: Parts, chunk: bytes, *, earlier: BlobId = HOLE) -> BlobId:
    blob_id, _ = store(parts, chunk, earlier=earlier)
    parts.store.seal(since=0)
    return blob_id


def base_of(parts: Parts, blob_id: BlobId) -> BlobId | None:
    location = parts.index.find(blob_id)
    assert location is not None
    return location.base


# -- what is stored as a difference ------------------------------------------------------------


def test_a_small_change_takes_little_and_reads_whole(parts):
    base_id = sealed(parts, BASE)

    blob_id, added = store(parts, changed(BASE), earlier=base_id)
    assert parts.reader.chunks([blob_id]) == [changed(BASE)], "on its way already"
    parts.store.seal(since=0)

    assert added < 400
    assert base_of(parts, blob_id) == base_id
    assert parts.reader.chunks([blob_id, base_id]) == [changed(BASE), BASE]


def test_a_change_to_a_difference_is_one_to_the_same_base(parts):
    base_id = sealed(parts, BASE)
    first_id = sealed(parts, changed(BASE), earlier=base_id)

    second = changed(changed(BASE), at=9000, seed=10)
    second_id = sealed(parts, second, earlier=first_id)

    assert base_of(parts, second_id) == base_id
    assert parts.reader.chunks([second_id]) == [second]


def test_a_chunk_that_is_as_it_was_before_the_last_change_is_its_own_base(parts):
    base_id = sealed(parts, BASE)
    changed_id = sealed(parts, changed(BASE), earlier=base_id)
    parts.avoided.blobs = frozenset([base_id])

    again, added = store(parts, BASE, earlier=changed_id)

    assert (again, added) == (base_id, len(BASE) + 52), "whole: a difference to itself is nothing"


def test_what_is_stored_again_because_it_is_damaged_is_stored_whole(parts):
    """Others may differ from it."""
    base_id = sealed(parts, BASE)
    blob_id = sealed(parts, changed(BASE), earlier=base_id)
    parts.avoided.blobs = frozenset([blob_id])

    again = sealed(parts, changed(BASE), earlier=base_id)

    assert (again, base_of(parts, again)) == (blob_id, None)


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(OTHER, id="nothing in common"),
        pytest.param(BASE[: CHUNK_SIZE // 4] + OTHER[CHUNK_SIZE // 4 :], id="little in common"),
        pytest.param(BASE[: CHUNK_SIZE // 4].ljust(CHUNK_SIZE, b"\0"), id="mostly zeros now"),
    ],
)
def test_what_gains_little_is_stored_whole(parts, chunk):
    base_id = sealed(parts, BASE)

    assert base_of(parts, sealed(parts, chunk, earlier=base_id)) is None


def test_what_takes_little_anyway_is_stored_whole(parts):
    text = (b"all the same " * CHUNK_SIZE)[:CHUNK_SIZE]
    base_id = sealed(parts, text)

    assert base_of(parts, sealed(parts, changed(text, size=10), earlier=base_id)) is None


def test_a_base_that_is_on_its_way_is_none(parts):
    """A crash could keep the difference, and lose the pack with its base."""
    base_id, _ = store(parts, BASE)

    assert base_of(parts, sealed(parts, changed(BASE), earlier=base_id)) is None


def test_a_base_that_gc_has_condemned_is_none(parts):
    base_id = sealed(parts, BASE)
    parts.avoided.packs = frozenset([parts.index.find(base_id).pack_id])

    assert base_of(parts, sealed(parts, changed(BASE), earlier=base_id)) is None


def test_a_damaged_base_is_none(parts):
    base_id = sealed(parts, BASE)
    flip(parts.storage.folder, parts.index.find(base_id), within=90)

    blob_id = sealed(parts, changed(BASE), earlier=base_id)

    assert base_of(parts, blob_id) is None
    assert parts.reader.chunks([blob_id]) == [changed(BASE)]


def test_both_ends_of_a_batch_tell_whether_to_look_between_them(parts, monkeypatch):
    before = [noise(CHUNK_SIZE, seed=seed) for seed in range(20, 30)]
    before_ids = parts.store.store_chunks(before).ids
    parts.store.seal(since=0)
    read: list[BlobId] = []
    chunks = parts.reader.chunks
    monkeypatch.setattr(parts.reader, "chunks", lambda ids: read.extend(ids) or chunks(ids))

    new = [noise(CHUNK_SIZE, seed=seed) for seed in range(30, 40)]
    parts.store.store_chunks(
        new, find_earlier=lambda numbers: [before_ids[number] for number in numbers]
    )

    assert read == [before_ids[0], before_ids[-1]]


@pytest.mark.parametrize("like", [[0, 1, 4], [2, 3, 5], [0], [5], range(6)])
def test_all_that_is_like_is_found_where_one_end_of_a_batch_is_like(parts, like):
    before = [noise(CHUNK_SIZE, seed=seed) for seed in range(20, 26)]
    before_ids = parts.store.store_chunks(before).ids
    parts.store.seal(since=0)

    new = [
        changed(chunk) if place in like else noise(CHUNK_SIZE, seed=30 + place)
        for place, chunk in enumerate(before)
    ]
    ids = parts.store.store_chunks(
        new, find_earlier=lambda numbers: [before_ids[number] for number in numbers]
    ).ids
    parts.store.seal(since=0)

    expected = [before_ids[place] if place in like else None for place in range(6)]
    assert [base_of(parts, blob_id) for blob_id in ids] == expected
    assert parts.reader.chunks(ids) == new


def test_an_image_to_differ_from_that_is_gone_is_looked_for_once(parts, monkeypatch):
    asked: list[BlobId] = []
    node = parts.reader.node
    gone = BlobId(b"g" * 32)
    monkeypatch.setattr(
        parts.reader,
        "node",
        lambda blob_id, level: asked.append(blob_id) or node(blob_id, level),
    )
    draft = Draft(
        reader=parts.reader,
        store=parts.store,
        workers=parts.workers,
        credit=parts.credit,
        share=parts.share,
        alike=Root(gone, 1),
    )

    for number in range(20):
        draft.write(number * CHUNK_SIZE, noise(CHUNK_SIZE, seed=number))
        draft.checkpoint()

    assert asked.count(gone) == 1


def test_the_bases_of_neighbours_are_read_in_one_go(parts):
    befores = [noise(CHUNK_SIZE, seed=seed) for seed in range(10)]
    before_ids = parts.store.store_chunks(befores).ids
    parts.store.seal(since=0)
    stored = parts.store.store_chunks(
        [changed(chunk) for chunk in befores],
        find_earlier=lambda numbers: [before_ids[number] for number in numbers],
    )
    parts.store.seal(since=0)
    for blob_id in (*before_ids, *stored.ids):
        parts.reader._chunks.drop(blob_id)
    parts.storage.fail_at(1 << 30)  # counts from now on

    chunks = parts.reader.chunks(stored.ids)

    assert chunks == [changed(chunk) for chunk in befores]
    assert len(parts.storage.calls) == 2, "the differences, and what they are to"


@pytest.mark.parametrize("features", [(), (DIFFERENCES,), (PIECES,)])
def test_a_repository_without_the_features_stores_none(location, features):
    path = Path(location) / CONFIG_NAME
    with Service.open(location) as service:
        config = service.repository.config
        assert config.mandatory_features == (DIFFERENCES, PIECES)
    path.chmod(0o600)
    path.write_bytes(encode_config(replace(config, mandatory_features=features), IDS))

    with Service.open(location) as service:
        back_up(service, IMAGE)
        second = back_up(service, changed(IMAGE))
        assert differences(service, second) == []
        assert restored(service, second) == changed(IMAGE)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chunk_reads_whole_whatever_it_is_a_difference_to(data):
    randomness = random.Random(data.draw(st.integers(0, 1 << 32)))
    base = bytearray(randomness.randbytes(CHUNK_SIZE))
    plain = bytearray(base)
    for _ in range(data.draw(st.integers(0, 5))):
        start = randomness.randrange(CHUNK_SIZE)
        size = randomness.choice([1, 7, 512, 4096, 9000])
        source = randomness.choice(
            [bytes(size), randomness.randbytes(size), bytes(base[5:])[:size]]
        )
        plain[start : start + size] = source
    plain = plain[:CHUNK_SIZE].ljust(CHUNK_SIZE, b"\0")
    blob_id, base_id = IDS.chunk_id(plain), IDS.chunk_id(base)
    level = data.draw(st.sampled_from([1, 3, 9, 19]))
    if plain == base:
        return

    blob = as_difference(bytes(plain), bytes(base), compression_level=level)

    assert blob_format.base_of(blob) == base_id
    decoded = blob_format.decode(
        blob, expected=blob_id, level=0, ids=IDS, find_base={base_id: bytes(base)}.__getitem__
    )
    assert decoded == plain
    with pytest.raises(blob_format.BadBlobError):
        blob_format.decode(blob, expected=blob_id, level=0, ids=IDS)
    wrong = bytes(base[1:]) + b"x"
    with pytest.raises(blob_format.BadBlobError):
        blob_format.decode(blob, expected=blob_id, level=0, ids=IDS, find_base=lambda _: wrong)


# -- backups -----------------------------------------------------------------------------------


def chunk_ids(service: Service, record: Record) -> list[BlobId]:
    count = -(-record.size // CHUNK_SIZE)
    return leaf_ids(service.repository.reader, Root(record.root, record.height), 0, count)


def differences(service: Service, record: Record) -> list[tuple[BlobId, BlobLocation]]:
    ids = chunk_ids(service, record)
    found = zip(ids, service.repository.index.find_many(ids), strict=True)
    return [(blob_id, place) for blob_id, place in found if place and place.base is not None]


def edited(image: bytes, *places: int, seed: int = 9) -> bytes:
    """An image with a small change in each of some chunks."""
    for place in places:
        image = changed(image, at=place * CHUNK_SIZE + 3000, seed=seed + place)
    return image


def test_an_incremental_stores_what_differs(service):
    back_up(service, IMAGE)
    second = back_up(service, edited(IMAGE, 3, 17, 39))

    assert len(differences(service, second)) == 3
    assert second.stored_bytes < 3 * 400 + 2 * 4200
    assert restored(service, second) == edited(IMAGE, 3, 17, 39)
    assert is_clean(service)


def test_a_full_backup_on_request_differs_from_nothing(service):
    back_up(service, IMAGE)

    second = service.backup(BytesSource(edited(IMAGE, 3)), volume="vm", parent=None)

    assert differences(service, second) == []


def test_differences_are_read_with_an_index_made_from_the_footers(location, service):
    back_up(service, IMAGE)
    second = back_up(service, edited(IMAGE, 3, 17))
    service.repository.renew_index()

    assert len(differences(service, second)) == 2
    assert restored(service, second) == edited(IMAGE, 3, 17)


def test_the_bases_of_a_backup_outlive_the_backup_that_they_were_stored_for(service):
    first = back_up(service, IMAGE)
    second = back_up(service, edited(IMAGE, *range(40)))
    assert len(differences(service, second)) == 40
    service.delete(first)

    service.gc()
    service.repository.renew_index()

    assert restored(service, second) == edited(IMAGE, *range(40))
    assert is_clean(service)
    service.delete(second)
    service.gc()
    assert list_packs(service.repository.storage) == {}


def test_a_repacked_difference_is_still_one(service):
    image = IMAGE + noise(60 * CHUNK_SIZE, seed=4)
    first = back_up(service, image)
    second = back_up(service, edited(IMAGE, 3, 17))
    back_up(service, edited(IMAGE, *range(20), seed=70), volume="other")
    service.delete(first)

    assert service.gc().packs_repacked

    assert len(differences(service, second)) == 2
    assert restored(service, second) == edited(IMAGE, 3, 17)
    assert is_clean(service)


def test_nobody_relies_on_a_dead_difference_whose_base_is_gone(location, service):
    """gc leaves dead blobs in packs that are mostly alive, and takes their bases elsewhere."""
    keeper = noise(8 * CHUNK_SIZE, seed=5)
    first = back_up(service, IMAGE)
    base_packs = set(list_packs(service.repository.storage))
    # In one pack: what lives on, and differences to what does not.
    mixed = service.backup(
        BytesSource(edited(IMAGE, 3, 17) + keeper), volume="vm", parent=first.backup_id
    )
    assert len(differences(service, mixed)) == 2
    kept = back_up(service, keeper, volume="kept")
    dead_ids = [blob_id for blob_id, _ in differences(service, mixed)]
    service.delete(first)
    service.delete(mixed)
    service.gc()
    packs = set(list_packs(service.repository.storage))
    assert not base_packs & packs
    assert all(service.repository.index.find(blob_id) for blob_id in dead_ids), "the case at hand"

    again = back_up(service, edited(IMAGE, 3, 17), volume="again")

    assert restored(service, again) == edited(IMAGE, 3, 17)
    assert restored(service, kept) == keeper
    assert is_clean(service)
    service.repository.renew_index()
    assert restored(service, again) == edited(IMAGE, 3, 17)


def gc_takes(service: Service, record: Record) -> None:
    """A backup is deleted and collected while another one is being made; nothing of it is cached."""
    service.delete(record)
    service.gc()
    service.repository.reader._nodes = ByteCache(2048)
    index = service.repository.index
    assert index.find(record.root) is None, "the case at hand"


def test_a_backup_goes_on_when_gc_takes_the_one_that_it_resembles(service):
    first = back_up(service, IMAGE)
    image = edited(IMAGE, *range(40))

    class Interrupted(BytesSource):
        def extents(self) -> Iterator[tuple[int, bytes]]:
            for offset, data in super().extents():
                if offset == 300_000:
                    gc_takes(service, first)
                yield offset, data

    second = service.backup(Interrupted(image), volume="vm")

    assert restored(service, second) == image
    assert is_clean(service)
    assert service.repository.index.damaged() == frozenset(), "what is gone was not looked for"


def test_a_staged_file_goes_on_when_gc_takes_the_backup_that_it_resembles(service):
    first = back_up(service, IMAGE)
    image = edited(IMAGE, *range(40))
    area = service.open_staging(Policy(), mountpoint=None)
    try:
        handle = area.create("vm.img", mode=0o600, uid=0, gid=0)
        area.begin_writing(handle)
        for offset in range(0, len(image), 100_000):
            if offset == 300_000:
                gc_takes(service, first)
            area.note_write(handle)
            handle.staged.draft.write(offset, image[offset : offset + 100_000])
        area.flush(handle, interrupted=False)
        area.release(handle, interrupted=False)
    finally:
        area.close()

    assert restored(service, service.resolve("vm@latest")) == image
    assert is_clean(service)
    assert service.repository.index.damaged() == frozenset(), "what is gone was not looked for"


def reopened(location: str) -> Service:
    """With nothing in its caches."""
    return Service.open(location)


@pytest.mark.parametrize("of", ["base", "difference"])
def test_damage_is_an_error_for_what_needs_it_alone_and_storing_it_again_heals_it(location, of):
    edits = edited(IMAGE, 3, 17)
    with reopened(location) as service:
        back_up(service, IMAGE)
        second = back_up(service, edits)
        _, place = differences(service, second)[0]
        base_place = service.repository.index.find(place.base)
        flip(location, base_place if of == "base" else place, within=-1)

    with reopened(location) as service:
        image = service.open_image(second)
        for chunk_index in range(40):
            start = chunk_index * CHUNK_SIZE
            if chunk_index == 3:
                with pytest.raises(CorruptBlob):
                    image.read(start, CHUNK_SIZE)
            else:
                assert image.read(start, CHUNK_SIZE) == edits[start : start + CHUNK_SIZE]
        hits = {(hit.volume, hit.offset, hit.backup_id) for hit in service.verify().damage}
        first, _ = service.backups("vm")
        expected = [first, second] if of == "base" else [second]
        assert hits == {("vm", 3 * CHUNK_SIZE, record.backup_id) for record in expected}

    with reopened(location) as service:
        back_up(service, IMAGE, volume="again")
        back_up(service, edits, volume="again")
        assert is_clean(service)
        assert restored(service, second) == edits
    with reopened(location) as service:
        service.gc()
        service.repository.renew_index()
        assert is_clean(service)
        assert restored(service, second) == edits


def test_a_base_that_is_gone_is_told_by_a_quick_look_too(location):
    with reopened(location) as service:
        first = back_up(service, IMAGE)
        lost = set(list_packs(service.repository.storage))
        nodes = {service.repository.index.find(first.root).pack_id}
        second = back_up(service, edited(IMAGE, 3))
        data = service.export_record(second)
        service.delete(second)
        second = service.import_record(data).record
        service.delete(first)
        (pack_id,) = lost - nodes
        (Path(location) / pack_name(pack_id)).unlink()

    with reopened(location) as service:
        hit = {finding.offset for finding in service.verify(quick=True).damage}
        assert 3 * CHUNK_SIZE in hit or 0 in hit
        offsets = [(d.offset, d.size) for d in service.verify(quick=True).damage]
        assert sum(size for _, size in offsets) == len(IMAGE), "all of it was in that pack"
        service.delete(second)
        with pytest.raises(MissingData):
            service.import_record(data)


@pytest.mark.parametrize("has_index", [True, False], ids=["with index", "index lost"])
def test_a_pack_with_differences_and_their_bases_is_saved_without_its_footer(
    location, cache_home, has_index
):
    """gc may have put a difference before its base."""
    edits = edited(IMAGE, *range(40))
    with reopened(location) as service:
        first = back_up(service, IMAGE)
        second = back_up(service, edits)
        packer, reader = service.repository.writer().packer, service.repository.reader
        index = service.repository.index
        found = differences(service, second)
        # As a gc would: the differences first, then what they are to.
        blobs = []
        for blob_id, place in found:
            blobs.append((blob_id, place))
        for _, place in found:
            blobs.append((place.base, index.find(place.base)))
        old = {place.pack_id for _, place in blobs}
        for blob_id, place in blobs:
            entry = PackEntry(
                blob_id=blob_id, offset=place.offset, size=place.size, level=0, base=place.base
            )
            data = reader.raw_at(place.pack_id, entry)
            packer.claim([blob_id])
            packer.append([NewBlob(blob_id=blob_id, level=0, data=data)])
        packer.seal(since=packer.failures)
        for pack_id in old:
            service.repository.storage.delete(pack_name(pack_id))
        service.repository.renew_index()
        assert restored(service, second) == edits
        (together,) = {index.find(blob_id).pack_id for blob_id, _ in blobs}
        path = Path(location) / pack_name(together)
        path.write_bytes(path.read_bytes()[:-70])
    if not has_index:
        shutil.rmtree(cache_home)

    with reopened(location) as service:
        (expected,) = service.repair(dry_run=True).packs
        (repaired,) = service.repair().packs
        assert (repaired.blobs, expected.blobs) == (80, 80)
        assert restored(service, second) == edits
        assert restored(service, first) == IMAGE
        assert is_clean(service)


def test_an_image_whose_bases_are_gone_is_not_complete(location):
    with reopened(location) as service:
        first = back_up(service, IMAGE)
        lost = set(list_packs(service.repository.storage))
        second = back_up(service, edited(IMAGE, *range(40)))
        nodes = {service.repository.index.find(first.root).pack_id}
        service.delete(first)
        service.delete(second)
        assert second.root.hex() in {tree.root for tree in service.repair().trees}
        for pack_id in lost - nodes:
            (Path(location) / pack_name(pack_id)).unlink()

    with reopened(location) as service:
        assert second.root.hex() not in {tree.root for tree in service.repair().trees}


# -- the index ---------------------------------------------------------------------------------

ENTRY = PackEntry(blob_id=BlobId(b"a" * 32), offset=0, size=100, level=0)
AS_DIFFERENCE = replace(ENTRY, base=BlobId(b"b" * 32))


@pytest.mark.parametrize("order", [(ENTRY, AS_DIFFERENCE), (AS_DIFFERENCE, ENTRY)])
def test_the_whole_chunk_counts_whichever_came_first(parts, order):
    for number, entry in enumerate(order):
        parts.index.add_pack(PackId(bytes([number]) * 16), [entry])

    assert parts.index.find(ENTRY.blob_id).base is None

    parts.index.clear()
    parts.index.add_pack(PackId(b"x" * 16), order)
    assert parts.index.find(ENTRY.blob_id).base is None


def test_a_difference_counts_where_the_whole_chunk_is_gone_or_damaged(parts):
    for spoil in (
        lambda: parts.index.forget_packs([PackId(b"w" * 16)]),
        lambda: parts.index.mark_damaged([ENTRY.blob_id]),
    ):
        parts.index.clear()
        parts.index.add_pack(PackId(b"w" * 16), [ENTRY])
        spoil()
        parts.index.add_pack(PackId(b"d" * 16), [AS_DIFFERENCE])

        assert parts.index.find(ENTRY.blob_id).base == AS_DIFFERENCE.base


def test_gaps_are_filled_with_the_whole_chunk_rather(parts):
    one, other, gone = (PackId(letter * 16) for letter in (b"o", b"p", b"g"))
    parts.index.add_pack(one, [AS_DIFFERENCE])
    parts.index.add_pack(other, [ENTRY])
    parts.index.add_pack(gone, [ENTRY])
    parts.index.forget_packs([gone], leaves_gaps=True)

    for pack_id, entry in ((one, AS_DIFFERENCE), (other, ENTRY), (one, AS_DIFFERENCE)):
        parts.index.fill_gaps(pack_id, [entry])

    assert parts.index.find(ENTRY.blob_id) == BlobLocation(pack_id=other, offset=0, size=100)


# -- forged packs ------------------------------------------------------------------------------


def forged_pack(location: str, number: int, blobs: list[tuple[bytes, BlobId | None]]) -> PackId:
    """A pack of these blobs; with the bases that its footer is to name."""
    pack_id = PackId(bytes([number]) * 16)
    body, entries = b"", []
    for data, base in blobs:
        header = blob_format.unpack_header(data)
        entry = PackEntry(
            blob_id=header.blob_id, offset=len(body), size=len(data), level=0, base=base
        )
        entries.append(entry)
        body += data
    path = Path(location) / pack_name(pack_id)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body + encode_footer(pack_id, entries, blobs_size=len(body), ids=IDS))
    return pack_id


@pytest.mark.parametrize("length", [2, 3, 10])
@pytest.mark.parametrize("first_comes", ["a reader", "a writer"])
def test_differences_in_a_circle_are_damage_and_hang_nothing(location, length, first_comes):
    versions = [edited(BASE, 0, seed=seed) for seed in range(length)]
    blobs = [
        (as_difference(plain, base), IDS.chunk_id(base))
        for plain, base in zip(versions, [*versions[1:], versions[0]], strict=True)
        if plain != base
    ]
    with reopened(location) as service:
        record = back_up(service, versions[0])
        place = service.repository.index.find(IDS.chunk_id(versions[0]))
        service.repository.storage.delete(pack_name(place.pack_id))
    forged_pack(location, 1, blobs)

    with reopened(location) as service:
        if first_comes == "a reader":
            with pytest.raises(DamageError):
                service.open_image(record).read(0, CHUNK_SIZE)
            assert {hit.backup_id for hit in service.verify().damage} == {record.backup_id}
            service.gc()
        back_up(service, versions[0], volume="again")
        assert restored(service, record) == versions[0]
        assert is_clean(service)


@pytest.mark.parametrize("make", [as_difference, as_whole_difference])
def test_a_base_that_is_itself_a_difference_is_read(location, make):
    """Written so only where a base was lost, and stored again as a difference."""
    versions = [edited(BASE, 0, seed=seed) for seed in range(3)]
    blobs = [
        (make(plain, base), IDS.chunk_id(base)) for plain, base in itertools.pairwise(versions)
    ]
    with reopened(location) as service:
        record = back_up(service, versions[0])
        last = back_up(service, versions[2], volume="last")
        place = service.repository.index.find(IDS.chunk_id(versions[0]))
        service.repository.storage.delete(pack_name(place.pack_id))
    forged_pack(location, 1, blobs)

    with reopened(location) as service:
        assert restored(service, record) == versions[0]
        assert differences(service, back_up(service, changed(versions[0], at=9000))) == []
        service.delete(last)
        service.gc()
        service.repository.renew_index()
        assert restored(service, record) == versions[0]
        assert is_clean(service)


@pytest.mark.parametrize("named", [None, IDS.chunk_id(OTHER)], ids=["no base", "another base"])
def test_a_footer_that_hides_a_base_is_damage(location, named):
    """gc would take the base: better an error while it is still there."""
    plain = changed(BASE)
    with reopened(location) as service:
        back_up(service, BASE, volume="base")
        back_up(service, OTHER, volume="other")
        record = back_up(service, plain)
        place = service.repository.index.find(IDS.chunk_id(plain))
        service.repository.storage.delete(pack_name(place.pack_id))
    forged_pack(location, 1, [(as_difference(plain, BASE), named)])

    with reopened(location) as service:
        with pytest.raises(CorruptBlob, match="footer"):
            service.open_image(record).read(0, CHUNK_SIZE)
        assert {finding.backup_id for finding in service.verify().damage} == {record.backup_id}


def test_a_difference_passes_for_no_node(location):
    """A forged tree that asks for one as a node must not make it count as damaged."""
    with reopened(location) as service:
        back_up(service, BASE)
        second = back_up(service, changed(BASE))
        ((blob_id, _),) = differences(service, second)
        with pytest.raises(DamageError):
            service.repository.reader.node(blob_id, 1)
        assert service.repository.index.damaged() == frozenset()
        assert restored(service, second) == changed(BASE)
