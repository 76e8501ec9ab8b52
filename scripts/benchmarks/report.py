"""Turns measurements into Markdown: medians, each behind its ratio to backupfs through the mount."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
# Around what is measured in a document; the rest of it is written by hand.
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

# Figures by subject and name; a list has one value for each run.
Figures = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure as a column; ``scale`` divides it, ``digits`` follow the point."""

    figure: str
    heading: str
    scale: float = 1
    digits: int = 2
    with_ratio: bool = True


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def put_into(path: Path, text: str) -> None:
    """Replace what stands between the marks of a document, or make one of nothing else."""
    document = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")


def backup_columns(generations: Sequence[str]) -> list[Column]:
    columns = [
        Column(figure="full seconds", heading="full, s"),
        Column(figure="full stored", heading="stored, MiB", scale=MIB, digits=0),
    ]
    for name in generations:
        columns += [
            Column(figure=f"{name} seconds", heading=f"{name}, s"),
            Column(figure=f"{name} added", heading=f"{name} adds, MiB", scale=MIB, digits=1),
        ]
    return [
        *columns,
        Column(figure="restore seconds", heading="restore, s"),
        Column(figure="collect seconds", heading="delete and gc, s"),
        Column(figure="peak", heading="peak memory, MiB", scale=MIB, digits=0, with_ratio=False),
    ]


EXTREME_COLUMNS = [
    Column(figure="zeros seconds", heading="zeros, s"),
    Column(figure="random seconds", heading="random, s"),
    Column(figure="random stored", heading="random stored, MiB", scale=MIB, digits=0),
]

READ_COLUMNS = [
    Column(figure="ready seconds", heading="ready, s"),
    Column(figure="cold rate", heading="all, cold, MB/s", scale=1e6, digits=0),
    Column(figure="second rate", heading="again, MB/s", scale=1e6, digits=0),
    Column(figure="random cold 1", heading="4 KiB cold, IOPS", digits=0),
    Column(figure="random cold 1 median", heading="p50, µs", scale=1e-6, digits=0),
    Column(figure="random warm 1", heading="warm, IOPS", digits=0),
    Column(figure="random warm 1 median", heading="p50, µs", scale=1e-6, digits=0),
    Column(figure="random cold 4", heading="4 jobs cold, IOPS", digits=0),
    Column(figure="random cold 4 median", heading="p50, µs", scale=1e-6, digits=0),
]


def table(figures: Figures, titles: Mapping[str, str], columns: Sequence[Column]) -> str:
    """One row for each subject that has any of the figures; the first is what ratios refer to."""
    reference = next(iter(figures.values()), {})
    lines = [
        "| | " + " | ".join(column.heading for column in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for subject, values in figures.items():
        if any(values.get(column.figure) for column in columns):
            cells = [cell(values, reference, column) for column in columns]
            lines.append(f"| {titles[subject]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(
    values: Mapping[str, Sequence[float]],
    reference: Mapping[str, Sequence[float]],
    column: Column,
) -> str:
    if not values.get(column.figure):
        return "–"
    median = statistics.median(values[column.figure])
    text = f"{median / column.scale:,.{column.digits}f}"
    if not column.with_ratio or not reference.get(column.figure):
        return text
    base = statistics.median(reference[column.figure])
    return f"×{median / base:.2f} · {text}" if base else text


# -- the machine ---------------------------------------------------------------------------------


def machine(work: Path) -> list[str]:
    """What the figures were measured on, a line for each part."""
    return [
        f"{os.cpu_count()} × {processor()}, {memory_size() / (1 << 30):.0f} GiB",
        f"{distribution()}, Linux {platform.release()}, Python {platform.python_version()}",
        f"work folder on {file_system(work)}",
    ]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_size() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def file_system(folder: Path) -> str:
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", folder]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "an unknown file system"
