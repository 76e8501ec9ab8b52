"""mount, unmount, drafts and publish, with a real mount where the host can have one."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import MIB, Run

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
    if is_mounted(folder):
        ended = command("unmount", folder)
        detach(folder)
        assert ended.returncode == 0, ended.stderr


def is_mounted(folder: Path) -> bool:
    """Asks the kernel's table: a mount that hangs would hold up who looks into it."""
    return str(folder) in Path("/proc/self/mountinfo").read_text(errors="replace").split()


def detach(folder: Path) -> None:
    """Leave no mount to whoever comes after a test that failed."""
    if is_mounted(folder):
        subprocess.run(["fusermount3", "-u", "-z", "--", folder], check=False, timeout=20)


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
    assert not is_mounted(tmp_path / "mnt")


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
    # Looking into the mount waits for what was closed before; commands look beside it.
    shown = (mountpoint / "volumes" / "vm" / "latest.img").readlink()

    (made,) = run("list", repo, "--json").json
    restored = run("restore", repo, "vm@latest", tmp_path / "out.img")

    assert (made["volume"], made["name"]) == ("vm", str(shown))
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
        detach(folder)
    assert ended.returncode == 0, ended.stderr
    assert not is_mounted(folder)


def becomes(condition: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def drafts(run: Run, repo: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run("drafts", repo, "--json").json
    return found


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
    # A killed program's file is closed by the kernel, which waits for nobody.
    assert becomes(lambda: drafts(run, repo)[0]["state"] != "open", seconds=20)

    (draft,) = drafts(run, repo)
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
def test_held_draft_can_be_published_after_the_mount_is_gone(
    run: Run, repo: Path, mountpoint: Path, image: Path
) -> None:
    cut_copy(mountpoint, image, "vm.img")
    assert command("unmount", mountpoint).returncode == 0

    (draft,) = drafts(run, repo)
    published = run("publish", repo, "vm.img")

    assert (draft["name"], draft["state"]) == ("vm.img", "held")
    assert published.code == 0, published.err
    assert drafts(run, repo) == []
    assert [made["volume"] for made in run("list", repo, "--json").json] == ["vm"]


@needs_mount
@pytest.mark.mount
def test_mount_shows_what_commands_did(run: Run, repo: Path, mountpoint: Path, image: Path) -> None:
    (made,) = run("backup", repo, image, "--json").json
    shown = mountpoint / "volumes" / "vm" / made["name"]

    assert becomes(shown.exists, seconds=20)
    assert shown.read_bytes() == image.read_bytes()

    assert run("delete", repo, made["id"]).code == 0
    assert becomes(lambda: not shown.exists(), seconds=20)


@needs_mount
@pytest.mark.mount
def test_restore_can_write_into_a_mount(
    run: Run, repo: Path, mountpoint: Path, backup: dict[str, Any], image: Path
) -> None:
    ended = run("restore", repo, "vm@latest", mountpoint / "staging" / "copy.img")

    assert ended.code == 0, ended.err
    assert (mountpoint / "volumes" / "copy" / "latest.img").read_bytes() == image.read_bytes()
    assert [made["volume"] for made in run("list", repo, "--json").json] == ["copy", "vm"]


@needs_mount
@pytest.mark.mount
def test_foreground_mount_ends_with_its_signal(repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    words = [*COMMAND, "mount", str(repo), str(folder), "--foreground"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=30)
        finally:
            process.kill()
            detach(folder)

    assert "mounted at" in said
    assert process.returncode == 0
    assert "Traceback" not in log
    assert not is_mounted(folder)


@needs_mount
@pytest.mark.mount
def test_mount_by_a_program_that_has_closed_its_streams(repo: Path, tmp_path: Path) -> None:
    """Their numbers are free: the daemon's word that it is ready must not go the way of its output."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    script = '"$@" <&- >&- 2>&-'
    try:
        ended = subprocess.run(
            ["bash", "-c", script, "bash", *COMMAND, "mount", repo, folder],
            check=False,
            timeout=60,
        )

        assert ended.returncode == 0
        assert is_mounted(folder)
        assert command("unmount", folder).returncode == 0
    finally:
        detach(folder)


@needs_mount
@pytest.mark.mount
def test_unmount_is_refused_while_a_file_is_open(mountpoint: Path) -> None:
    with (mountpoint / "README.txt").open():
        refused = command("unmount", mountpoint)

    assert refused.returncode == 1
    assert refused.stderr.startswith("backupfs: ") and "in use" in refused.stderr
    assert is_mounted(mountpoint)
