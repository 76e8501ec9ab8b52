"""The mounted tree: which names there are, and what each of them stands for.

Knows nothing of inodes, handles or attributes. All answers come from memory: the catalogue for
``volumes/`` and ``backups/``, the staging area for ``staging/``; so the event loop may ask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from backupfs.catalogue import Catalogue, Change
from backupfs.format.names import LATEST_NAME, METADATA_NAME
from backupfs.format.record import is_backup_id
from backupfs.service import StagingArea
from backupfs.staging.staged_file import StagedFile

RECORD_SUFFIX = ".msgpack"
IMAGE_SUFFIX = ".img"


class Kind(StrEnum):
    ROOT = "root"
    README = "readme"
    STAGING = "staging"  # key: path of a folder below staging/, empty for staging/ itself
    STAGED = "staged"  # key: id of the draft
    VOLUMES = "volumes"  # key: path of a folder below volumes/, empty for volumes/ itself
    BACKUP = "backup"  # key: id; in two places of the tree
    LATEST = "latest"  # key: volume
    METADATA = "metadata"  # key: volume
    BACKUPS = "backups"
    RECORD = "record"  # key: id of the backup
    SIDECAR = "sidecar"  # key: name; a record that is being copied in
    CONTROL = "control"  # .backupfs/
    STATUS = "status"
    EVENTS = "events"


FOLDERS = {Kind.ROOT, Kind.STAGING, Kind.VOLUMES, Kind.BACKUPS, Kind.CONTROL}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for. Equal entries are the same file, under whatever name."""

    kind: Kind
    key: str = ""
    staged: StagedFile | None = field(default=None, compare=False, repr=False)

    @property
    def is_folder(self) -> bool:
        return self.kind in FOLDERS


ROOT = Entry(Kind.ROOT)
STAGING = Entry(Kind.STAGING)
VOLUMES = Entry(Kind.VOLUMES)
BACKUPS = Entry(Kind.BACKUPS)
CONTROL = Entry(Kind.CONTROL)
_TOP = {
    "README.txt": Entry(Kind.README),
    "staging": STAGING,
    "volumes": VOLUMES,
    "backups": BACKUPS,
    ".backupfs": CONTROL,
}
_CONTROL = {"status.json": Entry(Kind.STATUS), "events.log": Entry(Kind.EVENTS)}


