"""The order of a measurement: make the images, let every subject work on them, print the tables."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import growth, measure, plot, report
from benchmarks.bench import READINGS, Bench, keep_figures, known_figures
from benchmarks.peers import SUBJECTS
from benchmarks.workload import EXTREMES, GENERATIONS, data_ranges, make_workload

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in UNITS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 256M or 2G")
    return int(number) * UNITS[unit]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure backupfs beside other tools; prints Markdown tables.",
        epilog="Examples: scripts/bench --size 256M --runs 1 --only mount,command,cp; "
        "scripts/bench --only '' --growth 1G,4G",
    )
    add = parser.add_argument
    add("--size", type=parse_size, default="2G", help="size of the base image (default 2G)")
    add("--runs", type=int, default=3, help="medians are taken of this many runs (default 3)")
    add("--seed", type=int, default=1, help="chooses files and changes (default 1)")
    every = ",".join(SUBJECTS)
    add("--only", default=every, help=f"of {every} (default: all; '' for none)")
    every = ",".join(GENERATIONS)
    add("--generations", default=every, help=f"of {every} (default: all)")
    every = ",".join(EXTREMES)
    add("--extremes", default=every, help=f"of {every} (default: all; '' for none)")
    add("--no-reads", action="store_true", help="leave out the reads through mounts")
    add("--work", type=Path, help="folder to work in; its images are kept for the next time")
    add("--figures", type=Path, help="add to the figures that this file has, and keep them in it")
    every = ",".join(growth.PARTS)
    help_growth = f"also measure how cost grows: all, or of {every}; takes 30 GiB of disk"
    add("--growth", nargs="?", const=every, default="", metavar="PARTS", help=help_growth)
    add("--output", type=Path, help="put the tables into this Markdown file, a plot beside it")
    arguments = parser.parse_args()
    arguments.only = [name for name in arguments.only.split(",") if name]
    arguments.growth = [part for part in arguments.growth.split(",") if part]
    arguments.generations = arguments.generations.split(",")
    arguments.extremes = [name for name in arguments.extremes.split(",") if name]
    for name in arguments.only:
        if name not in SUBJECTS:
            parser.error(f"--only {name}: not one of {', '.join(SUBJECTS)}")
    if arguments.output is not None and not arguments.only:
        parser.error("--output replaces the tables of subjects: name some with --only")
    for part in arguments.growth:
        if part not in growth.PARTS:
            parser.error(f"--growth {part}: not one of {', '.join(growth.PARTS)}")
    for name in arguments.generations:
        if name not in GENERATIONS:
            parser.error(f"--generations {name}: not one of {', '.join(GENERATIONS)}")
    for name in arguments.extremes:
        if name not in EXTREMES:
            parser.error(f"--extremes {name}: not one of {', '.join(EXTREMES)}")
    return arguments


def describe(bench: Bench, versions: list[str], *, cold: bool) -> str:
    arguments, workload = bench.arguments, bench.workload
    titles = {name: subject.title for name, subject in SUBJECTS.items()}
    data_size = sum(end - start for start, end in data_ranges(workload.base))
    command = shlex.join(["scripts/bench", *sys.argv[1:]])
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `{command}`",
        "",
        f"- base: ext4, {workload.base.stat().st_size / report.MIB:.0f} MiB, "
        f"{data_size / report.MIB:.0f} MiB of it data",
    ]
    for generation in workload.generations:
        lines.append(
            f"- {generation.name}: {generation.changed_size / report.MIB:.1f} MiB rewritten "
            f"in {len(generation.extents)} places, half of it random bytes"
        )
    for image in workload.extremes:
        size = image.stat().st_size / report.MIB
        lines.append(f"- {image.stem}: {size:.0f} MiB")
    lines += [f"- {line}" for line in report.machine(bench.work)]
    lines += [
        f"- {', '.join(versions)}",
        f"- medians of {bench.runs_made()}, of reads of a mount {READINGS} times as many; "
        "first the ratio to the first row; everything durable; sources in the page cache, repositories not"
        + ("" if cold else " (caches kept: not root)"),
        f"- peaks below {measure.resident_peak(os.getpid()) / report.MIB:.0f} MiB cannot be told",
        "",
    ]
    tables = [report.backup_columns(arguments.generations), report.EXTREME_COLUMNS]
    for columns in tables if arguments.no_reads else [*tables, report.READ_COLUMNS]:
        lines += [report.table(bench.figures, titles, columns), ""]
    lines += [f"- failed: {failure}" for failure in dict.fromkeys(bench.failures)]
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    # Ended from outside it unmounts and removes as after any failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as ending:
        if arguments.work is None:
            folder = tempfile.TemporaryDirectory(prefix="backupfs-bench-")
            work = Path(ending.enter_context(folder))
        else:
            work = arguments.work
            work.mkdir(parents=True, exist_ok=True)
        work = work.resolve()
        bench, text = None, ""
        if arguments.only:
            bench, versions, absent = prepare(arguments, work)
            bench.run([name for name in arguments.only if name not in absent])
            bench.note_peaks()
            text = describe(bench, versions, cold=measure.drop_caches())
        if arguments.growth:
            figures = known_figures(arguments.figures).get("growth", {})
            growth.measure_growth(work, arguments.growth, figures)
            keep_figures(arguments.figures, {"growth": figures})
            text += growth.tables(figures)
    print(text)
    if arguments.output is not None:
        report.put_into(arguments.output, text)
        if bench is not None:
            titles = {name: subject.title for name, subject in SUBJECTS.items()}
            arguments.output.with_suffix(".svg").write_text(plot.draw(bench.figures, titles))
    return 1 if bench is not None and bench.ours_failed else 0


def prepare(arguments: argparse.Namespace, work: Path) -> tuple[Bench, list[str], list[str]]:
    """The bench, the versions of what takes part, and the subjects that are not installed."""
    report.say(f"making the images in {work}")
    # In a process of its own: its memory would be counted as that of small commands.
    with ProcessPoolExecutor(max_workers=1) as pool:
        workload = pool.submit(
            make_workload,
            work / "images",
            size=arguments.size,
            seed=arguments.seed,
            names=arguments.generations,
            extremes=arguments.extremes,
        ).result()
    found = {name: SUBJECTS[name].version() for name in arguments.only}
    absent = [name for name, version in found.items() if version is None]
    for name in absent:
        report.say(f"{name} is not installed and left out")
    versions = list(dict.fromkeys(version for version in found.values() if version is not None))
    return Bench(arguments, work, workload), versions, absent


if __name__ == "__main__":
    sys.exit(main())
