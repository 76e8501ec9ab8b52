"""Repairs a repository, and brings an image back that has lost its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backupfs.catalogue import Catalogue
from backupfs.errors import InvalidOption
from backupfs.format import tree
from backupfs.format.record import Record
from backupfs.repository.images import Root, leaf_ids
from backupfs.repository.marking import DRAFTS
from backupfs.repository.repair import LostTree, RepairedPack, find_lost_trees, repair_packs
from backupfs.repository.repository import Repository
from backupfs.repository.sessions import gc_lock_path
from backupfs.staging.draft import Content
from backupfs.staging.publish import Publication, publish
from backupfs.staging.state_store import load_states
from backupfs.storage.locks import held_lock
from backupfs.types import BlobId, Progress

ROOT_LETTERS_MIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What one run did, or with ``dry_run`` would do, apart from looking for what is still wrong."""

    packs: Sequence[RepairedPack]
    trees: Sequence[LostTree]


def repair(repository: Repository, progress: Progress, *, dry_run: bool) -> Repaired:
    """Save what is whole in damaged packs, make the index anew, list images without a record.

    May run beside mounts, backups and reading, and be killed at any moment. Deletes nothing.

    Raises: LockTimeout (a gc runs), StorageError.
    """
    with held_lock(
        gc_lock_path(repository.folder),
        repository.ambient,
        what="gc to end, or a repair",
        seconds_max=repository.lock_seconds_max,
    ):
        packs = repair_packs(repository, progress, dry_run=dry_run)
        if not dry_run:
            repository.renew_index()
        trees = find_lost_trees(repository, _known_roots(repository))
    return Repaired(packs=packs, trees=trees)


def adopt(
    repository: Repository, catalogue: Catalogue, root: str, *, volume: str, size: int | None
) -> Record:
    """Make an image without a record a backup of ``volume``: of ``size`` bytes where that is known,
    else as large as its last chunk that is not zeros tells.

    Raises:
        InvalidOption: there is no such image, or it cannot be of that size.
        DamageError: its last chunk, which the size may cut, cannot be proven; there is no backup.
        LockTimeout, StorageError: there is no backup.
    """
    # Without gc, what is complete now is so until the record says that it is needed.
    with held_lock(
        gc_lock_path(repository.folder),
        repository.ambient,
        what="gc to end, or a repair",
        seconds_max=repository.lock_seconds_max,
    ):
        lost = _chosen(find_lost_trees(repository, _known_roots(repository)), root)
        chunk_size = repository.config.chunk_size
        if size is None:
            size = lost.size
        elif _has_data_behind(repository, lost, size):
            raise InvalidOption(option="--size", reason="the image has data beyond that size")
        elif tree.height(size, chunk_size=chunk_size) != lost.height:
            raise InvalidOption(option="--size", reason="an image of that size has another tree")
        content = Content(
            root=_root(lost),
            size=size,
            data_count=lost.data_size // chunk_size,
        )
        publication = Publication(
            volume=volume,
            parent=None,
            backup_id=repository.ambient.new_uuid(),
            data_timestamp=lost.stored_at or repository.ambient.now(),
            stored_bytes=0,
        )
        return publish(repository, catalogue, content, publication)


def _root(lost: LostTree) -> Root:
    return Root(BlobId(bytes.fromhex(lost.root)), lost.height)


def _has_data_behind(repository: Repository, lost: LostTree, size: int) -> bool:
    """Whether an image of ``size`` bytes would lack some of the lost one that are not zeros."""
    chunk_size = repository.config.chunk_size
    if not lost.size - chunk_size < size < lost.size:
        return size < lost.size
    # The last chunk is known to hold data, but not how far.
    ids = leaf_ids(repository.reader, _root(lost), size // chunk_size, 1)
    (chunk,) = repository.reader.chunks(ids)
    return any(chunk[size % chunk_size :])


def _chosen(trees: list[LostTree], root: str) -> LostTree:
    root = root.lower()
    if len(root) < ROOT_LETTERS_MIN:
        raise InvalidOption(option="--adopt", reason=f"give {ROOT_LETTERS_MIN} letters or more")
    found = [lost for lost in trees if lost.root.startswith(root)]
    if len(found) != 1:
        what = "no complete image" if not found else f"{len(found)} images"
        raise InvalidOption(
            option="--adopt", reason=f"{what} without a record begins with {root!r}"
        )
    return found[0]


def _known_roots(repository: Repository) -> set[Root]:
    """Roots of all backups and drafts that can be read."""
    records, _unreadable = repository.records.get_all()
    roots = {Root(record.root, record.height) for record in records.values()}
    for folder in (repository.folder / DRAFTS).glob("*/"):
        states, _damage = load_states(
            folder, repository.ids, chunk_size=repository.config.chunk_size
        )
        roots |= {Root(state.root, state.height) for state in states}
    return roots
