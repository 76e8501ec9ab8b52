"""The index: finds what it was told of, forgets what is gone, and is not believed when in doubt."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.errors import StorageUnavailable
from backupfs.format.pack import PackEntry
from backupfs.repository import index as index_module
from backupfs.repository import index_file
from backupfs.repository.index import BlobLocation, Index
from backupfs.types import BlobId, PackId

ADD_AND_DIE = """
import os, sys
from pathlib import Path
from backupfs.format.pack import PackEntry
from backupfs.repository.index import Index
index = Index.open(Path(sys.argv[1]))
index.add_pack(b"d" * 16, [PackEntry(blob_id=b"d" * 32, offset=0, size=100, level=0)])
os._exit(9)
"""

HOLD = """
import sys
from pathlib import Path
from backupfs.repository.index import Index
index = Index.open(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(scratch: Path) -> Path:
    return scratch / "index"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    opened = Index.open(folder)
    yield opened
    opened.close()


def blob(number: int) -> BlobId:
    return BlobId(number.to_bytes(2, "big") * 16)


def pack(number: int) -> PackId:
    return PackId(bytes([number]) * 16)


def entries(*numbers: int, offset: int = 0) -> list[PackEntry]:
    return [
        PackEntry(blob_id=blob(number), offset=offset + place * 100, size=100, level=0)
        for place, number in enumerate(numbers)
    ]


def at(pack_number: int, offset: int) -> BlobLocation:
    return BlobLocation(pack_id=pack(pack_number), offset=offset, size=100)


def resident_of_files() -> int:
    """Bytes of files that this process has mapped and in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith(("RssFile:", "RssShmem:"))]
    return sum(map(int, sizes)) * 1024


def test_what_was_added_is_found_in_the_order_asked(index):
    index.add_pack(pack(1), entries(5, 6))

    assert index.find_many([blob(6), blob(7), blob(5)]) == [at(1, 100), None, at(1, 0)]
    assert index.pack_ids() == {pack(1)}


def test_every_blob_asked_for_counts_whether_it_is_there_or_not(index):
    index.add_pack(pack(1), entries(1))

    index.find_many([blob(1), blob(2)])
    index.find_usable([blob(1)])

    assert index.lookup_count == 3


def test_of_two_places_the_later_counts(index):
    index.add_pack(pack(2), entries(5))
    index.add_pack(pack(1), entries(6, 5))

    assert index.find(blob(5)) == at(1, 100)


def test_a_pack_is_taken_in_once(index):
    index.add_pack(pack(1), entries(5))
    index.add_pack(pack(2), entries(5))

    index.add_pack(pack(1), entries(5))

    assert index.find(blob(5)) == at(2, 0)


def test_blobs_of_a_forgotten_pack_are_absent_also_when_others_follow(index):
    index.add_pack(pack(1), entries(5))

    index.forget_packs([pack(1), pack(9)])
    index.add_pack(pack(2), entries(6))

    assert index.find_many([blob(5), blob(6)]) == [None, at(2, 0)]
    assert index.pack_ids() == {pack(2)}


def test_a_forgotten_pack_can_come_back(index):
    index.add_pack(pack(1), entries(5))
    index.forget_packs([pack(1)])

    index.add_pack(pack(1), entries(5))

    assert index.find(blob(5)) == at(1, 0)


def test_gaps_are_filled_from_packs_that_stay(index):
    index.add_pack(pack(1), entries(5, 6))
    index.add_pack(pack(2), entries(6, 7))
    index.forget_packs([pack(2)], leaves_gaps=True)
    mark = index.gaps()
    assert index.find_many([blob(5), blob(6), blob(7)]) == [at(1, 0), None, None]

    index.fill_gaps(pack(1), entries(5, 6))
    index.fill_gaps(pack(2), entries(6, 7))
    index.close_gaps(mark)

    assert index.find_many([blob(5), blob(6), blob(7)]) == [at(1, 0), at(1, 100), None]
    assert index.gaps() is None


def test_gaps_that_come_while_others_are_filled_stay_noted(index):
    index.add_pack(pack(1), entries(5))
    index.add_pack(pack(2), entries(6))
    index.forget_packs([pack(1)], leaves_gaps=True)
    mark = index.gaps()
    index.forget_packs([pack(2)], leaves_gaps=True)

    index.close_gaps(mark)

    assert index.gaps() is not None


def test_damage_is_remembered_until_the_blob_is_stored_again(index):
    index.add_pack(pack(1), entries(5, 6))

    index.mark_damaged([blob(5), blob(6)])
    assert index.damaged() == {blob(5), blob(6)}
    index.add_pack(pack(2), entries(5))

    assert index.damaged() == {blob(6)}
    assert index.find(blob(6)) == at(1, 100), "it is marked, not forgotten"


def test_clear_forgets_everything_but_damage(index):
    index.add_pack(pack(1), entries(5))
    index.mark_damaged([blob(5)])

    index.clear()

    assert index.find(blob(5)) is None
    assert index.pack_ids() == set()
    assert index.damaged() == {blob(5)}
    assert index.entry_count() == 0


def test_what_was_healed_is_not_undone_by_an_index_made_anew(index):
    index.add_pack(pack(1), entries(5, 6))
    index.mark_damaged([blob(5)])
    index.add_pack(pack(2), entries(5))
    assert index.damaged() == frozenset()

    for order in ((1, 2), (2, 1)):
        index.clear()
        for number in order:
            index.add_pack(pack(number), {1: entries(5, 6), 2: entries(5)}[number])
        assert index.find(blob(5)) == at(2, 0)
        assert index.find(blob(6)) == at(1, 100)


def test_an_index_made_anew_of_the_damaged_copy_alone_heals_nothing(index):
    index.add_pack(pack(1), entries(5))
    index.mark_damaged([blob(5)])
    index.clear()

    index.add_pack(pack(1), entries(5))

    assert index.damaged() == {blob(5)}
    assert index.find_usable([blob(5)]) == [None]


def test_the_index_is_one_per_process_and_lasts_until_its_last_holder_closes_it(folder):
    first, second = Index.open(folder), Index.open(folder)
    assert first is second

    first.close()
    second.add_pack(pack(1), entries(5))
    second.close()

    reopened = Index.open(folder)
    assert reopened.find(blob(5)) == at(1, 0)
    reopened.close()


def test_what_another_process_adds_and_forgets_is_seen_at_once(index, folder):
    index.add_pack(pack(1), entries(5))
    assert index.find(BlobId(b"d" * 32)) is None

    subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(folder)], check=False)

    found = index.find(BlobId(b"d" * 32))
    assert found is not None
    assert found.pack_id == b"d" * 16
    assert index.pack_ids() == {pack(1), b"d" * 16}


def test_the_death_of_a_process_loses_nothing(folder):
    subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(folder)], check=False)

    index = Index.open(folder)

    assert index.find(BlobId(b"d" * 32)) is not None
    index.close()


# -- whether to believe it ---------------------------------------------------------------------


def next_boot(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    boot_file = folder.parent / "boot"
    boot_file.write_text("another boot of the host\n")
    monkeypatch.setattr(index_file, "BOOT_ID_FILE", boot_file)


def make(folder: Path) -> None:
    index = Index.open(folder)
    index.add_pack(pack(1), entries(5))
    index.close()


def found_after(folder: Path) -> bool:
    index = Index.open(folder)
    found = index.find(blob(5)) is not None
    index.close()
    return found


def test_what_was_closed_before_the_host_ended_is_believed(folder, monkeypatch):
    make(folder)

    next_boot(monkeypatch, folder)

    assert found_after(folder)


def test_what_was_in_use_when_the_host_ended_is_not_believed(folder, monkeypatch):
    """Nothing of it was synced: a page that was lost would let a writer rely on nothing."""
    make(folder)
    subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(folder)], check=False)

    next_boot(monkeypatch, folder)

    assert not found_after(folder)


def test_opening_it_takes_the_mark_of_a_clean_end_away_first(folder, monkeypatch):
    """After a power cut the pages may be newer than the page that numbers the transaction."""
    make(folder)
    open_and_die = ADD_AND_DIE.replace("index.add_pack", "0 and index.add_pack")
    subprocess.run([sys.executable, "-c", open_and_die, str(folder)], check=False)

    next_boot(monkeypatch, folder)

    assert not found_after(folder)


def test_the_end_of_one_process_is_no_clean_end_while_another_goes_on(folder, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        make(folder)
        other.kill()

    next_boot(monkeypatch, folder)

    assert not found_after(folder)


def test_a_host_that_does_not_name_its_boots_makes_it_anew_after_a_death(folder, monkeypatch):
    monkeypatch.setattr(index_file, "BOOT_ID_FILE", folder.parent / "nothing")
    make(folder)
    assert found_after(folder)
    (folder / f"clean-{index_file.VERSION}").unlink()

    assert not found_after(folder)


def test_a_damaged_file_is_made_anew(folder):
    make(folder)
    path = folder / f"index-{index_file.VERSION}"
    path.write_bytes(os.urandom(path.stat().st_size))

    assert not found_after(folder)


def test_a_folder_that_was_deleted_is_made_again(folder):
    make(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()

    assert not found_after(folder)


def test_a_folder_that_cannot_be_used_is_a_storage_error(scratch):
    (scratch / "file").touch()

    with pytest.raises(StorageUnavailable):
        Index.open(scratch / "file" / "index")


def test_an_index_that_is_full_is_a_storage_error(folder, monkeypatch):
    """The cache's disk may be full: callers know how to deal with errors of ours only."""
    monkeypatch.setattr(index_file, "MAP_SIZES", (1 << 17,))
    index = Index.open(folder)

    with pytest.raises(StorageUnavailable):
        for number in range(1, 256):
            index.add_pack(pack(number), entries(*range(number * 100, number * 100 + 100)))
    with pytest.raises(StorageUnavailable):
        index.mark_damaged([blob(number) for number in range(60000)])

    assert index.find(blob(100)) == at(1, 0)
    index.close()


def test_less_address_space_is_made_do_with(folder, monkeypatch):
    monkeypatch.setattr(index_file, "MAP_SIZES", (1 << 62, 1 << 20))

    make(folder)

    assert found_after(folder)


# -- many at a time ----------------------------------------------------------------------------


def test_pages_that_were_looked_at_do_not_stay_mapped_without_bound(index, monkeypatch):
    """A daemon of a large repository would seem to hold all of its index in memory."""
    count = 30_000
    blob_ids = [BlobId(random.Random(number).randbytes(32)) for number in range(count)]
    packed = [PackEntry(blob_id=one, offset=0, size=100, level=0) for one in blob_ids]
    index.add_pack(pack(1), packed)
    index.find_many(blob_ids)
    before = resident_of_files()

    monkeypatch.setattr(index_module, "MAPPED_SIZE_MAX", 0)
    assert all(index.find_many(blob_ids))
    index.add_pack(pack(2), entries(1))

    assert resident_of_files() < before - (1 << 20)
    assert all(index.find_many(blob_ids[:100]))


def test_readers_are_right_while_pages_are_unmapped(index, monkeypatch):
    monkeypatch.setattr(index_module, "MAPPED_SIZE_MAX", 0)
    monkeypatch.setattr(index_module, "LOOKUPS_BETWEEN", 1)
    index.add_pack(pack(1), entries(*range(1000)))
    problems: list[object] = []

    def read(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(300):
            numbers = choice.sample(range(1000), 20)
            found = index.find_many([blob(number) for number in numbers])
            if found != [at(1, number * 100) for number in numbers]:
                problems.append(numbers)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(20):
        index.add_pack(pack(2 + number), entries(2000 + number))
    for thread in threads:
        thread.join()

    assert problems == []


def test_readers_never_see_a_pack_half_taken_in(index):
    index.add_pack(pack(1), entries(1, 2, 3))
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            found = index.find_many([blob(1), blob(2), blob(3)])
            if len({location and location.pack_id for location in found}) != 1:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(2, 100):
        index.add_pack(pack(number), entries(1, 2, 3))
        index.forget_packs([pack(number - 1)])
    stop.set()
    for reader in readers:
        reader.join()

    assert wrong == []


OPERATIONS = st.one_of(
    st.tuples(
        st.just("add"), st.integers(1, 6), st.lists(st.integers(0, 12), min_size=1, unique=True)
    ),
    st.tuples(st.just("forget"), st.integers(1, 6), st.none()),
    st.tuples(st.just("damage"), st.integers(0, 12), st.none()),
)


@given(st.lists(OPERATIONS, max_size=30))
@settings(max_examples=60, deadline=None)
def test_random_operations_agree_with_dictionaries(tmp_path_factory, operations):
    index = Index.open(tmp_path_factory.mktemp("model-index"))
    packs: dict[int, list[int]] = {}
    places: dict[int, tuple[int, int]] = {}
    damaged: set[int] = set()

    for verb, number, blobs in operations:
        if verb == "damage":
            index.mark_damaged([blob(number)])
            damaged.add(number)
        elif verb == "forget":
            index.forget_packs([pack(number)])
            packs.pop(number, None)
            places = {name: place for name, place in places.items() if place[0] != number}
        else:
            index.add_pack(pack(number), entries(*blobs))
            if number not in packs:
                packs[number] = blobs
                places |= {name: (number, place * 100) for place, name in enumerate(blobs)}
                damaged -= set(blobs)

    assert index.pack_ids() == {pack(number) for number in packs}
    assert index.damaged() == {blob(number) for number in damaged}
    for number in range(13):
        place = places.get(number)
        assert index.find(blob(number)) == (at(*place) if place else None)
    index.close()
