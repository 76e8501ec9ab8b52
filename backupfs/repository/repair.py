"""Saves what can be saved of damaged packs, and finds images that no record names.

A pack whose footer is lost, damaged or another's is read from end to end: each blob's header says what
follows, and its id proves it. What is proven is stored again in new packs; only when these are
durable and in the index, the old file is set aside in the folder ``damaged``, where nothing looks and
nothing deletes. Killed at any moment it leaves blobs in two places and never in none.

The caller holds the lock of gc, so no pack is deleted meanwhile.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backupfs.errors import (
    BackupfsError,
    CorruptObject,
    DamageError,
    ObjectNotFound,
    StorageUnavailable,
)
from backupfs.format import tree
from backupfs.format.pack import pack_name
from backupfs.repository.images import Root, walk
from backupfs.repository.marking import with_bases
from backupfs.repository.pack_scan import PackScan
from backupfs.repository.packer import NewBlob
from backupfs.repository.rebuild import list_packs, read_footer
from backupfs.repository.repository import Repository
from backupfs.storage.local import keep_as, make_folders, same_bytes, sync_folder
from backupfs.storage.oserrors import translated
from backupfs.types import HOLE, BlobId, PackId, Progress

log = logging.getLogger(__name__)

DAMAGED_FOLDER = "damaged"
BATCH_SIZE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedPack:
    """A pack without a usable footer, and what became of it."""

    object_name: str
    reason: str
    blobs: int  # proven whole
    bytes: int  # that these take
    bytes_lost: int  # of the file: footer, damaged blobs, and what is no blob
    set_aside: str | None  # where the old file is now; None where it was left alone


@dataclass(frozen=True, slots=True, kw_only=True)
class LostTree:
    """A complete image that neither a backup nor anything staged names."""

    root: str  # hexadecimal
    height: int
    size: int  # of the image, as far as its last byte that is not zero tells: in whole chunks
    data_size: int  # bytes of chunks that are no holes
    stored_at: datetime | None  # when the pack with its root was written


# -- packs -------------------------------------------------------------------------------------


def repair_packs(
    repository: Repository, progress: Progress, *, dry_run: bool
) -> list[RepairedPack]:
    """Save what is whole in packs without a usable footer; with ``dry_run`` only look for it.

    Raises: StorageError: what was done is of use, and nothing was lost.
    """
    repaired = []
    for pack_id, size in sorted(list_packs(repository.storage).items()):
        reason = _what_is_wrong(repository, pack_id, size)
        progress(size)
        if reason is not None:
            repaired.append(_repair_pack(repository, pack_id, size, reason, dry_run=dry_run))
    return repaired


def _what_is_wrong(repository: Repository, pack_id: PackId, size: int) -> str | None:
    try:
        read_footer(repository.storage, repository.ids, pack_id, size)
    except ObjectNotFound:
        return None  # deleted by hand since it was listed
    except (CorruptObject, StorageUnavailable) as error:
        return str(error.reason)
    return None


def _repair_pack(
    repository: Repository, pack_id: PackId, size: int, reason: str, *, dry_run: bool
) -> RepairedPack:
    scan = PackScan(
        repository.storage, repository.ids, pack_id, size, find_base=repository.reader.base
    )
    if dry_run:
        for _ in scan.blobs():
            pass
    else:
        _store_again(repository, scan.blobs())
    # One that the disk cannot read may be readable tomorrow, in its place.
    is_done = scan.is_readable and not dry_run
    log.warning("%s: %s: %d blobs are whole", pack_name(pack_id), reason, scan.count)
    return RepairedPack(
        object_name=pack_name(pack_id),
        reason=reason,
        blobs=scan.count,
        bytes=scan.size_found,
        bytes_lost=size - scan.size_found,
        set_aside=_set_aside(repository, pack_id) if is_done else None,
    )


def _store_again(repository: Repository, blobs: Iterable[NewBlob]) -> None:
    """Put blobs into new packs; durable and in the index on return. Raises: StorageError."""
    packer = repository.writer().packer
    since = packer.failures
    batch: list[NewBlob] = []
    batch_size = 0
    try:
        for blob in blobs:
            # Chunks and nodes go to packs of their own.
            is_other = batch and (blob.level > 0) != (batch[0].level > 0)
            if is_other or batch_size >= BATCH_SIZE:
                packer.append(batch)
                batch, batch_size = [], 0
            if packer.claim([blob.blob_id]):
                batch.append(blob)
                batch_size += len(blob.data)
        if batch:
            packer.append(batch)
    except BackupfsError as error:
        packer.abandon({blob.blob_id for blob in batch}, error)  # or a seal would wait for them
        raise
    packer.seal(since=since)


def _set_aside(repository: Repository, pack_id: PackId) -> str:
    """Move a pack to where nothing looks for it, and nothing deletes it."""
    source = repository.folder / pack_name(pack_id)
    folder = repository.folder / DAMAGED_FOLDER
    with translated():
        make_folders(folder)
        for target in _names_aside(folder, pack_id):
            if not target.exists():
                keep_as(source, target)
                break
            if same_bytes(source, target):  # an earlier try came to here
                break
        sync_folder(folder)
    # Only now: it is never in neither place.
    repository.storage.delete(pack_name(pack_id))
    repository.index.forget_packs([pack_id], leaves_gaps=True)
    return f"{DAMAGED_FOLDER}/{target.name}"


def _names_aside(folder: Path, pack_id: PackId) -> Iterator[Path]:
    yield folder / pack_id.hex()
    for number in itertools.count(2):
        yield folder / f"{pack_id.hex()}-{number}"


# -- images that no record names ---------------------------------------------------------------


def find_lost_trees(repository: Repository, known: Iterable[Root]) -> list[LostTree]:
    """The complete images in the packs that none of ``known`` is, the newest first.

    What is below ``known`` roots, or below another image, is left out. Whether their chunks are
    whole is not looked at, only whether they are there. Raises: StorageError.
    """
    packs = list_packs(repository.storage)
    nodes: dict[BlobId, tuple[int, PackId]] = {}
    for pack_id, size in packs.items():
        try:
            entries = read_footer(repository.storage, repository.ids, pack_id, size)
        except (CorruptObject, ObjectNotFound, StorageUnavailable):
            continue  # told elsewhere
        nodes.update({e.blob_id: (e.level, pack_id) for e in entries if e.level > 0})
    below = _below(repository, nodes) | _reached(repository, known)
    found = []
    for blob_id in nodes.keys() - below:
        level, pack_id = nodes[blob_id]
        lost = _as_lost_tree(repository, Root(blob_id, level), _stored_at(repository, pack_id))
        if lost is not None:
            found.append(lost)
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda lost: (lost.stored_at or oldest, lost.root), reverse=True)


def _below(repository: Repository, nodes: dict[BlobId, tuple[int, PackId]]) -> set[BlobId]:
    """All nodes that another node leads to."""
    below: set[BlobId] = set()
    for blob_id, (level, _) in nodes.items():
        if level > 1:
            try:
                below.update(tree.node_entries(repository.reader.node(blob_id, level)))
            except DamageError as error:
                log.warning("%s", error)
    return below


def _reached(repository: Repository, known: Iterable[Root]) -> set[BlobId]:
    """All nodes below some roots, and these."""
    reached: set[BlobId] = set()

    def enter(blob_id: BlobId, _level: int) -> bool:
        is_new = blob_id not in reached
        reached.add(blob_id)
        return is_new

    for root in known:
        for _ in walk(repository.reader, root, enter=enter, on_damage=lambda *_: None):
            pass
    return reached


def _as_lost_tree(
    repository: Repository, root: Root, stored_at: datetime | None
) -> LostTree | None:
    """What is known of a tree; None where it is not complete."""
    count, last = 0, -1
    try:
        for first, ids in walk(repository.reader, root, enter=lambda _id, _level: True):
            places = [place for place, blob_id in enumerate(ids) if blob_id != HOLE]
            chunk_ids = [ids[place] for place in places]
            if any(where is None for _, where in with_bases(repository.index, chunk_ids)):
                return None
            count += len(places)
            last = max(last, first + places[-1]) if places else last
    except DamageError:
        return None
    chunk_size = repository.config.chunk_size
    # A tree is no higher than its image needs: zeros at the end may be all that makes it so high.
    count_min = tree.span(root.height - 1) + 1 if root.height > 1 else 1
    return LostTree(
        root=root.root.hex(),
        height=root.height,
        size=max(last + 1, count_min) * chunk_size,
        data_size=count * chunk_size,
        stored_at=stored_at,
    )


def _stored_at(repository: Repository, pack_id: PackId) -> datetime | None:
    try:
        status = os.stat(repository.folder / pack_name(pack_id))
    except OSError:
        return None
    return datetime.fromtimestamp(int(status.st_mtime), UTC)
