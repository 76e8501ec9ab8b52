"""What is measured, and how each of them is called.

A subject works in a folder of its own, is used for one run and thrown away with its folder. It
backs up ``source``, whose content is changed between the calls, as a host's disk would be.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from benchmarks import measure
from benchmarks.measure import Cost, MeasurementFailed, Stopwatch
from benchmarks.workload import Generation

BACKUPFS = str(Path(sys.executable).with_name("backupfs"))


class Subject:
    """One way of backing up. Every ``Cost`` includes making the result durable."""

    title: ClassVar[str]
    program: ClassVar[str]
    mountable: ClassVar[bool] = False  # ``mounted`` can be used

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = source
        self.repository = folder / "repository"

    @classmethod
    def version(cls) -> str | None:
        """What the program says of itself; None where it is not installed."""
        if shutil.which(cls.program) is None:
            return None
        said = subprocess.run(
            [cls.program, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        number = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
        return f"{Path(cls.program).name} {number.group() if number else '?'}"

    def prepare(self) -> None:
        """Make the repository; not measured."""

    def full(self) -> Cost:
        """Back up ``source`` for the first time."""
        raise NotImplementedError

    def incremental(self, generation: Generation) -> Cost:
        """Back it up again; it is ``generation`` now."""
        raise NotImplementedError

    def restore(self, target: Path) -> Cost:
        """Write the latest backup to a new file."""
        raise NotImplementedError

    def stored_size(self) -> int:
        return measure.stored_size(self.repository)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[tuple[Path, float]]:
        """The latest backup as a file, and the seconds until the mount answered."""
        raise NotImplementedError
        yield

    def finish(self) -> Cost | None:
        """End what runs; what it cost besides, where it is known only now."""
        return None


# -- backupfs ------------------------------------------------------------------------------------


class BackupfsCommand(Subject):
    title = "`backupfs backup`"
    program = BACKUPFS

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(self.folder / "home") for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}

    def run(self, *arguments: str | Path) -> Cost:
        return measure.run(BACKUPFS, *arguments, env=self.environment)

    def prepare(self) -> None:
        self.run("init", self.repository)

    def full(self) -> Cost:
        return self.run("backup", self.repository, self.source, "--volume", "volume")

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def restore(self, target: Path) -> Cost:
        return self.run("restore", self.repository, "volume@latest", target)


class BackupfsMount(BackupfsCommand):
    """Copies into the mount, and over the head."""

    title = "**backupfs**, `cp` into the mount"
    mountable = True

    def __init__(self, folder: Path, source: Path) -> None:
        super().__init__(folder, source)
        self.mountpoint = folder / "mount"
        self.head = self.mountpoint / "staging" / "volume.img"
        self.latest = self.mountpoint / "volumes" / "volume" / "latest.img"
        self.mounts = contextlib.ExitStack()
        self.daemon: subprocess.Popen[bytes] | None = None
        self.peak_size = 0

    def prepare(self) -> None:
        super().prepare()
        self.mountpoint.mkdir()
        self.mounts.enter_context(self.served())

    @contextlib.contextmanager
    def served(self) -> Iterator[float]:
        """The repository mounted; gives the seconds until it answered."""
        log = self.folder / "mount.log"
        command = [BACKUPFS, "mount", self.repository, self.mountpoint, "--foreground"]
        with measure.running(*command, env=self.environment, log=log) as self.daemon:
            ready = measure.wait_until_mounted(self.mountpoint, self.daemon, log=log)
            try:
                yield ready
            finally:
                self.note_peak()
                measure.unmount([BACKUPFS, "unmount", self.mountpoint], self.daemon)

    def note_peak(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.peak_size = max(self.peak_size, measure.resident_peak(self.daemon.pid))

    def full(self) -> Cost:
        cost = measure.run("cp", self.source, self.head)
        return Cost(seconds=self.checked(cost.seconds))

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def checked(self, seconds: float) -> float:
        """``seconds``, when the backup is there. Raises: MeasurementFailed."""
        if self.latest.stat().st_size != self.source.stat().st_size:
            raise MeasurementFailed("the copy did not become a backup")
        return seconds

    def restore(self, target: Path) -> Cost:
        watch = Stopwatch()
        measure.run("cp", self.latest, target)
        measure.make_durable(target)
        return Cost(seconds=watch.stop())

    @contextlib.contextmanager
    def mounted(self) -> Iterator[tuple[Path, float]]:
        self.mounts.close()
        measure.drop_caches()
        with self.served() as ready:
            yield self.latest, ready

    def finish(self) -> Cost | None:
        self.mounts.close()
        return Cost(seconds=0, peak_size=self.peak_size)


class BackupfsPatch(BackupfsMount):
    """Copies in once; afterwards only the changed blocks are written into the head."""

    title = "backupfs, changed blocks into the head"
    mountable = False

    def incremental(self, generation: Generation) -> Cost:
        pieces = list(self.pieces(generation))
        watch = Stopwatch()
        file = os.open(self.head, os.O_WRONLY)
        try:
            for offset, data in pieces:
                os.pwrite(file, data, offset)
        finally:
            os.close(file)
        return Cost(seconds=self.checked(watch.stop()))

    def pieces(self, generation: Generation) -> Iterator[tuple[int, bytes]]:
        with self.source.open("rb") as file:
            for offset, size in generation.extents:
                yield offset, os.pread(file.fileno(), size, offset)


# -- plain files ---------------------------------------------------------------------------------


class PlainCopy(Subject):
    title = "`cp` and fsync"
    program = "cp"

    def prepare(self) -> None:
        self.repository.mkdir()
        self.copies = 0

    def copy(self, source: Path, target: Path) -> Cost:
        watch = Stopwatch()
        cost = measure.run("cp", source, target)
        measure.make_durable(target)
        return Cost(seconds=watch.stop(), peak_size=cost.peak_size)

    def full(self) -> Cost:
        self.copies += 1
        return self.copy(self.source, self.repository / str(self.copies))

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def restore(self, target: Path) -> Cost:
        return self.copy(self.repository / str(self.copies), target)


class CompressedFile(PlainCopy):
    title = "`zstd -1 -T2` and fsync"
    program = "zstd"

    def copy(self, source: Path, target: Path) -> Cost:
        restoring = source.parent == self.repository
        options = ["-d"] if restoring else ["-1", "-T2"]
        watch = Stopwatch()
        cost = measure.run("zstd", "-q", *options, "-o", target, source)
        measure.make_durable(target)
        return Cost(seconds=watch.stop(), peak_size=cost.peak_size)

    def full(self) -> Cost:
        self.copies += 1
        return self.copy(self.source, self.repository / f"{self.copies}")


# -- backup programs -----------------------------------------------------------------------------


class Restic(Subject):
    title = "restic"
    program = "restic"
    mountable = True

    @classmethod
    def version(cls) -> str | None:
        if shutil.which("restic") is None:
            return None
        said = subprocess.run(["restic", "version"], capture_output=True, text=True, check=False)
        return " ".join(said.stdout.split()[:2])

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RESTIC_REPOSITORY": str(self.repository),
            "RESTIC_PASSWORD": "measured",
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }

    def prepare(self) -> None:
        measure.run("restic", "init", env=self.environment)

    def full(self) -> Cost:
        return measure.run("restic", "backup", self.source, env=self.environment)

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def restore(self, target: Path) -> Cost:
        out = self.folder / "restored"
        watch = Stopwatch()
        cost = measure.run("restic", "restore", "latest", "--target", out, env=self.environment)
        restored = out / self.source.relative_to("/")
        measure.make_durable(restored)
        seconds = watch.stop()
        restored.rename(target)
        return Cost(seconds=seconds, peak_size=cost.peak_size)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[tuple[Path, float]]:
        mountpoint = self.folder / "mount"
        log = self.folder / "mount.log"
        mountpoint.mkdir(exist_ok=True)
        measure.drop_caches()
        command = ["restic", "mount", mountpoint]
        with measure.running(*command, env=self.environment, log=log) as process:
            ready = measure.wait_until_mounted(mountpoint, process, log=log)
            image = mountpoint / "snapshots" / "latest" / self.source.relative_to("/")
            try:
                yield image, ready
            finally:
                measure.unmount(["fusermount3", "-u", mountpoint], process)


class Borg(Subject):
    title = "borg, defaults"
    program = "borg"
    mountable = True
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "BORG_REPO": str(self.repository),
            "BORG_BASE_DIR": str(self.folder / "home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def prepare(self) -> None:
        (self.folder / "home").mkdir()
        self.archives = 0
        measure.run("borg", "init", "--encryption", "none", env=self.environment)

    def full(self) -> Cost:
        self.archives += 1
        command = ["borg", "create", *self.options, f"::{self.archives}", self.source.name]
        return measure.run(*command, env=self.environment, cwd=self.source.parent)

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def restore(self, target: Path) -> Cost:
        out = self.folder / "restored"
        out.mkdir()
        watch = Stopwatch()
        command = ["borg", "extract", "--sparse", f"::{self.archives}"]
        cost = measure.run(*command, env=self.environment, cwd=out)
        measure.make_durable(out / self.source.name)
        seconds = watch.stop()
        (out / self.source.name).rename(target)
        return Cost(seconds=seconds, peak_size=cost.peak_size)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[tuple[Path, float]]:
        mountpoint = self.folder / "mount"
        log = self.folder / "mount.log"
        mountpoint.mkdir(exist_ok=True)
        measure.drop_caches()
        command = ["borg", "mount", "--foreground", f"::{self.archives}", mountpoint]
        with measure.running(*command, env=self.environment, log=log) as process:
            ready = measure.wait_until_mounted(mountpoint, process, log=log)
            try:
                yield mountpoint / self.source.name, ready
            finally:
                measure.unmount(["borg", "umount", mountpoint], process)


class BorgFixed(Borg):
    """The closest relative: fixed chunks of our size and the fastest compression."""

    title = "borg, fixed 64 KiB, lz4"
    mountable = False
    options = ("--chunker-params", "fixed,65536", "--compression", "lz4")


# The first one is what the others are compared with.
SUBJECTS: dict[str, type[Subject]] = {
    "mount": BackupfsMount,
    "patch": BackupfsPatch,
    "command": BackupfsCommand,
    "cp": PlainCopy,
    "zstd": CompressedFile,
    "restic": Restic,
    "borg": Borg,
    "borg-fixed": BorgFixed,
}
