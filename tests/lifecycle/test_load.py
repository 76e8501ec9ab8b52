"""Many clients at once, some of whom stop, or die in the middle: nobody else waits for long, memory
stays within its bound, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_server import CommandServer
from lifecycle_mount import (
    KIB,
    MIB,
    Site,
    assert_same,
    becomes,
    content,
    descriptors,
    memory_peak,
    site_in,
    threads,
)

LOAD_SECONDS = 18.0
MEMORY_MAX = 256 * MIB
# Generous: the machine may be slow, and busy with other tests. A client that waits for another one's
# stop would wait for all of the load's time.
WAIT_SECONDS_MAX = 14.0
IMAGE_SIZE = 12 * MIB
KINDS = 4  # of images


class Clients:
    """Threads that do one thing again and again, and how long each time took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, what: str, work: Callable[[random.Random], None], count: int) -> None:
        self.seconds[what] = []
        for number in range(count):
            rng = random.Random(f"{what}-{number}")
            thread = threading.Thread(target=self._run, args=(what, work, rng), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, what: str, work: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                work(rng)
            except Exception as error:  # told by the test's thread
                self.failures.append(f"{what}: {error!r}")
                return
            self.seconds[what].append(time.monotonic() - started)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"

    def describe(self) -> str:
        lines = []
        for what, seconds in self.seconds.items():
            ordered = sorted(seconds)
            p99 = ordered[len(ordered) * 99 // 100]
            lines.append(f"{what}: {len(ordered)} times, p99 {p99:.3f} s, max {ordered[-1]:.3f} s")
        return "; ".join(lines)


@pytest.fixture
def images(mounted: Site) -> list[bytes]:
    """What is backed up before the load begins, as volumes base0, base1…"""
    found = [content(IMAGE_SIZE, kind) for kind in range(KINDS)]
    for kind, data in enumerate(found):
        mounted.copy_in(f"base{kind}.img", data)
    return found


class Load:
    """What the clients do."""

    def __init__(self, site: Site, images: list[bytes]) -> None:
        self.site = site
        self.images = images
        self.sources = [site.image(data, f"load{kind}.img") for kind, data in enumerate(images)]
        self._numbers = iter(range(1 << 30))
        self._lock = threading.Lock()

    def copy(self, rng: random.Random) -> None:
        """Copy an image in, look at the backup, remove both."""
        with self._lock:
            volume = f"load{next(self._numbers)}"
        kind = rng.randrange(KINDS)
        staged = self.site.staging / f"{volume}.img"
        subprocess.run(["cp", self.sources[kind], staged], check=True, timeout=60)
        latest = self.site.latest(volume)
        offset = rng.randrange(IMAGE_SIZE - MIB)
        with latest.open("rb") as file:
            file.seek(offset)
            assert file.read(MIB) == self.images[kind][offset : offset + MIB]
        staged.unlink()
        (latest.parent / os.readlink(latest)).unlink()

    def read_some(self, rng: random.Random) -> None:
        """Open a backup, read a little anywhere, close it."""
        kind = rng.randrange(KINDS)
        with self.site.latest(f"base{kind}").open("rb", buffering=0) as file:
            offset = rng.randrange(IMAGE_SIZE - 4 * KIB)
            assert (
                os.pread(file.fileno(), 4 * KIB, offset)
                == (self.images[kind][offset : offset + 4 * KIB])
            )

    def read_all(self, rng: random.Random) -> None:
        kind = rng.randrange(KINDS)
        assert self.site.latest(f"base{kind}").read_bytes() == self.images[kind]

    def patch(self, rng: random.Random) -> None:
        """Change a little in the head of a volume of one's own."""
        name = f"patched-{threading.get_ident()}"
        path = self.site.staging / f"{name}.img"
        if not path.exists():
            path.write_bytes(self.images[0][: 2 * MIB])
        with path.open("r+b", buffering=0) as file:
            file.seek(rng.randrange(MIB))
            file.write(rng.randbytes(8 * KIB))
        for made in self.site.names(name)[:-2]:
            (self.site.volumes / name / made).unlink()

    def look_around(self, rng: random.Random) -> None:
        os.listdir(self.site.volumes)
        self.site.status()
        assert (self.site.path / ".backupfs/events.log").read_bytes()
        os.statvfs(self.site.path)

    def die(self, rng: random.Random) -> None:
        """Copy, and be killed somewhere in it, in its flush too."""
        target = self.site.staging / f"dead-{threading.get_ident()}.img"
        with subprocess.Popen(["cp", self.sources[0], target]) as process:
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        target.unlink(missing_ok=True)


def test_clients_that_stop_or_die_keep_nobody_waiting(mounted: Site, images: list[bytes]) -> None:
    load = Load(mounted, images)
    clients = Clients()
    stopped_reader = mounted.latest("base0").open("rb", buffering=0)
    stopped_reader.read(100 * KIB)
    stopped_writer = (mounted.staging / "stopped.img").open("wb", buffering=0)
    stopped_writer.write(images[0][: 3 * MIB + 17])
    halted = mounted.start("cp", load.sources[1], mounted.staging / "halted.img")
    halted.send_signal(signal.SIGSTOP)

    clients.start("copy", load.copy, 14)
    clients.start("small read", load.read_some, 16)
    clients.start("whole read", load.read_all, 8)
    clients.start("patch", load.patch, 14)
    clients.start("look around", load.look_around, 6)
    clients.start("killed copy", load.die, 6)
    time.sleep(LOAD_SECONDS / 2)
    started = time.monotonic()
    collected = mounted.begin("gc")
    assert collected.wait() == 0, collected.err()
    gc_seconds = time.monotonic() - started
    time.sleep(LOAD_SECONDS / 2)
    clients.stop()

    peak = memory_peak(mounted.daemon())
    print(f"{clients.describe()}; gc {gc_seconds:.2f} s; peak {peak >> 20} MiB")
    assert clients.failures == []
    assert all(max(seconds) < WAIT_SECONDS_MAX for seconds in clients.seconds.values())
    assert all(len(seconds) > 3 for seconds in clients.seconds.values())
    assert gc_seconds < 2 * WAIT_SECONDS_MAX
    assert peak < MEMORY_MAX
    halted.send_signal(signal.SIGCONT)
    assert halted.wait(timeout=30) == 0
    stopped_reader.close()
    stopped_writer.close()
    assert_same(mounted.latest("halted").read_bytes(), images[1], "the halted copy")
    assert_same(
        mounted.latest("stopped").read_bytes(), images[0][: 3 * MIB + 17], "the stopped one"
    )
    mounted.assert_verified()


ASKING = """
import os, sys
while True:
    try:
        os.stat(f"{sys.argv[1]}/none-{os.getpid()}-{os.urandom(4).hex()}")
    except OSError:
        pass
"""


def test_programs_killed_while_they_wait_do_not_stop_the_mount(mounted: Site) -> None:
    """A request that its program takes back, by dying, at the moment when the daemon is about to
    read it must not have the daemon wait for the next one: with it all others would wait too."""
    daemon = mounted.daemon()
    waiting_in = Path(f"/proc/{daemon}/task/{daemon}/wchan")
    rng = random.Random(7)
    stopped = 0
    for _ in range(40):
        asking = [
            subprocess.Popen([sys.executable, "-Sc", ASKING, mounted.volumes]) for _ in range(4)
        ]
        time.sleep(rng.uniform(0.05, 0.08))
        for process in asking:
            process.kill()
        for process in asking:
            process.wait(timeout=10)
        if "fuse_dev_do_read" in waiting_in.read_text():
            stopped += 1
            # Nobody asks it for anything now: it has to go on by itself.
            assert becomes(lambda: "fuse_dev_do_read" not in waiting_in.read_text(), seconds=2)
    print(f"stopped for a moment {stopped} of 40 times")


def test_many_large_copies_at_once_stay_within_the_memory_bound(mounted: Site) -> None:
    """More in flight than fits: scattered, in small pieces, and each alone half of the bound."""
    data = content(32 * MIB, 1)
    source = mounted.image(data)
    copies = [
        mounted.start(
            *("dd", f"if={source}", f"of={mounted.staging}/v{number}.img", "status=none"),
            f"bs={size}",
        )
        for number, size in enumerate(["4k", "61k", "1M", "7M"] * 5)
    ]
    scattered = mounted.staging / "scattered.img"
    with scattered.open("wb", buffering=0) as file:
        os.truncate(file.fileno(), 1 << 30)
        for place in random.Random(2).sample(range(1 << 18), 2000):
            os.pwrite(file.fileno(), b"x" * 100, place * 4 * KIB)
    assert [copy.wait(timeout=60) for copy in copies] == [0] * len(copies)

    peak = memory_peak(mounted.daemon())
    print(f"peak {peak >> 20} MiB")
    assert peak < MEMORY_MAX
    for number in range(0, 20, 7):
        assert_same(mounted.latest(f"v{number}").read_bytes(), data, number)
    assert memory_peak(mounted.daemon()) < MEMORY_MAX


def test_nothing_leaks_however_often_files_are_opened(mounted: Site) -> None:
    data = content(300 * KIB, 3)
    mounted.copy_in("vm.img", data)
    daemon = mounted.daemon()

    def use() -> None:
        for number in range(60):
            assert len(mounted.latest("vm").read_bytes()) == len(data)
            (mounted.staging / "other.img").write_bytes(data)
            with (mounted.staging / "vm.img").open("r+b") as file:
                file.write(b"%d" % number)
            for path in (mounted.volumes / "no", mounted.staging / "no", mounted.backups / "no"):
                assert not path.exists()
            with pytest.raises(OSError):
                mounted.latest("vm").open("r+b")
            next(mounted.backups.glob("*.msgpack")).read_bytes()
            os.listdir(mounted.volumes / "vm")
            mounted.status()
            for name in mounted.names("vm")[:-1]:
                (mounted.volumes / "vm" / name).unlink()
            for name in mounted.names("other")[:-1]:
                (mounted.volumes / "other" / name).unlink()
            (mounted.staging / "other.img").unlink()
        mounted.copy_in("vm.img", data)

    use()
    mounted.command("gc")
    before = descriptors(daemon), threads(daemon)
    use()
    mounted.command("gc")
    after = descriptors(daemon), threads(daemon)

    # A few packs more or fewer are kept open for reading, up to a bound.
    print(f"descriptors and threads: {before}, then {after}")
    assert after[0] <= before[0] + 8
    assert becomes(lambda: threads(daemon) <= before[1] + 4, seconds=15)


def test_nothing_is_left_of_many_mounts(site: Site) -> None:
    def files() -> set[Path]:
        found = {path for path in site.repo.rglob("*") if path.is_file()}
        return {path for path in found if path.parts[-2] not in ("locks",)}

    cache = site.folder / "cache"
    site.mount()
    site.copy_in("vm.img", content(MIB, 4))
    site.unmount()
    before, cached = files(), sorted(cache.rglob("*"))

    for number in range(10):
        site.mount("ro" if number % 3 == 0 else "")
        assert site.latest("vm").exists()
        site.kill() if number % 4 == 1 else site.unmount()
    site.mount()
    site.unmount()
    site.command("gc")

    assert files() == before
    assert sorted(cache.rglob("*")) == cached


def test_client_killed_in_its_flush_is_held_and_delays_nobody(
    tmp_path: Path, commands: CommandServer
) -> None:
    """Its close cannot be interrupted, but it ends; another client's small copy goes on meanwhile."""
    with site_in(tmp_path / "site", commands) as site:
        site.init()
        site.mount()
        source = site.image(content(48 * MIB, 5))
        small = site.image(content(MIB, 6), "small.img")
        killed = 0
        for number in range(6):
            big = f"big{number}"
            copy = site.start("cp", source, site.staging / f"{big}.img")
            time.sleep(0.02 + 0.03 * number)
            copy.send_signal(signal.SIGKILL)

            site.run("cp", small, site.staging / f"small{number}.img")
            assert site.latest(f"small{number}").exists()
            if copy.wait(timeout=WAIT_SECONDS_MAX) == 0:
                continue  # it was quicker, and is a backup
            killed += 1
            if (site.staging / f"{big}.img").exists() and site.names(big) == []:
                assert becomes(lambda name=big: is_held(site, f"{name}.img"), seconds=10)
        assert killed


def is_held(site: Site, name: str) -> bool:
    return bool(site.drafts()[name]["state"] == "held")
