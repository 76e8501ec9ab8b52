"""An open volume as something to back up or to restore to.

Volumes are files, or objects that behave like files: wrappers of storage systems' libraries and
proxies that pass every call to another thread. Only what all of them have is used, and ``fileno``
and ``tell`` where they work.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from backupfs.errors import BackupfsError, SourceFailed, TargetFailed
from backupfs.types import Buffer

# What is asked of a volume at a time.
READ_SIZE = 1 << 20
ZEROS = bytes(READ_SIZE)
# Written and not synced yet: more would make the last sync, or the close, wait long.
UNSYNCED_SIZE_MAX = 256 << 20


class VolumeFile(Protocol):
    """An open volume, at least; ``fileno`` and ``tell`` are used too where they work."""

    def read(self, size: int, /) -> Any:
        """Up to ``size`` bytes; none of them means the end."""

    def write(self, data: bytes, /) -> Any:
        """How many bytes were taken; None says all of them."""

    def seek(self, offset: int, whence: int = 0, /) -> Any: ...

    def flush(self) -> Any: ...


@contextmanager
def _failing_as(failure: type[BackupfsError], name: str) -> Iterator[None]:
    """Turn whatever a volume's file raises into our error; the cause stays chained."""
    try:
        yield
    except Exception as error:  # each storage system's library has errors of its own
        raise failure(name=name, reason=f"{type(error).__name__}: {error}") from error


def _no_look() -> None:
    """For callers that let nothing stop them."""


class VolumeSource:
    """The image in an open volume, read from 0 until nothing more comes, which must be its end.

    ``look`` is called between pieces, holes included; what it raises ends the reading.
    """

    def __init__(
        self, file: VolumeFile, name: str, *, look: Callable[[], object] = _no_look
    ) -> None:
        self.name = name
        self.size_hint: int | None = None
        self._file = file
        self._look = look
        self._size = 0

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        with _failing_as(SourceFailed, self.name):
            self._file.seek(0)
        while piece := self._gather():
            offset, self._size = self._size, self._size + len(piece)
            if piece != ZEROS:
                yield offset, piece
            self._look()
        self._check_end()

    def size(self) -> int:
        return self._size

    def _check_end(self) -> None:
        """An empty read is the end only where the file, if it can tell, has no more."""
        try:
            self._file.seek(0, os.SEEK_END)
            end = self._file.tell()  # type: ignore[attr-defined]  # not all have one
        except Exception:  # nor do those without one agree on how to say so
            return
        if isinstance(end, int) and end != self._size:
            reason = f"it has {end} bytes, and gave {self._size}"
            raise SourceFailed(name=self.name, reason=reason)

    def _gather(self) -> bytes:
        """The next piece: whole, however short the reads are, so that chunks stay whole."""
        parts, missing = [], READ_SIZE
        while missing > 0 and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        with _failing_as(SourceFailed, self.name):
            data = self._file.read(size)
            if not isinstance(data, Buffer):
                # None is said by a file that has nothing yet: to take it for the end would cut.
                raise TypeError(f"read gave {type(data).__name__}, not bytes")
            data = bytes(data)
            if len(data) > size:
                # Whether the rest lies behind it, or comes again, is unknown.
                raise OSError(f"read gave {len(data)} bytes where {size} were asked for")
            return data


class VolumeTarget:
    """An open volume, written from 0 on. One whose writes end elsewhere than they should is refused.

    It may be full of other data, unless ``is_new`` says that it reads as zeros: then holes are
    left out. ``sync`` is fsync(2), or something that has it done elsewhere. ``look`` is called
    between pieces, zeros included; what it raises ends the writing.
    """

    def __init__(
        self,
        file: VolumeFile,
        name: str,
        *,
        is_new: bool = False,
        sync: Callable[[int], object] | None = None,
        look: Callable[[], object] = _no_look,
    ) -> None:
        self.name = name
        self._file = file
        self._look = look
        self._is_new = is_new
        self._sync = sync or os.fsync
        self._position: int | None = None  # in the file; None: not known yet
        self._end = 0  # of what was written
        self._unsynced_size = 0

    def write(self, offset: int, data: Buffer) -> None:
        self._look()
        with _failing_as(TargetFailed, self.name):
            if self._position is None:
                self._check_mode()
            if offset != self._position:
                self._file.seek(offset)
            rest = bytes(data)  # some wrappers take nothing else
            while rest:
                taken = self._file.write(rest)
                if taken is None:
                    break
                if not 0 < taken <= len(rest):
                    raise OSError(f"it took {taken} of {len(rest)} bytes")
                rest = rest[taken:]
            self._position = self._end = offset + len(data)
            self._unsynced_size += len(data)
            if self._unsynced_size >= UNSYNCED_SIZE_MAX:
                self._persist()

    def write_hole(self, offset: int, size: int) -> None:
        if not self._is_new:
            self._write_zeros(offset, size)

    def finish(self, size: int) -> None:
        if self._end < size:
            # A file grows to its size only by being written at its end.
            tail = min(size - self._end, READ_SIZE)
            self._write_zeros(size - tail, tail)
        with _failing_as(TargetFailed, self.name):
            self._check_place()
            self._persist()

    def _write_zeros(self, offset: int, size: int) -> None:
        end = offset + size
        while offset < end:
            self.write(offset, ZEROS[: end - offset])
            offset += min(READ_SIZE, end - offset)

    def _check_mode(self) -> None:
        """Each write of a file open for appending goes behind what is there, wherever it is meant."""
        descriptor = self._descriptor()
        if descriptor is not None and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError("it is open for appending; nothing was written")

    def _check_place(self) -> None:
        """A file that can tell where it is must be where the last write was to end."""
        try:
            place = self._file.tell()  # type: ignore[attr-defined]  # not all have one
        except Exception:  # nor do those without one agree on how to say so
            return
        if isinstance(place, int) and self._position not in (None, place):
            raise OSError(f"the last write ended at byte {place}, not at {self._position}")

    def _persist(self) -> None:
        self._unsynced_size = 0
        self._file.flush()
        descriptor = self._descriptor()
        if descriptor is None:
            return
        try:
            self._sync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what can never be synced: a pipe, a character device
                raise

    def _descriptor(self) -> int | None:
        try:
            descriptor = self._file.fileno()  # type: ignore[attr-defined]  # not all have one
        except Exception:  # nor do those without one agree on how to say so
            return None
        return descriptor if isinstance(descriptor, int) else None
