"""What every test gets: a cache of its own, and repositories in a folder that is quick to sync."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE, PACK_SIZE

from backupfs.ambient import Ambient
from backupfs.repository.repository import Repository
from backupfs.service import Service, init

MEMORY_DISK = Path("/dev/shm")


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No index of a test's repository touches the user's cache or outlives the test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing is quick: in memory, if the machine has such a disk."""
    if not MEMORY_DISK.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="backupfs-test-", dir=MEMORY_DISK))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def location(scratch: Path) -> str:
    """An empty repository of small chunks and packs."""
    folder = str(scratch / "repository")
    init(folder, chunk_size=CHUNK_SIZE, pack_size=PACK_SIZE)
    return folder


@pytest.fixture
def open_repository(location: str) -> Iterator[Callable[[], Repository]]:
    """Opens the repository as often as asked; closes all of them at the end."""
    opened: list[Repository] = []

    def open_one() -> Repository:
        opened.append(Repository.open(location, Ambient()))
        return opened[-1]

    yield open_one
    for repository in opened:
        repository.close()


@pytest.fixture
def repository(open_repository: Callable[[], Repository]) -> Repository:
    return open_repository()


@pytest.fixture
def service(location: str) -> Iterator[Service]:
    with Service.open(location) as opened:
        yield opened
