"""A small file system of a test's own, that can be filled, turned read-only and taken away."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from lifecycle_mount import MIB

DISK_SIZE = 24 * MIB


class Disk:
    """A small file system, for a repository."""

    def __init__(self, path: Path, *, inodes: int = 0) -> None:
        self.path = path
        self._filler = path / "filler"
        path.mkdir(parents=True)
        mount("-t", "tmpfs", "-o", f"size={DISK_SIZE},nr_inodes={inodes}", "none", path)

    @property
    def free_size(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Take all room but ``leave`` bytes."""
        size = self.free_size - leave
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while size > 0:
                size -= file.write(bytes(min(size, MIB)))

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def turn(self, how: str) -> None:
        """Make it read-only, or writable again; nothing may have a file open for writing."""
        mount("-o", f"remount,{how}", self.path)

    def take_away(self) -> None:
        """It is gone from where it was; who has something open there keeps that."""
        subprocess.run(["umount", "-l", str(self.path)], check=True, timeout=30)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, timeout=30)
