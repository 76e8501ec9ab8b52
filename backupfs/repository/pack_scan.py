"""Finds the blobs of a pack that has lost its footer: each blob's header says what follows."""

from __future__ import annotations

from collections.abc import Iterator

from backupfs.errors import StorageUnavailable
from backupfs.format import blob as blob_format
from backupfs.format.blob import DIFFERENCES_MAX, BadBlobError, FindBase
from backupfs.format.ids import IdScheme
from backupfs.format.pack import BLOB_SIZE_MAX, pack_name
from backupfs.repository.packer import NewBlob
from backupfs.storage.base import Storage
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import BlobId, PackId

READ_SIZE = 2 * BLOB_SIZE_MAX
# Where the disk cannot read, it is tried again so many bytes further on.
UNREADABLE_STEP = 4096


class PackScan:
    """Finds the blobs of a pack without its footer."""

    def __init__(
        self, storage: Storage, ids: IdScheme, pack_id: PackId, size: int, *, find_base: FindBase
    ) -> None:
        self._storage = storage
        self._ids = ids
        self._name = pack_name(pack_id)
        self._size = size
        self._find_elsewhere = find_base
        self._places: dict[BlobId, tuple[int, int]] = {}  # of chunks found: offset, size
        self._postponed: list[tuple[int, int]] = []  # differences whose base was not found yet
        self._looks_elsewhere = False
        self.count = 0
        self.size_found = 0
        self.is_readable = True

    def blobs(self) -> Iterator[NewBlob]:
        """Those that their ids prove; at most ``READ_SIZE`` bytes are held at a time.

        In order, but differences come last whose base does not come before them in the pack. Only
        what is not in it at all is looked for elsewhere, which takes long where it is nowhere.
        """
        for offset, blob in self._in_order():
            yield self._found(offset, blob)
        yield from self._postponed_blobs()
        self._looks_elsewhere = True
        yield from self._postponed_blobs()

    def _postponed_blobs(self) -> Iterator[NewBlob]:
        """Those of the postponed whose base can be found now."""
        count_before = -1
        while self._postponed and len(self._postponed) != count_before:
            count_before = len(self._postponed)
            postponed, self._postponed = self._postponed, []
            for offset, size in postponed:
                found = self._blob_at(self._read_again(offset, size), 0, offset)
                if found is not None:
                    yield self._found(offset, found)

    def _found(self, offset: int, blob: NewBlob) -> NewBlob:
        self.count += 1
        self.size_found += len(blob.data)
        if blob.level == 0:
            self._places[blob.blob_id] = (offset, len(blob.data))
        return blob

    def _in_order(self) -> Iterator[tuple[int, NewBlob]]:
        start = 0
        while start < self._size:
            data = self._read(start)
            # A blob may go on beyond what was read, where there is more.
            goes_on = len(data) == READ_SIZE and start + READ_SIZE < self._size
            end = len(data) - BLOB_SIZE_MAX if goes_on else len(data)
            place = self._next_header(data, 0)
            while place < end:
                found = self._blob_at(data, place, start + place)
                if found is not None:
                    yield start + place, found
                place = self._next_header(data, place + (1 if found is None else len(found.data)))
            start += min(place, len(data)) if goes_on else len(data) or UNREADABLE_STEP

    def _read(self, start: int) -> bytes:
        """Bytes from ``start`` up to where the disk cannot read; none where that is at once."""
        size = min(READ_SIZE, self._size - start)
        try:
            return self._storage.get_range(self._name, start, size)
        except StorageUnavailable:
            self.is_readable = False
        data = b""
        while len(data) < size - UNREADABLE_STEP:
            try:
                part = self._storage.get_range(self._name, start + len(data), UNREADABLE_STEP)
            except StorageUnavailable:
                break
            if not part:
                break
            data += part
        return data

    @staticmethod
    def _next_header(data: bytes, place: int) -> int:
        found = data.find(blob_format.MAGIC, place)
        return found if found >= 0 else len(data)

    def _blob_at(self, data: bytes, place: int, offset: int) -> NewBlob | None:
        """The blob at ``place`` of what was read, which is ``offset`` of the pack."""
        view = memoryview(data)[place:]
        try:
            header = blob_format.unpack_header(view)
            whole = view[: blob_format.HEADER.size + header.stored_size]
            blob_format.decode(
                whole,
                expected=header.blob_id,
                level=header.level,
                ids=self._ids,
                find_base=self._base,
            )
        except _BaseNotFound:
            self._postponed.append((offset, len(whole)))
            return None
        except BadBlobError:
            return None
        return NewBlob(blob_id=header.blob_id, level=header.level, data=bytes(whole))

    def _base(self, base_id: BlobId, differences_max: int = DIFFERENCES_MAX) -> bytes:
        """What a difference is to: gc may have put both into this pack. Raises: BadBlobError."""
        if base_id in self._places and differences_max:
            return blob_format.decode(
                self._read_again(*self._places[base_id]),
                expected=base_id,
                level=0,
                ids=self._ids,
                find_base=lambda below: self._base(below, differences_max - 1),
            )
        if not self._looks_elsewhere:
            raise _BaseNotFound
        try:
            return self._find_elsewhere(base_id)
        except BadBlobError as error:
            raise _BaseNotFound from error
        except StorageUnavailable as error:
            if is_want_of_resources(error):
                raise
            self.is_readable = False  # not in all it takes
            raise _BaseNotFound from error

    def _read_again(self, offset: int, size: int) -> bytes:
        try:
            return self._storage.get_range(self._name, offset, size)
        except StorageUnavailable:
            self.is_readable = False
            return b""


class _BaseNotFound(BadBlobError):
    """Not yet: it may come later in the pack."""
