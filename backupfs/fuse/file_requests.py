"""Requests about open files: reading, writing, and what a close makes durable or publishes."""

from __future__ import annotations

import errno
import os
from functools import partial

import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from backupfs.fuse import handles
from backupfs.fuse.handles import (
    BackupHandle,
    Handle,
    StagedReader,
    StagedWriter,
    TextReader,
    TextWriter,
)
from backupfs.fuse.layout import RECORD_SUFFIX, Entry, Kind
from backupfs.fuse.openers import holds_for_writing, opener_of, was_killed
from backupfs.fuse.requests import Requests, answered, staged_entry, text_of
from backupfs.fuse.threads import LONG_READ_SIZE
from backupfs.service import Image
from backupfs.staging.lifecycle import is_temporary
from backupfs.staging.staged_file import StagedFile
from backupfs.types import IMAGE_SIZE_MAX, Buffer


class FileRequests(Requests):
    """Handlers of open files."""

    # -- open files --------------------------------------------------------------------------------

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self._entry(parent_inode)
        if parent.kind is Kind.STAGING:
            writer = await self._create_staged(parent, name, mode, ctx)
            info = self._opened_to_write(writer, flags)
            return info, await self._told(staged_entry(writer.handle))
        self._writable()
        text = text_of(name)
        if parent.kind is not Kind.BACKUPS or not _may_be_sidecar(text):
            raise FUSEError(errno.EPERM)
        entry = Entry(Kind.SIDECAR, text)
        sidecar = TextWriter(entry, handles.RECORD_TEXT_SIZE_MAX)
        self._sidecars[text] = sidecar
        return self._opened(sidecar, direct=True), await self._told(entry)

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        entry = self._entry(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if entry.kind is Kind.STAGED:
            assert entry.staged is not None
            if not writing:
                return self._open_staged_reader(entry.staged)
            await self._published(entry.staged)
            handle = await self.threads.slow(
                self._writable().open_write, entry.staged, truncate=bool(flags & os.O_TRUNC)
            )
            return self._opened_to_write(StagedWriter(handle, opener_of(ctx.pid)), flags)
        if entry.kind is Kind.RECORD and self._service.catalogue.get(entry.key) is None:
            raise FUSEError(errno.ESTALE)  # deleted just now: the kernel looks its name up again
        if writing:
            return await self._open_text_writer(entry, bool(flags & os.O_TRUNC))
        if entry.kind is Kind.BACKUP:
            return await self._open_backup(entry)
        if entry.kind in (Kind.STATUS, Kind.EVENTS):
            await self._all_published()  # so that they tell of what was closed before
        return self._opened(TextReader(await self._content(entry)), direct=True)

    def _open_staged_reader(self, staged: StagedFile) -> FileInfo:
        handle = StagedReader(staged, staged.draft.saved.root)
        staged.readers += 1
        self._service.repository.writer().session.hold(handle.root)
        return self._opened(handle)

    async def _open_backup(self, entry: Entry) -> FileInfo:
        record = await self.threads.slow(self._service.resolve, entry.key)
        handle = BackupHandle(self._service.open_image(record), record)
        if self._area is not None:
            self._service.repository.writer().session.hold(handle.root)
        # An image never changes, so the pages the kernel has of it stay good. Where an id was used again,
        # for another image, they may be those of the first one, as long as somebody has that open.
        if self._opened_roots.setdefault(record.backup_id, record.root) != record.root:
            return self._opened(handle, direct=True)
        return self._opened(handle, keep=True)

    async def _open_text_writer(self, entry: Entry, truncate: bool) -> FileInfo:
        self._writable()
        if entry.kind not in (Kind.METADATA, Kind.RECORD, Kind.SIDECAR):
            raise FUSEError(errno.EACCES)
        if entry.kind is Kind.SIDECAR and entry.key in self._sidecars:
            writer = self._sidecars[entry.key]
        else:
            is_metadata = entry.kind is Kind.METADATA
            limit = handles.METADATA_TEXT_SIZE_MAX if is_metadata else handles.RECORD_TEXT_SIZE_MAX
            writer = TextWriter(entry, limit)
            if not truncate:
                writer.buffer[:] = await self._content(entry)
        if truncate:
            writer.clear()
        return self._opened(writer, direct=True)

    @answered
    async def read(  # type: ignore[override]  # any buffer will do for pyfuse3
        self, fh: int, off: int, size: int
    ) -> Buffer:
        handle = self._handles[fh]
        if isinstance(handle, BackupHandle):
            return await self._read_image(handle.image, off, size)
        if isinstance(handle, (StagedReader, StagedWriter)):
            return await self.threads.read(handle.staged.draft.read, off, size)
        content = handle.content if isinstance(handle, TextReader) else bytes(handle.buffer)
        return content[off : off + size]

    async def _read_image(self, image: Image, offset: int, size: int) -> Buffer:
        piece = image.piece_of_chunk(offset, size)
        if piece is not None and not self._writers_open:
            return await self._read_piece(image, *piece)
        data = image.read_cached(offset, size)
        if data is not None:
            return data
        if size >= LONG_READ_SIZE:
            return await self.threads.read(partial(self.long_reader.read, image), offset, size)
        return await self.threads.read(image.read, offset, size)

    async def _read_piece(self, image: Image, chunk_index: int, start: int, size: int) -> bytes:
        """``size`` bytes from place ``start`` of a chunk."""
        chunk = await self.quick_reader.read(image.root, chunk_index)
        if chunk is not None:
            return chunk[start : start + size]
        offset = chunk_index * image.chunk_size + start
        data = await self.threads.read(image.read, offset, size)
        self.quick_reader.learn(image.root, chunk_index)
        return data

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        if isinstance(handle, StagedWriter):
            area, staged = self._writable(), handle.staged
            if off + len(buf) > IMAGE_SIZE_MAX:
                raise FUSEError(errno.EFBIG)  # and nothing counts as written
            handle.flushed_at = None
            if handle.was_closed:
                # Pages of a mapping are written while their program ends, the release comes later.
                handle.was_killed |= was_killed(handle.opener.process_id)
            if staged.wants_mark:
                await self.threads.slow(area.begin_writing, handle.handle)
            area.note_write(handle.handle)
            staged.draft.write(off, buf)
            handle.handle.note_written(off, len(buf))
            if staged.wants_mark:  # the flush of another handle, just now, took the mark away
                await self.threads.slow(area.begin_writing, handle.handle)
            # Back-pressure: an unthrottled loop would keep the interpreter from the workers.
            await self.threads.below(self._service.repository.writer().credit)
        elif isinstance(handle, TextWriter):
            handle.write(off, buf)
        else:
            raise FUSEError(errno.EBADF)
        return len(buf)

    @answered
    async def flush(self, fh: int) -> None:
        handle = self._handles[fh]
        if isinstance(handle, StagedWriter):
            handle.flushed_at, handle.was_closed = None, True
            number = self._inodes.number(staged_entry(handle.handle))
            await self.threads.slow(self._flush_staged, handle, number)
            if handle.staged.changed:
                handle.flushed_at = trio.current_time()
        elif isinstance(handle, TextWriter) and handle.is_complete():
            await self._take_in(handle)

    def _flush_staged(self, handle: StagedWriter, number: int) -> None:
        """In a thread. The descriptor that is being closed is none of its program's any more."""
        program = handle.opener.process_id
        self._writable().flush(
            handle.handle,
            interrupted=was_killed(program),
            goes_on=handle.staged.changed and holds_for_writing(program, number),
        )

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if isinstance(handle, StagedWriter):
            await self.threads.slow(self._writable().sync, handle.handle)

    @answered
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        if isinstance(handle, StagedWriter):
            self._writers_open -= 1
            interrupted = handle.was_killed or was_killed(handle.opener.process_id)
            async with self._a_publish(handle.staged):
                handle.released.set()
                await self.threads.slow(
                    self._writable().release, handle.handle, interrupted=interrupted
                )
        elif isinstance(handle, (BackupHandle, StagedReader)) and self._area is not None:
            self._service.repository.writer().session.let_go(handle.root)
            if isinstance(handle, StagedReader):
                await self._end_reading(handle.staged)
        elif isinstance(handle, TextWriter):
            self._forget_sidecar(handle)

    async def _end_reading(self, staged: StagedFile) -> None:
        staged.readers -= 1
        if staged.unlinked and not staged.readers:
            await self.threads.slow(self._writable().end_reading, staged)

    def _forget_sidecar(self, writer: TextWriter) -> None:
        """Where nobody has it open any more: the next copy of that name may have begun."""
        name = writer.entry.key
        is_open = any(other is writer for other in self._handles.values())
        if self._sidecars.get(name) is writer and not is_open and not is_temporary(name):
            del self._sidecars[name]

    def _opened_to_write(self, writer: StagedWriter, flags: int) -> FileInfo:
        write_only = flags & os.O_ACCMODE == os.O_WRONLY
        # So rsync opens what it writes in place: its temporary files it opens to read as well, and
        # what it copies, from a temporary folder of another file system say, empty and exclusively.
        in_place = write_only and not flags & (os.O_TRUNC | os.O_EXCL)
        writer.handle.sets_size_last = in_place and writer.opener.name == b"rsync"
        self._writers_open += 1
        # direct_io takes 1 MiB at a time; who may mmap for writing needs the page cache.
        return self._opened(writer, direct=write_only)

    def _opened(self, handle: Handle, *, direct: bool = False, keep: bool = False) -> FileInfo:
        number = self._new_handle()
        self._handles[number] = handle
        return FileInfo(fh=number, direct_io=direct, keep_cache=keep)


def _may_be_sidecar(name: str) -> bool:
    return name.endswith(RECORD_SUFFIX) or (is_temporary(name) and RECORD_SUFFIX in name)
