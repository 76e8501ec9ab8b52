"""Keeps the durable state of drafts in a folder of this host, one small file each.

A draft's state is written at each checkpoint; an empty file beside it, the *mark*, says by its name
that writing went on after a checkpoint, and survives the death of the daemon. One process at a time
holds the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import Busy, CorruptObject
from backupfs.format import codec
from backupfs.format.draft_state import (
    FOLDERS_SIZE_MAX,
    STATE_SIZE_MAX,
    DraftState,
    decode_draft_state,
    decode_folders,
    encode_draft_state,
    encode_folders,
)
from backupfs.format.ids import IdScheme
from backupfs.repository.marking import DRAFT_SUFFIX, DRAFTS
from backupfs.storage.local import make_folders, replace_file, sync_folder
from backupfs.storage.locks import FileLock, holder, is_held, try_lock
from backupfs.storage.oserrors import translated
from backupfs.storage.ownership import make_file

log = logging.getLogger(__name__)

WRITING_SUFFIX = ".writing"
FOLDERS_NAME = "folders"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the folder of drafts."""

    process_id: int
    mountpoint: str | None


class StateStore:
    """The states of this host's drafts of one repository."""

    def __init__(
        self, folder: Path, lock: FileLock, ids: IdScheme, *, chunk_size: int, ambient: Ambient
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._ids = ids
        self._chunk_size = chunk_size
        self._ambient = ambient
        self._marks: defaultdict[str, dict[Path, int]] = defaultdict(dict)  # by draft: the flush
        for path in folder.glob(f"*{WRITING_SUFFIX}"):
            draft_id, _, number = path.name.removesuffix(WRITING_SUFFIX).partition(".")
            if not self._path(draft_id).exists():  # removed just before a crash
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            # One that says nothing counts: that holds the draft.
            self._marks[draft_id][path] = int(number) if number.isdecimal() else sys.maxsize

    @classmethod
    def open(
        cls,
        repository_folder: Path,
        ids: IdScheme,
        *,
        chunk_size: int,
        ambient: Ambient,
        mountpoint: str | None,
    ) -> StateStore:
        """Take the folder of this host's drafts. Raises: Busy, StorageError."""
        folder = host_folder(repository_folder, ambient)
        with translated():
            make_folders(folder)
        lock = try_lock(folder / "lock")
        if lock is None:
            raise Busy(what="the staging area", holder=_describe(current_holder(folder)))
        lock.describe(json.dumps({"pid": ambient.process_id(), "mountpoint": mountpoint}))
        return cls(folder, lock, ids, chunk_size=chunk_size, ambient=ambient)

    def close(self) -> None:
        self._lock.release()

    def save(self, state: DraftState) -> None:
        """Keep a draft's state; durable on return. Raises: StorageError."""
        with translated():
            replace_file(
                self._path(state.draft_id),
                encode_draft_state(state, self._ids),
                token=self._ambient.random_bytes(8).hex(),
            )

    def remove(self, draft_id: str) -> None:
        """Forget a draft; durable on return. Raises: StorageError."""
        with translated():
            self._path(draft_id).unlink(missing_ok=True)
        # After the state: should that stay, nobody may take it for one that was closed.
        self.unmark_writing(draft_id)
        with translated():
            sync_folder(self._folder)

    def mark_writing(self, draft_id: str, sequence: int) -> None:
        """Note that a draft changes after its flush ``sequence``; older notes of it go.

        Not synced: it is for the death of the daemon. What a crash of the host loses of it was
        not acknowledged to any writer; a state saved from now on takes it along.
        """
        # An empty file: bytes would not be durable with its name, and half a note cannot be told
        # from one that is void.
        path = self._folder / f"{draft_id}.{sequence}{WRITING_SUFFIX}"
        with translated():
            with contextlib.suppress(FileExistsError):
                os.close(make_file(path))
            for older in self._marks[draft_id].keys() - {path}:
                older.unlink(missing_ok=True)
        self._marks[draft_id] = {path: sequence}

    def unmark_writing(self, draft_id: str) -> None:
        """Note that it changes no more. Raises: StorageError."""
        with translated():
            for path in self._marks[draft_id]:
                path.unlink(missing_ok=True)
        del self._marks[draft_id]

    def was_writing(self, draft_id: str, sequence: int) -> bool:
        """Whether writing went on after flush ``sequence``."""
        return any(number >= sequence for number in self._marks[draft_id].values())

    def load_all(self) -> tuple[list[DraftState], list[CorruptObject]]:
        """Every readable state, and what is wrong with the others; those are left in place."""
        return load_states(self._folder, self._ids, chunk_size=self._chunk_size)

    def save_folders(self, folders: set[str]) -> None:
        """Keep the sub-folders of ``staging/``; durable on return. Raises: StorageError."""
        with translated():
            replace_file(
                self._folder / FOLDERS_NAME,
                encode_folders(folders),
                token=self._ambient.random_bytes(8).hex(),
            )

    def load_folders(self) -> set[str]:
        try:
            with (self._folder / FOLDERS_NAME).open("rb") as file:
                return decode_folders(file.read(FOLDERS_SIZE_MAX + 1))
        except FileNotFoundError:
            return set()
        except (OSError, codec.UndecodableError) as error:
            log.error("the list of staged folders is lost: %s", error)
            return set()

    def _path(self, draft_id: str) -> Path:
        return self._folder / f"{draft_id}{DRAFT_SUFFIX}"


def host_folder(repository_folder: Path, ambient: Ambient) -> Path:
    """Where this host keeps its drafts of a repository, beside it."""
    host = re.sub(r"[^A-Za-z0-9._-]", "_", ambient.host_name()).lstrip(".") or "host"
    return repository_folder / DRAFTS / host


def load_states(
    folder: Path, ids: IdScheme, *, chunk_size: int
) -> tuple[list[DraftState], list[CorruptObject]]:
    """The readable states in ``folder``, and what is wrong with the others; needs no lock."""
    states, damage = [], []
    for path in sorted(folder.glob(f"*{DRAFT_SUFFIX}")):
        try:
            with path.open("rb") as file:
                data = file.read(STATE_SIZE_MAX + 1)
            states.append(decode_draft_state(data, path.name, ids, chunk_size=chunk_size))
        except FileNotFoundError:
            continue  # forgotten since it was listed
        except (OSError, CorruptObject) as error:
            reason = error.reason if isinstance(error, CorruptObject) else str(error)
            name = f"{DRAFTS}/{folder.name}/{path.name}"
            damage.append(CorruptObject(name=name, reason=reason))
            log.error("a draft cannot be read: %s", damage[-1])
    return states, damage


def current_holder(folder: Path) -> Holder | None:
    """Who holds the drafts in ``folder`` now; None where nobody does."""
    path = folder / "lock"
    if not is_held(path):
        return None
    return _holder_of(holder(path))


def _holder_of(word: str) -> Holder:
    """Who left this word of itself; nobody known where it makes no sense."""
    try:
        value = json.loads(word)
        process_id, mountpoint = value["pid"], value["mountpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder(0, None)
    if type(process_id) is not int or not isinstance(mountpoint, str | None):
        return Holder(0, None)
    return Holder(process_id, mountpoint)


def _describe(found: Holder | None) -> str:
    if found is None or not found.process_id:
        return "another process"
    where = f", mounted at {found.mountpoint!r}" if found.mountpoint else ""
    return f"process {found.process_id}{where}"
