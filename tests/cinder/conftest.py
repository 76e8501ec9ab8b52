"""The driver under real Cinder, in the mode that ``BACKUPFS_CINDER_MODE`` names.

Cinder decides at its start between native threads and eventlet, for the whole process; so these
tests are runs of their own, one for each mode: scripts/test-cinder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

MODE = os.environ.get("BACKUPFS_CINDER_MODE", "")

if MODE:
    assert MODE in ("threading", "eventlet"), MODE
    os.environ["OS_CINDER_DISABLE_EVENTLET_PATCHING"] = str(int(MODE == "threading"))
    from cinder import monkey_patch

    monkey_patch.patch()

    # Cinder's modules count on this having been done by the program that imports them.
    from cinder import objects

    objects.register_all()

    if MODE == "eventlet":
        from eventlet import tpool

        tpool.setup()  # or the first test would be told that it left eventlet's own sockets open
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    if MODE:
        return f"cinder: {importlib.util.find_spec('cinder').origin}, {MODE} mode"
    return "cinder: its tests are run by scripts/test-cinder"


@pytest.fixture
def cloud(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Cinder's database, backup manager and a repository, all new; no test leaves a worker behind,
    or a connection to one."""
    from cloud import Cloud
    from stand_ins import processes_left, sockets_open

    before = sockets_open()
    made = Cloud(scratch, monkeypatch)
    yield made
    left_behind = processes_left(), sockets_open() - before
    made.close()
    assert left_behind == ({}, set())
