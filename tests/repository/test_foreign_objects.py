"""Objects that are whole and in the wrong place: of other repositories, under other names, forged.

In repositories without encryption all digests can be made by anybody. So nothing but the bytes' own
ids proves them, and whatever was put into the folder, what is read is right or an error.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.images import CHUNK_SIZE, PACK_SIZE, SparseSource, back_up, is_clean, noise, restored

from backupfs.errors import BackupfsError, CorruptObject, DamageError
from backupfs.format import pack
from backupfs.format.ids import IdScheme
from backupfs.format.record import encode_record, record_name
from backupfs.service import Record, Service, init
from backupfs.types import PackId

IDS = IdScheme()
IMAGE = noise(20 * CHUNK_SIZE, seed=1)


@pytest.fixture
def other(scratch: Path) -> Iterator[Service]:
    """Another repository with chunks of the same size."""
    folder = str(scratch / "other")
    init(folder, chunk_size=CHUNK_SIZE, pack_size=PACK_SIZE)
    with Service.open(folder) as opened:
        yield opened


@pytest.fixture
def coarse(scratch: Path) -> Iterator[Service]:
    """Another one whose chunks are larger."""
    folder = str(scratch / "coarse")
    init(folder, chunk_size=4 * CHUNK_SIZE, pack_size=PACK_SIZE)
    with Service.open(folder) as opened:
        yield opened


def copy_all(source: Service, target: str, kind: str) -> None:
    shutil.copytree(Path(source.location) / kind, Path(target) / kind, dirs_exist_ok=True)


def packs_of(location: str) -> list[Path]:
    return sorted(path for path in (Path(location) / "packs").rglob("*") if path.is_file())


# -- packs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["other", "coarse"])
def test_packs_of_another_repository_harm_nothing(location, request, kind):
    foreign = request.getfixturevalue(kind)
    with Service.open(location) as service:
        record = back_up(service, IMAGE)
    back_up(foreign, IMAGE + noise(5 * CHUNK_SIZE, seed=2))
    copy_all(foreign, location, "packs")

    with Service.open(location) as service:
        assert is_clean(service)
        assert restored(service, record) == IMAGE
        again = back_up(service, noise(5 * CHUNK_SIZE, seed=2) + IMAGE, volume="b")
        assert restored(service, again) == noise(5 * CHUNK_SIZE, seed=2) + IMAGE
        service.gc()
        assert is_clean(service)
        assert restored(service, record) == IMAGE
        assert restored(service, again).endswith(IMAGE)


def test_packs_under_each_others_names_are_damage_and_heal(location, cache_home):
    with Service.open(location) as service:
        first = back_up(service, IMAGE)
        second = back_up(service, noise(20 * CHUNK_SIZE, seed=3), volume="b")
    large = [path for path in packs_of(location) if path.stat().st_size > 10 * CHUNK_SIZE]
    one, two = large[0].read_bytes(), large[1].read_bytes()
    large[0].write_bytes(two)
    large[1].write_bytes(one)

    for _ in range(2):  # by the index as it was, then by a new one
        with Service.open(location) as service:
            for record in (first, second):
                with pytest.raises(DamageError):
                    restored(service, record)
            hit = {damage.backup_id for damage in service.verify().damage if damage.backup_id}
            assert hit == {first.backup_id, second.backup_id}
        shutil.rmtree(cache_home)
    with Service.open(location) as service:
        back_up(service, IMAGE, volume="c")
        back_up(service, noise(20 * CHUNK_SIZE, seed=3), volume="c")
        assert restored(service, first) == IMAGE
        assert restored(service, second) == noise(20 * CHUNK_SIZE, seed=3)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 60), st.integers(0, 1 << 20), st.integers(0, 70_000), st.integers(0, 7)
        ),
        max_size=12,
    )
)
@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_forged_footer_never_gives_other_bytes(tmp_path_factory, listed):
    """It names the ids of a backup's chunks, at places of its own where there are others."""
    folder = tmp_path_factory.mktemp("forged") / "repo"
    init(str(folder), chunk_size=CHUNK_SIZE, pack_size=PACK_SIZE)
    with Service.open(str(folder)) as service:
        record = back_up(service, IMAGE)
        image = service.open_image(record)
        ids = [*image.chunk_ids(0, 20), record.root]
    body = bytes(2 << 20)
    entries = [
        pack.PackEntry(blob_id=ids[number % len(ids)], offset=offset, size=52 + size, level=level)
        for number, offset, size, level in listed
    ]
    forged_id = PackId(b"\x00" * 15 + b"\x01")
    path = folder / pack.pack_name(forged_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body + pack.encode_footer(forged_id, entries, blobs_size=len(body), ids=IDS))

    with Service.open(str(folder)) as service:
        for _ in range(2):
            with contextlib.suppress(DamageError):
                assert restored(service, record) == IMAGE
        for _ in range(
            2
        ):  # what lies below a root that is not found is looked at when it is healed
            service.verify()
            healed = back_up(service, IMAGE, volume="again")
        assert restored(service, healed) == IMAGE
        assert restored(service, record) == IMAGE
    shutil.rmtree(folder)


