"""A repository of another user, in which root has worked: its owner can go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.images import back_up, noise, restored
from support.processes import in_a_child

from backupfs.service import Policy, Service, init

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")

OWNER = 65534


def give_away(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, OWNER, OWNER, follow_symlinks=False)


def work(location: str, seed: int, cache: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    with Service.open(location) as service:
        record = back_up(service, noise(300_000, seed=seed), volume=f"vm{seed}")
        assert restored(service, record) == noise(300_000, seed=seed)
        for record in service.backups():
            restored(service, record)
        service.delete(service.backups()[0])
        service.put_metadata(f"vm{seed}", {"seed": seed})
        service.gc()
        area = service.open_staging(Policy(), mountpoint=None)
        area.make_folder(f"folder{seed}")
        area.close()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_owner_goes_on_where_root_has_worked(location: str, scratch: Path, umask: int) -> None:
    folder = Path(location)
    scratch.chmod(0o755)
    give_away(folder)
    caches = [scratch / "cache of root", scratch / "cache of the owner"]
    for cache in caches:
        cache.mkdir()
    os.chown(caches[1], OWNER, OWNER)

    def by_root() -> None:
        os.umask(umask)
        for seed in (1, 2):
            work(location, seed, caches[0])

    def by_owner() -> None:
        os.setgroups([])
        os.setgid(OWNER)
        os.setuid(OWNER)
        for seed in (3, 4):
            work(location, seed, caches[1])

    assert in_a_child(by_root) == 0
    assert {path.stat().st_uid for path in folder.rglob("*")} == {OWNER}
    assert in_a_child(by_owner) == 0
    assert in_a_child(by_root) == 0


@pytest.mark.parametrize("name", ["locks/gc", "locks/publish", "spool/reserve"])
def test_root_gives_away_nothing_that_lies_elsewhere(
    location: str, scratch: Path, name: str
) -> None:
    """The owner may put links into the repository, to what only root can read or make."""
    roots_own = scratch / "root's own"
    roots_own.mkdir(mode=0o700)
    for place in ("there", "not there"):
        target = roots_own / place
        if place == "there":
            target.touch()
        link = Path(location) / name
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        give_away(Path(location))

        def by_root(place: str = place) -> None:
            work(location, 1 + (place == "there"), scratch / "cache")

        in_a_child(by_root)

        assert sorted(os.listdir(roots_own)) == (["there"])
        assert (target.lstat().st_uid if target.exists() else 0) == 0


def test_what_root_makes_for_itself_stays_its_own(tmp_path: Path) -> None:
    """A repository of root in another user's folder is none of that user's."""
    os.chown(tmp_path, OWNER, OWNER)

    init(str(tmp_path / "repository"))

    assert {path.stat().st_uid for path in tmp_path.rglob("*")} == {0}
