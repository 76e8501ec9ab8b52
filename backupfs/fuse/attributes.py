"""What stat and getxattr say of an entry."""

from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import datetime

import pyfuse3

from backupfs.format.record import Record
from backupfs.fuse.layout import Entry, Kind
from backupfs.fuse.options import MountOptions
from backupfs.service import Service
from backupfs.staging.staged_file import StagedFile
from backupfs.types import ceil_div

# Programs read and write in pieces of this size, so it decides the number of requests.
BLOCK_SIZE = 1 << 20
SECTOR_SIZE = 512
# Short, as other processes change the repository too; contents and attributes of an immutable
# backup could be kept for ever, but its name may go.
TIMEOUT_SECONDS = 1.0
# A record may be written by itself: importing it again succeeds.
_WRITABLE_TEXTS = {Kind.METADATA, Kind.SIDECAR, Kind.RECORD}
XATTR_PREFIX = "user.backupfs."


class Attributes:
    """Makes attributes for one mount; from memory alone."""

    def __init__(
        self,
        service: Service,
        options: MountOptions,
        *,
        own_uid: int,
        own_gid: int,
        mounted_at: datetime,
        number: Callable[[Entry], int],
    ) -> None:
        self._catalogue = service.catalogue
        self._chunk_size = service.config.chunk_size
        self._options = options
        self._uid = own_uid if options.uid is None else options.uid
        self._gid = own_gid if options.gid is None else options.gid
        self._mounted_at = mounted_at
        self._number = number

    def of(self, entry: Entry, *, text_size: int) -> pyfuse3.EntryAttributes | None:
        """The attributes of ``entry``, or None where it is gone.

        ``text_size`` is that of the content of a file which is made when it is read.
        """
        attributes = self._common(entry)
        if entry.is_folder:
            attributes.st_mode = stat.S_IFDIR | (0o777 & ~self._options.umask)
            attributes.st_nlink = 1  # as other file systems say where they do not count folders
        elif entry.kind is Kind.BACKUP:
            record = self._catalogue.get(entry.key)
            if record is None:
                return None
            self._fill_backup(attributes, record)
        elif entry.kind is Kind.STAGED:
            assert entry.staged is not None
            self._fill_staged(attributes, entry.staged)
        elif entry.kind is Kind.LATEST:
            record = self._catalogue.latest(entry.key)
            attributes.st_mode = stat.S_IFLNK | 0o777
            if record is not None:
                attributes.st_size = len(record.name)
                _set_times(attributes, int(record.data_timestamp.timestamp()) * 10**9)
        else:
            self._fill_text(attributes, entry, text_size)
        return attributes

    def of_removed(self, entry: Entry, record: Record) -> pyfuse3.EntryAttributes:
        """The attributes of a backup that was deleted and is still open."""
        attributes = self._common(entry)
        self._fill_backup(attributes, record)
        attributes.st_nlink = 0
        return attributes

    def xattrs(self, entry: Entry) -> dict[str, str]:
        """The extended attributes of ``entry``, with their prefix."""
        values: dict[str, str] = {}
        record = self._catalogue.get(entry.key) if entry.kind is Kind.BACKUP else None
        if record is not None:
            values = _backup_xattrs(record)
        elif entry.kind is Kind.STAGED and entry.staged is not None:
            values = _staged_xattrs(entry.staged)
        return {f"{XATTR_PREFIX}{name}": value for name, value in values.items()}

    def _common(self, entry: Entry) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = self._number(entry)
        attributes.generation = 0
        attributes.entry_timeout = TIMEOUT_SECONDS
        attributes.attr_timeout = TIMEOUT_SECONDS
        attributes.st_uid, attributes.st_gid = self._uid, self._gid
        attributes.st_nlink = 1
        attributes.st_rdev = 0
        attributes.st_size = 0
        attributes.st_blksize = BLOCK_SIZE
        attributes.st_blocks = 0
        _set_times(attributes, int(self._mounted_at.timestamp() * 1e9))
        return attributes

    def _fill_backup(self, attributes: pyfuse3.EntryAttributes, record: Record) -> None:
        attributes.st_mode = stat.S_IFREG | (0o444 & ~self._options.umask)
        attributes.st_nlink = 2  # in volumes/ and in backups/
        attributes.st_size = record.size
        attributes.st_blocks = _blocks(record.size, record.data_size)
        _set_times(attributes, int(record.data_timestamp.timestamp()) * 10**9)
        attributes.st_ctime_ns = int(record.created_at.timestamp() * 1e9)

    def _fill_staged(self, attributes: pyfuse3.EntryAttributes, staged: StagedFile) -> None:
        attributes.st_mode = stat.S_IFREG | staged.mode
        if self._options.uid is None:
            attributes.st_uid = staged.uid
        if self._options.gid is None:
            attributes.st_gid = staged.gid
        attributes.st_nlink = 0 if staged.unlinked else 1
        attributes.st_size = staged.size
        data_size = staged.draft.saved.data_count * self._chunk_size
        if staged.draft.is_dirty:  # not counted yet: say that all of it is data
            data_size = staged.size
        attributes.st_blocks = _blocks(staged.size, data_size)
        _set_times(attributes, staged.mtime_ns)

    def _fill_text(self, attributes: pyfuse3.EntryAttributes, entry: Entry, text_size: int) -> None:
        mode = 0o644 if entry.kind in _WRITABLE_TEXTS else 0o444
        attributes.st_mode = stat.S_IFREG | (mode & ~self._options.umask)
        attributes.st_size = text_size
        attributes.st_blocks = ceil_div(attributes.st_size, SECTOR_SIZE)
        attributes.attr_timeout = 0  # their size may be another at each look
        if entry.kind is Kind.SIDECAR:
            attributes.entry_timeout = 0  # its name is that of a record once it is taken in
        if entry.kind is Kind.RECORD:
            record = self._catalogue.get(entry.key)
            if record is not None:
                _set_times(attributes, int(record.created_at.timestamp() * 1e9))


def _set_times(attributes: pyfuse3.EntryAttributes, moment_ns: int) -> None:
    attributes.st_atime_ns = moment_ns
    attributes.st_mtime_ns = moment_ns
    attributes.st_ctime_ns = moment_ns


def _blocks(size: int, data_size: int) -> int:
    """Sectors with data; a last chunk that reaches past the end counts to the end."""
    return ceil_div(min(size, data_size), SECTOR_SIZE)


def _backup_xattrs(record: Record) -> dict[str, str]:
    values = {
        "id": record.backup_id,
        "volume": record.volume,
        "kind": record.kind,
        "root": record.root.hex(),
        "stored_bytes": str(record.stored_bytes),
        "created_at": record.created_at.isoformat(),
    }
    if record.parent_id is not None:
        values["parent"] = record.parent_id
    if record.description.display_name:
        values["display_name"] = record.description.display_name
    return values


def _staged_xattrs(staged: StagedFile) -> dict[str, str]:
    values = {"state": str(staged.state)}
    if staged.volume is not None:
        values["volume"] = staged.volume
    if staged.reason:
        values["reason"] = staged.reason
    if staged.published_id is not None:
        values["id"] = staged.published_id
    return values