# -- records -----------------------------------------------------------------------------------


def put_record(location: str, record: Record) -> Path:
    path = Path(location) / record_name(record.backup_id)
    path.write_bytes(encode_record(record, IDS))
    return path


@pytest.mark.parametrize("kind", ["other", "coarse"])
def test_a_record_of_another_repository_is_named_and_shown_as_no_backup(location, request, kind):
    foreign = request.getfixturevalue(kind)
    theirs = back_up(foreign, bytes(10 * CHUNK_SIZE))  # of zeros: nothing of it could be missing
    with Service.open(location) as service:
        ours = back_up(service, IMAGE)
    copy_all(foreign, location, "records")

    with Service.open(location) as service:
        assert service.backups() == [ours]
        (damage,) = service.verify().damage
        assert damage.object_name == record_name(theirs.backup_id)
        assert foreign.config.repository_id in damage.reason
        with pytest.raises(CorruptObject, match=foreign.config.repository_id):
            service.gc()
        (Path(location) / record_name(theirs.backup_id)).unlink()
        service.gc()
        assert restored(service, ours) == IMAGE


def test_a_record_with_chunks_of_another_size_is_never_read(location):
    with Service.open(location) as service:
        ours = back_up(service, IMAGE)
    forged = replace(
        ours, backup_id="0b0e4f2c-1111-4222-8333-444455556666", chunk_size=2 * CHUNK_SIZE
    )
    put_record(location, forged)

    with Service.open(location) as service:
        assert service.backups() == [ours]
        assert [damage.object_name for damage in service.verify().damage] == [forged.object_name]


def test_records_under_each_others_names_are_damage(location):
    with Service.open(location) as service:
        first, second = back_up(service, IMAGE), back_up(service, IMAGE[:-1], volume="b")
    one, two = (Path(location) / record.object_name for record in (first, second))
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])

    with Service.open(location) as service:
        assert service.backups() == []
        assert len(service.verify().damage) == 2
        with pytest.raises(CorruptObject):
            service.gc()
    one.write_bytes(data[0])
    two.write_bytes(data[1])
    with Service.open(location) as service:
        assert is_clean(service)
        assert restored(service, first) == IMAGE


FORGERIES: dict[str, dict[str, Any]] = {
    "a chunk as root": {},
    "an upper node as leaf": {},
    "a leaf as an upper node": {"size": CHUNK_SIZE << 10, "height": 2},
    "a root of nothing": {"root": b"\x11" * 32},
    "a size beyond the tree": {"size": 100 * CHUNK_SIZE},
    "a smaller size": {"size": 3},
    "no size": {"size": 0},
    "absurd counts": {"data_size": (1 << 63) - 1, "stored_bytes": (1 << 63) - 1},
    "the first year": {"name": "0001-01-01T000000Z.img"},
    "the last year": {"name": "9999-12-31T235959Z-999999999.img"},
}


@pytest.mark.parametrize("is_read_before", [False, True])
@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_record_of_ours_is_refused_or_reads_what_its_ids_say(
    location, what, is_read_before
):
    """``is_read_before``: what the trees have in common is in memory, as what it really is."""
    with Service.open(location) as service:
        ours = back_up(service, IMAGE)
        tall = service.backup(SparseSource(200 * CHUNK_SIZE, [(0, IMAGE)]), volume="tall")
        assert (ours.height, tall.height) == (1, 2)
        changes = FORGERIES[what]
        if what == "a chunk as root":
            changes = {"root": service.open_image(ours).chunk_ids(0, 1)[0]}
        elif what == "an upper node as leaf":
            changes = {"root": tall.root}
    with Service.open(location) as service:
        if is_read_before:
            restored(service, ours)
            restored(service, tall)
        forged = replace(
            ours, backup_id="0b0e4f2c-1111-4222-8333-444455556666", volume="f", **changes
        )
        data = encode_record(forged, IDS)
        try:
            service.import_record(data)
        except BackupfsError:
            put_record(location, forged)
            service.refresh()
        try:
            image = restored(service, forged)
        except DamageError:
            pass
        else:
            assert image == IMAGE[: forged.size].ljust(forged.size, b"\0")
        assert {damage.backup_id for damage in service.verify().damage} <= {forged.backup_id}
        assert not service.repository.index.damaged() - {forged.root}
        assert_whole(service, ours, tall)
        with contextlib.suppress(DamageError):  # what the forged one reaches is unknown
            service.gc()
        assert_whole(service, ours, tall)
        service.delete(forged)
        service.gc()
        assert is_clean(service)
        assert_whole(service, ours, tall)


def assert_whole(service: Service, ours: Record, tall: Record) -> None:
    assert restored(service, ours) == IMAGE
    assert restored(service, tall) == IMAGE.ljust(200 * CHUNK_SIZE, b"\0")
