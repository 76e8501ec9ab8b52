"""Reads a file as programs do: from start to end, and 4 KiB here and there.

Also a program: ``python -m benchmarks.reading FILE OFFSETS`` reads the offsets that the file
``OFFSETS`` lists (JSON) and prints the seconds of each read; several of them make a crowd.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import MeasurementFailed, Stopwatch
from benchmarks.workload import BLOCK_SIZE, data_ranges

READ_SIZE = 128 << 10  # as cat and older cp read
READS_PER_JOB = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomReads:
    """What a number of jobs reached together."""

    per_second: float
    median_seconds: float


def read_through(path: Path) -> float:
    """Seconds to read all of a file once, in order."""
    buffer = bytearray(READ_SIZE)
    watch = Stopwatch()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return watch.stop()


def choose_offsets(image: Path, *, jobs: int, seed: int) -> list[list[int]]:
    """For each job other blocks among those of ``image`` that hold data, none of them twice."""
    rng = random.Random(f"{seed} reads")
    ranges = [(start // BLOCK_SIZE, -(-end // BLOCK_SIZE)) for start, end in data_ranges(image)]
    weights = [end - start for start, end in ranges]
    wanted = min(READS_PER_JOB * jobs, sum(weights) // 2)
    chosen: set[int] = set()
    while len(chosen) < wanted:
        start, end = rng.choices(ranges, weights)[0]
        chosen.add(rng.randrange(start, end) * BLOCK_SIZE)
    shuffled = sorted(chosen)
    rng.shuffle(shuffled)
    return [shuffled[job::jobs] for job in range(jobs)]


def read_randomly(path: Path, offsets: Sequence[Sequence[int]], work: Path) -> RandomReads:
    """Read with one process for each list of offsets, all at the same time."""
    processes = []
    for number, job_offsets in enumerate(offsets):
        listed = work / f"offsets-{number}.json"
        listed.write_text(json.dumps(job_offsets))
        command = [sys.executable, "-m", "benchmarks.reading", str(path), str(listed)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    latencies: list[float] = []
    per_second = 0.0
    for process in processes:
        printed, _ = process.communicate(timeout=600)
        if process.returncode != 0:
            raise MeasurementFailed(f"reading {path} failed")
        job = json.loads(printed)
        latencies += job
        per_second += len(job) / sum(job)
    return RandomReads(per_second=per_second, median_seconds=statistics.median(latencies))


def main() -> None:
    path, listed = sys.argv[1:]
    offsets = json.loads(Path(listed).read_text())
    latencies = []
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel reads no more than is asked
    for offset in offsets:
        started = time.perf_counter()
        if len(os.pread(file, BLOCK_SIZE, offset)) != BLOCK_SIZE:
            raise SystemExit(f"short read at {offset}")
        latencies.append(time.perf_counter() - started)
    os.close(file)
    json.dump(latencies, sys.stdout)


if __name__ == "__main__":
    main()
