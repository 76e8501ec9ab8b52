"""From what a user calls a repository to its storage."""

from __future__ import annotations

from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import InvalidOption
from backupfs.storage.local import LocalStorage


def local_folder(location: str) -> Path:
    """The folder that ``location`` names, absolute.

    Raises:
        InvalidOption: it is the address of something that is no folder of this host.
    """
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    elif "://" in location:
        scheme = location.partition("://")[0]
        raise InvalidOption(option=location, reason=f"repositories in {scheme} are not supported")
    if not location:
        raise InvalidOption(option="REPO", reason="the name of a folder is missing")
    return Path(location).expanduser().absolute()


def open_storage(location: str, ambient: Ambient) -> LocalStorage:
    """The storage that ``location`` names; nothing is looked at yet."""
    return LocalStorage(local_folder(location), ambient)
