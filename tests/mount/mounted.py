"""A repository that is mounted for one test, seen as a user sees it: by its files and commands."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lifecycle.command_server import CommandServer

from backupfs.service import init

MIB = 1 << 20
CHUNK_SIZE = 64 << 10
COMMAND = [sys.executable, "-m", "backupfs.cli.main"]
SECONDS_MAX = 60.0

Word = str | bytes | Path
Ended = subprocess.CompletedProcess[bytes]


def random_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def patched(content: bytes, offset: int, data: bytes) -> bytes:
    """``content`` with ``data`` in place of what lies at ``offset``."""
    return content[:offset] + data + content[offset + len(data) :]


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where one of ``programs`` is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def becomes(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether ``condition`` turns true in time."""
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return reached


def run(
    *words: Word,
    check: bool = True,
    timeout: float = SECONDS_MAX,
    stdin: bytes = b"",
    cwd: Path | None = None,
) -> Ended:
    """Run a program to its end; with ``check`` its failure fails the test, with what it said."""
    ended = subprocess.run(
        [os.fspath(word) for word in words],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )
    if check:
        assert ended.returncode == 0, (words, ended.returncode, ended.stderr.decode())
    return ended


def shell(script: str, *arguments: Word, check: bool = True) -> Ended:
    """Run a script of bash; ``$1`` and so on are ``arguments``."""
    return run("bash", "-euc", script, "bash", *arguments, check=check)


