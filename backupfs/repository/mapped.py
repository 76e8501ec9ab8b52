"""Bounds how much of a mapped file counts as this process's memory.

What was looked at in a mapped file stays mapped, and counts as resident, until the system wants the
room. A daemon of a large repository would look as large as its index, and be the one that is ended
where memory is short. To unmap pages loses nothing: the page cache has them, and the next look
maps them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MAPS = Path("/proc/self/maps")
STATM = Path("/proc/self/statm")
MADV_DONTNEED = 4  # as in mman.h; of shared mappings of a file it drops nothing but the mapping


def mapped_size() -> int:
    """Bytes of files that are mapped and resident in this process; 0 where that is not told."""
    try:
        return int(STATM.read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def unmap_pages(path: Path) -> None:
    """Unmap all pages of a file that this process has mapped shared; other threads may be reading."""
    # Needed by few, and not quick to import.
    import ctypes

    libc = ctypes.CDLL(None)
    for start, end in _shared_mappings(path):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _shared_mappings(path: Path) -> Iterator[tuple[int, int]]:
    """Where the file is mapped: first address, and the one behind the last."""
    try:
        inode = str(path.stat().st_ino)
        lines = MAPS.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        fields = os.fsdecode(line).split(None, 5)
        if len(fields) == 6 and fields[4] == inode and fields[5].endswith(path.name):
            start, _, end = fields[0].partition("-")
            if fields[1].endswith("s"):
                yield int(start, 16), int(end, 16)
