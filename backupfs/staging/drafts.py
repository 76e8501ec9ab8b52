"""What is staged on this host, seen from outside the process that holds it.

While a repository is mounted its daemon owns the drafts: it is asked through the mount itself, by
its status file and by an attribute set on a staged file. Otherwise the kept states are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from backupfs.errors import (
    BackupfsError,
    Busy,
    DraftNotFound,
    InvalidName,
    NothingToPublish,
    StorageFull,
    StorageUnavailable,
)
from backupfs.format.names import check_volume_name, volume_of
from backupfs.reports import DraftInfo
from backupfs.repository.repository import Repository
from backupfs.staging.lifecycle import RENAME_FIRST, State, is_temporary_path, why_not_published
from backupfs.staging.state_store import current_holder, host_folder, load_states

log = logging.getLogger(__name__)

PUBLISH_ATTRIBUTE = "user.backupfs.publish"
ID_ATTRIBUTE = "user.backupfs.id"
STATE_ATTRIBUTE = "user.backupfs.state"
REASON_ATTRIBUTE = "user.backupfs.reason"
STATUS_PATH = ".backupfs/status.json"
MOUNT_SECONDS_MAX = 10.0
PUBLISH_SECONDS_MAX = 120.0  # also waits for other publishers

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RunningMount:
    """A mount of the repository on this host."""

    mountpoint: str
    process_id: int


def mount_of(repository: Repository) -> RunningMount | None:
    """The mount of the repository on this host; None where there is none.

    Raises:
        Busy: another process holds the drafts for a moment, without a mount.
    """
    found = current_holder(host_folder(repository.folder, repository.ambient))
    if found is None:
        return None
    if found.mountpoint is None:
        raise Busy(what="the staging area", holder=f"process {found.process_id}")
    return RunningMount(found.mountpoint, found.process_id)


def wait_for_mount(repository: Repository) -> None:
    """Let a mount of the repository on this host publish what was closed before this call.

    A program's close returns a moment before the daemon makes a backup of what it wrote; a look
    into ``volumes/`` waits for that. A mount that does not answer is not waited for.
    """
    try:
        mount = mount_of(repository)
    except Busy:
        return
    if mount is None:
        return
    try:
        asked(_look_into, mount.mountpoint, seconds_max=MOUNT_SECONDS_MAX)
    except TimeoutError:
        log.warning(
            "%r: the mount does not answer; its last copies may be missing", mount.mountpoint
        )
    except OSError:
        pass  # a dead mount, or another user's: it keeps nobody waiting


def _look_into(mountpoint: str) -> None:
    os.close(os.open(Path(mountpoint) / "volumes", os.O_RDONLY | os.O_DIRECTORY))


def asked(call: Callable[..., Answer], *arguments: Any, seconds_max: float) -> Answer:
    """What ``call`` gets from a mount: one whose daemon is stopped or stuck would hold it for ever.

    Raises: OSError (TimeoutError: no answer), and what else ``call`` raises.
    """
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(call(*arguments))
        except Exception as error:  # is raised where it was asked
            answer.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds_max)  # not only until the answer: the process may be about to fork
    if not answer.done():
        raise TimeoutError(f"what is mounted there did not answer in {seconds_max:.0f} s")
    return answer.result()


def list_drafts(repository: Repository) -> list[DraftInfo]:
    """What is staged and is not, or not wholly, a backup. Raises: Busy, StorageError."""
    mount = mount_of(repository)
    if mount is not None:
        return _drafts_of_mount(mount)
    folder = host_folder(repository.folder, repository.ambient)
    states, _logged = load_states(folder, repository.ids, chunk_size=repository.config.chunk_size)
    return [
        DraftInfo(
            name=state.name,
            volume=volume_of(state.name),
            state=State.HELD,
            reason=state.held or "will be looked at by the next mount",
            size=state.size,
            changed_at=state.changed_at,
        )
        for state in states
        if state.changed
    ]


def publish_through_mount(mount: RunningMount, name: str) -> str:
    """Have the daemon publish a draft; the id of its backup.

    Raises: DraftNotFound, InvalidName, NothingToPublish, StorageFull, StorageUnavailable.
    """
    if check_volume_name(name):  # nothing like "../x" is ever staged
        raise DraftNotFound(name=name)
    path = Path(mount.mountpoint) / "staging" / name

    def publish() -> str:
        _status(mount)
        os.setxattr(path, PUBLISH_ATTRIBUTE, b"1")
        return os.getxattr(path, ID_ATTRIBUTE).decode()

    try:
        return asked(publish, seconds_max=PUBLISH_SECONDS_MAX)
    except TimeoutError as error:
        raise StorageUnavailable(reason=f"{mount.mountpoint!r}: {error}") from error
    except OSError as error:
        raise _refusal(name, path, error) from error


def _refusal(name: str, path: Path, error: OSError) -> BackupfsError:
    """What the daemon meant by its errno."""
    if error.errno == errno.ENOENT:
        return DraftNotFound(name=name)
    if error.errno == errno.EINVAL and is_temporary_path(name):
        return InvalidName(name=name, reason=RENAME_FIRST)
    if error.errno == errno.EINVAL:
        with contextlib.suppress(OSError):
            state, reason = asked(_state_of, path, seconds_max=MOUNT_SECONDS_MAX)
            return NothingToPublish(name=name, reason=why_not_published(state, reason))
    if error.errno == errno.ENOSPC:
        return StorageFull(reason=error.strerror)
    return StorageUnavailable(reason=f"the mount refused: {error.strerror} (see its events.log)")


def _state_of(path: Path) -> tuple[str, str]:
    """The state of a staged file, and why it is in it."""
    state = os.getxattr(path, STATE_ATTRIBUTE).decode()
    try:
        return state, os.getxattr(path, REASON_ATTRIBUTE).decode()
    except OSError:
        return state, ""


def _status(mount: RunningMount) -> dict[str, Any]:
    """What a mount says of itself.

    Raises: StorageUnavailable, also where it is another one: that of ours was unmounted lazily, and some
    program keeps its daemon running.
    """
    try:
        status: dict[str, Any] = json.loads(Path(mount.mountpoint, STATUS_PATH).read_text())
        is_ours = status["process_id"] == mount.process_id
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"the mount at {mount.mountpoint!r} does not answer"
        raise StorageUnavailable(reason=reason) from error
    if not is_ours:
        reason = (
            f"its daemon, process {mount.process_id}, still runs, and is mounted at"
            f" {mount.mountpoint!r} no more: end it, or the programs that have files of it open"
        )
        raise StorageUnavailable(reason=reason)
    return status


def _drafts_of_mount(mount: RunningMount) -> list[DraftInfo]:
    try:
        status = asked(_status, mount, seconds_max=MOUNT_SECONDS_MAX)
    except OSError as error:
        reason = f"the mount at {mount.mountpoint!r} does not answer"
        raise StorageUnavailable(reason=reason) from error
    for damage in status["unreadable_drafts"]:
        log.error("a draft cannot be read: %s", damage)
    return [
        DraftInfo(
            name=item["name"],
            volume=item["volume"],
            state=item["state"],
            reason=item["reason"],
            size=item["size"],
            changed_at=datetime.fromisoformat(item["changed_at"]),
        )
        for item in status["drafts"]
    ]