class Mounted:
    """One mounted repository."""

    def __init__(self, folder: Path, commands: CommandServer) -> None:
        self._commands = commands
        self.folder = folder  # for anything a test makes; goes away with it
        self.repo = folder / "repo"
        self.path = folder / "mnt"
        self.log_file = folder / "backupfs.log"
        self.process_id = 0
        self.expects_errors = False  # in the daemon's log
        self._started: list[subprocess.Popen[bytes]] = []
        self.path.mkdir()
        init(str(self.repo))

    # -- the mount -----------------------------------------------------------------------------

    def mount(self, options: str = "") -> None:
        words = ",".join(filter(None, (f"log_file={self.log_file}", options)))
        self._ours("mount", self.repo, self.path, "-o", words)
        self.process_id = int(self.status()["process_id"])

    def unmount(self) -> None:
        self._ours("unmount", self.path)

    def remount(self, options: str = "") -> None:
        self.unmount()
        self.mount(options)

    def kill_daemon(self) -> None:
        """End the daemon as a crash would, and wait for its death."""
        descriptor = os.pidfd_open(self.process_id)
        try:
            os.kill(self.process_id, signal.SIGKILL)
            assert select.select([descriptor], [], [], 30)[0]
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Leave no program, no mount and no daemon behind, whatever the test did."""
        for process in self._started:
            _end(process)
        if mounts_below(self.path) and not self._is_unmounted_gently():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)
            subprocess.run(_umount_words(self.path, lazy=True), check=False, timeout=30)
            pytest.fail(f"the mount could not be ended: {self.log_text()[-2000:]}")
        if not self.expects_errors:
            lines = self.log_text().splitlines()
            errors = [line for line in lines if " ERROR " in line]
            assert not errors and "Traceback" not in self.log_text(), self.log_text()[-4000:]

    def _is_unmounted_gently(self) -> bool:
        try:
            process = os.pidfd_open(self.process_id)
        except ProcessLookupError:  # killed by the test
            return self._is_umounted()
        try:
            # Programs that were killed may need a moment to let go of the mount.
            is_umounted = becomes(self._is_umounted, seconds=10)
            return is_umounted and bool(select.select([process], [], [], 60)[0])
        except subprocess.TimeoutExpired:
            return False
        finally:
            os.close(process)

    def _is_umounted(self) -> bool:
        words = _umount_words(self.path)
        ended = subprocess.run(words, check=False, timeout=30, capture_output=True)
        return ended.returncode == 0

    def log_text(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    # -- programs ------------------------------------------------------------------------------

    def start(self, *words: Word, **named: Any) -> subprocess.Popen[bytes]:
        """Start a program in a process group of its own; it does not outlive the test."""
        process = subprocess.Popen(
            [os.fspath(word) for word in words], start_new_session=True, **named
        )
        self._started.append(process)
        return process

    def command(self, *words: Word, check: bool = True) -> Ended:
        """Run one of our commands; the first word is its name, the repository comes second."""
        name, *rest = words
        return self._ours(name, self.repo, *rest, check=check)

    def _ours(self, *words: Word, check: bool = True) -> Ended:
        """Run one of our commands in a process that is quick to start."""
        environment = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "LC_ALL")}
        command = self._commands.start(*map(os.fsdecode, words), environment=environment)
        code = command.wait(SECONDS_MAX)
        ended = Ended(words, code, command.out().encode(), command.err().encode())
        assert not check or code == 0, (words, code, command.err())
        return ended

    def listed(self, command: str, *words: Word) -> Any:
        return json.loads(self.command(command, *words, "--json").stdout)

    # -- what is there -------------------------------------------------------------------------

    @property
    def staging(self) -> Path:
        return self.path / "staging"

    @property
    def volumes(self) -> Path:
        return self.path / "volumes"

    @property
    def backups(self) -> Path:
        return self.path / "backups"

    def names(self, volume: str) -> list[str]:
        """File names of a volume's backups, oldest first; none where there is no such volume."""
        folder = self.volumes / volume
        if not folder.exists():
            return []
        names = [name for name in os.listdir(folder) if name[:2] == "20"]
        return sorted(names, key=_name_order)

    def latest(self, volume: str) -> Path:
        return self.volumes / volume / "latest.img"

    def xattr(self, path: Path, name: str) -> str:
        return os.getxattr(path, f"user.backupfs.{name}").decode()

    def stored_bytes(self, volume: str) -> int:
        """What the volume's latest backup added to the repository."""
        return int(self.xattr(self.latest(volume), "stored_bytes"))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.path / ".backupfs/status.json").read_text())
        return status

    def drafts(self) -> dict[str, dict[str, Any]]:
        """By name, what status.json lists as staged and not a backup."""
        return {draft["name"]: draft for draft in self.status()["drafts"]}

    def events(self) -> str:
        return (self.path / ".backupfs/events.log").read_text()

    def image(self, content: bytes, name: str = "source.img") -> Path:
        """A file outside of the mount."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    # -- what must be so -----------------------------------------------------------------------

    def assert_backups(self, volume: str, *contents: bytes) -> None:
        """The volume has exactly these backups, oldest first, and nothing is unpublished."""
        self.assert_kept(volume, *contents)
        assert self.drafts() == {}

    def assert_kept(self, volume: str, *contents: bytes) -> None:
        """The volume has exactly these backups, oldest first."""
        names = self.names(volume)
        assert len(names) == len(contents), (names, self.events())
        for name, content in zip(names, contents, strict=True):
            assert_same(self.volumes / volume / name, content)
        if names:
            assert os.readlink(self.latest(volume)) == names[-1]

    def assert_held(self, name: str, volume: str, *contents: bytes) -> dict[str, Any]:
        """``name`` is held, for a reason; the volume has just these backups. Returns the draft."""
        becomes(lambda: self.drafts()[name]["state"] != "open", seconds=20)
        draft = self.drafts()[name]
        assert draft["state"] == "held" and draft["reason"], draft
        (listed,) = [item for item in self.listed("drafts") if item["name"] == name]
        assert (listed["state"], listed["reason"]) == ("held", draft["reason"])
        self.assert_kept(volume, *contents)
        return draft


def assert_same(path: Path, content: bytes) -> None:
    """A file has just these bytes; says where they differ rather than which they are."""
    found = path.read_bytes()
    assert len(found) == len(content), path
    if found != content:
        place = next(i for i, (a, b) in enumerate(zip(found, content, strict=True)) if a != b)
        raise AssertionError(f"{path} differs from byte {place}")


@contextlib.contextmanager
def mounted_repository(
    folder: Path, commands: CommandServer, options: str = ""
) -> Iterator[Mounted]:
    """A new repository, mounted for the while."""
    mounted = Mounted(folder, commands)
    try:
        mounted.mount(options)
        yield mounted
    finally:
        mounted.close()


def _name_order(name: str) -> tuple[str, int]:
    stamp, _, number = name.removesuffix(".img").partition("Z")
    return stamp, int(number.removeprefix("-") or 1)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)


def mounts_below(folder: Path) -> list[Path]:
    """What is mounted at ``folder`` or below it."""
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    places = [mountpoint_in(line) for line in lines if line]
    return [place for place in places if place.is_relative_to(folder)]


def mountpoint_in(line: bytes) -> Path:
    """The mountpoint that a line of mountinfo is about."""
    escaped = line.split(b" ")[4]
    return Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), escaped)))


def _umount_words(path: Path, *, lazy: bool = False) -> Sequence[str]:
    if os.geteuid() == 0:
        return ["umount", *(["-l"] if lazy else []), str(path)]
    return ["fusermount3", "-uz" if lazy else "-u", str(path)]
