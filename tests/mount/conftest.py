"""Fixtures of the tests that mount: real kernel, real programs."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lifecycle.command_server import CommandServer
from mounted import Mounted, mounted_repository, mounts_below

CAN_MOUNT = (
    Path("/dev/fuse").exists()
    and shutil.which("fusermount3") is not None
    and importlib.util.find_spec("pyfuse3") is not None
)
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder mounts."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mount)
            if not CAN_MOUNT:
                reason = "needs /dev/fuse, fusermount3 and pyfuse3"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the test, with the index and all images in it; removed at once.

    Not pytest's folder: what it removes later, it would also remove from a mount left in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="backupfs-mount-"))
    folder.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    yield folder
    if not mounts_below(folder):
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """Runs our commands, and starts daemons, without a new interpreter for each."""
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture
def mounted(work: Path, commands: CommandServer) -> Iterator[Mounted]:
    """An empty repository, mounted with the usual options."""
    with mounted_repository(work, commands) as found:
        yield found


@pytest.fixture
def mount_with(work: Path, commands: CommandServer) -> Iterator[Callable[[str], Mounted]]:
    """Mount an empty repository with options of the test's choice; once a test."""
    opened = []

    def open_mount(options: str) -> Mounted:
        context = mounted_repository(work, commands, options)
        found = context.__enter__()
        opened.append(context)
        return found

    yield open_mount
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture
def mount_with_settle(mount_with: Callable[[str], Mounted]) -> Mounted:
    """An empty repository, mounted so that one can wait for what settles."""
    return mount_with("settle=2")
