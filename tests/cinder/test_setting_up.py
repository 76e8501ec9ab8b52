"""Configuring the driver, and the check that Cinder makes before it gives it work."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cinder import exception, interface
from cinder.backup.driver import BackupDriver
from cinder.interface import backup_driver
from cinder.objects import fields
from oslo_config import cfg
from stand_ins import MIB, eventually, image

from backupfs.cinder import BackupfsBackupDriver

CONF = cfg.CONF


def test_repository_that_is_fine_passes_the_check(cloud):
    BackupfsBackupDriver(context=cloud.context).check_for_setup_error()


@pytest.mark.parametrize("what", ["unset", "missing", "empty", "a file"])
def test_what_is_no_repository_fails_the_check(cloud, tmp_path, what, caplog):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    CONF.set_override(
        "backup_backupfs_repository", None if what == "unset" else str(tmp_path / what)
    )

    with pytest.raises(exception.InvalidConfigurationValue, match="backup_backupfs_repository"):
        BackupfsBackupDriver(cloud.context).check_for_setup_error()

    assert "The backupfs repository cannot be used: " in caplog.text
    assert ("it is not set" if what == "unset" else "backupfs init") in caplog.text


@pytest.mark.parametrize(("mode", "why"), [(0o000, "Permission denied"), (0o555, "cannot be")])
def test_repository_of_somebody_else_fails_the_check(cloud, tmp_path, monkeypatch, mode, why):
    """One that the service's user may not read, or not write to."""
    monkeypatch.setattr("sys.executable", as_a_mere_owner(tmp_path))
    repository = Path(cloud.repository)
    folders = [repository, *(path for path in repository.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(mode)
    try:
        with pytest.raises(exception.BackupDriverException, match=why):
            BackupfsBackupDriver(cloud.context).check_for_setup_error()
    finally:
        for folder in folders:
            folder.chmod(0o755)


def as_a_mere_owner(folder: Path) -> str:
    """A Python that has to obey the modes of files, also where the tests are run by root."""
    command = [sys.executable]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root obeys no modes, and there is no setpriv")
        command = [setpriv, "--bounding-set=-dac_override,-dac_read_search", "--", *command]
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_damaged_repository_fails_the_check(cloud):
    config = Path(cloud.repository) / "config"
    config.chmod(0o600)
    config.write_bytes(b"nothing")

    with pytest.raises(exception.BackupDriverException):
        BackupfsBackupDriver(cloud.context).check_for_setup_error()


def test_service_without_its_repository_takes_no_work_until_it_is_started_again(cloud, caplog):
    repository = Path(cloud.repository)
    repository.rename(cloud.repository + "-elsewhere")
    volume = cloud.volume(image(MIB))
    backup = cloud.new_backup(volume)
    cloud.manager.is_initialized = False

    cloud.manager.setup_backup_backend(cloud.context)
    eventually(lambda: "The backupfs repository cannot be used: " in caplog.text)
    with pytest.raises(exception.InvalidBackup, match="service is down"):
        cloud.make(backup, volume)
    Path(cloud.repository + "-elsewhere").rename(repository)
    restarted = cloud.new_manager()
    restarted.is_initialized = False
    restarted.setup_backup_backend(cloud.context)
    eventually(restarted.is_working)

    assert not cloud.manager.is_working()
    assert cloud.reread(backup).status == fields.BackupStatus.ERROR
    cloud.manager = restarted
    assert cloud.back_up(volume).status == fields.BackupStatus.AVAILABLE


def test_driver_can_delete_by_force(cloud):
    assert cloud.manager.check_support_to_force_delete(cloud.context)


@pytest.mark.parametrize("base", [backup_driver.BackupDriver, BackupDriver])
def test_driver_has_every_method_of_cinders_interface(base):
    for name, method in inspect.getmembers(base, inspect.isfunction):
        expected = list(inspect.signature(method).parameters)
        ours = list(inspect.signature(getattr(BackupfsBackupDriver, name)).parameters)

        assert ours[: len(expected)] == expected, name


def test_driver_is_registered_and_lists_its_options():
    names = {option.name for option in BackupfsBackupDriver.get_driver_options()}
    (listed,) = entry_points(group="oslo.config.opts", name="backupfs.cinder")

    assert BackupfsBackupDriver in interface._backup_register
    assert "backup_backupfs_repository" in names
    assert {option.name for option in listed.load()()[0][1]} == names


def test_generator_writes_a_sample_of_the_options():
    """As operators make their cinder.conf; it finds the options by the entry point."""
    result = subprocess.run(
        [sys.executable, "-m", "oslo_config.generator", "--namespace", "backupfs.cinder"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "[DEFAULT]" in result.stdout
    for option in BackupfsBackupDriver.get_driver_options():
        assert f"#{option.name} = " in result.stdout
        assert option.help[:40] in result.stdout
