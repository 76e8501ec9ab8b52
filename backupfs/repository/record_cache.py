"""Records as this host has read them before, in a file beside the index: spares a start reading each.

Disposable: losing it, or finding it damaged, costs time only. A record counts as read only while its
object is the file that it was, by the storage's stamp, so nothing is shown that is not there. What
the disk has lost of it since, without anybody's writing, is for ``verify`` to find, as with packs.

The file is blocks, only ever added at its end: size and digest, then a map with some records.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupfs.format import codec
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.storage.local import Stamp
from backupfs.types import Buffer

log = logging.getLogger(__name__)

# In the file's name, as another version may run beside this one: of blocks and of records.
VERSION = 1
HEAD = struct.Struct(f"<I{DIGEST_SIZE}s")  # size of the block's map in bytes, its digest
BLOCK_SIZE_MAX = 32 << 20
BLOCK_LENGTH_MAX = 1000  # records; so many are in memory at once


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """A record's object as it was read."""

    backup_id: str
    stamp: Stamp  # taken before it was read
    data: bytes  # taken by decode_record


class RecordCache:
    """The file in ``folder``, which need not exist. Any number of processes use it at once."""

    def __init__(self, folder: Path, ids: IdScheme) -> None:
        self._path = folder / f"records-{VERSION}"
        self._ids = ids

    def read(self) -> Iterator[KeptRecord]:
        """All that was kept, perhaps of one backup several times, up to where it is damaged."""
        try:
            with self._path.open("rb") as file:
                while head := file.read(HEAD.size):
                    size, digest = HEAD.unpack(head)
                    block = file.read(min(size, BLOCK_SIZE_MAX))
                    if len(block) != size or self._ids.digest("state", block) != digest:
                        raise ValueError("a block is not as it was written")
                    yield from _records_in(block)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            log.warning("records are read anew, as %s is of no use: %s", self._path, error)
            self.clear()

    def add(self, records: Sequence[KeptRecord]) -> None:
        """Keep these too. Where that fails the next start takes longer."""
        rows = [[record.backup_id, *record.stamp, record.data] for record in records]
        block = codec.encode({"records": rows})
        if len(block) > BLOCK_SIZE_MAX:
            return
        head = HEAD.pack(len(block), self._ids.digest("state", block))
        try:
            # One write, so that two processes do not mix. Not synced: the digest tells what a power
            # cut left of it.
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, head + block)
            finally:
                os.close(file)
        except OSError as error:
            log.info("records are not kept: %s", error)

    def clear(self) -> None:
        """Forget all."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.info("%s", error)


def _records_in(block: Buffer) -> Iterator[KeptRecord]:
    for backup_id, inode, size, content_ns, inode_ns, data in codec.decode_own(block)["records"]:
        yield KeptRecord(backup_id, (inode, size, content_ns, inode_ns), data)
