"""One mount, from the first request to the last: composes the parts and runs the event loop."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pyfuse3
import trio

from backupfs.errors import BackupfsError, MountFailed
from backupfs.fuse.attributes import Attributes
from backupfs.fuse.inodes import Inodes
from backupfs.fuse.layout import Layout
from backupfs.fuse.long_reader import LongReader
from backupfs.fuse.next_request import IDLE_TASKS_MAX, NextRequest
from backupfs.fuse.operations import Operations
from backupfs.fuse.options import MountOptions
from backupfs.fuse.quick_reader import QuickReader
from backupfs.fuse.texts import Texts
from backupfs.fuse.threads import Threads
from backupfs.repository.decoders import Decoders
from backupfs.service import Service, StagingArea

log = logging.getLogger(__name__)

FS_TYPE = "fuse.backupfs"
READ_AHEAD_KIB = 4096
REFRESH_SECONDS = 0.5  # until the mount shows what other processes did
TICK_SECONDS = 0.2
# Each look into volumes/ that waits for a publish has one: who only reads must find one left.
TASKS_MAX = 1000
INTERRUPT_SECONDS = 0.1
STDERR_SIZE_MAX = 4096
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOUNTINFO = Path("/proc/self/mountinfo")


class Mount:
    """A mounted repository. ``area`` is None for a read-only mount."""

    def __init__(
        self,
        service: Service,
        area: StagingArea | None,
        mountpoint: Path,
        options: MountOptions,
        decoders: Decoders,
    ) -> None:
        ambient = service.repository.ambient
        mounted_at = ambient.now()
        self._service = service
        self._mountpoint = mountpoint
        self._options = options
        self._decoders = decoders
        layout = Layout(service.catalogue, area)
        inodes = Inodes(layout)
        texts = Texts(
            service,
            area,
            mountpoint=str(mountpoint),
            mounted_at=mounted_at,
            process_id=ambient.process_id(),
        )
        self._operations = Operations(
            service=service,
            area=area,
            layout=layout,
            inodes=inodes,
            attributes=Attributes(
                service,
                options,
                own_uid=os.getuid(),
                own_gid=os.getgid(),
                mounted_at=mounted_at,
                number=inodes.number,
            ),
            texts=texts,
        )

    def run(self, on_ready: Callable[[], None]) -> None:
        """Mount, call ``on_ready`` when requests are taken, serve until it is unmounted.

        SIGTERM and SIGINT unmount. Raises: MountFailed.
        """
        logging.getLogger("pyfuse3").addFilter(_is_no_late_answer)
        # From here to the receiver below a signal would end the process and leave a dead mount.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with _noted_stderr() as said:
            try:
                pyfuse3.init(self._operations, str(self._mountpoint), self._fuse_options())
            except RuntimeError as error:
                reason = said() or str(error)
                raise MountFailed(mountpoint=str(self._mountpoint), reason=reason) from error
        device = mount_device(self._mountpoint)
        try:
            with _interrupted_now_and_then():
                trio.run(self._serve, on_ready)
        finally:
            # By its place: after "umount -l" another may stand there.
            pyfuse3.close(unmount=device == mount_device(self._mountpoint))

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        monotonic = self._service.repository.ambient.monotonic
        next_request = NextRequest(monotonic)
        next_request.install()
        threads = Threads()
        self._operations.threads = threads
        self._operations.quick_reader = QuickReader(
            self._service.repository.quick_reads, threads, next_request, monotonic
        )
        self._operations.long_reader = LongReader(self._service.repository.reader, self._decoders)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(_repeat, self._refresh, REFRESH_SECONDS)
                nursery.start_soon(_repeat, self._operations.publish_settled, TICK_SECONDS)
                nursery.start_soon(self._announce, on_ready)
                await pyfuse3.main(min_tasks=IDLE_TASKS_MAX, max_tasks=TASKS_MAX)
                nursery.cancel_scope.cancel()
        finally:
            threads.close()

    async def _refresh(self) -> None:
        await trio.to_thread.run_sync(self._service.refresh)

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        """The loop runs: whoever looks into the mount now is answered.

        Not even a thread of ours may look to prove it: should this process be told to end, or be
        killed, in that moment, the thread would wait for the process and the process for the thread.
        """
        await trio.to_thread.run_sync(_raise_read_ahead, self._mountpoint)
        on_ready()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(*SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            async for number in signals:
                log.info("unmounting on %s", signal.Signals(number).name)
                pyfuse3.terminate()
                return

    def _fuse_options(self) -> set[str]:
        source = self._service.location.encode("ascii", "replace").decode()
        options = set(pyfuse3.default_options)
        options.add("fsname=" + source.replace("\\", "\\\\").replace(",", "\\,"))
        options.add("subtype=backupfs")
        if self._options.allow_other:
            options.add("allow_other")
        if self._options.read_only:
            options.add("ro")
        return options


@contextlib.contextmanager
def _interrupted_now_and_then() -> Iterator[None]:
    """Have this thread's system calls interrupted, so that none of them can block the event loop.

    pyfuse3 reads a request when it is told that there is one, and waits if there is none: the
    program that made it may have been killed in between. Until the next request all would stand
    still then, threads too, as the interpreter's lock is held; a signal ends that read at once.
    """
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, INTERRUPT_SECONDS, INTERRUPT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def _repeat(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Do ``work`` now and then. What is wrong is told when it begins and when it has passed."""
    told = ""
    while True:
        await trio.sleep(seconds)
        problem = ""
        try:
            await work()
        except BackupfsError as error:
            problem = str(error)
        except Exception as error:  # a bug in it must not end the mount
            problem = f"{type(error).__name__}: {error}"
            if problem != told:
                log.exception("%s failed", work.__qualname__)
        if problem != told:
            log.error("%s", problem) if problem else log.info("this has passed: %s", told)
        told = problem


@contextlib.contextmanager
def _noted_stderr() -> Iterator[Callable[[], str]]:
    """Standard error of the block, in one line: libfuse gives its reasons nowhere else."""
    noted = os.memfd_create("stderr", os.MFD_CLOEXEC)
    saved = os.dup(2)
    os.dup2(noted, 2)

    def said() -> str:
        text = os.pread(noted, STDERR_SIZE_MAX, 0).decode(errors="replace")
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())

    try:
        yield said
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(noted)


def _is_no_late_answer(record: logging.LogRecord) -> bool:
    """Whoever waited for an answer was killed, or the mount has gone: that is no error of ours."""
    return not record.getMessage().endswith(f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}")


def _raise_read_ahead(mountpoint: Path) -> None:
    """Have the kernel read further ahead, where we may: it doubles what a reader gets."""
    device = mount_device(mountpoint)
    if device is not None:
        with contextlib.suppress(OSError):
            Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))


def mount_device(mountpoint: Path) -> str | None:
    """The device number, "major:minor", of a mount of ours; None where there is none."""
    found = None
    wanted = str(mountpoint)
    # Only newlines end lines: the place of anybody's mount may hold whatever else splits them.
    for line in os.fsdecode(MOUNTINFO.read_bytes()).rstrip("\n").split("\n"):
        fields = line.split(" ")
        kind = fields[fields.index("-") + 1]
        if kind == FS_TYPE and _unescaped(fields[4]) == wanted:
            found = fields[2]  # the last one counts: it lies on top
    return found


def _unescaped(text: str) -> str:
    """Undo mountinfo's octal escapes of blank, tab, newline and backslash."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text
