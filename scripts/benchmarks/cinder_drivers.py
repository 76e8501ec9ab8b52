"""Backup drivers of Cinder beside each other: the same images, through the same manager.

Run by scripts/bench-cinder in the environment of the Cinder tests, whose small cloud it uses: a
driver is measured in a process of its own, by a full backup, an incremental one and a restore.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Stopwatch, stored_size, warm
from benchmarks.workload import make_workload

MIB = 1 << 20
SUBJECTS = ("posix", "backupfs 64", "backupfs 32", "backupfs 16")
SAMPLE_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mode", choices=("threading", "eventlet"), default="threading")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.folder / "bench-cinder"
    images = make_workload(work / "images", size=given.size * MIB, seed=1, names=["gen1"])
    if given.subject:
        measure_one(given, work, images.base, images.generations[0].image)
        return
    try:
        rows = [measured(given, subject) for subject in SUBJECTS]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    changed = images.generations[0].changed_size
    print(f"image of {given.size} MiB, {changed / MIB:.1f} MiB changed, {given.mode} mode")
    print("driver       full s  MiB/s  stored MiB  incr s  stored MiB  restore s  service  worker")
    for row in rows:
        print(
            f"{row['subject']:12} {row['full']:6.1f} {given.size / row['full']:6.0f}"
            f" {row['full_stored'] / MIB:11.1f} {row['incremental']:7.1f}"
            f" {row['incremental_stored'] / MIB:11.1f} {row['restore']:10.1f}"
            f" {row['service'] / MIB:8.0f} {row['worker'] / MIB:7.0f}"
        )


def measured(given: argparse.Namespace, subject: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cinder_drivers"]
    command += ["--subject", subject, "--size", str(given.size)]
    command += ["--folder", str(given.folder), "--mode", given.mode]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    return json.loads(result.stdout.splitlines()[-1])


def measure_one(given: argparse.Namespace, work: Path, base: Path, changed: Path) -> None:
    """Measure ``given.subject`` in this process, and print what came out as JSON."""
    os.environ["OS_CINDER_DISABLE_EVENTLET_PATCHING"] = str(int(given.mode == "threading"))
    from cinder import monkey_patch

    monkey_patch.patch()
    from cinder import objects

    objects.register_all()
    import cloud
    import pytest
    from cinder.backup.drivers import posix  # noqa: F401  # for its options

    folder = work / "cloud"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    monkeypatch = pytest.MonkeyPatch()
    made = cloud.Cloud(folder, monkeypatch)
    kept = Path(made.repository)
    if given.subject == "posix":
        kept = folder / "posix"
        cloud.CONF.set_override("backup_driver", "cinder.backup.drivers.posix.PosixBackupDriver")
        cloud.CONF.set_override("backup_posix_path", str(kept))
        kept.mkdir()
        made.manager = made.new_manager()
    else:
        shutil.rmtree(kept)
        made.run("init", str(kept), "--chunk-size", f"{given.subject.split()[1]}K")
    print(json.dumps({"subject": given.subject, **run(made, kept, base, changed)}))


def run(made: object, kept: Path, base: Path, changed: Path) -> dict[str, float]:
    volume, empty = made.volume(b""), made.volume(b"")
    costs: dict[str, float] = {}
    before = stored_size(kept)
    with watched() as peaks:
        put(base, made.path(volume.id))
        watch = Stopwatch()
        full = made.back_up(volume, service=made.manager.driver_name)
        costs["full"] = watch.stop()
        costs["full_stored"] = stored_size(kept) - before
        put(changed, made.path(volume.id))
        watch = Stopwatch()
        child = made.back_up(volume, service=made.manager.driver_name, parent_id=full.id)
        costs["incremental"] = watch.stop()
        costs["incremental_stored"] = stored_size(kept) - before - costs["full_stored"]
        watch = Stopwatch()
        made.restore(child, empty, is_new=False)
        costs["restore"] = watch.stop()
    subprocess.run(["cmp", changed, made.path(empty.id)], check=True)
    made.close()
    return costs | peaks


def put(image: Path, volume: Path) -> None:
    shutil.copyfile(image, volume)
    os.sync()
    warm(volume)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most memory of this process, and of a worker of it, while the block runs."""
    # A thread of the system, so that it looks on whatever the mode.
    from eventlet import patcher

    original = patcher.original("threading")
    sleep = patcher.original("time").sleep
    peaks = {"service": 0.0, "worker": 0.0}
    stop = original.Event()

    def sample() -> None:
        while not stop.is_set():
            for child in children():
                peaks["worker"] = max(peaks["worker"], peak_of(child))
            sleep(SAMPLE_SECONDS)

    thread = original.Thread(target=sample, daemon=True)
    thread.start()
    yield peaks
    stop.set()
    peaks["service"] = peak_of(os.getpid())


def children() -> list[int]:
    listed = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    try:
        return [int(word) for word in listed.read_text().split()]
    except OSError:
        return []


def peak_of(process: int) -> float:
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    return 0.0


if __name__ == "__main__":
    main()
