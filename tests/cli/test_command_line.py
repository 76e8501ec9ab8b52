"""The program around the commands: help, wrong usage, and every way a command can end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from command_line import Run

from backupfs import __version__
from backupfs.cli import main as program
from backupfs.errors import (
    BackupfsError,
    Busy,
    Cancelled,
    CorruptBlob,
    InvalidOption,
    StorageFull,
)

COMMAND = [sys.executable, "-m", "backupfs.cli.main"]


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the command "stats" end with ``error``."""

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("backupfs.service.Service.open", fail)


# -- help --------------------------------------------------------------------------------------


def test_help_lists_every_command(run: Run) -> None:
    shown = run("--help")

    assert shown.code == 0
    assert all(f"\n  {command} " in shown.out for command in program.MODULES)


def test_help_imports_neither_the_engine_nor_rich() -> None:
    code = (
        "import sys; from backupfs.cli.main import main; main(['--help']);"
        "print([name for name in ('backupfs.format', 'backupfs.service', 'rich') if name in sys.modules])"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.endswith("[]\n")


@pytest.mark.parametrize("name", program.MODULES)
def test_help_of_a_command_teaches_by_example(run: Run, name: str) -> None:
    shown = run(name, "--help")

    assert shown.code == 0
    assert f"backupfs {name} " in shown.out.partition("Usage:")[2].partition("\n")[2]


@pytest.mark.parametrize("name", program.MODULES)
def test_line_in_the_list_is_the_first_of_the_commands_help(name: str) -> None:
    lines = {
        command: line
        for modules in program.FAMILIES.values()
        for commands in modules.values()
        for command, line in commands.items()
    }
    command = program.commands.get_command(click.Context(program.commands), name)

    assert command is not None and command.name == name
    assert (command.help or "").partition("\n")[0] == lines[name]


def test_version(run: Run) -> None:
    assert run("--version").out == f"backupfs {__version__}\n"


# -- wrong usage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "missing command (see 'backupfs --help')"),
        (("snapshot",), "no such command 'snapshot'"),
        (("--fast",), "no such option '--fast'"),
        (("list",), "missing argument 'REPO' (see 'backupfs list --help')"),
        (("list", "r", "--colour"), "no such option '--colour'"),
        (("restore", "r", "id"), "missing argument 'DEST'"),
        (("init", "r", "--chunk-size", "64Q"), "'64Q' is not a size"),
        (("prune", "r"), "--keep rule"),
        (("prune", "r", "--keep-daily", "0"), "--keep rule"),
        (("prune", "r", "--keep-daily", "-1"), "-1"),
        (("delete", "r"), "missing argument 'BACKUP...'"),
        (("backup", "r", "a", "b", "--volume", "v"), "--volume goes with one SOURCE only"),
        (("backup", "r", "-"), "give --volume"),
        (("backup", "r", "x/a.img", "y/a.raw"), "several sources would be volume 'a'"),
    ],
)
def test_wrong_usage_is_one_line_and_2(run: Run, words: tuple[str, ...], text: str) -> None:
    ended = run(*words)

    assert ended.code == 2
    assert text in ended.error_line
    assert ended.out == ""


def test_first_word_that_is_a_place_mounts_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    for place in ("here", str(tmp_path / "absent"), "s3://bucket/prefix"):
        ended = run(place, "-o", "ro")
        assert "missing argument 'MOUNTPOINT' (see 'backupfs mount --help')" in ended.error_line


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StorageFull(reason="/srv"), 1, "no space left in the repository's storage (/srv)"),
        (InvalidOption(option="x", reason="no"), 2, "option 'x': no"),
        (
            CorruptBlob(blob_id="ab", pack_id="cd", offset=5, reason="flipped"),
            3,
            "blob ab in pack cd at offset 5 is damaged: flipped",
        ),
        (Cancelled(what="backup"), 130, "cancelled: backup"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv"), 1, "'/srv': Permission den"),
        (OSError("no number"), 1, "no number"),
        (ZeroDivisionError("oh"), 1, "internal error: ZeroDivisionError: oh"),
        (Busy(what="gc\x1b[2J", holder="a\nb"), 1, r"gc\x1b[2J is in use by a\nb"),
        (BackupfsError(), 1, "backupfs failed"),
    ],
)
def test_every_failure_is_one_line_and_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    failing_with(monkeypatch, error)

    ended = run("stats", "r")

    assert ended.code == code
    assert ended.error_line.startswith(line)


def test_debug_shows_the_traceback_before_the_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, StorageFull(reason="/srv"))

    ended = run("--debug", "stats", "r")

    assert ended.code == 1
    assert ended.err.startswith("Traceback")
    assert ended.err.endswith("\nbackupfs: no space left in the repository's storage (/srv)\n")


def test_absent_repository_is_said_so(run: Run, tmp_path: Path) -> None:
    ended = run("list", tmp_path / "absent")

    assert ended.code == 1
    assert "no backupfs repository at" in ended.error_line


def test_reader_that_goes_away_is_no_drama() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    ended = subprocess.run(
        [*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)

    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_a_failure() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert ended.returncode == 1
    assert ended.stderr == "backupfs: No space left on device\n"
