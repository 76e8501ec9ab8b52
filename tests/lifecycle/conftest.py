"""Fixtures of the tests about life and death: real daemons, each with a limit of time."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
from lifecycle_mount import Site, site_in

CAN_MOUNT = (
    Path("/dev/fuse").exists()
    and shutil.which("fusermount3") is not None
    and importlib.util.find_spec("pyfuse3") is not None
)
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nearly everything in this folder mounts: what has the commands."""
    for item in items:
        if HERE in item.path.parents and "commands" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.mount)
            if not CAN_MOUNT:
                reason = "needs /dev/fuse, fusermount3 and pyfuse3"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """What runs our commands without an interpreter's start for each."""
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture
def site(tmp_path: Path, commands: CommandServer) -> Iterator[Site]:
    """An empty repository and a mountpoint; nothing is mounted yet."""
    with site_in(tmp_path / "site", commands) as found:
        found.init()
        yield found


@pytest.fixture
def mounted(site: Site) -> Site:
    """The same, mounted."""
    site.mount()
    return site
