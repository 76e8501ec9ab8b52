"""What no writer may rely on: packs that a gc has condemned, and blobs known to be damaged."""

from __future__ import annotations

from backupfs.repository.index import BlobLocation
from backupfs.types import BlobId, PackId


class Avoided:
    """Blobs and packs that no writer may rely on. Replaced whole, so reading needs no lock."""

    def __init__(self) -> None:
        self.packs: frozenset[PackId] = frozenset()
        self.blobs: frozenset[BlobId] = frozenset()

    def allows(self, blob_id: BlobId, location: BlobLocation) -> bool:
        return location.pack_id not in self.packs and blob_id not in self.blobs
