"""Stores changed chunks as their differences to what lay at the same place before.

A disk changes in blocks of 4 KiB or less, a chunk has 64 KiB: most of a changed chunk is known. What
differs is a small part of what the chunk takes by itself, and as much less is written. Reading it takes
its base as well, so only what gains much is stored so, and a base is never a difference itself: no
chunk takes more than two.

A base is relied on like any chunk that is not stored again (see ``chunks``), and it must be durable:
were it still on its way, a crash could keep the difference without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from backupfs.errors import BackupfsError
from backupfs.format import pieces
from backupfs.format.blob import BlobEncoder
from backupfs.repository.blobs import BlobReader
from backupfs.repository.index import BlobLocation
from backupfs.types import HOLE, BlobId, Buffer

# What a difference must spare, beside half of what its base takes.
GAIN_SIZE_MIN = 2048

# Where those blobs lie that a writer may rely on, by their ids.
FindUsable = Callable[[Iterable[BlobId]], dict[BlobId, BlobLocation]]


class _Candidate(NamedTuple):
    """A chunk, and what it may be stored as a difference to."""

    blob_id: BlobId
    plain: Buffer
    base_id: BlobId
    base_size: int  # bytes that the base takes


class _Like(NamedTuple):
    """A chunk that much of its base is found in again."""

    candidate: _Candidate
    base: bytes
    changed: bytes  # where they differ; see ``pieces``


class Differences:
    """Makes differences for one repository. Thread-safe."""

    def __init__(
        self,
        *,
        encoder: BlobEncoder,
        reader: BlobReader,
        find_usable: FindUsable,
    ) -> None:
        self._encoder = encoder
        self._reader = reader
        self._find_usable = find_usable

    def encode(
        self, chunks: Sequence[tuple[BlobId, Buffer]], earlier: dict[BlobId, BlobId]
    ) -> dict[BlobId, bytes]:
        """Blobs of those ``chunks`` that are to be stored as differences.

        ``earlier``: by the id of a chunk, that of what lay at its place before.
        """
        try:
            bases = self._bases({earlier[blob_id] for blob_id, _ in chunks if blob_id in earlier})
            wanted = [
                _Candidate(blob_id, plain, *bases[earlier[blob_id]])
                for blob_id, plain in chunks
                if earlier.get(blob_id) in bases
            ]
            # Where something else was written over a long range, both ends of a batch show it: then
            # what was there is not read and compared for each chunk between them.
            like = self._like(wanted if len(wanted) <= 2 else [wanted[0], wanted[-1]])
            if like:
                like += self._like(wanted[1:-1])
            return self._encode(like)
        except BackupfsError:  # a base cannot be read: whoever has it stores its chunk whole
            return {}

    def _bases(self, before: set[BlobId]) -> dict[BlobId, tuple[BlobId, int]]:
        """The base to take for what is like a chunk, and the bytes that the base takes."""
        locations = self._find_usable(before - {HOLE})
        # What is a difference itself has a base that is as good.
        others = {location.base for location in locations.values() if location.base is not None}
        locations |= self._find_usable(others - locations.keys())
        bases = {}
        for blob_id in before & locations.keys():
            base_id = locations[blob_id].base or blob_id
            location = locations.get(base_id)
            if location is not None and location.base is None:
                bases[blob_id] = (base_id, location.size)
        return bases

    def _like(self, wanted: Sequence[_Candidate]) -> list[_Like]:
        """Those of which at least half is as in their bases."""
        bases = self._reader.chunks([candidate.base_id for candidate in wanted])
        like = []
        for candidate, base in zip(wanted, bases, strict=True):
            if candidate.blob_id != candidate.base_id:
                changed = pieces.find_changed(candidate.plain, base)
                if 2 * sum(changed) <= len(changed):
                    like.append(_Like(candidate, base, changed))
        return like

    def _encode(self, like: Sequence[_Like]) -> dict[BlobId, bytes]:
        blobs = {}
        for (blob_id, plain, base_id, base_size), base, changed in like:
            blob = self._encoder.encode_difference(plain, blob_id, base, base_id, changed)
            if blob is not None and len(blob) <= min(base_size // 2, base_size - GAIN_SIZE_MIN):
                blobs[blob_id] = blob
        return blobs
