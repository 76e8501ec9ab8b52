"""The soak (see ``soak_rounds``) for about a minute, always with the same draws."""

from __future__ import annotations

from pathlib import Path

import soak_rounds
from command_server import CommandServer
from lifecycle_mount import MIB

SECONDS = 60.0
SEED = 20261122
ROUNDS_MIN = 30  # on a slow machine too; else it proves little


def test_random_use_with_kills_agrees_with_the_model(
    tmp_path: Path, commands: CommandServer
) -> None:
    soak = soak_rounds.run(tmp_path / "site", commands, seconds=SECONDS, seed=SEED, out=False)

    print(soak.describe())
    assert soak.rounds >= ROUNDS_MIN
    assert soak.counts["daemons killed"] and soak.counts["gc"]
    assert soak.memory_peak < 256 * MIB
