"""Requests about names and attributes: what is where, and renaming, removing and describing it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from backupfs.format.record import storable_time
from backupfs.fuse.handles import (
    Handle,
    StagedWriter,
    TextWriter,
)
from backupfs.fuse.layout import RECORD_SUFFIX, Entry, Kind
from backupfs.fuse.requests import Requests, answered, staged_entry, text_of
from backupfs.staging.drafts import PUBLISH_ATTRIBUTE
from backupfs.staging.lifecycle import is_temporary

_TAKES_ATTRIBUTES = {Kind.STAGING, Kind.BACKUPS, Kind.SIDECAR, Kind.RECORD, Kind.METADATA}


class NameRequests(Requests):
    """Handlers that open no file."""

    # -- names and attributes ----------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._entry(parent_inode)
        if name == b".":
            return await self._told(parent)
        if name == b"..":
            return await self._told(self._layout.parent(parent))
        if parent.kind is Kind.VOLUMES:
            await self._published_below(self._path(parent, name))
        elif parent.kind is Kind.BACKUPS and self._layout.child(parent, text_of(name)) is None:
            await self._published_below("")
        return await self._told(self._child(parent, name))

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        attributes = await self._stat_or_none(self._entry(inode))
        if attributes is None:
            raise FUSEError(errno.ESTALE)  # deleted just now: the kernel looks its name up again
        return attributes

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
        elif entry.kind in _TAKES_ATTRIBUTES and not fields.update_size:
            pass  # "cp -p" and "rsync -a" set mode and times of what they copied in
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
            writer = None
            if isinstance(handle, StagedWriter):
                writer, handle.flushed_at = handle.handle, None
            await self._published(entry.staged)
            async with self._a_publish(entry.staged):
                await self.threads.slow(area.truncate, entry.staged, attr.st_size, writer)
        wanted = {
            "mode": stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            "uid": attr.st_uid if fields.update_uid else None,
            "gid": attr.st_gid if fields.update_gid else None,
            "mtime_ns": storable_time(attr.st_mtime_ns) if fields.update_mtime else None,
        }
        if any(value is not None for value in wanted.values()):
            await self.threads.slow(area.set_attributes, entry.staged, **wanted)

    @answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        entry = self._entry(inode)
        # The kernel may know the link's name, and ask for its target only.
        await self._published_below(entry.key)
        latest = self._service.catalogue.latest(entry.key) if entry.kind is Kind.LATEST else None
        if latest is None:
            raise FUSEError(errno.ENOENT)
        return latest.name.encode()

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True  # the kernel checks permissions itself (default_permissions)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            self._inodes.forget(number, count)

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
            await self._published_below(entry.key)
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
            self._inodes.tell(entry)

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
        return await self._told(Entry(Kind.STAGING, path))

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
            await self._published(entry.staged)
            await self.threads.slow(area.unlink, entry.staged.name)
        elif entry.kind is Kind.BACKUP:
            record = await self.threads.slow(self._service.resolve, entry.key)
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
        target = self._layout.child(target_parent, text_of(name_new))
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        if flags and target is not None:
            raise FUSEError(errno.EEXIST)
        if entry.kind is Kind.SIDECAR and target_parent.kind is Kind.BACKUPS:
            await self._rename_sidecar(entry.key, text_of(name_new))
        elif entry.kind is Kind.STAGED and target_parent.kind is Kind.STAGING:
            assert entry.staged is not None
            if target is not None and target.is_folder:
                raise FUSEError(errno.EISDIR)
            await self._published(entry.staged)
            if target is not None and target.staged is not None:
                await self._published(target.staged)
            new_name = self._path(target_parent, name_new)
            async with self._a_publish(entry.staged, new_name=new_name):
                await self.threads.slow(self._writable().rename, entry.staged.name, new_name)
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
        return await self._told(staged_entry(writer.handle))

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
        entry = self._entry(inode)
        if entry.staged is not None:
            await self._published(entry.staged)  # its state is what became of the last copy
        value = self._attributes.xattrs(entry).get(name.decode("utf-8", "replace"))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        entry = self._entry(inode)
        if entry.kind is Kind.STAGED:
            return []  # "rsync -X" would remove from its copy what the source does not have
        return [name.encode() for name in self._attributes.xattrs(entry)]

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        entry = self._entry(inode)
        if entry.kind is not Kind.STAGED or name != PUBLISH_ATTRIBUTE.encode():
            raise FUSEError(errno.ENOTSUP)
        assert entry.staged is not None
        await self._published(entry.staged)
        async with self._a_publish(entry.staged):
            await self.threads.slow(self._writable().publish_now, entry.staged.name)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOTSUP)

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
