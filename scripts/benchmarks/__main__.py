"""The order of a measurement: make the images, let every subject work on them, print the tables."""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import measure, report
from benchmarks.measure import MeasurementFailed
from benchmarks.reading import choose_offsets, read_randomly, read_through
from benchmarks.subjects import SUBJECTS, BackupfsCommand, Subject
from benchmarks.workload import GENERATIONS, Workload, data_ranges, make_workload

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
        epilog="Example: scripts/bench --size 256M --runs 1 --only mount,command,cp",
    )
    add = parser.add_argument
    add("--size", type=parse_size, default="2G", help="size of the base image (default 2G)")
    add("--runs", type=int, default=3, help="medians are taken of this many runs (default 3)")
    add("--seed", type=int, default=1, help="chooses files and changes (default 1)")
    add("--only", default=",".join(SUBJECTS), help=f"of {','.join(SUBJECTS)} (default: all)")
    add("--generations", default="gen1", help=f"of {','.join(GENERATIONS)} (default gen1)")
    add("--no-reads", action="store_true", help="leave out the reads through mounts")
    add("--work", type=Path, help="folder to work in; its images are kept for the next time")
    add("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    arguments.generations = arguments.generations.split(",")
    for name in arguments.only:
        if name not in SUBJECTS:
            parser.error(f"--only {name}: not one of {', '.join(SUBJECTS)}")
    for name in arguments.generations:
        if name not in GENERATIONS:
            parser.error(f"--generations {name}: not one of {', '.join(GENERATIONS)}")
    return arguments


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Bench:
    """The figures, and what each of them needs."""

    def __init__(self, arguments: argparse.Namespace, work: Path, workload: Workload) -> None:
        self.arguments = arguments
        self.work = work
        self.workload = workload
        self.source = work / "run" / "volume.img"
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.failures: list[str] = []
        self.ours_failed = False  # a peer that cannot do something is a line in the report
        self.offsets = {
            jobs: choose_offsets(workload.base, jobs=jobs, seed=arguments.seed) for jobs in (1, 4)
        }

    def run(self, names: list[str]) -> None:
        for name in names:
            self.figures[name] = defaultdict(list)
        for number in range(1, self.arguments.runs + 1):
            for name in names:
                say(f"run {number} of {self.arguments.runs}: {name}")
                self.run_subject(name)

    def run_subject(self, name: str) -> None:
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        subject = SUBJECTS[name](folder / name, self.source)
        try:
            with ExitStack() as ending:
                ending.callback(self.finish, name, subject)
                self.measure(name, subject)
        except (MeasurementFailed, OSError) as error:
            self.failures.append(f"{SUBJECTS[name].title}: {error}")
            self.ours_failed |= issubclass(SUBJECTS[name], BackupfsCommand)
            say(f"{name} failed: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, name: str, subject: Subject) -> None:
        self.place(self.workload.base)
        subject.prepare()
        self.note_cost(name, "full", subject.full())
        stored = subject.stored_size()
        self.note(name, "full stored", stored)
        latest = self.workload.base
        for generation in self.workload.generations:
            latest = generation.image
            self.place(latest)
            self.note_cost(name, generation.name, subject.incremental(generation))
            stored, before = subject.stored_size(), stored
            self.note(name, f"{generation.name} added", stored - before)
        self.measure_restore(name, subject, latest)
        if subject.mountable and not self.arguments.no_reads:
            self.measure_reads(name, subject)

    def measure_restore(self, name: str, subject: Subject, expected: Path) -> None:
        target = self.work / "run" / "restored.img"
        measure.drop_caches()
        self.note_cost(name, "restore", subject.restore(target))
        if not filecmp.cmp(target, expected, shallow=False):
            raise MeasurementFailed("what was restored differs from what was backed up")
        target.unlink()

    def measure_reads(self, name: str, subject: Subject) -> None:
        size = self.source.stat().st_size
        with subject.mounted() as (image, ready):
            self.note(name, "ready seconds", ready)
            self.note(name, "cold rate", size / read_through(image))
            self.note(name, "second rate", size / read_through(image))
        for jobs, offsets in self.offsets.items():
            with subject.mounted() as (image, _):
                for kind in ("cold", "warm") if jobs == 1 else ("cold",):
                    reads = read_randomly(image, offsets, self.work / "run")
                    self.note(name, f"random {kind} {jobs}", reads.per_second)
                    self.note(name, f"random {kind} {jobs} median", reads.median_seconds)

    def finish(self, name: str, subject: Subject) -> None:
        cost = subject.finish()
        if cost is not None and cost.peak_size:
            self.note(name, "peak", cost.peak_size)

    def place(self, image: Path) -> None:
        """Make ``source`` be ``image``, in the page cache, with nothing left to be written."""
        self.source.unlink(missing_ok=True)
        self.source.hardlink_to(image)
        measure.stored_size(self.work / "run")
        measure.warm(self.source)

    def note(self, name: str, figure: str, value: float) -> None:
        self.figures[name][figure].append(value)

    def note_cost(self, name: str, action: str, cost: measure.Cost) -> None:
        self.note(name, f"{action} seconds", cost.seconds)
        if cost.peak_size is not None:
            self.note(name, f"{action} peak", cost.peak_size)

    def peaks(self) -> None:
        """The peak of a subject that runs as commands is that of its largest one."""
        for values in self.figures.values():
            peaks = [max(values[key]) for key in list(values) if key.endswith(" peak")]
            if peaks and "peak" not in values:
                values["peak"] = [max(peaks)]


def describe(bench: Bench, versions: list[str], *, cold: bool) -> str:
    arguments, workload = bench.arguments, bench.workload
    columns = report.backup_columns(arguments.generations)
    titles = {name: subject.title for name, subject in SUBJECTS.items()}
    data_size = sum(end - start for start, end in data_ranges(workload.base))
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `scripts/bench {' '.join(sys.argv[1:])}`".strip(),
        "",
        f"- base: ext4, {workload.base.stat().st_size / report.MIB:.0f} MiB, "
        f"{data_size / report.MIB:.0f} MiB of it data",
    ]
    for generation in workload.generations:
        lines.append(
            f"- {generation.name}: {generation.changed_size / report.MIB:.1f} MiB rewritten "
            f"in {len(generation.extents)} places"
        )
    lines += [f"- {line}" for line in report.machine(bench.work)]
    lines += [
        f"- {', '.join(versions)}",
        f"- medians of {arguments.runs}; in brackets the ratio to the first row; everything durable; "
        "sources in the page cache, repositories not"
        + ("" if cold else " (caches kept: not root)"),
        f"- peaks below {measure.resident_peak(os.getpid()) / report.MIB:.0f} MiB cannot be told",
        "",
        report.table(bench.figures, titles, columns),
        "",
    ]
    if not arguments.no_reads:
        lines += [report.table(bench.figures, titles, report.READ_COLUMNS), ""]
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
        bench, versions, absent = prepare(arguments, work)
        bench.run([name for name in arguments.only if name not in absent])
        bench.peaks()
        text = describe(bench, versions, cold=measure.drop_caches())
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    return 1 if bench.ours_failed else 0


def prepare(arguments: argparse.Namespace, work: Path) -> tuple[Bench, list[str], list[str]]:
    """The bench, the versions of what takes part, and the subjects that are not installed."""
    say(f"making the images in {work}")
    # In a process of its own: its memory would be counted as that of small commands.
    with ProcessPoolExecutor(max_workers=1) as pool:
        workload = pool.submit(
            make_workload,
            work / "images",
            size=arguments.size,
            seed=arguments.seed,
            names=arguments.generations,
        ).result()
    found = {name: SUBJECTS[name].version() for name in arguments.only}
    absent = [name for name, version in found.items() if version is None]
    for name in absent:
        say(f"{name} is not installed and left out")
    versions = list(dict.fromkeys(version for version in found.values() if version is not None))
    return Bench(arguments, work, workload), versions, absent


if __name__ == "__main__":
    sys.exit(main())
