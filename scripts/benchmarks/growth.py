"""How cost grows: with the size of an image, and with the number of backups in a repository.

The images are of unique data, half of it random, so that every chunk of them is new.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Stopwatch
from benchmarks.report import MIB, say
from benchmarks.subjects import BackupfsMount
from benchmarks.workload import BLOCK_SIZE, contents

IMAGE_SIZES_GIB = (1, 4, 16)
BACKUP_COUNTS = (10, 1_000, 10_000)
PIECE_SIZE = 1 << 20
# Gives a volume as many backups as wanted, all of the content of its first one.
MAKE_BACKUPS = """
import sys, uuid
from dataclasses import replace
from datetime import timedelta
from backupfs.format.names import backup_name
from backupfs.service import Service
with Service.open(sys.argv[1]) as service:
    (first,) = service.backups("volume")
    for number in range(1, int(sys.argv[2])):
        moment = first.data_timestamp + timedelta(minutes=number)
        service.repository.records.put(
            replace(
                first,
                backup_id=str(uuid.UUID(int=number)),
                name=backup_name(moment, ()),
                data_timestamp=moment,
            )
        )
"""


def measure_growth(work: Path) -> str:
    """Both tables, as Markdown."""
    lines = ["", "| one image of | copied in, s per GiB | ready, s | open and read 4 KiB, ms "]
    lines[-1] += "| 4 KiB into the head, ms | daemon's peak, MiB |"
    lines.append("| --- |" + " ---: |" * 5)
    for size in IMAGE_SIZES_GIB:
        say(f"growth: an image of {size} GiB")
        lines.append(f"| {size} GiB | {' | '.join(image_cells(work, size))} |")
    lines += ["", "| backups | ready, s | `ls -l volumes/volume`, s | 4 KiB into the head, ms "]
    lines[-1] += "| daemon's peak, MiB |"
    lines.append("| --- |" + " ---: |" * 4)
    for count in BACKUP_COUNTS:
        say(f"growth: {count} backups")
        lines.append(f"| {count:,} | {' | '.join(count_cells(work, count))} |")
    return "\n".join([*lines, ""])


@contextmanager
def subject_in(work: Path) -> Iterator[BackupfsMount]:
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "growth").mkdir(parents=True)
    subject = BackupfsMount(folder / "growth", folder / "volume.img")
    try:
        yield subject
    finally:
        subject.finish()
        shutil.rmtree(folder, ignore_errors=True)


def image_cells(work: Path, size_gib: int) -> Sequence[str]:
    with subject_in(work) as subject:
        make_unique(subject.source, size_gib)
        subject.prepare()
        seconds = subject.full().seconds / size_gib
        subject.source.unlink()
        with subject.mounted() as (latest, ready):
            watch = Stopwatch()
            read_block(latest, (int(size_gib * (1 << 30))) // 2)
            opened = watch.stop()
            patched = patch_block(subject.head, (int(size_gib * (1 << 30))) // 3)
        peak = subject.finish()
        return [
            f"{seconds:.2f}",
            f"{ready:.2f}",
            f"{opened * 1e3:.1f}",
            f"{patched * 1e3:.1f}",
            f"{peak.peak_size / MIB:.0f}" if peak and peak.peak_size else "?",
        ]


def count_cells(work: Path, count: int) -> Sequence[str]:
    with subject_in(work) as subject:
        make_unique(subject.source, 1 / 64)
        subject.prepare()
        subject.full()
        command = [sys.executable, "-c", MAKE_BACKUPS, subject.repository, str(count)]
        subprocess.run(command, env={**os.environ, **subject.environment}, check=True)
        with subject.mounted() as (_latest, ready):
            folder = subject.mountpoint / "volumes" / "volume"
            listed = measure.run("ls", "-l", folder).seconds
            patched = patch_block(subject.head, BLOCK_SIZE)
        peak = subject.finish()
        return [
            f"{ready:.2f}",
            f"{listed:.2f}",
            f"{patched * 1e3:.1f}",
            f"{peak.peak_size / MIB:.0f}" if peak and peak.peak_size else "?",
        ]


def make_unique(image: Path, size_gib: float) -> None:
    rng = random.Random(f"growth {size_gib}")
    with image.open("wb") as file:
        for _ in range(int(size_gib * (1 << 30)) // PIECE_SIZE):
            file.write(contents(rng, PIECE_SIZE))


def read_block(path: Path, offset: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.pread(file, BLOCK_SIZE, offset)
    finally:
        os.close(file)


def patch_block(head: Path, offset: int) -> float:
    """Seconds to write a block into the head and close it; what follows a close is not waited for."""
    data = os.urandom(BLOCK_SIZE)
    watch = Stopwatch()
    file = os.open(head, os.O_WRONLY)
    try:
        os.pwrite(file, data, offset)
    finally:
        os.close(file)
    return watch.stop()
