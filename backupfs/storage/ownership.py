"""Keeps a repository usable by its owner when root works in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def match_owner(path: Path, file: int | None = None) -> None:
    """Give what we have just made to the owner of the folder it lies in, where that is not us.

    A single gc by root would else leave locks and folders that the repository's owner cannot use.
    ``file``: its descriptor, where there is one; as that owner could put something else there, nothing
    is given away that was not made by us, and no link is followed.
    """
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
