"""The soak of power cuts: random programs, cut in many ways, until the time is over.

Each round is a new repository and a few programs, each on what a power cut left of the one before.
The program of a round depends on the seed alone; what a power cut leaves depends on the order of the
engine's threads as well.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from support.crash_check import BrokenPromiseError, Explorer
from support.crash_program import RandomProgram
from support.images import CHUNK_SIZE, PACK_SIZE

from backupfs.repository import gc, sessions
from backupfs.service import init

PROGRAMS = 4
ACTS_MAX = 25
CUTS = 60  # of each program
PROGRESS_SECONDS = 10.0


def run_round(folder: Path, seed: str) -> int:
    """Power cuts examined. Raises: BrokenPromiseError."""
    repository = folder / "repository"
    init(str(repository), chunk_size=CHUNK_SIZE, pack_size=PACK_SIZE)
    explorer = Explorer(repository, folder)
    for number in range(PROGRAMS):
        rng = random.Random(f"{seed}-{number}")
        explorer.run(RandomProgram(rng, rng.randint(5, ACTS_MAX)), rng, count_max=CUTS)
    return explorer.count


def run(*, minutes: float, seed: int, work: Path | None) -> int:
    """An exit code."""
    logging.disable(logging.CRITICAL)
    # Two threads of one process need not wait for each other as processes do.
    sessions.POLL_SECONDS = gc.ACKNOWLEDGE_POLL_SECONDS = 0.002
    deadline = time.monotonic() + minutes * 60
    told_at, rounds, cuts = time.monotonic(), 0, 0
    while time.monotonic() < deadline:
        rounds += 1
        with tempfile.TemporaryDirectory(prefix="backupfs-soak-", dir=work) as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            try:
                cuts += run_round(Path(folder), f"{seed}-{rounds}")
            except BrokenPromiseError as error:
                print(f"broken in round {rounds} of seed {seed}: {error}", file=sys.stderr)
                return 1
        if time.monotonic() - told_at > PROGRESS_SECONDS:
            print(f"{rounds} rounds, {cuts} power cuts", flush=True)
            told_at = time.monotonic()
    print(f"{rounds} rounds, {cuts} power cuts; nothing is broken")
    return 0
