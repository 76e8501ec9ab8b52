"""verify beside deletions and gc: what is deleted on purpose is no damage."""

from __future__ import annotations

import pytest
from support.faulty import SteppedStorage
from support.images import CHUNK_SIZE, back_up, noise

from backupfs.ambient import Ambient
from backupfs.repository.repository import Repository
from backupfs.service import Service


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("moment", ["get_range packs/", "get records/"])
def test_a_backup_deleted_and_collected_meanwhile_is_no_damage(location, moment, quick):
    storage = SteppedStorage(location)
    with Service.open(location) as other, Service(Repository(storage, Ambient())) as service:
        kept = back_up(other, noise(20 * CHUNK_SIZE, seed=1))
        doomed = back_up(other, noise(20 * CHUNK_SIZE, seed=2))
        service.refresh()
        calls: list[str] = []

        def delete(verb: str, name: str) -> None:
            if f"{verb} {name}".startswith(moment):
                calls.append(name)
                if len(calls) == 2:
                    other.delete(doomed)
                    assert other.gc().packs_deleted

        storage.after = delete
        report = service.verify(quick=quick)

        assert len(calls) >= 2
        assert report.damage == []
        assert service.verify([kept]).damage == []


def test_a_pack_repacked_meanwhile_is_no_damage(location):
    storage = SteppedStorage(location)
    with Service.open(location) as other, Service(Repository(storage, Ambient())) as service:
        longer = back_up(other, noise(50 * CHUNK_SIZE, seed=1))
        back_up(other, noise(50 * CHUNK_SIZE, seed=1)[: 10 * CHUNK_SIZE])
        other.delete(longer)
        service.refresh()
        calls: list[str] = []

        def collect(verb: str, name: str) -> None:
            if verb == "get_range" and name.startswith("packs/"):
                calls.append(name)
                if len(calls) == 3:
                    assert other.gc().packs_repacked

        storage.before = collect
        report = service.verify()

        assert len(calls) >= 3
        assert report.damage == []
