"""What all requests of the kernel share: from inodes to entries, and how a request ends.

A handler ends with an answer or a FUSEError, whatever happens: anything else would end the mount.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from backupfs.errors import BackupfsError, DamageError, StorageError
from backupfs.format.names import PART_SIZE_MAX, volume_of
from backupfs.fuse import handles
from backupfs.fuse.attributes import Attributes
from backupfs.fuse.errno_table import errno_of
from backupfs.fuse.handles import (
    BackupHandle,
    Handle,
    StagedWriter,
    TextWriter,
)
from backupfs.fuse.inodes import Inodes
from backupfs.fuse.layout import RECORD_SUFFIX, Entry, Kind, Layout
from backupfs.fuse.long_reader import LongReader
from backupfs.fuse.openers import holds_for_writing, opener_of
from backupfs.fuse.quick_reader import QuickReader
from backupfs.fuse.texts import Texts
from backupfs.fuse.threads import Threads
from backupfs.service import Service, StagingArea
from backupfs.staging.lifecycle import is_temporary
from backupfs.staging.staged_file import StagedFile
from backupfs.staging.write_handle import WriteHandle
from backupfs.types import BlobId

log = logging.getLogger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

RELEASE_SECONDS_MAX = 1.0  # from the flush of a close to its release
_MADE = {Kind.README, Kind.STATUS, Kind.EVENTS, Kind.RECORD, Kind.METADATA}


@dataclass(frozen=True, slots=True)
class _Publish:
    """Something under way that may make a backup of ``staged``, in one of ``volumes``."""

    staged: StagedFile
    volumes: frozenset[str]


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


class Requests(pyfuse3.Operations):
    """The state of one mount, for the handlers. Used by the event loop only."""

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
        self._opened_roots: dict[str, BlobId] = {}  # of backups, by id, as first opened
        self._writers_open = 0  # handles of staged files, open for writing
        self._sidecars: dict[str, TextWriter] = {}
        self._publishing: dict[trio.Event, _Publish] = {}
        # Set inside the event loop, before the first request.
        self.threads: Threads
        self.quick_reader: QuickReader
        self.long_reader: LongReader

    def _entry(self, inode: int) -> Entry:
        entry = self._inodes.entry(inode)
        if entry is None or (entry.kind is Kind.SIDECAR and entry.key not in self._sidecars):
            raise FUSEError(errno.ESTALE)  # the kernel looks the name up again
        return entry

    def _child(self, parent: Entry, name: bytes) -> Entry:
        text = text_of(name)
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

    async def _told(self, entry: Entry) -> EntryAttributes:
        """The same for an answer that makes an entry known to the kernel."""
        attributes = await self._stat(entry)
        self._inodes.tell(entry)
        return attributes

    async def _stat_or_none(self, entry: Entry) -> EntryAttributes | None:
        text_size = 0
        if entry.kind is Kind.SIDECAR:
            writer = self._sidecars.get(entry.key)
            text_size = len(writer.buffer) if writer else 0
        elif entry.kind in _MADE:
            if entry.kind is Kind.RECORD and self._service.catalogue.get(entry.key) is None:
                return None
            text_size = await self._text_size(entry)
        attributes = self._attributes.of(entry, text_size=text_size)
        if attributes is None and entry.kind is Kind.BACKUP:
            return self._stat_removed(entry)
        return attributes

    async def _text_size(self, entry: Entry) -> int:
        if entry.kind is Kind.RECORD:
            return self._texts.record_size(entry)
        try:
            return len(await self._content(entry))
        except (DamageError, StorageError):
            # Reading says what is wrong; it can be removed, and written anew. What lies beside it
            # must be found all the same.
            return 0

    def _stat_removed(self, entry: Entry) -> EntryAttributes | None:
        """A backup without a name is a file as long as somebody has it open."""
        for handle in self._handles.values():
            if isinstance(handle, BackupHandle) and handle.record.backup_id == entry.key:
                return self._attributes.of_removed(entry, handle.record)
        return None

    async def _content(self, entry: Entry) -> bytes:
        if entry.kind is Kind.SIDECAR:
            return bytes(self._sidecars[entry.key].buffer)
        if entry.kind not in _MADE:
            raise FUSEError(errno.EACCES)
        if entry.kind in (Kind.METADATA, Kind.RECORD):  # what the disk says
            return await self.threads.slow(self._texts.content, entry)
        return self._texts.content(entry)

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _writable(self) -> StagingArea:
        if self._area is None:
            raise FUSEError(errno.EROFS)
        return self._area

    @staticmethod
    def _path(folder: Entry, name: bytes) -> str:
        text = text_of(name)
        return f"{folder.key}/{text}" if folder.key else text

    @contextlib.asynccontextmanager
    async def _a_publish(self, staged: StagedFile, *, new_name: str = "") -> AsyncIterator[None]:
        """Something that may publish is under way; counted from before the first await."""
        volumes = {staged.volume, volume_of(new_name) if new_name else None} - {None}
        event = trio.Event()
        self._publishing[event] = _Publish(staged, frozenset(map(str, volumes)))
        try:
            yield
        finally:
            del self._publishing[event]
            event.set()

    async def publish_settled(self) -> None:
        """Publish what has settled; to be called now and then."""
        for staged in self._area.settled() if self._area is not None else []:
            async with self._a_publish(staged):
                await self.threads.slow(self._writable().publish_settled, staged)

    async def _published(self, staged: StagedFile) -> None:
        """Wait for what of one staged file began to publish before now."""
        await self._released([staged])
        for event, publishing in list(self._publishing.items()):
            if publishing.staged is staged:
                await event.wait()

    async def _published_below(self, path: str) -> None:
        """The same of all volumes that a path in ``volumes/`` leads to, or into: of all, if empty.

        What begins later is not waited for, nor what a look at ``path`` cannot show: a client is
        not to wait for the copies of others.
        """
        await self._released([staged for staged in self._staged() if _leads(path, staged.volume)])
        for event, publishing in list(self._publishing.items()):
            if any(_leads(path, volume) for volume in publishing.volumes):
                await event.wait()

    async def _all_published(self) -> None:
        """The same of every staged file, those of temporary names too."""
        await self._released(self._staged())
        for event in list(self._publishing):
            await event.wait()

    def _staged(self) -> list[StagedFile]:
        return self._area.files() if self._area is not None else []

    async def _released(self, files: Sequence[StagedFile]) -> None:
        """Wait for the releases of what was just closed, as far as one can tell.

        The kernel sends a release among the read-aheads of other programs, of which it lets but a
        few through at a time, so a look at the result of a copy may overtake it. A flush may also
        be that of a duplicate, which every program that a shell starts with its output in
        ``staging/`` closes: then the opener still has the file. Where one cannot look, as into
        another user's process, this does not wait for long.
        """
        if not files:
            return
        for handle in list(self._handles.values()):
            if not isinstance(handle, StagedWriter) or handle.flushed_at is None:
                continue
            if not any(handle.staged is staged for staged in files):
                continue
            number = self._inodes.number(staged_entry(handle.handle))
            with trio.move_on_at(handle.flushed_at + RELEASE_SECONDS_MAX):
                if not await self.threads.slow(holds_for_writing, handle.opener.process_id, number):
                    await handle.released.wait()

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
        return StagedWriter(handle, opener_of(ctx.pid))

    async def _take_in(self, writer: TextWriter) -> None:
        """A small file was closed: check it and keep it, or say why not."""
        assert self._area is not None
        if writer.entry.kind is Kind.METADATA:
            take_in, name = handles.put_metadata, f"{writer.entry.key}/metadata.json"
        elif is_temporary(writer.entry.key):
            return  # taken in when it is renamed
        else:
            suffix = RECORD_SUFFIX if writer.entry.kind is Kind.RECORD else ""
            take_in, name = handles.put_record, f"backups/{writer.entry.key}{suffix}"
        try:
            await self.threads.slow(take_in, self._service, writer)
        except BackupfsError as error:
            self._area.events.add("refused", name, str(error))
            raise
        self._area.events.add("took in", name)


def text_of(name: bytes) -> str:
    if len(name) > PART_SIZE_MAX:
        raise FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(errno.EINVAL) from None


def _leads(path: str, volume: str | None) -> bool:
    """Whether a look at ``path`` in ``volumes/`` can show a backup of ``volume``."""
    if volume is None:
        return False
    return not path or f"{volume}/".startswith(f"{path}/") or path.startswith(f"{volume}/")


def staged_entry(handle: WriteHandle) -> Entry:
    return Entry(Kind.STAGED, handle.staged.draft_id, handle.staged)
