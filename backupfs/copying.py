"""Images into the repository and out of it again, as whole streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

from backupfs.catalogue import Catalogue
from backupfs.errors import Cancelled, ImageTooSmall
from backupfs.format.record import Record
from backupfs.image import Image, ImageExtent
from backupfs.reports import ImageSource, ImageTarget
from backupfs.repository.images import EMPTY, Root
from backupfs.repository.repository import Repository
from backupfs.staging.draft import Draft
from backupfs.staging.publish import Publication, find_parent, publish
from backupfs.types import Progress, ceil_div

# What a restore reads, proves and writes at a time.
RESTORE_SIZE = 2 << 20
RESTORE_READERS = 3
# What it makes of a hole at a time: where it has to write zeros, this much is done in a second or so.
HOLE_SIZE_MIN = 64 << 20
HOLES_MAX = 65536  # pieces that an image without data has at most


def never() -> bool:
    """For callers that do not cancel."""
    return False


def back_up(
    repository: Repository,
    catalogue: Catalogue,
    source: ImageSource,
    publication: Publication,
    *,
    size_min: int,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Record:
    """Read ``source`` to its end and publish it; ``publication`` learns here what was stored.

    Raises:
        ImageTooLarge, ImageTooSmall, BackupExists, SourceFailed, Cancelled, StorageError: there is
            no backup; what was stored for it is garbage for gc.
    """
    writer = repository.writer()
    draft = Draft(
        reader=repository.reader,
        store=writer.store,
        workers=writer.workers,
        credit=writer.credit,
        share=writer.open_share,
        alike=_parent_root(catalogue, publication),
    )

    def checkpoint() -> set[Root]:
        root = draft.checkpoint().root
        draft.resembles(root)  # any other image gc may take from now on
        return {root}

    writer.session.add_checkpoint(checkpoint)
    try:
        for offset, data in source.extents():
            _stop_if(cancelled, f"backup of {source.name!r}")
            draft.write(offset, data)
            writer.credit.wait()
            progress(len(data))
        size = source.size()
        if size < size_min:
            raise ImageTooSmall(name=source.name, size=size, size_min=size_min)
        draft.truncate(size)
        content = draft.checkpoint()
        _stop_if(cancelled, f"backup of {source.name!r}")
        added = replace(publication, stored_bytes=draft.take_added_size())
        with writer.session.holding(content.root):
            return publish(repository, catalogue, content, added)
    finally:
        writer.session.remove_checkpoint(checkpoint)
        draft.clear()  # gives back what it holds in memory, however this ended


def _parent_root(catalogue: Catalogue, publication: Publication) -> Root:
    parent = find_parent(catalogue, publication)
    return EMPTY if parent is None else Root(parent.root, parent.height)


def restore(
    image: Image,
    target: ImageTarget,
    *,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> None:
    """Write an image to ``target``, every byte proven before it is written.

    Raises:
        DamageError, TargetFailed, Cancelled, StorageError: the target is not complete.
    """
    for size, extents in _read_ahead(image):
        _stop_if(cancelled, f"restore to {target.name!r}")
        for start, data, length in extents:
            if data is None:
                target.write_hole(start, length)
            else:
                target.write(start, data)
        progress(size)
    target.finish(image.size)


def _read_ahead(image: Image) -> Iterator[tuple[int, list[ImageExtent]]]:
    """(bytes covered, extents) of an image piece by piece, the next ones being read meanwhile."""
    coming: deque[tuple[int, Callable[[], list[ImageExtent]]]] = deque()
    with ThreadPoolExecutor(RESTORE_READERS, thread_name_prefix="restore") as pool:
        try:
            for offset, size, is_hole in _pieces(image):
                if is_hole:
                    coming.append((size, partial(_hole, offset, size)))
                else:
                    coming.append((size, pool.submit(image.extents, offset, size).result))
                if len(coming) > RESTORE_READERS:
                    size, extents = coming.popleft()
                    yield size, extents()
            while coming:
                size, extents = coming.popleft()
                yield size, extents()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pieces(image: Image) -> Iterator[tuple[int, int, bool]]:
    """(offset, size, whether it is a hole) of what to restore at a time; together the whole image."""
    # A device gets zeros for a hole, and may be cancelled meanwhile; but no image has many of them.
    hole_size = HOLE_SIZE_MIN * max(1, ceil_div(image.size, HOLE_SIZE_MIN * HOLES_MAX))
    data_size = max(RESTORE_SIZE, image.chunk_size)
    done = 0
    for start, end in chain(image.data_runs(gap_min=data_size), [(image.size, image.size)]):
        yield from _cut(done, start, hole_size, is_hole=True)
        yield from _cut(start, end, data_size, is_hole=False)
        done = end


def _cut(start: int, end: int, step: int, *, is_hole: bool) -> Iterator[tuple[int, int, bool]]:
    for offset in range(start, end, step):
        yield offset, min(step, end - offset), is_hole


def _hole(offset: int, size: int) -> list[ImageExtent]:
    return [(offset, None, size)]


def _stop_if(cancelled: Callable[[], bool], what: str) -> None:
    if cancelled():
        raise Cancelled(what=what)
