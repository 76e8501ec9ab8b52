"""Decoding processes: they give what a reader would, or nothing, and end with their daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import flip
from support.images import CHUNK_SIZE, back_up, noise
from support.processes import in_a_child

from backupfs.ambient import Ambient
from backupfs.format.blob import DIFFERENCES_MAX
from backupfs.format.pack import pack_name
from backupfs.repository import decoders as decoders_module
from backupfs.repository.blobs import BlobReader
from backupfs.repository.decoder_process import Job, pack_job, unpack_job
from backupfs.repository.decoders import (
    ANSWER_SIZE_MAX,
    ANSWERS_MAX,
    END_SECONDS_MAX,
    Decoders,
    decoding,
)
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.index import BlobLocation
from backupfs.service import Record, Service
from backupfs.types import HOLE, BlobId, PackId

COUNT = 2
IMAGE = noise(20 * CHUNK_SIZE, seed=1) + bytes(3 * CHUNK_SIZE) + b"text " * (3 * CHUNK_SIZE)
IMAGE += IMAGE[: 2 * CHUNK_SIZE]
IMAGE = IMAGE[: len(IMAGE) // CHUNK_SIZE * CHUNK_SIZE]


class Setup:
    """A repository with one backup, and processes to read it."""

    def __init__(self, service: Service, decoders: Decoders, processes: list[int]) -> None:
        self.service = service
        self.decoders = decoders
        self.processes = processes
        self.record = back_up(service, IMAGE)
        self.ids = ids_of(service, self.record)

    @property
    def reader(self) -> BlobReader:
        return self.service.repository.reader

    def read(self, ids: list[BlobId], size: int | None = None) -> bytes | None:
        size = len(ids) * CHUNK_SIZE if size is None else size
        answer = self.decoders.read(ids, size, self.reader)
        return None if answer is None else bytes(answer)


@pytest.fixture
def setup(location: str) -> Iterator[Setup]:
    before = children()
    with decoding(location, COUNT, Ambient()) as decoders, Service.open(location) as service:
        yield Setup(service, decoders, sorted(children() - before))


def ids_of(service: Service, record: Record) -> list[BlobId]:
    count = record.size // CHUNK_SIZE
    return leaf_ids(service.repository.reader, Root(record.root, record.height), 0, count)


def children() -> set[int]:
    threads = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(word) for thread in threads for word in (thread / "children").read_text().split()}


def kill(process_id: int) -> None:
    descriptor = os.pidfd_open(process_id)
    try:
        os.kill(process_id, signal.SIGKILL)
        assert select.select([descriptor], [], [], 10)[0]
    finally:
        os.close(descriptor)


# -- what they give ----------------------------------------------------------------------------


def test_they_give_chunks_in_order_with_holes_and_what_comes_twice(setup):
    assert HOLE in setup.ids and len(set(setup.ids)) < len(setup.ids) - 2

    backwards = b"".join(
        IMAGE[start : start + CHUNK_SIZE]
        for start in range(len(IMAGE) - CHUNK_SIZE, -1, -CHUNK_SIZE)
    )
    for _ in range(COUNT * ANSWERS_MAX):  # where there are holes now, there was something before
        assert setup.read(setup.ids) == IMAGE
        assert setup.read(setup.ids[::-1]) == backwards
        assert setup.read(setup.ids) == IMAGE


def test_they_give_no_more_than_was_asked_for(setup):
    assert setup.read(setup.ids[:3], 2 * CHUNK_SIZE + 5) == IMAGE[: 2 * CHUNK_SIZE + 5]


def test_they_give_what_is_stored_as_a_difference(setup):
    changed = bytearray(IMAGE)
    for number in range(0, 20, 3):
        changed[number * CHUNK_SIZE + 700] ^= 1
    record = back_up(setup.service, bytes(changed))
    ids = ids_of(setup.service, record)
    places = setup.service.repository.index.find_many(ids)
    assert sum(place is not None and place.base is not None for place in places) == 7

    assert setup.read(ids) == changed


def test_they_are_what_reads(setup, monkeypatch):
    monkeypatch.setattr(setup.reader, "chunks", None)

    assert setup.read(setup.ids) == IMAGE


def test_what_is_given_stays_while_others_read_and_is_given_up_with_its_view(setup):
    """What a view shows must not change before it is let go: it would be wrong bytes."""
    single = setup.ids[:20]
    held = []
    for blob_id in single[: COUNT * ANSWERS_MAX]:
        held.append(setup.decoders.read([blob_id], CHUNK_SIZE, setup.reader))
    expected = [IMAGE[n * CHUNK_SIZE : (n + 1) * CHUNK_SIZE] for n in range(COUNT * ANSWERS_MAX)]

    assert held == expected
    assert setup.read(single[:1]) is None, "all places are taken"
    assert held == expected

    del held[3]
    wanted = IMAGE[9 * CHUNK_SIZE : 10 * CHUNK_SIZE]
    assert wanted in [setup.read(single[9:10]) for _ in range(COUNT)], "one has a place again"
    assert held == expected[:3] + expected[4:]
    held.clear()
    for _ in range(3 * COUNT * ANSWERS_MAX):
        assert setup.read(setup.ids) == IMAGE


def test_more_than_they_have_room_for_is_declined(setup):
    count = ANSWER_SIZE_MAX // CHUNK_SIZE
    ids = (setup.ids * 4)[: count + 1]

    assert setup.read(ids) is None
    assert setup.read(ids[:-1]) == (IMAGE * 4)[:ANSWER_SIZE_MAX]


def test_what_is_in_no_pack_is_declined(setup):
    assert setup.read([*setup.ids[:3], BlobId(b"?" * 32)]) is None
    assert setup.read(setup.ids) == IMAGE


@pytest.mark.parametrize("within", [3, 40, 60, -1])
def test_damage_is_declined_and_all_else_is_read(setup, within):
    index = setup.service.repository.index
    flip(setup.service.location, index.find(setup.ids[5]), within=within)

    for _ in range(COUNT * (ANSWERS_MAX + 1)):
        assert setup.read(setup.ids) is None
    assert setup.read(setup.ids[:5]) == IMAGE[: 5 * CHUNK_SIZE]
    assert index.damaged() == frozenset(), "the reader is to judge"


def test_a_difference_to_a_damaged_chunk_is_declined(setup):
    changed = bytearray(IMAGE)
    changed[5 * CHUNK_SIZE + 700] ^= 1
    ids = ids_of(setup.service, back_up(setup.service, bytes(changed)))
    assert setup.read(ids[5:6]) == changed[5 * CHUNK_SIZE : 6 * CHUNK_SIZE]

    flip(setup.service.location, setup.service.repository.index.find(setup.ids[5]), within=60)

    assert setup.read(ids[5:6]) is None


def test_a_pack_that_is_gone_is_declined_and_none_is_kept_open(setup):
    place = setup.service.repository.index.find(setup.ids[0])
    assert setup.read(setup.ids[:1]) is not None
    path = Path(setup.service.location) / pack_name(place.pack_id)
    for process_id in setup.processes:
        opened = {os.readlink(link) for link in Path(f"/proc/{process_id}/fd").iterdir()}
        assert not [name for name in opened if "packs" in name]

    path.unlink()

    assert setup.read(setup.ids[:1]) is None


def test_no_more_differences_in_a_row_are_looked_up_than_are_read(setup, monkeypatch):
    """As a forged repository may have them, one for each of a million chunks."""
    asked = []

    def find_many(ids: list[BlobId]) -> list[BlobLocation]:
        asked.extend(ids)
        base = BlobId(bytes([len(asked)]) * 32)
        return [BlobLocation(pack_id=PackId(b"p" * 16), offset=0, size=9, base=base)]

    monkeypatch.setattr(setup.service.repository.index, "find_many", find_many)

    assert setup.read([BlobId(b"x" * 32)]) is None
    assert len(asked) == DIFFERENCES_MAX + 1


blob_ids = st.binary(min_size=32, max_size=32).map(BlobId)
locations = st.builds(
    BlobLocation,
    pack_id=st.binary(min_size=16, max_size=16).map(PackId),
    offset=st.integers(0, (1 << 32) - 1),
    size=st.integers(0, (1 << 32) - 1),
    base=st.none() | blob_ids.filter(lambda blob_id: blob_id != HOLE),
)


@given(
    st.builds(
        Job,
        start=st.integers(0, 1 << 31),
        chunk_size=st.integers(0, 1 << 31),
        blob_ids=st.lists(blob_ids),
        places=st.dictionaries(blob_ids, locations),
    )
)
def test_a_job_is_read_as_it_was_written(job):
    assert unpack_job(pack_job(job)) == job


# -- their lives -------------------------------------------------------------------------------


def test_there_are_as_many_as_wanted_and_they_end_with_the_block(location):
    before = children()
    with decoding(location, 3, Ambient()):
        made = children() - before
        assert len(made) == 3

    assert children() == before


def test_one_that_does_not_answer_is_left_behind(location):
    before = children()
    with decoding(location, COUNT, Ambient()):
        stuck, *_others = sorted(children() - before)
        os.kill(stuck, signal.SIGSTOP)
        began = time.monotonic()
    seconds = time.monotonic() - began
    try:
        assert children() - before == {stuck}
        assert seconds < 10 * END_SECONDS_MAX
    finally:
        kill(stuck)
        os.waitpid(stuck, 0)


def test_they_have_nothing_open_but_their_socket(setup):
    setup.read(setup.ids)

    for process_id in setup.processes:
        opened = sorted(os.readlink(link) for link in Path(f"/proc/{process_id}/fd").iterdir())
        assert opened[:3] == ["/dev/null"] * 3
        assert len(opened) == 4 and opened[3].startswith("socket:")
        assert Path(f"/proc/{process_id}/comm").read_text() == "backupfs-decode\n"


def test_one_that_is_gone_is_not_asked_again(setup):
    kill(setup.processes[0])

    answers = [setup.read(setup.ids) for _ in range(2 * COUNT)]

    assert answers.count(None) == 1
    assert set(answers) == {None, IMAGE}


def test_one_whose_answer_was_not_waited_for_is_not_asked_again(setup, monkeypatch):
    """It would answer what it was asked for then, and its memory pass for something else."""
    has_done = decoders_module._Decoder._has_done

    def sent_only(decoder: decoders_module._Decoder, job: bytes) -> bool:
        monkeypatch.setattr(decoders_module._Decoder, "_has_done", has_done)
        decoder._jobs.send(job)
        raise MemoryError

    monkeypatch.setattr(decoders_module._Decoder, "_has_done", sent_only)
    with pytest.raises(MemoryError):
        setup.read(setup.ids)

    for number in range(4 * COUNT):
        wanted = IMAGE[number * CHUNK_SIZE : (number + 1) * CHUNK_SIZE]
        assert setup.read(setup.ids[number : number + 1]) == wanted


def test_without_any_everything_is_declined(setup):
    for process_id in setup.processes:
        kill(process_id)

    assert [setup.read(setup.ids) for _ in range(2 * COUNT)] == [None] * 2 * COUNT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_for_a_whole_group_leave_them_to_their_daemon(setup, number):
    assert setup.read(setup.ids) == IMAGE  # so they have come to ignoring
    setup.read(setup.ids)
    for process_id in setup.processes:
        os.kill(process_id, number)

    assert [setup.read(setup.ids) for _ in range(COUNT)] == [IMAGE] * COUNT


def test_they_end_when_their_daemon_is_killed(location, tmp_path):
    told = tmp_path / "processes"

    def act() -> None:
        with decoding(location, COUNT, Ambient()):
            told.write_text(" ".join(map(str, children())))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(act) == -signal.SIGKILL
    processes = list(map(int, told.read_text().split()))
    assert len(processes) == COUNT
    deadline = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, processes))


def is_alive(process_id: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_where_no_process_can_be_made_the_reader_reads(location, monkeypatch):
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", fork)
    with decoding(location, COUNT, Ambient()) as decoders, Service.open(location) as service:
        ids = ids_of(service, back_up(service, IMAGE))
        assert decoders.read(ids, len(IMAGE), service.repository.reader) is None
    assert len(os.listdir("/proc/self/fd")) == descriptors
