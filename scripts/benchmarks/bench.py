"""What is measured of every subject, in which order."""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import measure, report
from benchmarks.measure import MeasurementFailed
from benchmarks.peers import SUBJECTS
from benchmarks.reading import choose_offsets, read_randomly, read_through
from benchmarks.subjects import BackupfsCommand, Subject
from benchmarks.workload import Workload

READINGS = 3  # of a mount in each run: what is read cold varies more than anything else


def known_figures(path: Path | None) -> dict[str, Any]:
    """All that the file has: of subjects by name, and of "growth"."""
    known: dict[str, Any] = {}
    if path is not None and path.exists():
        known = json.loads(path.read_text())
    return known


def keep_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Put figures into the file, in place of those of the same names."""
    if path is not None:
        path.write_text(json.dumps({**known_figures(path), **figures}, indent=1))


def load_figures(path: Path | None) -> dict[str, dict[str, list[float]]]:
    """Subject -> figure -> its value in each run so far, subjects as they are listed."""
    known = known_figures(path)
    return {name: defaultdict(list, known[name]) for name in SUBJECTS if name in known}


class Bench:
    """The figures, and what each of them needs."""

    def __init__(self, arguments: argparse.Namespace, work: Path, workload: Workload) -> None:
        self.arguments = arguments
        self.work = work
        self.workload = workload
        self.source = work / "run" / "volume.img"
        self.figures = load_figures(arguments.figures)
        self.failures: list[str] = []
        self.ours_failed = False  # a peer that cannot do something is a line in the report
        self.offsets = {
            jobs: choose_offsets(workload.base, jobs=jobs, seed=arguments.seed) for jobs in (1, 4)
        }

    def runs_made(self) -> int:
        """Of the subject that was measured least."""
        return min((len(values["full seconds"]) for values in self.figures.values()), default=0)

    def run(self, names: list[str]) -> None:
        for name in names:
            self.figures.setdefault(name, defaultdict(list))
        for number in range(1, self.arguments.runs + 1):
            for name in names:
                report.say(f"run {number} of {self.arguments.runs}: {name}")
                self.run_subject(name, self.source, self.measure)
                for image in self.workload.extremes:
                    source = self.source.with_name(image.name)
                    self.run_subject(name, source, self.measure_extreme)
        keep_figures(self.arguments.figures, self.figures)

    def run_subject(self, name: str, source: Path, act: Callable[[str, Subject], None]) -> None:
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        subject = SUBJECTS[name](folder / name, source)
        try:
            with ExitStack() as ending:
                ending.callback(self.finish, name, subject)
                act(name, subject)
        except (MeasurementFailed, OSError) as error:
            self.failures.append(f"{SUBJECTS[name].title}: {error}")
            self.ours_failed |= issubclass(SUBJECTS[name], BackupfsCommand)
            report.say(f"{name} failed: {error}")
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
        if subject.collects:
            self.measure_collecting(name, subject)

    def measure_collecting(self, name: str, subject: Subject) -> None:
        stored = subject.stored_size()
        self.note_cost(name, "collect", subject.collect())
        self.note(name, "collected", stored - subject.stored_size())

    def measure_extreme(self, name: str, subject: Subject) -> None:
        kind = subject.source.stem
        subject.source.hardlink_to(self.workload.base.with_name(subject.source.name))
        subject.prepare()
        if kind != "zeros":
            measure.warm(subject.source)
        stored = subject.stored_size()
        self.note_cost(name, kind, subject.full())
        self.note(name, f"{kind} stored", subject.stored_size() - stored)

    def measure_restore(self, name: str, subject: Subject, expected: Path) -> None:
        target = self.work / "run" / "restored.img"
        measure.drop_caches()
        self.note_cost(name, "restore", subject.restore(target))
        if not filecmp.cmp(target, expected, shallow=False):
            raise MeasurementFailed("what was restored differs from what was backed up")
        target.unlink()

    def measure_reads(self, name: str, subject: Subject) -> None:
        size = self.source.stat().st_size
        for _ in range(READINGS):
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
            self.note(name, "served peak", cost.peak_size)

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

    def note_peaks(self) -> None:
        """The peak of a subject is that of its largest process in all it did."""
        for values in self.figures.values():
            peaks = [max(values[key]) for key in list(values) if key.endswith(" peak")]
            if peaks:
                values["peak"] = [max(peaks)]
