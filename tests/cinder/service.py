"""A backup service in a process of its own, for tests that end it: python service.py VERB ….

It does one operation on a volume that comes to a standstill half-way, says so on its standard output,
and waits there for its end.
"""

# ruff: noqa: E402  # Cinder decides how threads are made before anything else is imported
from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

os.environ["OS_CINDER_DISABLE_EVENTLET_PATCHING"] = str(
    int(os.environ["BACKUPFS_CINDER_MODE"] == "threading")
)
from cinder import monkey_patch

monkey_patch.patch()

import pytest
from cinder import objects

objects.register_all()

from cloud import Cloud
from stand_ins import Wrapper


def main() -> None:
    verb, folder, database, backup_id, stop_at = sys.argv[1:]
    cloud = Cloud(Path(folder), pytest.MonkeyPatch(), database=Path(database))
    backup = objects.Backup.get_by_id(cloud.context, backup_id)
    volume = objects.Volume.get_by_id(cloud.context, backup.volume_id)
    wrapper = Wrapper(cloud.path(volume.id))

    def stand_still(position: int) -> None:
        if position == int(stop_at):
            print("half-way", flush=True)
            threading.Event().wait()

    wrapper.on_read = wrapper.on_write = stand_still
    cloud.attach_as(volume, wrapper)
    if verb == "backup":
        cloud.make(backup, volume)
    else:
        cloud.restore(backup, volume, is_new=False)


if __name__ == "__main__":
    main()
