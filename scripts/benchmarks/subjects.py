"""What is measured: what every subject can do, and how backupfs is called.

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
from benchmarks.workload import Generation, data_ranges

BACKUPFS = str(Path(sys.executable).with_name("backupfs"))
PATCH_SIZE = 1 << 20  # bytes of one write into the head at most
SETTLE_SECONDS_MAX = 20  # until an image of zeros alone has become a backup


class Subject:
    """One way of backing up. Every ``Cost`` includes making the result durable."""

    title: ClassVar[str]
    program: ClassVar[str]
    mountable: ClassVar[bool] = False  # ``mounted`` can be used
    collects: ClassVar[bool] = False  # ``collect`` can be used

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

    def collect(self) -> Cost:
        """Delete the latest backup and free what only it needed."""
        raise NotImplementedError

    def finish(self) -> Cost | None:
        """End what runs; what it cost besides, where it is known only now."""
        return None


# -- backupfs ------------------------------------------------------------------------------------


class BackupfsCommand(Subject):
    title = "backupfs, `backupfs backup`"
    program = BACKUPFS
    collects = True

    @property
    def latest_selector(self) -> str:
        return f"{self.source.stem}@latest"

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(self.folder / "home") for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}

    def run(self, *arguments: str | Path) -> Cost:
        return measure.run(BACKUPFS, *arguments, env=self.environment)

    def prepare(self) -> None:
        self.run("init", self.repository)

    def full(self) -> Cost:
        return self.run("backup", self.repository, self.source)

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def restore(self, target: Path) -> Cost:
        return self.run("restore", self.repository, self.latest_selector, target)

    def collect(self) -> Cost:
        watch = Stopwatch()
        self.delete_latest()
        cost = self.run("gc", self.repository)
        return Cost(seconds=watch.stop(), peak_size=cost.peak_size)

    def delete_latest(self) -> None:
        self.run("delete", self.repository, self.latest_selector)


class BackupfsMount(BackupfsCommand):
    """Copies into the mount, and over the head."""

    title = "**backupfs**, `cp` into the mount"
    mountable = True

    def __init__(self, folder: Path, source: Path) -> None:
        super().__init__(folder, source)
        self.mountpoint = folder / "mount"
        self.head = self.mountpoint / "staging" / source.name
        self.latest = self.mountpoint / "volumes" / source.stem / "latest.img"
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
            process_id = self.daemon.pid
            size = measure.resident_peak(process_id) + measure.children_own(process_id)
            self.peak_size = max(self.peak_size, size)

    def full(self) -> Cost:
        cost = measure.run("cp", "--sparse=auto", self.source, self.head)
        return Cost(seconds=self.checked(cost.seconds))

    def incremental(self, generation: Generation) -> Cost:
        return self.full()

    def checked(self, seconds: float) -> float:
        """``seconds``, when the backup is there. Raises: MeasurementFailed."""
        if not any(data_ranges(self.source)):  # zeros alone wait for their data first
            measure.wait_for_path(self.latest, SETTLE_SECONDS_MAX)
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

    def collect(self) -> Cost:
        self.mounts.close()
        self.mounts.enter_context(self.served())
        return super().collect()

    def delete_latest(self) -> None:
        self.latest.resolve().unlink()

    def finish(self) -> Cost | None:
        self.mounts.close()
        return Cost(seconds=0, peak_size=self.peak_size)


class BackupfsPatch(BackupfsMount):
    """Copies in once; afterwards only the changed blocks are written into the head."""

    title = "backupfs, changed blocks into the head"
    mountable = False

    def incremental(self, generation: Generation) -> Cost:
        watch = Stopwatch()
        file = os.open(self.head, os.O_WRONLY)
        try:
            for offset, data in self.pieces(generation):
                os.pwrite(file, data, offset)
        finally:
            os.close(file)
        return Cost(seconds=self.checked(watch.stop()))

    def pieces(self, generation: Generation) -> Iterator[tuple[int, bytes]]:
        with self.source.open("rb") as file:
            for start, size in generation.extents:
                for offset in range(start, start + size, PATCH_SIZE):
                    length = min(PATCH_SIZE, start + size - offset)
                    yield offset, os.pread(file.fileno(), length, offset)
