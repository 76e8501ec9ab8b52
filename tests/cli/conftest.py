"""A repository, images and a way to run command lines as a shell would."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import MIB, Run, run_command_line


@pytest.fixture
def run() -> Run:
    return run_command_line


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index of every repository made here goes away with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repo(tmp_path: Path, run: Run) -> Path:
    """An empty repository."""
    folder = tmp_path / "repo"
    made = run("init", folder)
    assert made.code == 0, made.err
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse image of 8 MiB: data, a long hole, data, zeros."""
    path = tmp_path / "vm.img"
    with path.open("wb") as file:
        file.write(os.urandom(MIB + 100))
        file.seek(6 * MIB)
        file.write(os.urandom(MIB // 2))
        file.truncate(8 * MIB)
    return path


@pytest.fixture
def backup(run: Run, repo: Path, image: Path) -> dict[str, Any]:
    """The one backup of ``image``, as JSON describes it."""
    made = run("backup", repo, image, "--json")
    assert made.code == 0, made.err
    (described,) = made.json
    return described


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """What lies below ``device``: 8 MiB of ones."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * (8 * MIB))
    return path


@pytest.fixture
def device(disk: Path) -> Iterator[str]:
    """A loop device."""
    made = subprocess.run(
        ["losetup", "--find", "--show", disk], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs loop devices, and losetup says: {made.stderr}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
