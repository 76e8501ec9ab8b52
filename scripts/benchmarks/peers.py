"""The programs that backupfs is measured beside."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from benchmarks import measure
from benchmarks.measure import Cost, Stopwatch
from benchmarks.subjects import BackupfsCommand, BackupfsMount, BackupfsPatch, Subject
from benchmarks.workload import Generation

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


class CompressedImage(PlainCopy):
    title = "`qemu-img convert -c` and fsync"
    program = "qemu-img"

    def full(self) -> Cost:
        self.copies += 1
        command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2"]
        return self.convert(command, self.source, self.repository / f"{self.copies}")

    def restore(self, target: Path) -> Cost:
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
        return self.convert(command, self.repository / f"{self.copies}", target)

    def convert(self, command: list[str], source: Path, target: Path) -> Cost:
        watch = Stopwatch()
        cost = measure.run(*command, source, target)
        measure.make_durable(target)
        return Cost(seconds=watch.stop(), peak_size=cost.peak_size)


# -- backup programs -----------------------------------------------------------------------------


class Restic(Subject):
    title = "restic"
    program = "restic"
    mountable = True
    collects = True

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

    def collect(self) -> Cost:
        return measure.run("restic", "forget", "latest", "--prune", env=self.environment)

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
    collects = True
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

    def collect(self) -> Cost:
        watch = Stopwatch()
        measure.run("borg", "delete", f"::{self.archives}", env=self.environment)
        cost = measure.run("borg", "compact", "--threshold", "0", env=self.environment)
        return Cost(seconds=watch.stop(), peak_size=cost.peak_size)

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
    options = ("--chunker-params", "fixed,65536", "--compression", "lz4")


# The first one is what the others are compared with.
SUBJECTS: dict[str, type[Subject]] = {
    "mount": BackupfsMount,
    "patch": BackupfsPatch,
    "command": BackupfsCommand,
    "cp": PlainCopy,
    "zstd": CompressedFile,
    "qemu": CompressedImage,
    "restic": Restic,
    "borg": Borg,
    "borg-fixed": BorgFixed,
}
