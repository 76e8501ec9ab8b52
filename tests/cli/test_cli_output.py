"""Tables, JSON and progress on the streams of a process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, on_terminal

from backupfs.cli.output import Column, in_steps, print_json, print_table, progress, report

COLUMNS = (Column("NAME", is_whole=False), Column("SIZE", is_number=True))


def python_on_terminal(code: str, *, columns: int) -> str:
    imports = "from backupfs.cli.output import *\n"
    status, shown = on_terminal([sys.executable, "-c", imports + code], columns=columns)
    assert status == 0, shown
    return shown


def test_table_for_a_pipe_has_each_row_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = "n" * 300

    print_table(COLUMNS, [(name, "7 B"), ("[bold]:smile:", "12 KiB")])

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["NAME", "SIZE"], [name, "7", "B"], ["[bold]:smile:", "12", "KiB"]]


def test_table_for_a_terminal_folds_what_may_be_folded() -> None:
    code = "print_table([Column('NAME', is_whole=False), Column('SIZE')], [('n' * 100, '7 B')])"

    shown = python_on_terminal(code, columns=40)

    rows = shown.splitlines()[1:]
    assert max(map(len, rows)) <= 40
    assert shown.count("n") == 100


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"volume": "grün\x1b[2J\u202e\n"}

    print_json(value)

    shown = capsys.readouterr().out
    assert shown.isascii() and "\x1b" not in shown
    assert json.loads(shown) == value


def test_error_line_survives_a_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", closed)

    report("nobody hears this")


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("vm", total=100) as advance:
        advance(100)

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [8 << 20, None])
def test_progress_on_a_terminal_names_what_is_done(total: int | None) -> None:
    code = f"with progress('backing up [red]', total={total}) as advance: advance(4 << 20)"

    shown = python_on_terminal(code, columns=100)

    assert "backing up [red]" in shown
    assert "4.0" in shown


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_long_work_on_a_repository_shows_how_much_is_left(
    repo: Path, backup: dict[str, Any], command: str
) -> None:
    """A bar without an end tells nothing after the first hour."""
    words = [sys.executable, "-m", "backupfs.cli.main", command, str(repo)]

    status, shown = on_terminal(words, columns=100)

    assert status == 0, shown
    assert "/1.5 MiB" in shown and "/?" not in shown


def test_progress_hears_of_work_in_steps() -> None:
    heard: list[int] = []
    advance = in_steps(heard.append)

    for _ in range(33):
        advance(65536)

    assert heard == [1 << 20, 1 << 20]


def test_whole_output_of_a_list_fits_a_script(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    shown = run("list", repo)

    titles, row = shown.out.splitlines()
    assert titles.split() == ["ID", "VOLUME", "BACKUP", "KIND", "SIZE", "DATA", "STORED"]
    assert row.split()[:4] == [backup["id"][:8], "vm", backup["name"][:-4], "full"]
