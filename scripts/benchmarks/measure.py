"""Times commands and weighs what they leave: seconds, peak resident memory, bytes on disk.

One measurement runs at a time. Everything is written out before a measurement begins, so that none
pays for the one before it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND_SECONDS_MAX = 3600
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class MeasurementFailed(Exception):
    """A tool could not do its work; the reason is in the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an action took."""

    seconds: float
    peak_size: int | None = None  # bytes resident at most; None where it was not watched


class Stopwatch:
    """Seconds from its making; ``stop`` keeps them."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._started


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Cost:
    """Run a command to its end. Raises: MeasurementFailed with the last of what it said."""
    environment = {**os.environ, **(env or {})}
    arguments = [os.fspath(part) for part in command]
    with tempfile.TemporaryFile() as said:
        watch = Stopwatch()
        process = subprocess.Popen(
            arguments, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        peak_size = wait_for(process)
        seconds = watch.stop()
        if process.returncode != 0:
            said.seek(max(0, said.tell() - 1000))
            raise MeasurementFailed(
                f"{' '.join(arguments)}: status {process.returncode}: "
                + said.read().decode(errors="replace").strip()
            )
    return Cost(seconds=seconds, peak_size=peak_size)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process, set its return code and give its peak resident bytes.

    The kernel counts the moment before exec as well, so that nothing smaller than this program
    itself can be told.
    """
    timer = threading.Timer(COMMAND_SECONDS_MAX, process.kill)
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def resident_peak(process_id: int) -> int:
    """The most bytes a living process ever held in memory."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise MeasurementFailed(f"process {process_id} is gone")


def children_own(process_id: int) -> int:
    """Bytes that the processes of a living process have in memory now, beside what they share."""
    folder = Path(f"/proc/{process_id}/task/{process_id}")
    lines = [
        line
        for child in (folder / "children").read_text().split()
        for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def resident_now(process_id: int) -> tuple[int, int]:
    """Bytes that a process has in memory: its own, and of mapped files. Zero where it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = dict(line.split(":", 1) for line in lines)
    anonymous, mapped = (sizes.get(name, "0").split()[0] for name in ("RssAnon", "RssFile"))
    return int(anonymous) * 1024, int(mapped) * 1024


def stored_size(folder: Path) -> int:
    """Bytes that the files below ``folder`` take: their size, or less where they have holes."""
    os.sync()  # allocation is known only then
    total = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            total += min(status.st_size, status.st_blocks * 512)
    return total


def make_durable(path: Path) -> None:
    """Wait until a file's data and its name survive a power cut."""
    for target in (path, path.parent):
        file = os.open(target, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def drop_caches() -> bool:
    """Empty the kernel's caches of files; False where we may not."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def warm(path: Path) -> None:
    """Bring a file into the page cache, so that sources are never read from the disk."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


@contextlib.contextmanager
def running(
    *command: str | Path, env: dict[str, str] | None = None, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs beside the measurements; ended at the end where it still runs."""
    with log.open("ab") as said:
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_mounted(mountpoint: Path, process: subprocess.Popen[bytes], *, log: Path) -> float:
    """Seconds until ``mountpoint`` answered. Raises: MeasurementFailed."""
    watch = Stopwatch()
    while not mountpoint.is_mount():
        if process.poll() is not None or watch.stop() > 60:
            said = log.read_text(errors="replace")[-1000:].strip()
            raise MeasurementFailed(f"{mountpoint} was not mounted: {said}")
        time.sleep(0.01)
    return watch.stop()


def wait_for_path(path: Path, seconds: float) -> None:
    """Wait until ``path`` is there, for so long at most."""
    watch = Stopwatch()
    while not path.exists() and watch.stop() < seconds:
        time.sleep(0.05)


def unmount(command: Sequence[str | Path], process: subprocess.Popen[bytes]) -> None:
    """Unmount and wait for the end of the process that served it."""
    run(*command)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        raise MeasurementFailed("the process that served the mount did not end") from None
