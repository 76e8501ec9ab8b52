"""Readers while gc moves what they read: every place a reader has in mind may be gone when it gets
there, and that is no damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle_mount import KIB, assert_same, content

from backupfs.errors import CorruptBlob, DamageError, MissingBlob
from backupfs.service import Record, Service, init

CHUNK_SIZE = 16 * KIB
CHUNK_COUNT = 64
NODE_SIZE_MAX = 8 * KIB


class Bytes:
    """A volume in memory, as a source of a backup."""

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


def read(service: Service, record: Record) -> bytes:
    return service.open_image(record).read(0, record.size)


def thin_backup(service: Service) -> tuple[Record, bytes]:
    """A backup whose chunks lie in a pack that is mostly garbage: the next gc moves them."""
    whole = content(CHUNK_COUNT * CHUNK_SIZE, 1)
    part = whole[: CHUNK_COUNT // 4 * CHUNK_SIZE]
    other = service.backup(Bytes(whole), volume="whole")
    record = service.backup(Bytes(part), volume="part")
    service.delete(other)
    return record, part


class Interrupting:
    """A storage that lets something happen between a reader's look-up of chunks and its read."""

    def __init__(self, storage: Any, happen: Any) -> None:
        self._storage = storage
        self._happen = happen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        if self._happen is not None and size > NODE_SIZE_MAX:
            happen, self._happen = self._happen, None
            happen()
        return bytes(self._storage.get_range(name, offset, size))


def test_chunks_that_gc_moves_between_lookup_and_read_are_found(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service.open(location) as writer:
        record, part = thin_backup(writer)
    with Service.open(location) as collector, Service.open(location) as reader:

        def collect() -> None:
            assert collector.gc().packs_repacked

        blobs = reader.repository.reader
        monkeypatch.setattr(blobs, "_storage", Interrupting(blobs._storage, collect))

        assert_same(read(reader, record), part, "what gc moved")
        assert reader.repository.index.damaged() == frozenset()


def test_chunks_that_gc_moves_are_found_by_a_reader_with_an_index_of_its_own(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another host: its index learns of the move only by looking at the packs."""
    with Service.open(location) as writer:
        record, part = thin_backup(writer)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        with Service.open(location) as reader:
            assert writer.gc().packs_repacked

            assert_same(read(reader, record), part, "what gc moved")
            assert reader.repository.index.damaged() == frozenset()


def test_new_packs_are_looked_for_however_often_that_was_needed_before(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service.open(location) as writer:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        with Service.open(location) as reader:
            for number in range(4):
                data = content(CHUNK_SIZE, 10 + number)
                record = writer.backup(Bytes(data), volume=f"v{number}")
                assert_same(read(reader, record), data, number)


def test_what_is_gone_for_good_is_still_damage(location: str) -> None:
    with Service.open(location) as service:
        record = service.backup(Bytes(content(CHUNK_SIZE, 2)), volume="v")
    packs = [path for path in (Path(location) / "packs").rglob("*") if path.is_file()]
    for pack in packs:
        if pack.stat().st_size > CHUNK_SIZE:
            pack.unlink()

    with Service.open(location) as service:
        for _ in range(2):
            with pytest.raises(MissingBlob):
                read(service, record)
        assert len(service.repository.index.damaged()) == 1


def test_flipped_bit_is_damage_at_every_read(location: str) -> None:
    with Service.open(location) as service:
        record = service.backup(Bytes(content(CHUNK_SIZE, 3)), volume="v")
    pack = max((Path(location) / "packs").glob("*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[1000] ^= 1
    pack.write_bytes(data)

    with Service.open(location) as service:
        for _ in range(2):
            with pytest.raises(CorruptBlob) as caught:
                read(service, record)
            assert isinstance(caught.value, DamageError)
