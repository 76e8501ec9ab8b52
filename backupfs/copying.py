"""Images into the repository and out of it again, as whole streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from backupfs.catalogue import Catalogue
from backupfs.errors import Cancelled
from backupfs.format.record import Record
from backupfs.image import Image, ImageExtent
from backupfs.reports import ImageSource, ImageTarget
from backupfs.repository.images import EMPTY, Root
from backupfs.repository.repository import Repository
from backupfs.staging.draft import Draft
from backupfs.staging.publish import Publication, find_parent, publish
from backupfs.types import Progress

# What a restore reads, proves and writes at a time.
RESTORE_SIZE = 2 << 20
RESTORE_READERS = 3


def never() -> bool:
    """For callers that do not cancel."""
    return False


def back_up(
    repository: Repository,
    catalogue: Catalogue,
    source: ImageSource,
    publication: Publication,
    *,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> Record:
    """Read ``source`` to its end and publish it; ``publication`` learns here what was stored.

    Raises:
        ImageTooLarge, BackupExists, SourceFailed, Cancelled, StorageError: there is no backup;
            what was stored for it is garbage for gc.
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
        draft.truncate(source.size())
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
    coming: deque[tuple[int, Future[list[ImageExtent]]]] = deque()
    with ThreadPoolExecutor(RESTORE_READERS, thread_name_prefix="restore") as pool:
        try:
            step = max(RESTORE_SIZE, image.chunk_size)
            for offset in range(0, image.size, step):
                size = min(step, image.size - offset)
                coming.append((size, pool.submit(image.extents, offset, size)))
                if len(coming) > RESTORE_READERS:
                    size, extents = coming.popleft()
                    yield size, extents.result()
            while coming:
                size, extents = coming.popleft()
                yield size, extents.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _stop_if(cancelled: Callable[[], bool], what: str) -> None:
    if cancelled():
        raise Cancelled(what=what)
