"""Tests that draw at random, run again and again with other draws and for longer than in CI."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
# What is run, and what makes it longer; ``SEED`` is another number each time.
SUITES: dict[str, dict[str, dict[str, str]]] = {
    "inputs": {
        "format/test_hostile_decoders.py": {"BACKUPFS_FUZZ_EXAMPLES": "2000"},
        "cli/test_hostile_words.py": {"BACKUPFS_FUZZ_EXAMPLES": "2000"},
    },
    "at-once": {
        "repository/test_model_at_once.py": {
            "BACKUPFS_MODEL_EXAMPLES": "100",
            "BACKUPFS_MODEL_STEPS": "40",
        },
        "repository/test_promises_at_once.py": {
            "BACKUPFS_PROMISE_SECONDS": "40",
            "BACKUPFS_TEST_SEED": "SEED",
        },
        "repository/test_at_once.py": {"BACKUPFS_TEST_SEED": "SEED"},
        "mount/test_changing_heads.py": {
            "BACKUPFS_HEAD_SECONDS": "30",
            "BACKUPFS_TEST_SEED": "SEED",
        },
    },
}


def run(suite: str, *, minutes: float, seed: int) -> int:
    """Until the time is over or a test fails; its exit code."""
    deadline = time.monotonic() + minutes * 60
    rounds = 0
    while time.monotonic() < deadline:
        for path, longer in SUITES[suite].items():
            environment = {name: value.replace("SEED", str(seed)) for name, value in longer.items()}
            words = ["-m", "pytest", f"--hypothesis-seed={seed}", "--timeout=3600", TESTS / path]
            ended = subprocess.run(
                [sys.executable, *map(str, words)],
                env=os.environ | environment,
                capture_output=True,
                text=True,
                check=False,
                cwd=TESTS.parent,
            )
            if ended.returncode:
                print(ended.stdout[-20_000:], ended.stderr[-2000:], sep="\n", file=sys.stderr)
                print(f"{path} failed with seed {seed}", file=sys.stderr)
                return 1
        rounds, seed = rounds + 1, (seed + 1) % (1 << 32)
        print(f"{rounds} rounds of {', '.join(SUITES[suite])}", flush=True)
    return 0
