"""How cost grows: with the size of an image, and with the number of backups in a repository.

The images are of unique data, half of it random, so that every chunk of them is new.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Stopwatch
from benchmarks.report import MIB, say
from benchmarks.subjects import BackupfsMount
from benchmarks.workload import BLOCK_SIZE, contents

# Measured one by one, as each takes minutes.
IMAGE_PARTS = {"1G": 1, "4G": 4, "16G": 16}
COUNT_PARTS = {"10": 10, "1000": 1_000, "10000": 10_000}
PARTS = [*IMAGE_PARTS, *COUNT_PARTS]
PATCH_COUNT = 5
# By part and figure: seconds, bytes, or how many.
GrowthFigures = dict[str, dict[str, float]]
PIECE_SIZE = 1 << 20
CHUNK_SIZE = 1 << 16
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthColumn:
    """A figure as a column; ``scale`` divides it, ``digits`` follow the point."""

    figure: str
    heading: str
    scale: float = 1
    digits: int = 2


_AFTER_COPY = [
    GrowthColumn(figure="patch", heading="4 KiB into the head, ms", scale=1e-3, digits=1),
    GrowthColumn(figure="memory", heading="daemon's own memory, MiB", scale=MIB, digits=0),
    GrowthColumn(figure="mapped", heading="and mapped files, MiB", scale=MIB, digits=0),
]
IMAGE_COLUMNS = [
    GrowthColumn(figure="copy", heading="copied in, s per GiB"),
    GrowthColumn(figure="lookups", heading="index look-ups per GiB", digits=0),
    GrowthColumn(figure="ready", heading="ready, s"),
    GrowthColumn(figure="open", heading="open and read 4 KiB, ms", scale=1e-3, digits=1),
    *_AFTER_COPY,
]
COUNT_COLUMNS = [
    GrowthColumn(figure="first", heading="ready the first time, s"),
    GrowthColumn(figure="ready", heading="ready, s"),
    GrowthColumn(figure="list", heading="`ls -l volumes/volume`, s"),
    *_AFTER_COPY,
]


def measure_growth(work: Path, parts: Sequence[str], figures: GrowthFigures) -> None:
    """Measure ``parts`` and enter what they took into ``figures``."""
    for part in parts:
        say(f"growth: {part}")
        if part in IMAGE_PARTS:
            figures[part] = image_figures(work, IMAGE_PARTS[part])
        else:
            figures[part] = count_figures(work, COUNT_PARTS[part])


def tables(figures: GrowthFigures) -> str:
    """What was measured, as Markdown."""
    images = [part for part in IMAGE_PARTS if part in figures]
    counts = [part for part in COUNT_PARTS if part in figures]
    lines: list[str] = []
    if images:
        rows = {f"{IMAGE_PARTS[part]} GiB": figures[part] for part in images}
        lines += ["", *table("one image of", rows, IMAGE_COLUMNS)]
    if counts:
        rows = {f"{COUNT_PARTS[part]:,}": figures[part] for part in counts}
        lines += ["", *table("backups", rows, COUNT_COLUMNS)]
    return "\n".join([*lines, ""])


def table(
    title: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[GrowthColumn]
) -> list[str]:
    headings = " | ".join(column.heading for column in columns)
    lines = [f"| {title} | {headings} |", "| --- |" + " ---: |" * len(columns)]
    for name, values in rows.items():
        cells = [f"{values[column.figure] / column.scale:,.{column.digits}f}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


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


def image_figures(work: Path, size_gib: int) -> dict[str, float]:
    with subject_in(work) as subject:
        make_unique(subject.source, size_gib)
        subject.prepare()
        with memory_of(subject) as held:
            seconds = subject.full().seconds
            lookups = index_lookups(subject)
        subject.source.unlink()
        with subject.mounted() as (latest, ready), memory_of(subject, held):
            watch = Stopwatch()
            read_block(latest, (size_gib << 30) // 2)
            opened = watch.stop()
            patched = median_patch(subject.head, (size_gib << 30) // 3)
        return {
            "copy": seconds / size_gib,
            "lookups": lookups / size_gib,
            "ready": ready,
            "open": opened,
            "patch": patched,
            "memory": held.anonymous,
            "mapped": held.mapped,
        }


def count_figures(work: Path, count: int) -> dict[str, float]:
    with subject_in(work) as subject:
        make_unique(subject.source, 1 / 64)
        subject.prepare()
        subject.full()
        command = [sys.executable, "-c", MAKE_BACKUPS, subject.repository, str(count)]
        subprocess.run(command, env={**os.environ, **subject.environment}, check=True)
        with subject.mounted() as (_latest, first):
            pass
        with subject.mounted() as (_latest, ready), memory_of(subject) as held:
            folder = subject.mountpoint / "volumes" / "volume"
            listed = measure.run("ls", "-l", folder).seconds
            patched = median_patch(subject.head, BLOCK_SIZE)
        return {
            "first": first,
            "ready": ready,
            "list": listed,
            "patch": patched,
            "memory": held.anonymous,
            "mapped": held.mapped,
        }


@dataclass
class Held:
    """The most that a daemon held in memory, in bytes, as seen ten times a second."""

    anonymous: int = 0  # its own
    mapped: int = 0  # of files, shared with the page cache: the system may take these back


@contextmanager
def memory_of(subject: BackupfsMount, held: Held | None = None) -> Iterator[Held]:
    """Watch the daemon of a mount meanwhile."""
    assert subject.daemon is not None
    process_id = subject.daemon.pid
    held = held or Held()
    ended = threading.Event()

    def watch() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(0.1)
            anonymous, mapped = measure.resident_now(process_id)
            held.anonymous = max(held.anonymous, anonymous)
            held.mapped = max(held.mapped, mapped)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()


def index_lookups(subject: BackupfsMount) -> int:
    status = json.loads((subject.mountpoint / ".backupfs" / "status.json").read_text())
    return int(status["index_lookups"])


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


def median_patch(head: Path, offset: int) -> float:
    """Seconds of a patch, each of another chunk; a moment lies between, for what follows a close."""
    seconds = []
    for number in range(PATCH_COUNT):
        seconds.append(patch_block(head, offset + number * CHUNK_SIZE))
        time.sleep(0.3)
    return statistics.median(seconds)


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
