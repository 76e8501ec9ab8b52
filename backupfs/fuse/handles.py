"""What an open file is to us: one class for each way in which reads, writes and closes differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import trio

from backupfs.errors import InvalidMetadata, InvalidRecord
from backupfs.format.record import METADATA_SIZE_MAX, RECORD_SIZE_MAX
from backupfs.fuse.layout import Entry, Kind
from backupfs.fuse.openers import Opener
from backupfs.repository.images import Root
from backupfs.service import Image, Record, Service
from backupfs.staging.staged_file import StagedFile
from backupfs.staging.write_handle import WriteHandle


@dataclass(slots=True)
class BackupHandle:
    """A backup, open for reading; its data are kept from gc until it is closed."""

    image: Image
    record: Record

    @property
    def root(self) -> Root:
        return Root(self.record.root, self.record.height)


@dataclass(slots=True)
class StagedReader:
    """A staged file, open for reading.

    What it held when it was opened is kept from gc: it may lose its name meanwhile, or be replaced.
    """

    staged: StagedFile
    root: Root


@dataclass(slots=True)
class StagedWriter:
    """A staged file, open for writing."""

    handle: WriteHandle
    opener: Opener
    flushed_at: float | None = None  # when all written through it was flushed; None: not yet, or no
    released: trio.Event = field(default_factory=trio.Event)
    was_closed: bool = False  # once at least: what is written now may come from a mapping
    was_killed: bool = False  # its program, while it wrote through a mapping

    @property
    def staged(self) -> StagedFile:
        return self.handle.staged


@dataclass(slots=True)
class TextReader:
    """A made file as it was when it was opened."""

    content: bytes


@dataclass(slots=True)
class TextWriter:
    """A small file that is checked and taken in whole when it is closed."""

    entry: Entry
    size_max: int
    buffer: bytearray = field(default_factory=bytearray)
    is_dirty: bool = False
    is_too_large: bool = False  # something written was refused: what is left is none of it

    def write(self, offset: int, data: bytes) -> None:
        """Raises: InvalidRecord, InvalidMetadata where it would become too large."""
        end = offset + len(data)
        self._check_size(end)
        if end > len(self.buffer):
            self.buffer.extend(bytes(end - len(self.buffer)))
        self.buffer[offset:end] = data
        self.is_dirty = True

    def truncate(self, size: int) -> None:
        """Raises: InvalidRecord, InvalidMetadata where it would become too large."""
        self._check_size(size)
        del self.buffer[size:]
        self.buffer.extend(bytes(size - len(self.buffer)))
        self.is_dirty = True

    def clear(self) -> None:
        """Begin anew, as O_TRUNC wants it."""
        self.buffer.clear()
        self.is_too_large = False

    def is_complete(self) -> bool:
        """Whether there is something to take in: shells close once before the first write."""
        return self.is_dirty and (bool(self.buffer) or self.is_too_large)

    def content(self) -> bytes:
        """All that was written. Raises: InvalidRecord, InvalidMetadata where it was too large."""
        self._check_size(0)
        return bytes(self.buffer)

    def _check_size(self, size: int) -> None:
        if size > self.size_max:
            self.is_dirty = self.is_too_large = True
        if self.is_too_large:
            reason = f"it has more than {self.size_max} bytes"
            is_metadata = self.entry.kind is Kind.METADATA
            raise InvalidMetadata(reason=reason) if is_metadata else InvalidRecord(reason=reason)


def put_metadata(service: Service, writer: TextWriter) -> None:
    """Take in what was written to a ``metadata.json``. Raises: InvalidMetadata, StorageError."""
    try:
        value = json.loads(writer.content())
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(reason=f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidMetadata(reason="it must be a JSON object")
    service.put_metadata(writer.entry.key, value)
    writer.is_dirty = False


def put_record(service: Service, writer: TextWriter) -> None:
    """Take in a record that was copied in. Raises: InvalidRecord, MissingData, BackupExists…"""
    service.import_record(writer.content())
    writer.is_dirty = False


METADATA_TEXT_SIZE_MAX = 4 * METADATA_SIZE_MAX
RECORD_TEXT_SIZE_MAX = RECORD_SIZE_MAX

Handle = BackupHandle | StagedReader | StagedWriter | TextReader | TextWriter
