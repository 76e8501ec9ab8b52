"""A load of 64 clients on one mount, some of whom stop, or die in the middle.

They copy, read, patch and look around for as long as they are let; what each did is compared with
what it should have seen, and how long it took is noted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from lifecycle_mount import KIB, MIB, Site, assert_same, content, memory_peak

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


class Load:
    """What the clients do."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.images = [content(IMAGE_SIZE, kind) for kind in range(KINDS)]
        for kind, data in enumerate(self.images):
            site.copy_in(f"base{kind}.img", data)
        self.sources = [
            site.image(data, f"load{kind}.img") for kind, data in enumerate(self.images)
        ]
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

    def start(self, clients: Clients) -> None:
        """Have 64 of them begin."""
        clients.start("copy", self.copy, 14)
        clients.start("small read", self.read_some, 16)
        clients.start("whole read", self.read_all, 8)
        clients.start("patch", self.patch, 14)
        clients.start("look around", self.look_around, 6)
        clients.start("killed copy", self.die, 6)

    @contextlib.contextmanager
    def stopped_ones(self) -> Iterator[None]:
        """A reader, a writer and a copying program that stop for the block, and end well after it."""
        site, images = self.site, self.images
        reader = site.latest("base0").open("rb", buffering=0)
        reader.read(100 * KIB)
        writer = (site.staging / "stopped.img").open("wb", buffering=0)
        writer.write(images[0][: 3 * MIB + 17])
        halted = site.start("cp", self.sources[1], site.staging / "halted.img")
        halted.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            halted.send_signal(signal.SIGCONT)
            ended = halted.wait(timeout=60)
            reader.close()
            writer.close()
        assert ended == 0
        assert_same(site.latest("halted").read_bytes(), images[1], "the halted copy")
        assert_same(site.latest("stopped").read_bytes(), images[0][: 3 * MIB + 17], "the stopped")


class Measured:
    """What a load was found to need."""

    def __init__(self, clients: Clients, gc_seconds: list[float], memory_peak: int) -> None:
        self.seconds = clients.seconds
        self.gc_seconds = gc_seconds
        self.memory_peak = memory_peak  # bytes
        self._clients = clients

    def describe(self) -> str:
        return (
            f"{self._clients.describe()}; gc {len(self.gc_seconds)} times, "
            f"max {max(self.gc_seconds):.2f} s; peak {self.memory_peak >> 20} MiB"
        )


def run_load(site: Site, *, seconds: float, gc_every: float) -> Measured:
    """Load a mount that nobody else uses; a gc beside it now and then. Fails where a client does."""
    load, clients = Load(site), Clients()
    gc_seconds = []
    deadline = time.monotonic() + seconds
    with load.stopped_ones():
        load.start(clients)
        try:
            while time.monotonic() < deadline and not clients.failures:
                time.sleep(gc_every)
                started = time.monotonic()
                collected = site.begin("gc")
                assert collected.wait() == 0, collected.err()
                gc_seconds.append(time.monotonic() - started)
        finally:
            clients.stop()
        peak = memory_peak(site.daemon())
    assert clients.failures == []
    site.assert_verified()
    return Measured(clients, gc_seconds, peak)
