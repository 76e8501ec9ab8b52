"""Makes staged files durable, with their own state, and finds them again at the next start.

The caller holds the staged file's lock, but for ``mark``.
"""

from __future__ import annotations

from collections.abc import Callable

from backupfs.errors import BackupfsError, CorruptObject, StorageError
from backupfs.staging.draft import Content, Draft
from backupfs.staging.events import EventLog
from backupfs.staging.staged_file import StagedFile, root_of
from backupfs.staging.state_store import StateStore


class Keeper:
    """What is durable of a staged file, and when."""

    def __init__(self, states: StateStore, events: EventLog) -> None:
        self._states = states
        self._events = events

    def flush(self, staged: StagedFile, *, interrupted: bool) -> None:
        """A writer is done, as far as it is concerned; where no other has written without a flush,
        a crash publishes from here on."""
        staged.interrupted |= interrupted and staged.changed
        if not staged.draft.is_dirty and staged.is_saved and not staged.is_marked:
            if interrupted:
                self.save(staged)
            return
        if not staged.unflushed:
            staged.sequence += 1
        self.persist(staged)
        with staged.state_lock:
            if not staged.is_marked:
                return
            # Before the look: who writes from now on sees that the mark is wanted, and waits for it.
            staged.is_marked = False
            if not staged.unflushed:
                self._states.unmark_writing(staged.draft_id)
            else:  # one began meanwhile: an older mark would be void
                self._states.mark_writing(staged.draft_id, staged.sequence)
                staged.is_marked = True

    def mark(self, staged: StagedFile) -> None:
        """A file changes: should the daemon die, the next one is to know."""
        with staged.state_lock:
            if staged.is_marked or staged.unlinked:
                return
            if not staged.is_saved:  # or nothing would tell that it was there
                self.save(staged)
            self._states.mark_writing(staged.draft_id, staged.sequence)
            staged.is_marked = True

    def persist(self, staged: StagedFile) -> None:
        if staged.draft.error is not None:
            raise staged.draft.error
        try:
            staged.draft.checkpoint()
            staged.stored_bytes += staged.draft.take_added_size()
            self.save(staged)
        except BackupfsError as error:
            # The writer is told, and may give up: what it wrote so far must not pass as complete.
            staged.failure = str(error)
            self._events.add("could not store a write to", staged.name, str(error))
            raise

    def save(self, staged: StagedFile) -> None:
        with staged.state_lock:
            if not staged.unlinked:
                self._states.save(staged.to_state(staged.draft.saved))
                staged.is_saved = True

    def save_if_possible(self, staged: StagedFile) -> None:
        """The same where the file is what it is, whether or not that can be kept."""
        try:
            self.save(staged)
        except StorageError as error:
            self._events.add("could not keep the state of", staged.name, str(error))

    def forget(self, staged: StagedFile) -> None:
        """It is no more; a writer that still holds it open keeps no state of it.

        Raises: StorageError: it is what it was.
        """
        with staged.state_lock:
            self._states.remove(staged.draft_id)
            staged.unlinked = True


def load_staged(
    states: StateStore, make_draft: Callable[[Content], Draft]
) -> tuple[dict[str, StagedFile], list[CorruptObject]]:
    """The staged files whose states were kept, by name; and what is wrong with other states.

    Raises: StorageError.
    """
    files: dict[str, StagedFile] = {}
    readable, damage = states.load_all()
    for state in sorted(readable, key=lambda state: state.changed_at):
        content = Content(root=root_of(state), size=state.size, data_count=state.data_count)
        staged = StagedFile.from_state(state, make_draft(content))
        older = files.pop(staged.name, None)
        files[staged.name] = staged
        if older is None:
            continue
        # Two states of one name: a rename was cut short, and the newer has replaced the older.
        if older.changed:
            older.name = _name_aside(older)
            files[older.name] = older
            states.save(older.to_state(older.draft.saved))
        else:
            states.remove(older.draft_id)
    return files, damage


def _name_aside(staged: StagedFile) -> str:
    """A temporary name beside the one that another file has now; at most 225 bytes in its part."""
    folder, _, name = staged.name.rpartition("/")
    kept = f"{name[:50]}.replaced-{staged.draft_id[:6]}.part"
    return f"{folder}/{kept}" if folder else kept
