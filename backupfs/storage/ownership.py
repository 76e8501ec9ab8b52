"""Keeps a repository usable by its owner when root works in it.

A single gc by root would else leave locks and folders that the owner cannot use. As that owner could put
something else in the place of what we make, nothing is given away that was not made by us, and no
link is followed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_file(path: Path, *, access: int = os.O_WRONLY) -> int:
    """Make and open a file that is not there, for the owner of its folder. Raises: OSError."""
    file = os.open(path, access | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _give(path, file)
    return file


def give_folder(path: Path) -> None:
    """Give a folder that was just made to the owner of the one it lies in."""
    _give(path, None)


def _give(path: Path, file: int | None) -> None:
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):  # of a file system without owners, or one that squashes root
        above = path.parent.stat()
        if (above.st_uid, above.st_gid) == (0, 0):
            return
        if file is None:
            os.chown(path, above.st_uid, above.st_gid, follow_symlinks=False)
        else:
            os.fchown(file, above.st_uid, above.st_gid)
