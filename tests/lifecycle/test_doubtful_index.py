"""gc with an index that is wrong: an entry that was lost, or names another place, makes what lies
there look dead, and the index is only a cache."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lifecycle_mount import KIB, assert_same, content

from backupfs.repository.index import Index
from backupfs.repository.listing import KEY_SIZE, LOCATION
from backupfs.service import Record, Service, init

CHUNK_SIZE = 16 * KIB
CHUNK_COUNT = 64


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.name = "memory"
        self._data = data

    def size(self) -> int:
        return len(self._data)

    def extents(self) -> Iterator[tuple[int, bytes]]:
        yield 0, self._data


@pytest.fixture
def location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    init(str(tmp_path / "repo"), chunk_size=CHUNK_SIZE)
    return str(tmp_path / "repo")


def fill(service: Service) -> dict[str, tuple[Record, bytes]]:
    """Some backups, in packs of which one half is garbage, so that gc has much to do."""
    kept = {}
    for number in range(4):
        whole = content(CHUNK_COUNT * CHUNK_SIZE, number)
        part = whole[: len(whole) // 2]
        garbage = service.backup(Bytes(whole), volume="garbage")
        record = service.backup(Bytes(part), volume=f"kept{number}")
        service.delete(garbage)
        kept[f"kept{number}"] = (record, part)
    return kept


def lose(value: bytes, _rng: random.Random) -> bytes | None:
    return None


def shift(value: bytes, _rng: random.Random) -> bytes | None:
    number, offset, size = LOCATION.unpack(value)
    return LOCATION.pack(number, offset + 1, size)


def misplace(value: bytes, rng: random.Random) -> bytes | None:
    _number, offset, size = LOCATION.unpack(value)
    return LOCATION.pack(rng.randrange(1, 8), offset, size)


def mislead(value: bytes, _rng: random.Random) -> bytes | None:
    _number, offset, size = LOCATION.unpack(value)
    return LOCATION.pack(4_000_000, offset, size)


def cut(value: bytes, _rng: random.Random) -> bytes | None:
    return value[:-2]


Damage = Callable[[bytes, random.Random], bytes | None]


def spoil(index: Index, damage: Damage, rng: random.Random, share: float) -> None:
    """Change some of its entries behind its back."""
    with index._environment.begin(write=True) as transaction:
        entries = list(transaction.cursor(db=index._blobs))
        for key, value in entries:
            assert len(key) == KEY_SIZE
            if rng.random() < share:
                spoiled = damage(value, rng)
                if spoiled is None:
                    transaction.delete(key, db=index._blobs)
                else:
                    transaction.put(key, spoiled, db=index._blobs)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize(
    "damage", [lose, shift, misplace, mislead, cut], ids=lambda damage: damage.__name__
)
def test_gc_with_a_wrong_index_deletes_nothing_that_lives(
    location: str, tmp_path: Path, damage: Damage, share: float
) -> None:
    with Service.open(location) as service:
        kept = fill(service)
        spoil(service.repository.index, damage, random.Random(share), share)

        service.gc()

    shutil.rmtree(tmp_path / "cache")
    with Service.open(location) as service:
        assert service.verify().damage == []
        for record, data in kept.values():
            assert_same(service.open_image(record).read(0, record.size), data, record.volume)
        assert service.gc().packs_deleted == 0


def test_gc_of_a_damaged_repository_frees_what_is_dead_and_keeps_the_rest(location: str) -> None:
    """A blob that is gone for good must not keep gc from its work for ever."""
    with Service.open(location) as service:
        kept = fill(service)
        lost = service.backup(Bytes(content(8 * CHUNK_SIZE, 9)), volume="lost")
    packs = sorted((Path(location) / "packs").glob("*/*"), key=lambda path: path.stat().st_mtime)
    next(path for path in reversed(packs) if path.stat().st_size > 4 * CHUNK_SIZE).unlink()

    with Service.open(location) as service:
        collected = service.gc()
        assert collected.bytes_after < collected.bytes_before
        hit = {item.volume for item in service.verify().damage}
        assert hit == {"lost"}
        for record, data in kept.values():
            assert_same(service.open_image(record).read(0, record.size), data, record.volume)
        service.delete(lost)
        service.gc()
        assert service.verify().damage == []
