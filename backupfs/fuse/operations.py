"""The requests of the kernel, each translated to a verb: thin on purpose.

Between two awaits nothing else runs here; what may wait for a disk or a lock goes to a thread. A
handler ends with an answer or a FUSEError, whatever happens: anything else would end the mount.

A release that publishes is counted before its first await, and a look into ``volumes/`` or
``backups/`` waits for those counted before it: that is why cp's backup is there when cp returns.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from backupfs.errors import BackupfsError
from backupfs.fuse import handles
from backupfs.fuse.attributes import Attributes
from backupfs.fuse.errno_table import errno_of
from backupfs.fuse.handles import (
    BackupHandle,
    Handle,
    StagedReader,
    StagedWriter,
    TextReader,
    TextWriter,
)
from backupfs.fuse.inodes import Inodes
from backupfs.fuse.layout import RECORD_SUFFIX, Entry, Kind, Layout
from backupfs.fuse.openers import was_killed
from backupfs.fuse.texts import Texts
from backupfs.fuse.threads import Threads
from backupfs.repository.images import Root
from backupfs.service import Image, Service, StagingArea
from backupfs.staging.area import WriteHandle
from backupfs.staging.drafts import PUBLISH_ATTRIBUTE
from backupfs.staging.lifecycle import is_temporary

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

_MADE = {Kind.README, Kind.STATUS, Kind.EVENTS, Kind.RECORD, Kind.METADATA}


def answered(handler: Handler) -> Handler:
    """A handler whose errors all become an errno."""

    @functools.wraps(handler)
    async def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            return await handler(*arguments, **named)
        except BackupfsError as error:
            code = errno_of(error)
            log.log(logging.ERROR if code == errno.EIO else logging.INFO, "%s", error)
            raise FUSEError(code) from error
        except (FUSEError, trio.Cancelled):
            raise
        except Exception:  # a bug must cost one request, not the mount
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return guarded  # type: ignore[return-value]


class Operations(pyfuse3.Operations):
    """One mount. Its methods are called by pyfuse3 in the event loop."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        *,
        service: Service,
        area: StagingArea | None,
        layout: Layout,
        inodes: Inodes,
        attributes: Attributes,
        texts: Texts,
    ) -> None:
        super().__init__()
        self._service = service
        self._area = area
        self._layout = layout
        self._inodes = inodes
        self._attributes = attributes
        self._texts = texts
        self._handles: dict[int, Handle] = {}
        self._folder_handles: dict[int, list[tuple[str, Entry]] | Entry] = {}
        self._next_handle = 1
        self._sidecars: dict[str, TextWriter] = {}
        self._publishing: set[trio.Event] = set()
        self.threads: Threads  # set inside the event loop, before the first request

    # -- names and attributes ----------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._entry(parent_inode)
        if name == b".":
            return await self._stat(parent)
        if name == b"..":
            return await self._stat(self._layout.parent(parent))
        if parent.kind in (Kind.VOLUMES, Kind.BACKUPS):
            await self._published()
        return await self._stat(self._child(parent, name))

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._stat(self._entry(inode))

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        entry = self._entry(inode)
        handle = self._handles.get(fh) if fh is not None else None
        if entry.kind is Kind.STAGED:
            await self._set_staged(entry, attr, fields, handle)
        elif isinstance(handle, TextWriter) and fields.update_size:
            handle.truncate(attr.st_size)
        elif entry.kind in (Kind.SIDECAR, Kind.RECORD, Kind.METADATA):
            pass  # "cp -p" sets mode and times of what it copied in
        else:
            raise FUSEError(errno.EPERM)
        return await self._stat(entry)

    async def _set_staged(
        self,
        entry: Entry,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        handle: Handle | None,
    ) -> None:
        assert entry.staged is not None
        area = self._writable()
        if fields.update_size:
            writer = handle.handle if isinstance(handle, StagedWriter) else None
            async with self._a_publish():
                await self.threads.slow(area.truncate, entry.staged, attr.st_size, writer)
        wanted = {
            "mode": stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            "uid": attr.st_uid if fields.update_uid else None,
            "gid": attr.st_gid if fields.update_gid else None,
            "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
        }
        if any(value is not None for value in wanted.values()):
            await self.threads.slow(area.set_attributes, entry.staged, **wanted)

    @answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        entry = self._entry(inode)
        await self._published()  # the kernel may know the link's name, and asks for its target only
        latest = self._service.catalogue.latest(entry.key) if entry.kind is Kind.LATEST else None
        if latest is None:
            raise FUSEError(errno.ENOENT)
        return latest.name.encode()

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # the kernel checks permissions itself (default_permissions)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, _count in inode_list:
            self._inodes.forget(number)

    @answered
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        found = await self.threads.slow(os.statvfs, self._service.repository.folder)
        data = pyfuse3.StatvfsData()
        for name in (
            *("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail"),
            *("f_files", "f_ffree", "f_favail"),
        ):
            setattr(data, name, getattr(found, name))
        data.f_namemax = 255
        return data

    # -- folders -----------------------------------------------------------------------------------

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        entry = self._entry(inode)
        if not entry.is_folder:
            raise FUSEError(errno.ENOTDIR)
        if entry.kind in (Kind.VOLUMES, Kind.BACKUPS):
            await self._published()
        number = self._new_handle()
        self._folder_handles[number] = entry
        return number

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listed = self._folder_handles[fh]
        if isinstance(listed, Entry):
            # Listed once, at the first read, so that names deleted meanwhile do not shift others.
            listed = self._folder_handles[fh] = self._layout.children(listed)
        for place in range(start_id, len(listed)):
            name, entry = listed[place]
            attributes = await self._stat_or_none(entry)
            if attributes is None:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, place + 1):
                return

    async def releasedir(self, fh: int) -> None:
        self._folder_handles.pop(fh, None)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass  # names are durable when they are made

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._entry(parent_inode)
        if parent.kind is not Kind.STAGING:
            raise FUSEError(errno.EPERM)
        path = self._path(parent, name)
        await self.threads.slow(self._writable().make_folder, path)
        return await self._stat(Entry(Kind.STAGING, path))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        entry = self._child(self._entry(parent_inode), name)
        if not entry.is_folder:
            raise FUSEError(errno.ENOTDIR)
        if entry.kind is Kind.STAGING and entry.key:
            area = self._writable()
            if not area.is_empty_folder(entry.key):
                raise FUSEError(errno.ENOTEMPTY)
            await self.threads.slow(area.remove_folder, entry.key)
        elif entry.kind is Kind.VOLUMES and entry.key:
            self._writable()
            if not self._layout.remove_folder(entry.key):
                raise FUSEError(errno.ENOTEMPTY)
        else:
            raise FUSEError(errno.EPERM)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        area = self._writable()
        parent = self._entry(parent_inode)
        entry = self._child(parent, name)
        if entry.is_folder:
            raise FUSEError(errno.EISDIR)
        if entry.kind is Kind.STAGED:
            assert entry.staged is not None
            await self.threads.slow(area.unlink, entry.staged.name)
        elif entry.kind is Kind.BACKUP:
            record = self._service.resolve(entry.key)
            if parent.kind is Kind.VOLUMES:
                self._layout.keep_emptied(record.volume)
            await self.threads.slow(self._service.delete, record)
            area.events.add("deleted", f"{record.volume}/{record.name}", record.backup_id)
        elif entry.kind is Kind.LATEST:
            self._layout.hide_latest(entry.key)
        elif entry.kind is Kind.METADATA:
            await self.threads.slow(self._service.put_metadata, entry.key, {})
        elif entry.kind is Kind.SIDECAR:
            self._sidecars.pop(entry.key, None)
        else:
            raise FUSEError(errno.EPERM)  # a record goes with its backup

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        parent, target_parent = self._entry(parent_inode_old), self._entry(parent_inode_new)
        entry = self._child(parent, name_old)
        target = self._layout.child(target_parent, _text(name_new))
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        if flags and target is not None:
            raise FUSEError(errno.EEXIST)
        if entry.kind is Kind.SIDECAR and target_parent.kind is Kind.BACKUPS:
            await self._rename_sidecar(entry.key, _text(name_new))
        elif entry.kind is Kind.STAGED and target_parent.kind is Kind.STAGING:
            assert entry.staged is not None
            if target is not None and target.is_folder:
                raise FUSEError(errno.EISDIR)
            async with self._a_publish():
                await self.threads.slow(
                    self._writable().rename,
                    entry.staged.name,
                    self._path(target_parent, name_new),
                )
        elif entry.kind is Kind.STAGING and target_parent.kind is Kind.STAGING and entry.key:
            await self._rename_folder(entry.key, self._path(target_parent, name_new), target)
        else:
            raise FUSEError(errno.EPERM)

    async def _rename_folder(self, old: str, new: str, target: Entry | None) -> None:
        """Only an empty one: renaming what is below would make backups of other volumes."""
        area = self._writable()
        if target is not None or not area.is_empty_folder(old):
            raise FUSEError(errno.EPERM)
        await self.threads.slow(area.make_folder, new)
        await self.threads.slow(area.remove_folder, old)

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._entry(parent_inode)
        if parent.kind is not Kind.STAGING or not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)
        writer = await self._create_staged(parent, name, mode, ctx)
        await self.threads.slow(self._writable().release, writer.handle, interrupted=False)
        return await self._stat(_staged_entry(writer.handle))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    # -- extended attributes -----------------------------------------------------------------------

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        # The kernel asks for security.capability at every write: answer that first.
        if not name.startswith(b"user."):
            raise FUSEError(pyfuse3.ENOATTR)
        value = self._attributes.xattrs(self._entry(inode)).get(name.decode("utf-8", "replace"))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return [name.encode() for name in self._attributes.xattrs(self._entry(inode))]

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        entry = self._entry(inode)
        if entry.kind is not Kind.STAGED or name != PUBLISH_ATTRIBUTE.encode():
            raise FUSEError(errno.ENOTSUP)
        assert entry.staged is not None
        async with self._a_publish():
            await self.threads.slow(self._writable().publish_now, entry.staged.name)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOTSUP)

    # -- open files --------------------------------------------------------------------------------

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self._entry(parent_inode)
        if parent.kind is Kind.STAGING:
            writer = await self._create_staged(parent, name, mode, ctx)
            info = self._opened(writer, direct=_is_write_only(flags))
            return info, await self._stat(_staged_entry(writer.handle))
        self._writable()
        text = _text(name)
        if parent.kind is not Kind.BACKUPS or not _may_be_sidecar(text):
            raise FUSEError(errno.EPERM)
        entry = Entry(Kind.SIDECAR, text)
        sidecar = TextWriter(entry, handles.RECORD_TEXT_SIZE_MAX)
        self._sidecars[text] = sidecar
        return self._opened(sidecar, direct=True), await self._stat(entry)

    async def _create_staged(
        self, parent: Entry, name: bytes, mode: int, ctx: RequestContext
    ) -> StagedWriter:
        handle = await self.threads.slow(
            self._writable().create,
            self._path(parent, name),
            mode=stat.S_IMODE(mode),
            uid=ctx.uid,
            gid=ctx.gid,
        )
        return StagedWriter(handle, ctx.pid)

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        entry = self._entry(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if entry.kind is Kind.STAGED:
            assert entry.staged is not None
            if not writing:
                return self._opened(StagedReader(entry.staged))
            handle = await self.threads.slow(
                self._writable().open_write, entry.staged, truncate=bool(flags & os.O_TRUNC)
            )
            # direct_io takes 1 MiB at a time; who may mmap for writing needs the page cache.
            return self._opened(StagedWriter(handle, ctx.pid), direct=_is_write_only(flags))
        if writing:
            return await self._open_text_writer(entry, bool(flags & os.O_TRUNC))
        if entry.kind is Kind.BACKUP:
            return self._open_backup(entry)
        return self._opened(TextReader(await self._content(entry)), direct=True)

    def _open_backup(self, entry: Entry) -> FileInfo:
        record = self._service.resolve(entry.key)
        root = Root(record.root, record.height)
        if self._area is not None:
            self._service.repository.writer().session.hold(root)
        # An image never changes, so the pages the kernel has of it stay good.
        return self._opened(BackupHandle(self._service.open_image(record), root), keep=True)

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
            writer.buffer.clear()
        return self._opened(writer, direct=True)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._handles[fh]
        if isinstance(handle, BackupHandle):
            return await self._read_image(handle.image, off, size)
        if isinstance(handle, (StagedReader, StagedWriter)):
            return await self.threads.read(handle.staged.draft.read, off, size)
        content = handle.content if isinstance(handle, TextReader) else bytes(handle.buffer)
        return content[off : off + size]

    async def _read_image(self, image: Image, offset: int, size: int) -> bytes:
        data = image.read_cached(offset, size)
        if data is None:
            data = await self.threads.read(image.read, offset, size)
        return data

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        if isinstance(handle, StagedWriter):
            area, staged = self._writable(), handle.staged
            if staged.is_marked:
                area.note_write(handle.handle)
            else:
                await self.threads.slow(area.note_write, handle.handle)
            staged.draft.write(off, buf)
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
            interrupted = was_killed(handle.opener)
            await self.threads.slow(self._writable().flush, handle.handle, interrupted=interrupted)
        elif isinstance(handle, TextWriter) and handle.is_complete():
            await self._take_in(handle)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if isinstance(handle, StagedWriter):
            await self.threads.slow(self._writable().sync, handle.handle)

    @answered
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        if isinstance(handle, StagedWriter):
            interrupted = was_killed(handle.opener)
            async with self._a_publish():
                await self.threads.slow(
                    self._writable().release, handle.handle, interrupted=interrupted
                )
        elif isinstance(handle, BackupHandle) and self._area is not None:
            self._service.repository.writer().session.let_go(handle.root)
        elif isinstance(handle, TextWriter) and not is_temporary(handle.entry.key):
            self._sidecars.pop(handle.entry.key, None)

    # -- parts -------------------------------------------------------------------------------------

    async def _take_in(self, writer: TextWriter) -> None:
        """A small file was closed: check it and keep it, or say why not."""
        assert self._area is not None
        if writer.entry.kind is Kind.METADATA:
            take_in, name = handles.put_metadata, f"{writer.entry.key}/metadata.json"
        elif is_temporary(writer.entry.key):
            return  # taken in when it is renamed
        else:
            take_in, name = handles.put_record, f"backups/{writer.entry.key}"
        try:
            await self.threads.slow(take_in, self._service, writer)
        except BackupfsError as error:
            self._area.events.add("refused", name, str(error))
            raise
        self._area.events.add("took in", name)

    async def _rename_sidecar(self, old: str, new: str) -> None:
        writer = self._sidecars[old]
        if is_temporary(new):
            raise FUSEError(errno.EINVAL)
        if not new.endswith(RECORD_SUFFIX):
            raise FUSEError(errno.EPERM)
        writer.entry = Entry(Kind.SIDECAR, new)
        try:
            await self._take_in(writer)
        finally:
            self._sidecars.pop(old, None)

    def _entry(self, inode: int) -> Entry:
        entry = self._inodes.entry(inode)
        if entry is None:
            raise FUSEError(errno.ESTALE)
        return entry

    def _child(self, parent: Entry, name: bytes) -> Entry:
        text = _text(name)
        entry = self._layout.child(parent, text)
        if entry is None and parent.kind is Kind.BACKUPS and text in self._sidecars:
            entry = Entry(Kind.SIDECAR, text)
        if entry is None:
            raise FUSEError(errno.ENOENT)
        return entry

    async def _stat(self, entry: Entry) -> EntryAttributes:
        attributes = await self._stat_or_none(entry)
        if attributes is None:
            raise FUSEError(errno.ENOENT)
        return attributes

    async def _stat_or_none(self, entry: Entry) -> EntryAttributes | None:
        text_size = 0
        if entry.kind is Kind.SIDECAR:
            writer = self._sidecars.get(entry.key)
            text_size = len(writer.buffer) if writer else 0
        elif entry.kind in _MADE:
            if entry.kind is Kind.RECORD and self._service.catalogue.get(entry.key) is None:
                return None
            text_size = len(await self._content(entry))
        return self._attributes.of(entry, text_size=text_size)

    async def _content(self, entry: Entry) -> bytes:
        if entry.kind is Kind.SIDECAR:
            return bytes(self._sidecars[entry.key].buffer)
        if entry.kind not in _MADE:
            raise FUSEError(errno.EACCES)
        if entry.kind is Kind.METADATA:  # the one that only the disk knows
            return await self.threads.slow(self._texts.content, entry)
        return self._texts.content(entry)

    def _opened(self, handle: Handle, *, direct: bool = False, keep: bool = False) -> FileInfo:
        number = self._new_handle()
        self._handles[number] = handle
        return FileInfo(fh=number, direct_io=direct, keep_cache=keep)

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _writable(self) -> StagingArea:
        if self._area is None:
            raise FUSEError(errno.EROFS)
        return self._area

    @staticmethod
    def _path(folder: Entry, name: bytes) -> str:
        text = _text(name)
        return f"{folder.key}/{text}" if folder.key else text

    @contextlib.asynccontextmanager
    async def _a_publish(self) -> AsyncIterator[None]:
        """Something that may publish is under way; counted from before the first await."""
        event = trio.Event()
        self._publishing.add(event)
        try:
            yield
        finally:
            self._publishing.discard(event)
            event.set()

    async def _published(self) -> None:
        """Wait for what began to publish before now; what begins later is not waited for."""
        for event in list(self._publishing):
            await event.wait()


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(errno.EINVAL) from None


def _is_write_only(flags: int) -> bool:
    return flags & os.O_ACCMODE == os.O_WRONLY


def _may_be_sidecar(name: str) -> bool:
    return name.endswith(RECORD_SUFFIX) or (is_temporary(name) and RECORD_SUFFIX in name)


def _staged_entry(handle: WriteHandle) -> Entry:
    return Entry(Kind.STAGED, handle.staged.draft_id, handle.staged)
