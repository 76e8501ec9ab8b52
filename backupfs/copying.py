"""Images into the repository and out of it again, as whole streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from backupfs.catalogue import Catalogue
from backupfs.errors import Cancelled
from backupfs.format.record import Record
from backupfs.image import Image
from backupfs.reports import ImageSource, ImageTarget
from backupfs.repository.images import Root
from backupfs.repository.repository import Repository
from backupfs.staging.draft import Draft
from backupfs.staging.publish import Publication, publish
from backupfs.types import Progress

# What a restore reads, proves and writes at a time.
RESTORE_SIZE = 4 << 20


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
    )

    def checkpoint() -> set[Root]:
        return {draft.checkpoint().root}

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
    for offset in range(0, image.size, RESTORE_SIZE):
        _stop_if(cancelled, f"restore to {target.name!r}")
        size = min(RESTORE_SIZE, image.size - offset)
        for start, data, length in image.extents(offset, size):
            if data is None:
                target.write_hole(start, length)
            else:
                target.write(start, data)
        progress(size)
    target.finish(image.size)


def _stop_if(cancelled: Callable[[], bool], what: str) -> None:
    if cancelled():
        raise Cancelled(what=what)
