"""What keeps named bytes for a repository: five calls and their contract.

Objects are immutable and each name is used once. Nothing rests on create-only puts, on
compare-and-swap, on a complete or current listing, or on the clocks of hosts: what the repository
needs is only that an object it was told is stored can be read back until it is deleted.

Every implementation passes the conformance suite in ``tests/storage``. Each call is thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backupfs.types import Buffer, ObjectName


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One line of a listing."""

    name: ObjectName
    size: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledFile:
    """Bytes to be stored that lie in a file of this host, in the storage's spool folder."""

    path: Path
    size: int  # bytes


class Storage(Protocol):
    """Where a repository's objects are."""

    location: str  # as the user wrote it, for messages

    def put_new(self, name: ObjectName, data: Buffer | SpooledFile) -> None:
        """Store ``data`` under ``name``; on return it survives a power cut.

        Readers see all of it or nothing. Repeating a put with the same bytes is harmless. A
        spooled file belongs to the storage from the call on: it is gone after success.

        Raises:
            ObjectExists: other bytes are there; they were not touched.
            StorageFull, StorageReadOnly: nothing was stored.
            StorageUnavailable: unknown whether it was stored; the caller may repeat.
        """

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        """All bytes of an object of at most ``size_max`` bytes.

        Raises:
            ObjectNotFound: there is none of that name.
            CorruptObject: it is larger than ``size_max``.
            StorageUnavailable: it could not be read.
        """

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer only where the object ends. Raises as ``get``."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose names begin with ``prefix``, which ends in "/"; in no order.

        An object put or deleted meanwhile may be listed or not; one that is listed may not be durable
        before its put returns.
        """

    def delete(self, name: ObjectName) -> None:
        """Remove an object; on return it stays gone. Absent already: no error."""
