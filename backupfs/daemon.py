"""The mount's process: open, start, serve, stop, in this order, and what can go wrong with each.

In the background the command's process forks; the child reports over a pipe that the mount answers,
or why it does not, and lives on without a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import resource
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from backupfs.ambient import Ambient
from backupfs.errors import BackupfsError, Busy, MountFailed, UnmountFailed
from backupfs.fuse.mount import Mount, mount_device
from backupfs.fuse.options import MountOptions, parse_mount_options
from backupfs.fuse.threads import LONG_READERS
from backupfs.repository.decoders import decoding
from backupfs.repository.repository import cache_folder
from backupfs.service import Policy, Service
from backupfs.staging.drafts import STATUS_PATH, asked
from backupfs.storage.locate import local_folder

__all__ = ["MountOptions", "mount", "parse_mount_options", "unmount"]

log = logging.getLogger("backupfs")

Answer = TypeVar("Answer")

START_SECONDS_MAX = 120.0
ANSWER_SECONDS_MAX = 20.0
REPORT_SIZE_MAX = 4096
DESCRIPTORS_WANTED = 4096  # a quarter of them for packs kept open: 64 GiB of what is stored
LINKS_MAX = 40  # as the kernel has it


def mount(location: str, mountpoint: str, options: MountOptions, *, foreground: bool) -> None:
    """Mount a repository.

    In the background this returns when the mount answers; in the foreground, when it was unmounted.

    Raises:
        MountFailed, Busy, RepositoryNotFound, StorageError…: nothing is mounted.
    """
    location = str(local_folder(location))  # the daemon works elsewhere
    target = _checked_mountpoint(location, mountpoint, options)
    if foreground:
        _log_to(logging.StreamHandler(sys.stderr))
        _run(location, target, options, lambda: log.info("mounted at %s", target))
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _await_report(reading, child, str(target))
        return
    os.close(reading)
    _run_detached(location, target, options, writing)


def unmount(mountpoint: str, *, timeout: float = 300) -> None:
    """Unmount; returns when everything is durable and the daemon is gone.

    Raises:
        Busy: something in the mount is open.
        UnmountFailed: nothing of ours is mounted there, or the daemon did not end in time.
    """
    target = _resolved(mountpoint)
    if mount_device(target) is None:
        raise UnmountFailed(mountpoint=mountpoint, reason="no backupfs is mounted there")
    try:
        process = _asked(_daemon_of, target)
        is_dead = process is None and _asked(_is_dead, target)
    except OSError as error:
        raise UnmountFailed(mountpoint=mountpoint, reason=str(error)) from error
    _call_umount(target, is_dead=is_dead)
    if process is not None:
        try:
            if not select.select([process], [], [], timeout)[0]:
                raise UnmountFailed(
                    mountpoint=mountpoint,
                    reason=f"unmounted, but the daemon still works after {timeout:.0f} s",
                )
        finally:
            os.close(process)


def _resolved(mountpoint: str) -> Path:
    """Its place, without links. It is not looked at itself: what is mounted there may not answer."""
    target = Path(mountpoint).absolute()
    for _ in range(LINKS_MAX):
        target = Path(os.path.realpath(target.parent)) / target.name
        try:
            target = target.parent / os.readlink(target)  # of a mount the kernel itself says no
        except OSError:
            break
    return target


# -- before the mount --------------------------------------------------------------------------


def _checked_mountpoint(location: str, mountpoint: str, options: MountOptions) -> Path:
    """The mountpoint, free of dead mounts of ours, and neither in nor around the repository.

    Nor does the index or the log lie below it: the daemon would wait for itself.
    """
    target = _resolved(mountpoint)
    _clear_dead_mount(target)
    target = Path(os.path.realpath(target))
    if not target.is_dir():
        raise MountFailed(mountpoint=mountpoint, reason="it is no folder")
    if mount_device(target) is not None:
        raise MountFailed(mountpoint=mountpoint, reason="a backupfs is mounted there already")
    folder = Path(os.path.realpath(local_folder(location)))
    if folder.is_relative_to(target) or target.is_relative_to(folder):
        raise MountFailed(
            mountpoint=mountpoint, reason="repository and mountpoint must not lie in each other"
        )
    for place in filter(None, (cache_folder(""), options.log_file)):
        if Path(os.path.realpath(place)).is_relative_to(target):
            reason = f"the daemon's own {str(place)!r} must not lie below it"
            raise MountFailed(mountpoint=mountpoint, reason=reason)
    return target


def _clear_dead_mount(target: Path) -> None:
    """Remove what a killed daemon left mounted; a living mount is never touched."""
    try:
        is_dead = _asked(_is_dead, target)
    except OSError as error:
        raise MountFailed(mountpoint=str(target), reason=str(error)) from error
    if is_dead and mount_device(target) is not None:
        log.warning("removing the dead mount at %s", target)
        _call_umount(target, is_dead=True)
    elif is_dead:
        reason = os.strerror(errno.ENOTCONN)
        raise MountFailed(mountpoint=str(target), reason=f"another file system there: {reason}")


def _asked(ask: Callable[[Path], Answer], target: Path) -> Answer:
    """What a mount answers. Raises: OSError (TimeoutError: no answer)."""
    return asked(ask, target, seconds_max=ANSWER_SECONDS_MAX)


def _is_dead(target: Path) -> bool:
    """Whether a FUSE mount has no daemon any more. Raises: OSError."""
    try:
        # Not stat: for a second the kernel answers that for a dead daemon.
        os.statvfs(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return True
    return False


def _call_umount(target: Path, *, is_dead: bool) -> None:
    """Unmount. A dead mount goes even where programs still hold files of it: nothing answers them."""
    command = ["umount", *(["--lazy"] if is_dead else []), "--", str(target)]
    if os.geteuid() != 0:
        command = ["fusermount3", "-uz" if is_dead else "-u", "--", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if result.returncode == 0:
        return
    message = result.stderr.strip().splitlines()[-1:] or ["umount failed"]
    if "busy" in message[0]:
        raise Busy(what=f"the mount at {str(target)!r}", holder=_users_of(target))
    raise UnmountFailed(mountpoint=str(target), reason=message[0])


def _users_of(target: Path) -> str:
    return f"a program (see 'fuser -vm {shlex.quote(str(target))}')"


def _daemon_of(target: Path) -> int | None:
    """A descriptor that becomes readable when the daemon of a mount ends; None for a dead one."""
    try:
        status = json.loads((target / STATUS_PATH).read_text())
        return os.pidfd_open(int(status["process_id"]))
    except (OSError, ValueError, KeyError):
        return None


# -- the process -------------------------------------------------------------------------------


def _run(location: str, target: Path, options: MountOptions, on_ready: object) -> None:
    assert callable(on_ready)
    _raise_descriptor_limit()
    policy = Policy(
        settle_seconds=options.settle,
        settle_all=options.settle_all,
        publish_on_rename_only=options.publish_on_rename_only,
    )
    ambient = Ambient()
    with (
        decoding(location, LONG_READERS, ambient) as decoders,
        Service.open(location, ambient=ambient, beside_mount=False) as service,
    ):
        area = None
        if not options.read_only:
            area = service.open_staging(policy, mountpoint=str(target))
        try:
            Mount(service, area, target, options, decoders).run(on_ready)
        finally:
            if area is not None:
                area.close()
    log.info("unmounted")


def _raise_descriptor_limit() -> None:
    """The usual limit of 1,024 is for programs that wait by select(2): a mount does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _run_detached(location: str, target: Path, options: MountOptions, report: int) -> None:
    """The child's whole life: never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        _detach_streams()
        _log_to(_log_handler(location, options))
        _run(location, target, options, lambda: _send_report(report, b"ready"))
        status = 0
    except BackupfsError as error:
        log.error("%s", error)
        _send_report(report, str(error).encode())
    except OSError as error:
        log.exception("the daemon ends")
        reason = error.strerror or str(error)
        _send_report(report, f"{error.filename or 'the daemon'}: {reason}".encode())
    except BaseException as error:  # the last place that can say what happened
        log.exception("the daemon ends")
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # what went wrong, not where in the event loop
        _send_report(report, f"{type(error).__name__}: {error}".encode())
    finally:
        logging.shutdown()
        os._exit(status)


def _send_report(report: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # reported already, or nobody listens
        os.write(report, text[:REPORT_SIZE_MAX])
        os.close(report)


def _await_report(reading: int, child: int, mountpoint: str) -> None:
    """Return when the daemon says that it is ready, and its mount says so too."""
    with open(reading, "rb", buffering=0) as pipe:
        if not select.select([pipe], [], [], START_SECONDS_MAX)[0]:
            os.kill(child, signal.SIGTERM)
            raise MountFailed(mountpoint=mountpoint, reason="the daemon does not answer")
        report = pipe.read(REPORT_SIZE_MAX) or b"the daemon died"
    if report != b"ready":
        text = report.decode(errors="replace")
        prefix = f"cannot mount {mountpoint!r}: "
        raise MountFailed(mountpoint=mountpoint, reason=text.removeprefix(prefix))
    try:
        Path(mountpoint).stat()
    except OSError as error:
        raise MountFailed(mountpoint=mountpoint, reason=f"the daemon died: {error}") from error


def _detach_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _log_handler(location: str, options: MountOptions) -> logging.Handler:
    """The log file asked for; else syslog, where there is one; else a file beside the index."""
    if options.log_file is not None:
        return logging.FileHandler(options.log_file)
    if Path("/dev/log").exists():
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(
                "/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON
            )
            handler.ident = "backupfs: "
            return handler
    folder = cache_folder("log")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return logging.handlers.RotatingFileHandler(
        folder / "backupfs.log", maxBytes=10 << 20, backupCount=2
    )


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
