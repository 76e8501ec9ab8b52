"""Brings the index in line with the packs that exist: the packs are the truth.

Packs it does not know are taken in from their footers, packs that are gone are forgotten. A pack
whose footer cannot be read is reported and left out; its blobs count as absent until repaired.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set

from backupfs.errors import CorruptObject, ObjectNotFound, StorageUnavailable
from backupfs.format.blob import DIFFERENCES_MAX
from backupfs.format.ids import IdScheme
from backupfs.format.pack import (
    PACKS_PREFIX,
    TAIL_SIZE,
    BadPackError,
    PackEntry,
    decode_footer,
    footer_size,
    pack_id_of,
    pack_name,
)
from backupfs.repository.index import Index
from backupfs.storage.base import Storage
from backupfs.storage.oserrors import is_want_of_resources
from backupfs.types import ObjectName, PackId

log = logging.getLogger(__name__)

# One read brings footers of up to 1,400 blobs whole; larger ones need a second.
FOOTER_GUESS_SIZE = 64 << 10


def list_packs(storage: Storage) -> dict[PackId, int]:
    """The packs that exist, with their sizes in bytes. Raises: StorageError."""
    packs = {}
    for info in storage.list(PACKS_PREFIX):
        pack_id = pack_id_of(info.name)
        if pack_id is not None:
            packs[pack_id] = info.size
    return packs


def read_footer(
    storage: Storage, ids: IdScheme, pack_id: PackId, pack_size: int
) -> list[PackEntry]:
    """What a pack holds. Raises: CorruptObject, ObjectNotFound, StorageError."""
    name = pack_name(pack_id)
    try:
        start = max(0, pack_size - FOOTER_GUESS_SIZE)
        end = storage.get_range(name, start, pack_size - start)
        size = footer_size(end[-TAIL_SIZE:])
        if size > pack_size:
            raise BadPackError("footer is larger than its pack")
        if size > len(end):
            end = storage.get_range(name, pack_size - size, size)
        return decode_footer(pack_id, end[-size:], pack_size=pack_size, ids=ids)
    except BadPackError as error:
        raise CorruptObject(name=name, reason=str(error)) from error


def refresh_index(
    storage: Storage,
    ids: IdScheme,
    index: Index,
    *,
    make_lasting: Callable[[Iterable[ObjectName]], Set[ObjectName]] = lambda _names: frozenset(),
    fills_gaps: bool = True,
) -> list[CorruptObject]:
    """Make the index list just the packs that exist; what is wrong with those it could not take.

    ``fills_gaps``: whether to go through all packs, where something may have another copy.
    ``make_lasting`` gets the packs that are new, before they are listed: one may be seen while who
    stores it is still about to make its name durable, and who finds it in the index relies on it.
    On those that it returns, as it could not, nobody relies until a later refresh can.

    Raises: StorageError, and what ``make_lasting`` does.
    """
    # Known before existing: who adds a pack has put it in place before, who deletes one deletes it
    # before it is forgotten. So what is known and not listed is gone, and not merely new.
    known = index.pack_ids()
    existing = list_packs(storage)
    new = existing.keys() - known
    in_doubt = new | (index.fleeting() & existing.keys())
    fleeting = make_lasting([pack_name(pack_id) for pack_id in in_doubt])
    index.note_fleeting(
        in_doubt, {pack_id for pack_id in in_doubt if pack_name(pack_id) in fleeting}
    )
    # Before those that are gone are forgotten: gc may have moved blobs from these into new ones, and
    # another process that has this index looks for them meanwhile.
    damage = list(_take_in(storage, ids, index, sorted(new), existing))
    # This index may be alone in naming those as the places of blobs that other packs hold too.
    index.forget_packs(known - existing.keys(), leaves_gaps=True)
    if new:
        # A gc may have deleted and forgotten one of them before it was taken in.
        index.forget_packs(new - list_packs(storage).keys(), leaves_gaps=True)
    if fills_gaps:
        _fill_gaps(storage, ids, index, existing)
    return damage


def _fill_gaps(storage: Storage, ids: IdScheme, index: Index, sizes: dict[PackId, int]) -> None:
    mark = index.gaps()
    if mark is None:
        return
    log.info(
        "packs were deleted, damaged, or hold copies of the same: looking for what can be read"
    )
    is_complete = True
    waiting: dict[PackId, list[PackEntry]] = {}
    for pack_id in sorted(index.pack_ids() & sizes.keys()):
        try:
            entries = read_footer(storage, ids, pack_id, sizes[pack_id])
        except (ObjectNotFound, CorruptObject):
            continue
        except StorageUnavailable as error:  # the disk cannot read this one; ask for the others
            if is_want_of_resources(error):
                raise
            log.warning("%s", error)
            is_complete = False
            continue
        waiting[pack_id] = index.fill_gaps(pack_id, entries)
    # The base of a difference may have been listed after it, and the base of that one.
    for _ in range(DIFFERENCES_MAX):
        waiting = {pack_id: entries for pack_id, entries in waiting.items() if entries}
        for pack_id, entries in waiting.items():
            waiting[pack_id] = index.fill_gaps(pack_id, entries)
    if is_complete:
        index.close_gaps(mark)


def _take_in(
    storage: Storage,
    ids: IdScheme,
    index: Index,
    pack_ids: Iterable[PackId],
    sizes: dict[PackId, int],
) -> Iterable[CorruptObject]:
    for pack_id in pack_ids:
        try:
            index.add_pack(pack_id, read_footer(storage, ids, pack_id, sizes[pack_id]))
        except ObjectNotFound:
            continue  # deleted since it was listed
        except StorageUnavailable as error:  # the disk cannot read this one; ask for the others
            if is_want_of_resources(error):
                raise
            log.warning("%s", error)
            yield CorruptObject(name=pack_name(pack_id), reason=error.reason)
        except CorruptObject as error:
            log.warning("%s", error)
            yield error
