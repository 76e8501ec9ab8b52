"""Where the command line's words go: tables and JSON to stdout, errors and progress to stderr.

``rich`` and the engine's types are imported where they are needed, not before: a help text is there
sooner than they are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from backupfs.cli.escaping import escaped
from backupfs.types import Progress, no_progress

# A progress bar hears of work in steps of this many bytes: drawing costs more than a chunk.
PROGRESS_STEP = 1 << 20

# As wide as any table: what is not a terminal gets each row in one line, nothing cut.
ENDLESS_WIDTH = 1 << 20


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column; ``is_whole`` for one that a narrow terminal must not break."""

    title: str
    is_number: bool = False
    is_whole: bool = True


def prepare() -> None:
    """Let neither a closed stream nor a character that the terminal lacks end a command half-way."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _open_closed_streams() -> None:
    """As nothing: what is opened next would get their numbers, and then what is written to them."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def print_line(text: str) -> None:
    """One line of result. What is not printable must have been escaped."""
    print(text)


def print_json(value: Any) -> None:
    """A result for scripts, in ASCII, so that no name reaches a terminal as it is."""
    from backupfs.cli.describe import as_json

    print(json.dumps(as_json(value), indent=2))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Rows of printable text below their titles; without any title, just the rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_titled = any(column.title for column in columns)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=is_titled)
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_whole,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    width = None if sys.stdout.isatty() else ENDLESS_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        print(line.rstrip())


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names with their values, one pair a line."""
    print_table([Column(""), Column("", is_whole=False)], pairs)


def report(text: str) -> None:
    """One line to stderr about something that went wrong; cannot fail."""
    with suppress(OSError, ValueError):
        print(f"backupfs: {escaped(text)}", file=sys.stderr, flush=True)


class ReportingHandler(logging.Handler):
    """Shows what the engine logs about trouble that does not end the command."""

    def emit(self, record: logging.LogRecord) -> None:
        report(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def reported_log() -> Iterator[None]:
    """Report warnings and worse of the engine while the block runs."""
    logging.getLogger("backupfs").addHandler(ReportingHandler(logging.WARNING))
    try:
        yield
    finally:
        end_reported_log()


def end_reported_log() -> None:
    """For a command that from now on has a log of its own."""
    logger = logging.getLogger("backupfs")
    for handler in list(logger.handlers):
        if isinstance(handler, ReportingHandler):
            logger.removeHandler(handler)


def settle() -> None:
    """Write out what stdout still holds, or drop it where that fails.

    Otherwise the interpreter would try again at its end, and complain in its own way.
    """
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def progress(label: str, *, total: int | None = None) -> Iterator[Progress]:
    """Show a bar on stderr while the block runs, if that is a terminal, and wipe it afterwards.

    ``total`` is in bytes; None where it is unknown. ``label`` must be printable.
    """
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich import progress as bars
    from rich.console import Console

    shown = bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        *([bars.TimeRemainingColumn()] if total else []),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with shown:
        task = shown.add_task(label, total=total)
        yield in_steps(lambda size: shown.advance(task, size))


def in_steps(advance: Progress) -> Callable[[int], None]:
    """A ``Progress`` that passes on what it hears a megabyte at a time."""
    pending = 0

    def advance_in_steps(size: int) -> None:
        nonlocal pending
        pending += size
        if pending >= PROGRESS_STEP:
            advance(pending)
            pending = 0

    return advance_in_steps