class Layout:
    """The tree as it is now. ``area`` is None in a read-only mount."""

    def __init__(self, catalogue: Catalogue, area: StagingArea | None) -> None:
        self._catalogue = catalogue
        self._area = area
        self._lock = threading.Lock()  # over changes: the catalogue tells of its own from threads
        self._folders = _Folders()
        self._volumes: set[str] = set()
        # Folders that stay until rmdir, as their last backup, or folder, was removed by name.
        self._emptied: set[str] = set()
        self._left: set[str] = set()
        self._without_latest: set[str] = set()  # volumes whose link was removed
        catalogue.subscribe(self._follow)
        for volume in catalogue.volumes():
            self._volumes.add(volume)
            self._folders.add(volume)

    def child(self, parent: Entry, name: str) -> Entry | None:
        """What ``name`` in the folder ``parent`` stands for."""
        if parent.kind is Kind.ROOT:
            return _TOP.get(name) if self._shows(name) else None
        if parent.kind is Kind.STAGING:
            return self._staged_child(_join(parent.key, name))
        if parent.kind is Kind.VOLUMES:
            return self._volume_child(parent.key, name)
        if parent.kind is Kind.BACKUPS:
            return self._backup_child(name)
        return _CONTROL.get(name) if parent.kind is Kind.CONTROL else None

    def children(self, parent: Entry) -> list[tuple[str, Entry]]:
        """All names in a folder, sorted."""
        if parent.kind is Kind.ROOT:
            return [(name, entry) for name, entry in sorted(_TOP.items()) if self._shows(name)]
        if parent.kind is Kind.STAGING:
            return sorted(self._staged_children(parent.key), key=_name)
        if parent.kind is Kind.VOLUMES:
            return self._volume_children(parent.key)
        if parent.kind is Kind.BACKUPS:
            return sorted(self._backup_children(), key=_name)
        return sorted(_CONTROL.items()) if parent.kind is Kind.CONTROL else []

    def parent(self, entry: Entry) -> Entry:
        """The folder that a folder lies in."""
        if entry.kind in (Kind.STAGING, Kind.VOLUMES) and entry.key:
            return Entry(entry.kind, entry.key.rpartition("/")[0])
        return ROOT

    def walk(self) -> Iterator[Entry]:
        """Every entry there is."""
        folders = [ROOT]
        while folders:
            folder = folders.pop()
            yield folder
            for _child, entry in self.children(folder):
                if entry.is_folder:
                    folders.append(entry)
                else:
                    yield entry

    # -- removing through the mount ----------------------------------------------------------------

    def keep_emptied(self, volume: str) -> None:
        """A volume's backup is about to be removed by name: its folder stays until rmdir."""
        with self._lock:
            self._keep(self._emptied, volume)

    def hide_latest(self, volume: str) -> None:
        """The link was removed, as "rm -r" does; the next backup brings it back."""
        self._without_latest.add(volume)

    def remove_folder(self, path: str) -> bool:
        """Drop a folder of ``volumes/``; False where there are backups in or below it.

        The one it lies in stays, as "rm -r" removes it next.
        """
        below = f"{path}/"

        def goes(folder: str) -> bool:
            return folder == path or folder.startswith(below)

        with self._lock:
            if any(map(goes, self._volumes)):
                return False
            self._let_go(goes)
            parent = path.rpartition("/")[0]
            if parent and not self._folders.has(parent):
                self._keep(self._left, parent)
        return True

    def _keep(self, kept: set[str], path: str) -> None:
        if path not in kept:
            kept.add(path)
            self._folders.add(path)

    def _let_go(self, goes: Callable[[str], bool]) -> None:
        for kept in (self._emptied, self._left):
            for path in list(filter(goes, kept)):
                kept.discard(path)
                self._folders.remove(path)

    # -- parts -------------------------------------------------------------------------------------

    def _shows(self, name: str) -> bool:
        return name != "staging" or self._area is not None

    def _staged_child(self, path: str) -> Entry | None:
        assert self._area is not None
        staged = self._area.find(path)
        if staged is not None:
            return Entry(Kind.STAGED, staged.draft_id, staged)
        return Entry(Kind.STAGING, path) if self._area.is_folder(path) else None

    def _staged_children(self, folder: str) -> Iterator[tuple[str, Entry]]:
        assert self._area is not None
        for staged in self._area.files():
            place, _, name = staged.name.rpartition("/")
            if place == folder:
                yield name, Entry(Kind.STAGED, staged.draft_id, staged)
        for path in self._area.folders():
            place, _, name = path.rpartition("/")
            if place == folder:
                yield name, Entry(Kind.STAGING, path)

    def _volume_child(self, folder: str, name: str) -> Entry | None:
        path = _join(folder, name)
        if self._folders.has(path):
            return Entry(Kind.VOLUMES, path)
        stays = folder in self._volumes or folder in self._emptied
        if name == LATEST_NAME and stays:
            # Of an emptied folder it is not listed any more, but "rm -r" may yet remove it.
            return None if folder in self._without_latest else Entry(Kind.LATEST, folder)
        if folder in self._volumes:
            record = self._catalogue.by_name(folder, name)
            if record is not None:
                return Entry(Kind.BACKUP, record.backup_id)
        if name == METADATA_NAME and stays:
            return Entry(Kind.METADATA, folder)
        return None

    def _volume_children(self, folder: str) -> list[tuple[str, Entry]]:
        found = [
            (name, Entry(Kind.VOLUMES, _join(folder, name)))
            for name in self._folders.children(folder)
        ]
        if folder in self._volumes:
            for record in self._catalogue.backups(folder):
                found.append((record.name, Entry(Kind.BACKUP, record.backup_id)))
            if folder not in self._without_latest:
                found.append((LATEST_NAME, Entry(Kind.LATEST, folder)))
            found.append((METADATA_NAME, Entry(Kind.METADATA, folder)))
        return sorted(found, key=_name)

    def _backup_child(self, name: str) -> Entry | None:
        for suffix, kind in ((IMAGE_SUFFIX, Kind.BACKUP), (RECORD_SUFFIX, Kind.RECORD)):
            backup_id = name.removesuffix(suffix)
            if backup_id != name and is_backup_id(backup_id):
                return Entry(kind, backup_id) if self._catalogue.get(backup_id) else None
        return None

    def _backup_children(self) -> Iterator[tuple[str, Entry]]:
        for record in self._catalogue.all():
            backup_id = record.backup_id
            yield f"{backup_id}{IMAGE_SUFFIX}", Entry(Kind.BACKUP, backup_id)
            yield f"{backup_id}{RECORD_SUFFIX}", Entry(Kind.RECORD, backup_id)

    def _follow(self, change: Change) -> None:
        with self._lock:
            for volume in {record.volume for record in (*change.added, *change.removed)}:
                self._follow_volume(volume)
            for record in change.added:
                self._without_latest.discard(record.volume)

    def _follow_volume(self, volume: str) -> None:
        exists = self._catalogue.latest(volume) is not None
        if exists and volume not in self._volumes:
            self._volumes.add(volume)
            self._folders.add(volume)
            self._let_go(lambda path: f"{volume}/".startswith(f"{path}/"))
        elif not exists and volume in self._volumes:
            self._volumes.discard(volume)
            self._folders.remove(volume)


class _Folders:
    """Folders that exist because something below needs them, counted by those needs."""

    def __init__(self) -> None:
        self._needs: dict[str, int] = {}
        self._children: dict[str, set[str]] = {"": set()}

    def has(self, path: str) -> bool:
        return path in self._needs

    def children(self, path: str) -> list[str]:
        return sorted(self._children.get(path, ()))

    def add(self, path: str) -> None:
        """Need a folder and all those it lies in."""
        while path:
            self._needs[path] = self._needs.get(path, 0) + 1
            folder, _, name = path.rpartition("/")
            self._children.setdefault(folder, set()).add(name)
            path = folder

    def remove(self, path: str) -> None:
        """Need them no longer."""
        while path:
            folder, _, name = path.rpartition("/")
            self._needs[path] -= 1
            if not self._needs[path]:
                del self._needs[path]
                self._children.pop(path, None)
                self._children[folder].discard(name)
            path = folder


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _name(item: tuple[str, Entry]) -> str:
    return item[0]
