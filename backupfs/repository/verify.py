"""Compares bytes with their ids, and says which backups, and which ranges of them, are hit.

In two passes, so that memory stays bounded and disks are read in order: the trees of the backups
are walked to learn which blobs matter, then the packs are read one after the other. Only where
something is wrong the trees are walked again, to name what it hits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from backupfs.errors import (
    CorruptObject,
    DamageError,
    MissingBlob,
    ObjectNotFound,
    StorageUnavailable,
)
from backupfs.format import blob as blob_format
from backupfs.format import tree
from backupfs.format.blob import LEVEL_MAX
from backupfs.format.pack import PackEntry, pack_name
from backupfs.format.record import Record
from backupfs.repository.blobs import RANGE_SIZE_MAX
from backupfs.repository.images import Root, walk
from backupfs.repository.index import BlobLocation
from backupfs.repository.marking import Marker, with_bases
from backupfs.repository.rebuild import list_packs, read_footer
from backupfs.repository.repository import Repository
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import HOLE, BlobId, PackId, Progress

READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong; ``record`` and the range are None where no backup is hit."""

    object_name: str
    reason: str
    record: Record | None
    offset: int | None
    size: int | None


class Verification:
    """One run over some backups of a repository."""

    def __init__(self, repository: Repository, progress: Progress) -> None:
        self._repository = repository
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._marker = Marker(repository.reader, repository.index)
        # (blob, level) -> (object, reason): a forged tree may name a whole blob at a wrong level.
        self._bad: dict[tuple[BlobId, int], tuple[str, str]] = {}
        self._absent: set[tuple[BlobId, int]] = set()  # of the bad: those that are nowhere
        self._unlisted: set[PackId] = set()  # packs whose footers cannot be read
        self.findings: list[Finding] = []
        self.bytes_checked = 0

    def run(self, records: Sequence[Record], *, quick: bool) -> None:
        """Check ``records``; with ``quick`` data are only looked up. Raises: StorageError."""
        self.note_objects(self._repository.refresh_index())
        roots = (Root(record.root, record.height) for record in records)
        self._marker.mark(roots, on_damage=self._bad_node)
        self._marker.look_again(self._repository.refresh_index)
        for blob_id in self._marker.reached.missing:
            for level in range(LEVEL_MAX + 1):
                self._bad.setdefault((blob_id, level), ("no pack", "it is not in any pack"))
        if not quick:
            self._read_packs()
        if self._unlisted:
            self._check_unlisted(records)
        if self._bad:
            self._repository.reader.note_damage(
                {blob_id for blob_id, level in self._bad.keys() - self._absent}
            )
            self._look_for_other_copies()
            for record in records:
                # Deleted meanwhile, and collected: that is no damage.
                if self._repository.records.exists(record.backup_id):
                    self._name_hits(record)

    def _look_for_other_copies(self) -> None:
        """What another pack holds whole is not lost: the index, made aware of the damage, names it."""
        self._repository.refresh_index()
        index = self._repository.index
        for blob_id, level in list(self._bad.keys() - self._absent):
            place = index.find(blob_id)
            if place is None or index.is_damaged(blob_id):
                continue
            entry = PackEntry(
                blob_id=blob_id, offset=place.offset, size=place.size, level=level, base=place.base
            )
            try:
                self._repository.reader.raw_at(place.pack_id, entry)
            except DamageError:
                continue
            except StorageUnavailable as error:
                if is_want_of_resources(error):
                    raise
                continue
            del self._bad[blob_id, level]

    def note_objects(self, damage: Sequence[CorruptObject]) -> None:
        """Add findings about objects that hit no single backup."""
        self.findings.extend(
            Finding(
                object_name=error.fields["name"],
                reason=error.fields["reason"],
                record=None,
                offset=None,
                size=None,
            )
            for error in damage
        )

    def _bad_node(
        self, blob_id: BlobId, level: int, _first: int, error: DamageError | StorageUnavailable
    ) -> None:
        pack_id = error.fields.get("pack_id", "no pack")
        self._bad[blob_id, level] = (f"packs/…/{pack_id}", str(error))
        if isinstance(error, MissingBlob):
            self._absent.add((blob_id, level))

    def _read_packs(self) -> None:
        sizes = list_packs(self._repository.storage)
        with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as pool:
            for pack_id in sorted(self._marker.reached.packs()):
                if pack_id not in sizes:
                    continue  # gc has moved its blobs since they were marked
                entries = self._entries(pack_id, sizes[pack_id])
                list(pool.map(lambda group, p=pack_id: self._check(p, group), _groups(entries)))

    def _entries(self, pack_id: PackId, size: int) -> list[PackEntry]:
        offsets = self._marker.reached.offsets(pack_id)
        try:
            entries = read_footer(self._repository.storage, self._repository.ids, pack_id, size)
        except CorruptObject as error:
            self.note_objects([error])
            self._unlisted.add(pack_id)
            return []
        except StorageUnavailable as error:  # the disk cannot read it
            if is_want_of_resources(error):
                raise
            self.note_objects([CorruptObject(name=pack_name(pack_id), reason=error.reason)])
            self._unlisted.add(pack_id)
            return []
        except ObjectNotFound:
            return []  # gc has moved its blobs since
        return [entry for entry in entries if entry.offset in offsets]

    def _check_unlisted(self, records: Sequence[Record]) -> None:
        """Blobs of packs without a usable footer, one by one, where the index has them."""
        checked: set[BlobId] = set()
        entered: set[tuple[BlobId, int]] = set()

        def enter(blob_id: BlobId, level: int) -> bool:
            if (blob_id, level) in entered:
                return False
            entered.add((blob_id, level))
            self._check_where_indexed([blob_id], level)
            return True

        for record in records:
            root = Root(record.root, record.height)
            reader = self._repository.reader
            for _first, ids in walk(reader, root, enter=enter, on_damage=self._bad_node):
                new = set(ids) - checked - {HOLE}
                self._check_where_indexed(sorted(new), 0)
                checked |= new

    def _check_where_indexed(self, blob_ids: list[BlobId], level: int) -> None:
        locations = self._repository.index.find_many(blob_ids)
        for blob_id, location in zip(blob_ids, locations, strict=True):
            if location is not None and location.pack_id in self._unlisted:
                self._check(location.pack_id, [_as_entry(blob_id, location, level)])

    def _check(self, pack_id: PackId, group: list[PackEntry]) -> None:
        first, last = group[0], group[-1]
        size = last.offset + last.size - first.offset
        name = pack_name(pack_id)
        try:
            data = self._repository.storage.get_range(name, first.offset, size)
        except ObjectNotFound:
            return
        except StorageUnavailable as error:  # the disk cannot read it, or some of it
            if is_want_of_resources(error):
                raise
            if len(group) == 1:
                reason = f"{error.reason} (at offset {first.offset})"
                self._bad[first.blob_id, first.level] = (name, reason)
            else:
                for entry in group:
                    self._check(pack_id, [entry])
            return
        view = memoryview(data)
        for entry in group:
            start = entry.offset - first.offset
            try:
                blob = view[start : start + entry.size]
                blob_format.decode(
                    blob,
                    expected=entry.blob_id,
                    level=entry.level,
                    ids=self._repository.ids,
                    find_base=self._repository.reader.base,
                )
                blob_format.check_listed_base(blob, entry.base)
            except blob_format.BadBlobError as error:
                reason = f"{error} (at offset {entry.offset})"
                self._bad[entry.blob_id, entry.level] = (name, reason)
            except StorageUnavailable as error:  # the disk cannot read what it is a difference to
                if is_want_of_resources(error):
                    raise
                reason = f"the chunk that it differs from: {error.reason}"
                self._bad[entry.blob_id, entry.level] = (name, reason)
        with self._progress_lock:
            self.bytes_checked += size
            self._progress(size)

    def _name_hits(self, record: Record) -> None:
        root = Root(record.root, record.height)
        chunk_size = record.chunk_size
        hit_nodes: list[tuple[BlobId, int, int]] = []

        def note_node(
            blob_id: BlobId, level: int, first: int, error: DamageError | StorageUnavailable
        ) -> None:
            hit_nodes.append((blob_id, level, first))
            self._bad.setdefault((blob_id, level), ("no pack", str(error)))

        reader = self._repository.reader
        everywhere = walk(reader, root, enter=lambda _id, _level: True, on_damage=note_node)
        for first, ids in everywhere:
            self._note_differences(ids)
            for place, blob_id in enumerate(ids):
                if (blob_id, 0) in self._bad:
                    self._hit(record, (blob_id, 0), (first + place) * chunk_size, chunk_size)
        for blob_id, level, first in hit_nodes:
            span = tree.span(level) * chunk_size
            self._hit(record, (blob_id, level), first * chunk_size, span)

    def _note_differences(self, blob_ids: Sequence[BlobId]) -> None:
        """What differs from a bad chunk is as bad, also where it was not read."""
        index = self._repository.index
        for blob_id, location in zip(blob_ids, index.find_many(blob_ids), strict=True):
            if location is None or location.base is None:
                continue
            for base_id, _ in with_bases(index, [location.base]):
                if (base_id, 0) in self._bad:
                    object_name, reason = self._bad[base_id, 0]
                    reason = f"the chunk that it differs from: {reason}"
                    self._bad.setdefault((blob_id, 0), (object_name, reason))

    def _hit(self, record: Record, bad: tuple[BlobId, int], offset: int, size: int) -> None:
        object_name, reason = self._bad[bad]
        size = max(0, min(size, record.size - offset))
        if self.findings:
            last = self.findings[-1]
            is_same = last.record is record and (last.object_name, last.reason) == self._bad[bad]
            # One chunk may fill most of an image, a disk wiped with ones say: that is one range.
            if is_same and (last.offset or 0) + (last.size or 0) == offset:
                self.findings[-1] = replace(last, size=(last.size or 0) + size)
                return
        self.findings.append(
            Finding(object_name=object_name, reason=reason, record=record, offset=offset, size=size)
        )


def _as_entry(blob_id: BlobId, location: BlobLocation, level: int) -> PackEntry:
    return PackEntry(
        blob_id=blob_id,
        offset=location.offset,
        size=location.size,
        level=level,
        base=location.base,
    )


def _groups(entries: list[PackEntry]) -> list[list[PackEntry]]:
    """Entries in the order of their pack, in groups that one read brings in."""
    groups: list[list[PackEntry]] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if groups and entry.offset + entry.size - groups[-1][0].offset <= RANGE_SIZE_MAX:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups
