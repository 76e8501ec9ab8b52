"""Restores: how images with long holes are written, and what is said of data that go meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE, SparseSource, back_up, noise, restored

from backupfs import copying
from backupfs.errors import BackupNotFound, Cancelled, MissingBlob
from backupfs.service import Record, Service

MIB = 1 << 20
TIB = 1 << 40


class CountingTarget:
    """Keeps what is written of a large image, and checks that all comes from start to end."""

    def __init__(self) -> None:
        self.name = "target"
        self.pieces: dict[int, bytes] = {}
        self.calls = 0
        self.end = 0
        self.is_finished = False

    def write(self, offset: int, data: bytes) -> None:
        if any(data):
            self.pieces[offset] = data
        self.write_hole(offset, len(data))

    def write_hole(self, offset: int, size: int) -> None:
        assert offset == self.end and size > 0
        self.end += size
        self.calls += 1

    def finish(self, size: int) -> None:
        assert size == self.end
        self.is_finished = True


def sparse(service: Service, size: int, pieces: list[tuple[int, bytes]]) -> Record:
    return service.backup(SparseSource(size, pieces), volume="sparse")


def test_long_holes_are_stepped_over(service):
    """Each 2 MiB of a hole were a step of its own: 1 TiB of nothing took 18 s."""
    places = [3 * MIB, TIB // 2, TIB // 2 + 64 * MIB, TIB]
    record = sparse(service, TIB + 5, [(place, b"data!") for place in places])
    target = CountingTarget()
    told: list[int] = []

    service.restore(record, target, progress=told.append)

    assert target.is_finished
    assert list(target.pieces) == places
    assert all(data[:5] == b"data!" for data in target.pieces.values())
    assert sum(told) == record.size
    assert target.calls < TIB // copying.HOLE_SIZE_MIN + len(places) * 2 * copying.RESTORE_SIZE // (
        CHUNK_SIZE
    )


@pytest.mark.parametrize("size", [0, 1, TIB, 1 << 50])
def test_image_without_data_is_a_hole_in_few_pieces(service, size):
    target = CountingTarget()
    told: list[int] = []

    service.restore(sparse(service, size, []), target, progress=told.append)

    assert target.is_finished
    assert target.calls == len(told) <= copying.HOLES_MAX
    assert sum(told) == size


@pytest.mark.parametrize("seed", range(6))
def test_images_with_holes_come_back_as_they_were(service, seed, monkeypatch):
    """Steps from less than a leaf of the tree to many, and holes cut into more than one piece."""
    rng = random.Random(seed)
    monkeypatch.setattr(copying, "RESTORE_SIZE", rng.choice([1, 4, 128, 300]) * CHUNK_SIZE)
    monkeypatch.setattr(copying, "HOLE_SIZE_MIN", rng.choice([1, 5]) * MIB)
    image = bytearray(rng.randrange(1, 40 * MIB))
    for _ in range(rng.randrange(8)):
        start = rng.randrange(len(image))
        data = noise(rng.choice([1, CHUNK_SIZE, 3 * MIB]), seed=seed)[: len(image) - start]
        image[start : start + len(data)] = data
    record = sparse(service, len(image), [(0, bytes(image))])

    assert restored(service, record) == image


def test_restore_is_cancelled_within_a_hole(service):
    record = sparse(service, TIB, [])
    target = CountingTarget()

    with pytest.raises(Cancelled):
        service.restore(record, target, cancelled=lambda: target.calls == 3)

    assert not target.is_finished


def test_backup_that_is_deleted_and_collected_meanwhile_is_no_damage(location):
    """The restore ended as if the repository were damaged (exit code 3)."""
    with Service.open(location) as service, Service.open(location) as other:
        record = back_up(other, noise(20 * MIB, seed=1))
        service.refresh()

        def delete(_size: int) -> None:
            if other.backups():
                other.delete(record)
                other.gc()

        with pytest.raises(BackupNotFound, match=record.backup_id):
            service.restore(record, CountingTarget(), progress=delete)


def test_backup_that_lost_its_data_is_damaged(location):
    with Service.open(location) as service:
        record = back_up(service, noise(20 * MIB, seed=1))
    for pack in (Path(location) / "packs").rglob("*"):
        if pack.stat().st_size > MIB // 2 and pack.is_file():
            pack.unlink()

    with Service.open(location) as service, pytest.raises(MissingBlob):
        service.restore(record, CountingTarget())
