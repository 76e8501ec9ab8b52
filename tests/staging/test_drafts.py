"""A draft, at every moment, is the image that was written; durable as of its last checkpoint."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.faulty import FULL, UNAVAILABLE, FaultyStorage
from support.images import CHUNK_SIZE, noise
from support.parts import PACK_SIZE, Parts, make_parts

from backupfs.errors import CorruptBlob, ImageTooLarge, StorageError, StorageFull
from backupfs.format import tree
from backupfs.format.pack import pack_name
from backupfs.format.tree import FANOUT
from backupfs.repository.images import leaf_ids, walk
from backupfs.repository.rebuild import list_packs
from backupfs.staging.draft import NO_CONTENT, Content, Draft
from backupfs.types import HOLE, IMAGE_SIZE_MAX


def new_draft(parts: Parts, content: Content = NO_CONTENT) -> Draft:
    return Draft(
        reader=parts.reader,
        store=parts.store,
        workers=parts.workers,
        credit=parts.credit,
        share=parts.share,
        content=content,
    )


def image_of(parts: Parts, content: Content) -> bytes:
    """The image that a durable content names, read past the draft."""
    count = tree.chunk_count(content.size, chunk_size=CHUNK_SIZE)
    chunks = parts.reader.chunks(leaf_ids(parts.reader, content.root, 0, count))
    return b"".join(chunks)[: content.size]


class SparseBytes:
    """What a bytearray would be, of any size: chunks by index, absent ones are zeros."""

    def __init__(self) -> None:
        self.size = 0
        self.chunks: dict[int, bytearray] = {}

    def copy(self) -> SparseBytes:
        other = SparseBytes()
        other.size = self.size
        other.chunks = {index: bytearray(chunk) for index, chunk in self.chunks.items()}
        return other

    def write(self, offset: int, data: bytes) -> None:
        self.size = max(self.size, offset + len(data))
        while data:
            index, start = divmod(offset, CHUNK_SIZE)
            piece, data = data[: CHUNK_SIZE - start], data[CHUNK_SIZE - start :]
            chunk = self.chunks.setdefault(index, bytearray(CHUNK_SIZE))
            chunk[start : start + len(piece)] = piece
            offset += len(piece)

    def truncate(self, size: int) -> None:
        if size < self.size:
            last = size // CHUNK_SIZE
            self.chunks = {index: chunk for index, chunk in self.chunks.items() if index <= last}
            if last in self.chunks:
                within = size % CHUNK_SIZE
                self.chunks[last][within:] = bytes(CHUNK_SIZE - within)
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        data = bytearray()
        while offset < end:
            index, start = divmod(offset, CHUNK_SIZE)
            chunk = self.chunks.get(index, bytes(CHUNK_SIZE))
            piece = chunk[start : start + end - offset]
            data += piece
            offset += len(piece)
        return bytes(data)

    def data_count(self) -> int:
        return sum(any(chunk) for chunk in self.chunks.values())


# Around the edges of nodes of every level up to the third: heights 1 to 4.
BASES = [0, 3, FANOUT - 1, FANOUT, 5 * FANOUT, FANOUT**2 - 1, FANOUT**2 + 3, FANOUT**3 + 1]
OFFSETS = st.builds(
    lambda base, within: base * CHUNK_SIZE + within,
    st.sampled_from(BASES),
    st.sampled_from([0, 1, 4096, CHUNK_SIZE - 1, CHUNK_SIZE, 2 * CHUNK_SIZE, 3 * CHUNK_SIZE + 512])
    | st.integers(0, 3 * CHUNK_SIZE),
)
SIZES = st.sampled_from([1, 512, 4096, CHUNK_SIZE, 2 * CHUNK_SIZE, 70 * CHUNK_SIZE]) | st.integers(
    1, 4 * CHUNK_SIZE
)


class DraftAgainstBytes(RuleBasedStateMachine):
    """Random writes, cuts, failures and reopenings; read at any moment it is what it should be."""

    parts: Parts

    @initialize()
    def start(self) -> None:
        self.draft = new_draft(self.parts)
        self.model = SparseBytes()
        self.saved: list[tuple[Content, SparseBytes]] = [(NO_CONTENT, SparseBytes())]
        self.last_saved = SparseBytes()
        self.random = random.Random(0)

    @rule(offset=OFFSETS, size=SIZES, zeros=st.booleans())
    def write(self, offset: int, size: int, zeros: bool) -> None:
        data = bytes(size) if zeros else self.random.randbytes(size)
        self.draft.write(offset, data)
        self.model.write(offset, data)

    @rule(offset=OFFSETS, count=st.integers(2, 12), step=st.sampled_from([512, 4096, 5000]))
    def write_in_pieces(self, offset: int, count: int, step: int) -> None:
        for number in range(count):
            data = self.random.randbytes(step)
            self.draft.write(offset + number * step, data)
            self.model.write(offset + number * step, data)

    @rule(size=OFFSETS)
    def truncate(self, size: int) -> None:
        self.draft.truncate(size)
        self.model.truncate(size)

    @rule(less=st.integers(1, CHUNK_SIZE * 2))
    def cut_a_little(self, less: int) -> None:
        self.truncate(max(0, self.model.size - less))

    @rule()
    def clear(self) -> None:
        self.draft.clear()
        self.model = SparseBytes()

    @rule()
    def checkpoint(self) -> None:
        content = self.draft.checkpoint()

        assert not self.draft.is_dirty
        assert content == self.draft.saved
        assert content.size == self.model.size
        assert content.data_count == self.model.data_count()
        assert content.root.height == tree.height(content.size, chunk_size=CHUNK_SIZE)
        self.check_durable(content, self.model)
        self.saved.append((content, self.model.copy()))
        self.last_saved = self.model.copy()

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        content, model = data.draw(st.sampled_from(self.saved[-4:]))
        self.draft = new_draft(self.parts, content)
        self.model, self.last_saved = model.copy(), model.copy()

    @rule(how=st.sampled_from([FULL, UNAVAILABLE]), seed=st.integers(0, 1 << 40))
    def fail(self, how: tuple[type[StorageError], bool], seed: int) -> None:
        """A write is lost: the draft is as it was at its last checkpoint, and says so."""
        storage = self.parts.storage
        assert isinstance(storage, FaultyStorage)
        self.draft.write(self.model.size, noise(CHUNK_SIZE, seed=seed))
        storage.fail_at(1, how, stay_broken=True)
        with pytest.raises(StorageError):
            self.draft.checkpoint()
        storage.repair()

        for attempt in (lambda: self.draft.write(0, b"x"), self.draft.checkpoint):
            with pytest.raises(StorageError):
                attempt()
        self.draft.forgive()
        self.model = self.last_saved.copy()

    @rule(offset=OFFSETS, size=SIZES)
    def read(self, offset: int, size: int) -> None:
        assert self.draft.read(offset, size) == self.model.read(offset, size)

    @invariant()
    def reads_as_written(self) -> None:
        if not hasattr(self, "draft"):
            return
        assert self.draft.size == self.model.size
        for base in BASES:
            offset = max(0, base * CHUNK_SIZE - 100)
            expected = self.model.read(offset, 3 * CHUNK_SIZE)
            assert self.draft.read(offset, 3 * CHUNK_SIZE) == expected
        end = max(0, self.model.size - 5000)
        assert self.draft.read(end, 9000) == self.model.read(end, 9000)

    def check_durable(self, content: Content, model: SparseBytes) -> None:
        found = {
            first + place
            for first, ids in walk(self.parts.reader, content.root, enter=lambda _id, _level: True)
            for place, blob_id in enumerate(ids)
            if blob_id != HOLE
        }
        assert found == {index for index, chunk in model.chunks.items() if any(chunk)}
        for index in found:
            (blob_id,) = leaf_ids(self.parts.reader, content.root, index, 1)
            assert self.parts.index.find(blob_id) is not None, "not in a durable pack"
            assert self.parts.reader.chunks([blob_id]) == [bytes(model.chunks[index])]


@pytest.mark.timeout(120)
def test_random_changes_agree_with_bytes(scratch: Path) -> None:
    folder = scratch / "parts"
    folder.mkdir()
    parts = make_parts(folder, FaultyStorage(folder))
    DraftAgainstBytes.parts = parts
    try:
        run_state_machine_as_test(
            DraftAgainstBytes,
            settings=settings(max_examples=60, stateful_step_count=25, deadline=None),
        )
    finally:
        parts.close()


# -- one thing at a time -----------------------------------------------------------------------


def test_nothing_is_durable_before_a_checkpoint(parts):
    draft = new_draft(parts)

    draft.write(0, noise(50_000, seed=1))

    assert draft.is_dirty
    assert draft.saved == NO_CONTENT
    content = draft.checkpoint()
    assert image_of(parts, content) == noise(50_000, seed=1)
    assert draft.checkpoint() is content, "nothing new: nothing to do"


def test_a_chunk_written_in_part_keeps_the_rest_of_its_base(parts):
    base = noise(3 * CHUNK_SIZE, seed=1)
    first = new_draft(parts)
    first.write(0, base)
    content = first.checkpoint()

    draft = new_draft(parts, content)
    draft.write(CHUNK_SIZE + 10, b"new")
    changed = draft.checkpoint()

    expected = bytearray(base)
    expected[CHUNK_SIZE + 10 : CHUNK_SIZE + 13] = b"new"
    assert image_of(parts, changed) == bytes(expected)
    assert image_of(parts, content) == base, "the base never changes"


def test_rewriting_the_same_bytes_stores_nothing(parts):
    image = noise(20 * CHUNK_SIZE, seed=1)
    draft = new_draft(parts)
    draft.write(0, image)
    content = draft.checkpoint()
    assert draft.take_added_size() > len(image)
    assert draft.take_added_size() == 0

    again = new_draft(parts, content)
    again.write(0, image)

    assert again.checkpoint() == content
    assert again.take_added_size() == 0


def test_zeros_cost_nothing_wherever_they_are(parts):
    draft = new_draft(parts)
    draft.truncate(1 << 40)
    draft.write(1 << 39, bytes(10 * CHUNK_SIZE))

    content = draft.checkpoint()

    assert (content.data_count, content.root.root) == (0, HOLE)
    assert draft.take_added_size() == 0
    assert list_packs(parts.storage) == {}
    assert draft.read((1 << 40) - 5, 100) == bytes(5)


@pytest.mark.parametrize("size", [IMAGE_SIZE_MAX + 1, 1 << 63])
def test_an_image_beyond_the_limit_is_refused_and_nothing_changed(parts, size):
    draft = new_draft(parts)
    draft.write(0, b"data")

    with pytest.raises(ImageTooLarge):
        draft.truncate(size)
    with pytest.raises(ImageTooLarge):
        draft.write(size - 1, b"x")

    assert draft.size == 4
    assert draft.checkpoint().size == 4
    draft.truncate(IMAGE_SIZE_MAX)
    draft.write(IMAGE_SIZE_MAX - 1, b"x")
    assert draft.checkpoint().size == IMAGE_SIZE_MAX


def test_many_small_writes_all_over_need_little_memory_and_agree(parts):
    """Chunks written in part beyond what may stay open are completed and sent early."""
    draft, expected = new_draft(parts), bytearray(300 * CHUNK_SIZE)
    places = random.Random(3)
    for number in range(1500):
        offset = places.randrange(300 * CHUNK_SIZE - 600)
        data = number.to_bytes(4, "big") * 150
        draft.write(offset, data)
        expected[offset : offset + 600] = data
    draft.truncate(len(expected))

    assert draft.read(0, len(expected)) == bytes(expected)
    assert image_of(parts, draft.checkpoint()) == bytes(expected)


def test_a_base_that_is_damaged_fails_the_write_that_needs_it(parts):
    base = noise(3 * CHUNK_SIZE, seed=1)
    first = new_draft(parts)
    first.write(0, base)
    content = first.checkpoint()
    (pack_id,) = (name for name, size in list_packs(parts.storage).items() if size > CHUNK_SIZE * 2)
    path = parts.storage.folder / pack_name(pack_id)
    data = bytearray(path.read_bytes())
    data[CHUNK_SIZE + 1000] ^= 1
    path.write_bytes(data)

    draft = new_draft(parts, content)
    draft.write(CHUNK_SIZE + 10, b"new")
    with pytest.raises(CorruptBlob):
        draft.checkpoint()

    draft.forgive()
    draft.write(CHUNK_SIZE, base[CHUNK_SIZE : 2 * CHUNK_SIZE])
    parts.avoided.blobs = parts.index.damaged()
    assert image_of(parts, draft.checkpoint()) == base, "a whole chunk needs no base"


def test_of_two_drafts_the_failure_of_one_pack_fails_both(parts):
    """The other may have relied on a chunk in it; that is coarse, and safe."""
    one, other = new_draft(parts), new_draft(parts)
    shared = noise(5 * CHUNK_SIZE, seed=1)
    one.write(0, shared)
    other.write(0, shared)
    parts.storage.fail_at(1, FULL, stay_broken=True)

    for draft in (one, other):
        with pytest.raises(StorageFull):
            draft.checkpoint()
        assert (draft.size, draft.saved) == (0, NO_CONTENT)

    parts.storage.repair()
    for draft in (one, other):
        draft.forgive()
        draft.write(0, shared)
        assert image_of(parts, draft.checkpoint()) == shared


def test_a_failed_pack_fails_the_next_write_and_not_only_the_checkpoint(parts):
    """Who copies a large image to a full disk is told when that is full."""
    draft = new_draft(parts)
    parts.storage.fail_at(1, FULL, stay_broken=True)

    written = 0
    with pytest.raises(StorageFull):
        while written < 100 * PACK_SIZE:
            draft.write(written, noise(16 * CHUNK_SIZE, seed=written))
            written += 16 * CHUNK_SIZE
            parts.credit.wait()

    parts.storage.repair()
    draft.forgive()
    draft.write(0, b"again")
    assert image_of(parts, draft.checkpoint()) == b"again"


def test_a_failure_before_its_first_write_is_none_of_a_drafts_business(parts):
    failing, later = new_draft(parts), new_draft(parts)
    failing.write(0, noise(CHUNK_SIZE, seed=1))
    parts.storage.fail_at(1, FULL)
    with pytest.raises(StorageFull):
        failing.checkpoint()

    later.write(0, noise(CHUNK_SIZE, seed=2))

    assert image_of(parts, later.checkpoint()) == noise(CHUNK_SIZE, seed=2)


def test_clearing_forgets_an_error_and_everything_written(parts):
    draft = new_draft(parts)
    draft.write(0, noise(CHUNK_SIZE, seed=1))
    parts.storage.fail_at(1, FULL)
    with pytest.raises(StorageFull):
        draft.checkpoint()

    draft.clear()
    draft.write(0, b"again")

    assert draft.error is None
    assert image_of(parts, draft.checkpoint()) == b"again"


def test_credit_is_given_back_whatever_happens(parts):
    draft = new_draft(parts)
    draft.write(0, noise(100 * CHUNK_SIZE, seed=1))
    parts.storage.fail_at(1, FULL, stay_broken=True)
    with pytest.raises(StorageFull):
        draft.checkpoint()
    parts.storage.repair()
    draft.forgive()
    draft.write(0, noise(100 * CHUNK_SIZE, seed=2))
    draft.clear()
    draft.checkpoint()

    assert parts.credit._taken == 0
    assert parts.share.part() == 64


# -- many at a time ----------------------------------------------------------------------------


def test_writers_readers_and_checkpoints_at_once(parts):
    """Each writer has a region of its own; readers see every byte as it was or as it is."""
    draft, region = new_draft(parts), 40 * CHUNK_SIZE + 777
    draft.truncate(4 * region)
    problems: list[object] = []
    stop = threading.Event()

    def write(number: int) -> None:
        places = random.Random(number)
        try:
            for _ in range(150):
                offset = places.randrange(region - 3000)
                size = places.choice([1, 500, 3000])
                draft.write(number * region + offset, bytes([number + 1]) * size)
                if draft.read(number * region + offset, size) != bytes([number + 1]) * size:
                    problems.append("did not read its own write")
        except Exception as error:
            problems.append(error)

    def watch() -> None:
        while not stop.is_set():
            for number in range(4):
                seen = set(draft.read(number * region, region))
                if not seen <= {0, number + 1}:
                    problems.append(f"saw {seen}")

    def checkpoint() -> None:
        while not stop.is_set():
            draft.checkpoint()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    others = [threading.Thread(target=watch), threading.Thread(target=checkpoint)]
    for thread in writers + others:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()

    assert problems == []
    assert image_of(parts, draft.checkpoint()) == draft.read(0, 4 * region)


def test_drafts_of_the_same_content_at_once(parts):
    """They rely on each other's chunks, also while these are still being compressed."""
    image = noise(80 * CHUNK_SIZE, seed=1)
    contents: list[Content] = []
    problems: list[object] = []

    def stage() -> None:
        draft = new_draft(parts)
        for start in range(0, len(image), 100_000):
            draft.write(start, image[start : start + 100_000])
        content = draft.checkpoint()
        if any(
            parts.index.find(blob_id) is None
            for blob_id in leaf_ids(parts.reader, content.root, 0, 80)
        ):
            problems.append("a checkpoint returned before all was durable")
        contents.append(content)

    threads = [threading.Thread(target=stage) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    assert len({content.root for content in contents}) == 1
    assert image_of(parts, contents[0]) == image
    assert parts.index.entry_count() == 81
