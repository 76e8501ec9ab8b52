"""Cuts the power of a run at every sync, in many ways, and looks whether promises were kept."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from support.crash_disk import Disk, Image, picks, read_image, write_image
from support.crash_run import Backups, Promise, Run, nothing
from support.crash_world import World
from support.images import noise, restored
from support.os_calls import Call, watched_calls

from backupfs.format.config import CONFIG_NAME, decode_config
from backupfs.format.ids import IdScheme
from backupfs.repository.index_file import _boot_file, _boot_id, index_path
from backupfs.repository.repository import _cache_name, cache_folder

PROBE = noise(40_000, seed=99)


class BrokenPromiseError(AssertionError):
    """What was promised is not there, or what must not be is."""


@dataclass(frozen=True)
class Crash:
    """What one power cut left."""

    what: str
    image: Image
    promise: Promise


class Recording:
    """What a run did to its folder, call by call, and what it had promised at each moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = read_image(folder)
        self._entries: list[Call | Promise] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record what is done in the block."""
        with watched_calls(self.folder, self._handle):
            yield
        disk = Disk(self._start)
        for entry in self._entries:
            if isinstance(entry, Call):
                disk.apply(entry)
        everything = list(picks(random.Random(0), random_count=0))[1]
        assert disk.image(everything) == read_image(self.folder), "some call was not seen"

    def note(self, promise: Promise) -> None:
        self._entries.append(promise)

    def _handle(self, call: Call, act: Callable[[], object]) -> object:
        result = act()
        if call.kind == "write":
            assert isinstance(result, int)
            call = replace(call, data=call.data[:result])
        self._entries.append(call)
        return result

    def crashes(self, rng: random.Random, *, random_count: int) -> Iterator[Crash]:
        """What may be left when the power goes right before each sync, and after each promise;
        the same outcome of the same promise once."""
        disk, promise, seen = Disk(self._start), Promise(), set()
        last = "the start"
        for entry in self._entries:
            if isinstance(entry, Promise):
                promise = entry
            elif entry.kind != "sync":
                disk.apply(entry)
                last = str(entry)
                continue
            for pick in picks(rng, random_count=random_count):
                image = disk.image(pick)
                mark = (id(promise), fingerprint(image))
                if mark not in seen:
                    seen.add(mark)
                    yield Crash(f"{promise.what}; after {last}; {pick.what}", image, promise)
            if isinstance(entry, Call):
                disk.apply(entry)
                last = str(entry)


class Explorer:
    """Runs programs on a repository, one after the other, each on what a power cut left of the one
    before; and examines what power cuts may leave of each."""

    def __init__(self, repository: Path, work: Path) -> None:
        self._repository = repository
        self._work = work
        self._before = Promise()
        self.count = 0  # of power cuts examined

    def run(
        self, program: Callable[[World], None], rng: random.Random, *, count_max: int | None = None
    ) -> None:
        """Record ``program``, then examine at most ``count_max`` power cuts (None: all).

        Raises: BrokenPromiseError.
        """
        recording, indexes = self._record(program)
        crashes = list(recording.crashes(rng, random_count=1 if count_max is None else 3))
        # None: it is lost. The last knows packs that the power cut took.
        for crash in rng.sample(crashes, min(count_max or len(crashes), len(crashes))):
            self.count += 1
            examine(crash, self._work / "crashed", rng.choice([None, *indexes]))
        self._go_on_from(rng.choice(crashes))

    def _record(self, program: Callable[[World], None]) -> tuple[Recording, list[Path]]:
        recording = Recording(self._repository)
        indexes = [self._work / "index of the start", self._work / "index of the end"]
        for path in indexes:
            path.unlink(missing_ok=True)
        with recording.running():
            recording.note(self._before)
            with Run(str(self._repository)) as run:
                run.mount()
                keep_index(run, indexes[0])
                program(World(run, recording.note, _as_found(run, self._before)))
                keep_index(run, indexes[1])
        return recording, indexes

    def _go_on_from(self, crash: Crash) -> None:
        shutil.rmtree(self._repository)
        write_image(crash.image, self._repository)
        what = f"mounting after a cut in {crash.promise.what}"
        self._before = replace(crash.promise, what=what, again=nothing, aim=None, gone="")


def _as_found(run: Run, before: Promise) -> Promise:
    """What is there, of the ways in which it might be."""
    return Promise(
        what="mounted",
        must=backups_of(run),
        staged=(run.staged(),),
        folders=before.folders,
        metadata={volume: (run.service.get_metadata(volume),) for volume in before.metadata},
    )


def fingerprint(image: Image) -> bytes:
    digest = blake2b(digest_size=16)
    for name in sorted(image):
        data = image[name]
        digest.update(f"{name}\0{-1 if data is None else len(data)}\0".encode())
        digest.update(data or b"")
    return digest.digest()


# -- the index, which lies elsewhere and is not synced ---------------------------------------------


def keep_index(run: Run, path: Path) -> None:
    """Make a copy of the index as it is now."""
    run.service.repository.index._environment.copy(str(path))


def put_index(folder: Path, copy: Path | None) -> None:
    """Have the next who opens the repository find this index, and believe it."""
    config = decode_config((folder / CONFIG_NAME).read_bytes(), IdScheme())
    cache = cache_folder(_cache_name(config, folder))
    shutil.rmtree(cache, ignore_errors=True)
    if copy is not None:
        cache.mkdir(parents=True)
        shutil.copy(copy, index_path(cache))
        _boot_file(cache).write_text(_boot_id())


# -- looking ---------------------------------------------------------------------------------------


def examine(crash: Crash, folder: Path, index: Path | None) -> None:
    """Open what a power cut left, and see that promises were kept; then that life goes on.

    Raises: BrokenPromiseError.
    """
    write_image(crash.image, folder)
    try:
        put_index(folder, index)
        with Run(str(folder)) as run:
            _look(run, crash.promise)
            run.mount()
            _look_at_staged(run, crash.promise)
            _go_on(run, crash.promise)
    except Exception as error:  # whatever it is, the user would meet it
        raise BrokenPromiseError(f"{crash.what}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder)


def _look(run: Run, promise: Promise) -> None:
    """As the first does who comes."""
    _compare(backups_of(run), must=promise.must, may=_allowed(promise))
    for volume, values in promise.metadata.items():
        value = run.service.get_metadata(volume)
        assert value in values, f"metadata of {volume} are {value}"
    _verify(run)


def _look_at_staged(run: Run, promise: Promise) -> None:
    """As the clients of a mount do."""
    assert not run.area.unreadable, run.area.unreadable
    must = promise.must | promise.must_once_mounted
    _compare(backups_of(run), must=must, may=_allowed(promise))
    staged = run.staged()
    assert staged in promise.staged, (
        f"staged are {sizes(staged)}, not {' or '.join(map(str, map(sizes, promise.staged)))}"
    )
    missing = promise.folders - run.area.folders()
    assert not missing, f"folders {missing} are lost"


def _go_on(run: Run, promise: Promise) -> None:
    """gc runs, and what was under way is tried again."""
    staged, found = run.staged(), backups_of(run)
    run.gc()
    assert run.staged() == staged, "gc took what is staged"
    assert backups_of(run) == found, "gc took backups"
    promise.again(run)
    if promise.aim is not None:
        missing = set(promise.aim.must.values()) - set(backups_of(run).values())
        assert not missing, f"{names(missing)} was not made when tried again"
        staged = run.staged()
        assert promise.aim.staged[0].items() <= staged.items(), f"staged are {sizes(staged)}"
        assert promise.gone not in staged, f"{promise.gone} is still staged"
    _probe(run)
    _verify(run)


def backups_of(run: Run) -> Backups:
    """What is there, read from start to end."""
    run.service.refresh()
    return {
        record.backup_id: (record.volume, run.service.open_image(record).read(0, record.size))
        for record in run.service.backups()
    }


def _allowed(promise: Promise) -> Backups:
    return promise.may | promise.must | promise.must_once_mounted


def _compare(found: Backups, *, must: Backups, may: Backups) -> None:
    for backup_id, backup in must.items():
        assert backup_id in found, f"backup {names([backup])} is lost"
        assert found[backup_id] == backup, f"backup {names([backup])} is another"
    for backup_id, backup in found.items():
        assert may.get(backup_id) == backup, f"backup {names([backup])} must not be"


def _verify(run: Run) -> None:
    report = run.service.verify()
    assert report.complete and not report.damage, report.damage


def _probe(run: Run) -> None:
    handle = run.open("probe.img", truncate=True)
    run.write(handle, 0, PROBE)
    run.end(handle, killed=False)
    latest = run.service.catalogue.latest("probe")
    assert latest is not None and restored(run.service, latest) == PROBE


def names(backups: object) -> str:
    return ", ".join(f"{volume} of {len(image)} bytes" for volume, image in backups)  # type: ignore


def sizes(staged: dict[str, bytes]) -> dict[str, str]:
    return {
        name: f"{len(data)}:{blake2b(data, digest_size=3).hexdigest()}"
        for name, data in staged.items()
    }
