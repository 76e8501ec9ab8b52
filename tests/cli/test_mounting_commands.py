"""mount, unmount, drafts and publish, with a real mount where the host can have one."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MIB, Run

COMMAND = [sys.executable, "-m", "backupfs.cli.main"]
CAN_MOUNT = (
    Path("/dev/fuse").exists()
    and shutil.which("fusermount3") is not None
    and importlib.util.find_spec("pyfuse3") is not None
)
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="needs /dev/fuse, fusermount3 and pyfuse3")


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own, as mounting wants it."""
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def mountpoint(repo: Path, tmp_path: Path) -> Iterator[Path]:
    """``repo`` mounted in the background."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    mounted = command("mount", repo, folder)
    assert mounted.returncode == 0, mounted.stderr
    yield folder
    if folder.is_mount():
        ended = command("unmount", folder)
        assert ended.returncode == 0, ended.stderr


# -- without a mount ---------------------------------------------------------------------------


def test_mounting_without_its_libraries_says_what_to_install(
    run: Run, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is how the import system is told that a module is not there.
    monkeypatch.setitem(sys.modules, "backupfs.daemon", None)
    monkeypatch.delattr("backupfs.daemon", raising=False)

    for words in (("mount", repo, tmp_path), ("unmount", tmp_path)):
        ended = run(*words)
        assert ended.code == 1
        assert "is not installed (pip install 'backupfs[mount]')" in ended.error_line


def test_nothing_is_staged_in_a_new_repository(run: Run, repo: Path) -> None:
    assert run("drafts", repo, "--json").json == []
    assert run("drafts", repo).out.split() == ["NAME", "STATE", "SIZE", "CHANGED", "REASON"]


def test_publish_of_what_is_not_staged_fails(run: Run, repo: Path) -> None:
    ended = run("publish", repo, "no\x1bsuch.img")

    assert ended.code == 1
    assert r"nothing is staged under 'no\x1bsuch.img'" in ended.error_line


def test_unmount_of_what_is_no_mount_fails(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pyfuse3")

    ended = run("unmount", tmp_path)

    assert ended.code == 1
    assert str(tmp_path) in ended.error_line


@needs_mount
@pytest.mark.mount
def test_mount_of_no_repository_says_so(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()

    ended = command("mount", tmp_path / "absent", tmp_path / "mnt")

    assert ended.returncode == 1
    assert ended.stderr.startswith("backupfs: ") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "mnt").is_mount()


@needs_mount
@pytest.mark.mount
def test_unknown_mount_option_is_wrong_usage(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()

    ended = command("mount", repo, tmp_path / "mnt", "-o", "settle=soon")

    assert ended.returncode == 2
    assert "settle" in ended.stderr


# -- with a mount ------------------------------------------------------------------------------


@needs_mount
@pytest.mark.mount
def test_copy_into_the_mount_is_listed_and_restored(
    run: Run, repo: Path, mountpoint: Path, image: Path, tmp_path: Path
) -> None:
    shutil.copyfile(image, mountpoint / "staging" / "vm.img")

    (made,) = run("list", repo, "--json").json
    restored = run("restore", repo, "vm@latest", tmp_path / "out.img")

    assert made["volume"] == "vm"
    assert (mountpoint / "volumes" / "vm" / made["name"]).exists()
    assert restored.code == 0
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()


@needs_mount
@pytest.mark.mount
def test_mount_helper_form_with_options_of_fstab(run: Run, repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()

    mounted = command(repo, folder, "-o", "rw,nofail,settle=1")

    try:
        assert mounted.returncode == 0, mounted.stderr
        assert (folder / "staging").is_dir()
    finally:
        ended = command("unmount", folder)
    assert ended.returncode == 0, ended.stderr
    assert not folder.is_mount()


def cut_copy(mountpoint: Path, image: Path, name: str) -> None:
    """Copy half an image by a program that is killed then."""
    half = image.with_name("half")
    half.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    program = (
        "import os, sys; from pathlib import Path; source, target = sys.argv[1:];"
        "file = open(target, 'wb', 0); file.write(Path(source).read_bytes());"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, half, mountpoint / "staging" / name], check=False
    )
    assert killed.returncode == -signal.SIGKILL


@needs_mount
@pytest.mark.mount
def test_interrupted_copy_is_held_until_published(
    run: Run, repo: Path, mountpoint: Path, image: Path
) -> None:
    cut_copy(mountpoint, image, "vm.img")

    (draft,) = run("drafts", repo, "--json").json
    shown = run("drafts", repo).out
    assert (draft["name"], draft["volume"], draft["state"]) == ("vm.img", "vm", "held")
    assert draft["size"] == 4 * MIB and draft["reason"]
    assert "vm.img" in shown and "held" in shown and draft["reason"] in shown
    assert run("list", repo, "--json").json == []

    published = run("publish", repo, "vm.img")

    assert published.code == 0, published.err
    assert published.out.startswith("published vm@")
    (made,) = run("list", repo, "--json").json
    assert made["size"] == 4 * MIB


@needs_mount
@pytest.mark.mount
def test_unmount_is_refused_while_a_file_is_open(mountpoint: Path) -> None:
    with (mountpoint / "README.txt").open():
        refused = command("unmount", mountpoint)

    assert refused.returncode == 1
    assert refused.stderr.startswith("backupfs: ") and "in use" in refused.stderr
    assert mountpoint.is_mount()
