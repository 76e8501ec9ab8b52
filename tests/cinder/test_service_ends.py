"""The service is killed in the middle of an operation, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cinder import objects
from cinder.objects import fields
from stand_ins import MIB, eventually, image, is_alive, workers_alive

SIGNALS = [signal.SIGKILL, signal.SIGTERM]


@contextmanager
def half_way(cloud, verb, backup) -> Iterator[subprocess.Popen[str]]:
    """A service in the middle of an operation on a backup."""
    script = Path(__file__).parent / "service.py"
    words = [verb, str(cloud.folder), str(cloud.database), backup.id, str(16 * MIB)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), *words], stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == "half-way\n"
            yield service
        finally:
            service.kill()
            service.wait(30)


def end(service: subprocess.Popen[str], number: signal.Signals) -> None:
    """By SIGTERM as systemd does it: it is for the service and for all that the service started."""
    (worker,) = workers_alive(service.pid)
    service.send_signal(number)
    if number == signal.SIGTERM:
        os.kill(worker, number)
    service.wait(30)
    eventually(lambda: not is_alive(worker))


def start_again(cloud) -> None:
    cloud.manager = cloud.new_manager()
    cloud.manager.is_initialized = False
    cloud.manager.init_host()
    eventually(cloud.manager.is_working)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_backup_of_a_service_that_ended_failed_and_gc_frees_its_space(cloud, number):
    volume = cloud.volume(image(32 * MIB, holes=False))
    backup = cloud.new_backup(volume)

    with half_way(cloud, "backup", backup) as service:
        end(service, number)
        start_again(cloud)

    assert cloud.reread(backup).status == fields.BackupStatus.ERROR
    assert objects.Volume.get_by_id(cloud.context, volume.id).status == "available"
    assert cloud.stored() == []
    cloud.run("gc", cloud.repository)
    assert cloud.pack_size() == 0
    cloud.delete(backup)
    assert cloud.back_up(volume).status == fields.BackupStatus.AVAILABLE


def test_restore_of_a_service_that_ended_can_be_done_again(cloud):
    data = image(32 * MIB, holes=False)
    volume = cloud.volume(data)
    backup = cloud.back_up(volume)

    with half_way(cloud, "restore", backup) as service:
        end(service, signal.SIGKILL)
        start_again(cloud)

    backup = cloud.reread(backup)
    assert backup.status == fields.BackupStatus.AVAILABLE
    assert objects.Volume.get_by_id(cloud.context, volume.id).status == "error_restoring"
    cloud.restore(backup, volume, is_new=False)
    assert cloud.path(volume.id).read_bytes() == data
