"""Inode numbers: the same entry has the same number at every mount.

A number is made from what the entry is, so file handles of NFS survive a restart. The table only
leads back from numbers to entries; what is not in it is found again by walking the tree, if it has
a name there. It keeps what the kernel knows: that forgets a number as often as it was told of it,
and may be told of it anew before we hear that it forgot it.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from backupfs.fuse.layout import ROOT, Entry, Layout

ROOT_NUMBER = 1
_NUMBER_BITS = 63


class Inodes:
    """Used by the event loop only."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._entries: dict[int, Entry] = {ROOT_NUMBER: ROOT}
        self._told: Counter[int] = Counter()

    def number(self, entry: Entry) -> int:
        """The inode number of ``entry``."""
        if entry == ROOT:
            return ROOT_NUMBER
        number = _preferred(entry)
        while (other := self._entries.get(number)) is not None and other != entry:
            number += 1  # two in 2**63 collide: the later one moves on
        self._entries[number] = entry
        return number

    def entry(self, number: int) -> Entry | None:
        """The entry of a number that the kernel got from us, in this mount or an earlier one."""
        entry = self._entries.get(number)
        if entry is None:
            for found in self._layout.walk():
                if self.number(found) == number:
                    return found
        return entry

    def tell(self, entry: Entry) -> None:
        """The kernel is told of ``entry`` by its name."""
        self._told[self.number(entry)] += 1

    def forget(self, number: int, count: int) -> None:
        """The kernel does not need ``count`` of the times any more that it was told of a number."""
        self._told[number] -= count
        if self._told[number] <= 0:
            del self._told[number]
            if number != ROOT_NUMBER:
                self._entries.pop(number, None)


def _preferred(entry: Entry) -> int:
    text = f"{entry.kind}\0{entry.key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return max(2, int.from_bytes(digest, "little") >> (64 - _NUMBER_BITS))
