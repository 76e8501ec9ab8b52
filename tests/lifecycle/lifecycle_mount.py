"""One repository and its mounts, held as an operator holds them: by commands, processes, signals.

Knows how to start, stop and kill daemons and how to leave nothing behind. Nothing here can hang for
ever: a watchdog kills the daemons of a site that is still in use when its time is over, and then
whoever waits in the kernel for one gets an error.
"""

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
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from command_server import Command, CommandServer

KIB = 1 << 10
MIB = 1 << 20
BACKUPFS = str(Path(sys.executable).with_name("backupfs"))
COMMAND_SECONDS = 60.0
DEATH_SECONDS = 30.0
MOUNTINFO = Path("/proc/self/mountinfo")

Word = str | bytes | Path
Ended = subprocess.CompletedProcess[str]


def content(size: int, seed: int) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def becomes(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether ``condition`` turns true in time."""
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def assert_same(found: bytes, expected: bytes, what: object) -> None:
    """The same bytes; says where they differ rather than which they are."""
    assert len(found) == len(expected), f"{what}: {len(found)} of {len(expected)} bytes"
    if found != expected:
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise AssertionError(f"{what} differs from byte {place}")


class Site:
    """A repository, a mountpoint, and the processes that a test starts around them."""

    def __init__(
        self,
        folder: Path,
        commands: CommandServer,
        *,
        seconds: float = 90.0,
        repo: Path | None = None,
    ) -> None:
        self.folder = folder
        self._commands = commands
        self.repo = repo or folder / "repo"
        self.path = folder / "mnt"
        self.log_file = folder / "backupfs.log"
        self.environment = {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(BACKUPFS).parent}:{os.environ['PATH']}",
        }
        self.may_log_errors = False
        self._daemons: set[int] = set()
        self._started: list[subprocess.Popen[Any]] = []
        self._is_late = False
        self._watchdog = threading.Timer(seconds, self._bark)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.path.mkdir(parents=True, exist_ok=True)

    # -- commands ------------------------------------------------------------------------------

    def run(self, *words: Word, check: bool = True, seconds: float = COMMAND_SECONDS) -> Ended:
        """Run a program to its end; with ``check`` its failure fails the test."""
        ended = subprocess.run(
            [os.fsdecode(word) for word in words],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert ended.returncode == 0, (words, ended.returncode, ended.stderr)
        return ended

    def begin(self, name: str, *words: Word) -> Command:
        """Start a command of ours on the repository."""
        texts = [os.fsdecode(word) for word in (self.repo, *words)]
        return self._commands.start(name, *texts, environment=self.environment)

    def command(self, name: str, *words: Word, check: bool = True, seconds: float = 60.0) -> Ended:
        """Run a command of ours on the repository."""
        return _ended(self.begin(name, *words), check=check, seconds=seconds)

    def listed(self, name: str, *words: Word) -> Any:
        return json.loads(self.command(name, *words, "--json").stdout)

    def start(self, *words: Word, **named: Any) -> subprocess.Popen[bytes]:
        """Start a program in a process group of its own; it does not outlive the test."""
        process = subprocess.Popen(
            [os.fsdecode(word) for word in words],
            start_new_session=True,
            env=os.environ | self.environment,
            **{"stdin": subprocess.DEVNULL, **named},
        )
        self._started.append(process)
        return process

    def assert_verified(self) -> None:
        """Everything can be restored."""
        ended = self.command("verify", check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    # -- the mount -----------------------------------------------------------------------------

    def init(self, *words: Word) -> None:
        self.command("init", *words)

    def try_mount(self, options: str = "", *, path: Path | None = None) -> Ended:
        """Mount, or fail to."""
        words = [option for option in (f"log_file={self.log_file}", options) if option]
        ended = self.command("mount", path or self.path, "-o", ",".join(words), check=False)
        with contextlib.suppress(OSError, ValueError):
            self._daemons.add(self.daemon(path))
        return ended

    def mount(self, options: str = "", *, path: Path | None = None) -> None:
        ended = self.try_mount(options, path=path)
        assert ended.returncode == 0, ended.stderr

    def try_unmount(self, path: Path | None = None) -> Ended:
        """Unmount, or fail to."""
        words = ("unmount", path or self.path)
        command = self._commands.start(*words, environment=self.environment)
        return _ended(command, check=False, seconds=COMMAND_SECONDS)

    def unmount(self, path: Path | None = None) -> None:
        ended = self.try_unmount(path)
        assert ended.returncode == 0, ended.stderr

    def remount(self, options: str = "") -> None:
        self.unmount()
        self.mount(options)

    def daemon(self, path: Path | None = None) -> int:
        """The process that serves the mount."""
        return int(self.status(path)["process_id"])

    def kill(self, path: Path | None = None) -> None:
        """End the daemon as a crash would; returns when it is dead."""
        kill_and_wait(self.daemon(path))

    def is_mounted(self, path: Path | None = None) -> bool:
        return is_mounted(path or self.path)

    def status(self, path: Path | None = None) -> dict[str, Any]:
        text = ((path or self.path) / ".backupfs/status.json").read_text()
        status: dict[str, Any] = json.loads(text)
        return status

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

    def latest(self, volume: str) -> Path:
        return self.volumes / volume / "latest.img"

    def names(self, volume: str) -> list[str]:
        """File names of a volume's backups; none where there is no such volume."""
        folder = self.volumes / volume
        if not folder.exists():
            return []
        return sorted(name for name in os.listdir(folder) if name[:2] == "20")

    def drafts(self) -> dict[str, dict[str, Any]]:
        """By name, what is staged and not a backup."""
        return {draft["name"]: draft for draft in self.status()["drafts"]}

    def image(self, data: bytes, name: str = "source.img") -> Path:
        """A file outside of the mount."""
        path = self.folder / name
        path.write_bytes(data)
        return path

    def copy_in(self, name: str, data: bytes) -> None:
        """Stage ``data`` with cp; a backup when this returns."""
        self.run("cp", self.image(data), self.staging / name)
        assert self.latest(Path(name).stem).exists()

    def packs(self) -> list[Path]:
        """All packs, the largest first."""
        packs = [path for path in (self.repo / "packs").rglob("*") if path.is_file()]
        return sorted(packs, key=lambda path: -path.stat().st_size)

    def log_text(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave no program, no mount and no daemon behind, whatever the test did."""
        try:
            for process in self._started:
                end_process(process)
            for path in mounts_below(self.folder):
                with contextlib.suppress(OSError, ValueError):
                    self._daemons.add(self.daemon(path))
                self._end_mount(path)
            for process_id in self._daemons:
                assert becomes(lambda pid=process_id: not is_alive(pid), seconds=DEATH_SECONDS), (
                    f"daemon {process_id} outlived its mount"
                )
            assert not self._is_late, "the test took too long and was cut short"
        finally:
            self._watchdog.cancel()
            self._force_end()
        if not self.may_log_errors:
            errors = [line for line in self.log_text().splitlines() if is_error(line)]
            assert not errors, (errors, self.log_text()[-4000:])

    def _end_mount(self, path: Path) -> None:
        ended = subprocess.run(
            umount_words(path), capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, f"{ended.stderr} {self.log_text()[-2000:]}"

    def _force_end(self) -> None:
        for process_id in self._daemons | daemons_of(self.repo):
            if is_alive(process_id):
                kill_and_wait(process_id)
        for path in mounts_below(self.folder):
            subprocess.run(umount_words(path, lazy=True), timeout=30, check=False)

    def _bark(self) -> None:
        """Time is over. Whoever waits for a daemon gets an error when it is dead."""
        self._is_late = True
        for process_id in self._daemons | daemons_of(self.repo):
            with contextlib.suppress(OSError):
                os.kill(process_id, signal.SIGKILL)
        for process in self._started:
            end_process(process)


def _ended(command: Command, *, check: bool, seconds: float) -> Ended:
    code = command.wait(seconds)
    if check:
        assert code == 0, (command.words, code, command.err())
    return Ended(command.words, code, command.out(), command.err())


@contextlib.contextmanager
def site_in(
    folder: Path, commands: CommandServer, *, seconds: float = 90.0, repo: Path | None = None
) -> Iterator[Site]:
    """A site for the while; its folder is removed afterwards, as images are large."""
    site = Site(folder, commands, seconds=seconds, repo=repo)
    try:
        yield site
    finally:
        try:
            site.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def is_error(line: str) -> bool:
    """Whether a line of the daemon's log must not be there."""
    return " ERROR " in line or "Traceback" in line


# -- processes and mounts ----------------------------------------------------------------------


def is_alive(process_id: int) -> bool:
    """Whether a process runs; one that waits only to be reaped does not."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def is_at_rest(process_id: int) -> bool:
    """Whether a process is stopped, or dead and not reaped. Raises: OSError (it is gone)."""
    fields = Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()
    return fields[0] in (b"T", b"Z", b"X")


def kill_and_wait(process_id: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; returns when the process is dead."""
    try:
        descriptor = os.pidfd_open(process_id)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, number)
        assert select.select([descriptor], [], [], DEATH_SECONDS)[0], f"{process_id} lives on"
    finally:
        os.close(descriptor)


def end_process(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)


def daemons_of(repo: Path) -> set[int]:
    """The processes that hold the staging area of a repository, or did last."""
    found = set()
    for path in (repo / "drafts").glob("*/lock"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.add(int(json.loads(path.read_text())["pid"]))
    return {process_id for process_id in found if _is_backupfs(process_id)}


def _is_backupfs(process_id: int) -> bool:
    """Not some process that has the number of one that is dead."""
    try:
        words = Path(f"/proc/{process_id}/cmdline").read_bytes()
        return b"backupfs" in words or b"command_server" in words  # a fork of the one or the other
    except OSError:
        return False


def mounts_below(folder: Path) -> list[Path]:
    """FUSE mounts in a folder, the innermost first."""
    found = []
    for line in os.fsdecode(MOUNTINFO.read_bytes()).rstrip("\n").split("\n"):
        fields = line.split(" ")
        path = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if fields[fields.index("-") + 1].startswith("fuse") and path.is_relative_to(folder):
            found.append(path)
    return found[::-1]


def umount_words(path: Path, *, lazy: bool = False) -> list[str]:
    if os.geteuid() == 0:
        return ["umount", *(["-l"] if lazy else []), "--", str(path)]
    return ["fusermount3", "-uz" if lazy else "-u", "--", str(path)]


def is_mounted(path: Path) -> bool:
    return path in mounts_below(path)


def memory_peak(process_id: int) -> int:
    """The most memory, in bytes, that a process had resident so far."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("no VmHWM")


def descriptors(process_id: int) -> int:
    return len(os.listdir(f"/proc/{process_id}/fd"))


def threads(process_id: int) -> int:
    return len(os.listdir(f"/proc/{process_id}/task"))
