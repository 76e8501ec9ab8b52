"""The packer: what is pending, what a seal promises, and who learns of a loss."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, UNAVAILABLE
from support.images import CHUNK_SIZE, noise
from support.parts import Parts

from backupfs.errors import StorageError, StorageFull, StorageUnavailable
from backupfs.format.blob import BlobEncoder, decode
from backupfs.repository import packer as packer_module
from backupfs.repository.packer import UNLISTED_PACKS_MAX, NewBlob, write_all_parts
from backupfs.repository.rebuild import list_packs, read_footer, refresh_index
from backupfs.types import BlobId

ENCODER = BlobEncoder(compression_level=1)


def new_blob(parts: Parts, number: int, *, level: int = 0) -> NewBlob:
    plain = noise(CHUNK_SIZE if level == 0 else 4096, seed=number)
    blob_id = parts.ids.blob_id(plain, level=level)
    (data,) = ENCODER.encode_many([plain], [blob_id], level=level)
    return NewBlob(blob_id=blob_id, level=level, data=data)


def put(parts: Parts, *blobs: NewBlob) -> list[BlobId]:
    """Claim and append, as writers do."""
    claimed = parts.packer.claim([blob.blob_id for blob in blobs])
    parts.packer.append([blob for blob in blobs if blob.blob_id in claimed])
    return [blob.blob_id for blob in blobs]


def reads(parts: Parts, blob: NewBlob) -> bool:
    if blob.level:
        data = parts.reader.node(blob.blob_id, blob.level)
    else:
        (data,) = parts.reader.chunks([blob.blob_id])
    return data == decode(blob.data, expected=blob.blob_id, level=blob.level, ids=parts.ids)


def test_a_sealed_blob_is_in_a_pack_and_in_the_index_and_pending_no_more(parts):
    blob = new_blob(parts, 1)
    since = parts.packer.failures

    put(parts, blob)
    parts.packer.seal(since=since)

    assert not parts.packer.is_pending(blob.blob_id)
    location = parts.index.find(blob.blob_id)
    assert location is not None
    (pack_id,) = list_packs(parts.storage)
    assert location.pack_id == pack_id
    assert reads(parts, blob)
    assert list(parts.spool.iterdir()) == []


def test_a_pending_blob_is_read_wherever_it_is(parts, monkeypatch):
    """In memory, in the open pack, in a pack that is being sealed."""
    first, second = new_blob(parts, 1), new_blob(parts, 2)
    reached, go = threading.Event(), threading.Event()
    real = parts.storage.put_new

    def wait(name, data):
        reached.set()
        assert go.wait(10)
        real(name, data)

    monkeypatch.setattr(parts.storage, "put_new", wait)
    put(parts, first)
    assert reads(parts, first)

    sealing = threading.Thread(target=lambda: parts.packer.seal(since=0))
    sealing.start()
    assert reached.wait(10)
    put(parts, second)
    assert reads(parts, first)
    assert reads(parts, second)

    go.set()
    sealing.join()


def test_a_claimed_blob_belongs_to_one_writer(parts):
    blob = new_blob(parts, 1)

    assert parts.packer.claim([blob.blob_id]) == {blob.blob_id}
    assert parts.packer.claim([blob.blob_id]) == set()
    assert parts.packer.is_pending(blob.blob_id)
    assert parts.packer.read_pending(blob.blob_id) is None, "there is nothing to read yet"
    parts.packer.append([blob])


def test_an_abandoned_claim_is_a_failure_for_all_who_relied_on_it(parts):
    blob = new_blob(parts, 1)
    since = parts.packer.failures
    parts.packer.claim([blob.blob_id])

    parts.packer.abandon({blob.blob_id}, StorageFull(reason="test"))

    with pytest.raises(StorageFull):
        parts.packer.check(since=since)
    assert parts.packer.claim([blob.blob_id]) == {blob.blob_id}
    parts.packer.append([blob])
    parts.packer.seal(since=parts.packer.failures)


def test_a_seal_waits_for_what_others_have_claimed(parts):
    """A draft relies on a chunk that another draft is just compressing: its backup must not be
    published before that chunk is durable."""
    blob = new_blob(parts, 1)
    since = parts.packer.failures
    parts.packer.claim([blob.blob_id])
    sealed = threading.Event()

    def rely_on_it() -> None:
        assert parts.packer.claim([blob.blob_id]) == set()
        parts.packer.seal(since=since)
        sealed.set()

    relying = threading.Thread(target=rely_on_it)
    relying.start()
    assert not sealed.wait(0.2)

    parts.packer.append([blob])
    relying.join(10)

    assert sealed.is_set()
    assert parts.index.find(blob.blob_id) is not None


def test_a_seal_learns_that_what_others_had_claimed_is_lost(parts):
    blob = new_blob(parts, 1)
    since = parts.packer.failures
    parts.packer.claim([blob.blob_id])
    outcome: list[Exception] = []

    def rely_on_it() -> None:
        try:
            parts.packer.seal(since=since)
        except StorageError as error:
            outcome.append(error)

    relying = threading.Thread(target=rely_on_it)
    relying.start()
    parts.packer.abandon({blob.blob_id}, StorageFull(reason="test"))
    relying.join(10)

    assert [type(error) for error in outcome] == [StorageFull]


def test_full_packs_are_sealed_without_being_asked(parts):
    blobs = [new_blob(parts, number) for number in range(70)]  # a little more than 1 MiB

    put(parts, *blobs[:65])
    put(parts, *blobs[65:])
    parts.packer.seal(since=0)

    assert len(list_packs(parts.storage)) == 2
    assert all(reads(parts, blob) for blob in blobs)


def test_nodes_and_chunks_lie_in_packs_of_their_own(parts):
    put(parts, new_blob(parts, 1), new_blob(parts, 2))
    put(parts, new_blob(parts, 3, level=1), new_blob(parts, 4, level=2))
    parts.packer.seal(since=0)

    levels = {
        tuple(entry.level for entry in read_footer(parts.storage, parts.ids, pack_id, size))
        for pack_id, size in list_packs(parts.storage).items()
    }
    assert levels == {(0, 0), (1, 2)}


def test_closing_makes_durable_what_was_appended(parts, scratch):
    blob = new_blob(parts, 1)
    put(parts, blob)

    parts.packer.close()

    assert parts.index.find(blob.blob_id) is not None
    parts.packer._threads = []  # the fixture closes it once more
    parts.packer._jobs.maxsize = 0


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [FULL, UNAVAILABLE], ids=["full", "unavailable"])
def test_a_pack_that_cannot_be_stored_is_dropped_with_all_it_held(parts, how):
    lost, later = new_blob(parts, 1), new_blob(parts, 2)
    since = parts.packer.failures
    parts.storage.fail_at(1, how)

    put(parts, lost)
    with pytest.raises(how[0]):
        parts.packer.seal(since=since)

    assert not parts.packer.is_pending(lost.blob_id)
    assert parts.index.find(lost.blob_id) is None
    assert list(parts.spool.iterdir()) == []
    assert parts.packer.failures != since
    put(parts, lost, later)
    parts.packer.seal(since=parts.packer.failures)
    assert reads(parts, lost) and reads(parts, later)


def test_a_pack_whose_acknowledgement_was_lost_is_there_for_the_next_refresh(parts):
    blob = new_blob(parts, 1)
    parts.storage.fail_at(1, LOST_ACKNOWLEDGEMENT)
    put(parts, blob)
    with pytest.raises(StorageUnavailable):
        parts.packer.seal(since=0)

    parts.storage.repair()
    assert refresh_index(parts.storage, parts.ids, parts.index) == []

    assert reads(parts, blob)


def test_a_spool_without_room_fails_what_relied_on_it_and_only_that(parts, monkeypatch):
    earlier = new_blob(parts, 1)
    put(parts, earlier)
    parts.packer.seal(since=0)
    started = new_blob(parts, 2)
    put(parts, started)
    assert reads(parts, started)

    def full(_file, _parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(packer_module, "write_all_parts", full)
        put(parts, new_blob(parts, 3))
        with pytest.raises(StorageFull):
            parts.packer.seal(since=0)

    assert not parts.packer.is_pending(started.blob_id), "it lay in the same pack"
    assert reads(parts, earlier)
    put(parts, started)
    parts.packer.seal(since=parts.packer.failures)
    assert reads(parts, started)


def test_what_waits_behind_a_failed_pack_is_lost_with_it_and_seals_are_answered(parts, monkeypatch):
    """What is left of a full disk is not for writers that have failed already."""
    reached, go = threading.Event(), threading.Event()

    def full(_file, _parts):
        reached.set()
        assert go.wait(10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    waiting = [new_blob(parts, number) for number in range(2, 7)]
    outcomes = []

    def seal() -> None:
        try:
            parts.packer.seal(since=0)
        except StorageFull:
            outcomes.append("full")

    with monkeypatch.context() as context:
        context.setattr(packer_module, "write_all_parts", full)
        put(parts, new_blob(parts, 1))
        assert reached.wait(10)
        put(parts, *waiting[:3])
        sealing = threading.Thread(target=seal)
        sealing.start()
        while parts.packer._jobs.qsize() < 2:
            time.sleep(0.001)
        put(parts, *waiting[3:])
    go.set()
    sealing.join(10)

    assert outcomes == ["full"]
    assert parts.packer.failures == 1
    assert not any(parts.packer.is_pending(blob.blob_id) for blob in waiting)
    put(parts, *waiting)
    parts.packer.seal(since=1)
    assert all(reads(parts, blob) for blob in waiting)


@pytest.mark.parametrize("place", ["spool", "storage"])
def test_a_disk_that_fails_the_cleaning_up_too_fails_the_writers_and_hangs_nobody(
    parts, monkeypatch, place
):
    def broken(*_arguments, **_named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as context:
        if place == "spool":
            context.setattr(packer_module, "write_all_parts", broken)
        else:
            context.setattr(parts.storage, "put_new", broken)
        context.setattr(Path, "unlink", broken)
        for number in (1, 2):
            since = parts.packer.failures
            put(parts, new_blob(parts, number))
            with pytest.raises(StorageUnavailable):
                parts.packer.seal(since=since)

    blob = new_blob(parts, 3)
    put(parts, blob)
    parts.packer.seal(since=parts.packer.failures)
    assert reads(parts, blob)


def test_a_seal_that_is_answered_while_others_close_is_no_error(parts, monkeypatch):
    reached, go = threading.Event(), threading.Event()
    real = parts.storage.put_new

    def slow(name, data):
        reached.set()
        assert go.wait(10)
        real(name, data)

    monkeypatch.setattr(packer_module, "ALIVE_SECONDS", 0.01)
    monkeypatch.setattr(parts.storage, "put_new", slow)
    blob = new_blob(parts, 1)
    put(parts, blob)
    outcomes: list[object] = []

    def seal() -> None:
        try:
            parts.packer.seal(since=0)
            outcomes.append("sealed")
        except StorageUnavailable as error:
            outcomes.append(error)

    sealing = threading.Thread(target=seal)
    sealing.start()
    assert reached.wait(10)
    closing = threading.Thread(target=parts.packer.close)
    closing.start()
    parts.packer._threads[0].join(10)  # the packer's own has ended, the sealer is at work
    time.sleep(0.1)
    go.set()
    for thread in (sealing, closing):
        thread.join(10)

    assert outcomes == ["sealed"]


def test_a_seal_that_a_close_overtakes_is_told(parts):
    parts.packer.close()
    parts.packer._is_closed = False  # as it was when the seal had looked

    with pytest.raises(StorageUnavailable, match="closed"):
        parts.packer.seal(since=0)

    parts.packer._is_closed = True


def test_a_bug_while_packing_fails_the_writers_instead_of_hanging_them(parts, monkeypatch):
    def broken(_file, _parts):
        raise RuntimeError("a bug")

    monkeypatch.setattr(packer_module, "write_all_parts", broken)
    put(parts, new_blob(parts, 1))

    with pytest.raises(StorageUnavailable, match="a bug"):
        parts.packer.seal(since=0)


def test_an_index_that_takes_nothing_leaves_what_is_durable_readable(parts, monkeypatch):
    blob = new_blob(parts, 1)

    def full(_pack_id, _entries):
        raise StorageUnavailable(reason="the cache's disk is full")

    with monkeypatch.context() as context:
        context.setattr(parts.index, "add_pack", full)
        put(parts, blob)
        parts.packer.seal(since=0)

    assert reads(parts, blob)
    refresh_index(parts.storage, parts.ids, parts.index)
    assert parts.index.find(blob.blob_id) is not None


def test_packs_that_no_index_takes_are_not_kept_open_for_ever(parts, monkeypatch):
    def full(_pack_id, _entries):
        raise StorageUnavailable(reason="the cache's disk is full")

    before = len(os.listdir("/proc/self/fd"))
    blobs = [new_blob(parts, number) for number in range(3 * UNLISTED_PACKS_MAX)]
    with monkeypatch.context() as context:
        context.setattr(parts.index, "add_pack", full)
        for blob in blobs:
            put(parts, blob)
            parts.packer.seal(since=0)
    kept = [blob for blob in blobs if parts.packer.is_pending(blob.blob_id)]
    assert kept == blobs[-UNLISTED_PACKS_MAX:]
    assert len(os.listdir("/proc/self/fd")) <= before + UNLISTED_PACKS_MAX + 2

    put(parts, new_blob(parts, len(blobs)))
    parts.packer.seal(since=0)

    assert not any(parts.packer.is_pending(blob.blob_id) for blob in blobs)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all(reads(parts, blob) for blob in blobs)


def test_nobody_relies_on_a_durable_pack_that_only_the_packer_knows(parts, monkeypatch):
    """gc may have condemned, and deleted, the pack meanwhile: only the index learns of that."""
    blob = new_blob(parts, 1)

    def full(_pack_id, _entries):
        raise StorageUnavailable(reason="the cache's disk is full")

    with monkeypatch.context() as context:
        context.setattr(parts.index, "add_pack", full)
        put(parts, blob)
        parts.packer.seal(since=0)

    assert parts.packer.claim([blob.blob_id]) == {blob.blob_id}
    assert parts.packer.read_pending(blob.blob_id) is not None, "until then it is read as before"
    parts.packer.append([blob])
    parts.packer.seal(since=0)
    location = parts.index.find(blob.blob_id)
    assert location is not None
    assert not parts.packer.is_pending(blob.blob_id)


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda file, parts: real(file, [b"".join(parts)[:7]]))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)

    write_all_parts(file, [b"0123", b"4567", b"89"])

    os.close(file)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


# -- many at a time ----------------------------------------------------------------------------


def test_many_writers_of_the_same_blobs_store_each_once(parts: Parts, scratch: Path) -> None:
    blobs = [new_blob(parts, number) for number in range(50)]
    errors: list[Exception] = []

    def write(order: int) -> None:
        try:
            for blob in blobs[::order]:
                put(parts, blob)
            parts.packer.seal(since=0)
            if any(parts.index.find(blob.blob_id) is None for blob in blobs):
                errors.append(AssertionError("sealed, but not in the index"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(order,)) for order in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert all(reads(parts, blob) for blob in blobs)
    assert len(list_packs(parts.storage)) <= 4
