"""The staging area: what is staged under which name, and what becomes of it.

Every method may wait for I/O unless it says otherwise, so the event loop calls them from threads;
it reads names and attributes directly. One lock guards the names and is held for their changes;
each staged file has a lock of its own, held over its flush, publish and rename. Where both are
needed, the file's comes first.
"""

from __future__ import annotations

import logging
import threading

from backupfs.catalogue import Catalogue
from backupfs.errors import (
    BackupfsError,
    CorruptObject,
    DraftNotFound,
    InvalidName,
    NameTaken,
    NothingToPublish,
    StorageError,
)
from backupfs.format.names import PART_SIZE_MAX, check_volume_name, folders_of, volume_of
from backupfs.format.record import Record
from backupfs.repository.images import EMPTY, Root
from backupfs.repository.repository import Repository
from backupfs.staging.deciding import Decider
from backupfs.staging.draft import NO_CONTENT, Content, Draft
from backupfs.staging.events import EventLog
from backupfs.staging.extents import Extents
from backupfs.staging.keeper import Keeper, load_staged
from backupfs.staging.lifecycle import (
    RENAME_FIRST,
    Policy,
    State,
    is_rsync_temporary,
    likely_path,
    why_not_published,
)
from backupfs.staging.publish import make_lasting
from backupfs.staging.staged_file import StagedFile
from backupfs.staging.state_store import StateStore
from backupfs.staging.write_handle import WriteHandle

log = logging.getLogger(__name__)


class StagingArea:
    """This host's staged files of one repository. Thread-safe.

    Without a policy it publishes only what it is told to: for who is no mount.
    """

    def __init__(
        self,
        repository: Repository,
        catalogue: Catalogue,
        states: StateStore,
        policy: Policy | None,
        events: EventLog,
    ) -> None:
        self._repository = repository
        self._catalogue = catalogue
        self._states = states
        self._policy = policy or Policy()
        self._decides_at_start = policy is not None
        self._ambient = repository.ambient
        self.events = events
        self._keeper = Keeper(states, events)
        self._decider = Decider(repository, catalogue, self._keeper, self._policy, events)
        self._writer = repository.writer()
        self._lock = threading.RLock()
        self._files: dict[str, StagedFile] = {}
        self._nameless: set[StagedFile] = set()  # that somebody has open still
        self._folders: set[str] = states.load_folders()
        self.unreadable: list[CorruptObject] = []  # states of drafts, as found at the start
        self._writer.session.add_checkpoint(self._checkpoint_all)
        self._recover()

    def close(self) -> None:
        """Make durable what is being written, and leave. Nothing is published any more."""
        for staged in self.files():
            with staged.lock:
                try:
                    if staged.draft.is_dirty:
                        self._keeper.persist(staged)
                except BackupfsError as error:
                    self.events.add("could not keep", staged.name, str(error))
        self._writer.session.remove_checkpoint(self._checkpoint_all)
        self._states.close()

    # -- what is there; never waits ----------------------------------------------------------------

    def find(self, name: str) -> StagedFile | None:
        return self._files.get(name)

    def files(self) -> list[StagedFile]:
        return list(self._files.values())

    def is_folder(self, path: str) -> bool:
        return not path or path in self._folders

    def folders(self) -> set[str]:
        return set(self._folders)

    # -- names -------------------------------------------------------------------------------------

    def create(self, name: str, *, mode: int, uid: int, gid: int) -> WriteHandle:
        """Stage a new, empty file under ``name`` and open it for writing.

        Raises: InvalidName, NameTaken.
        """
        latest = self._catalogue.latest(volume_of(likely_path(name)))
        alike = EMPTY if latest is None else Root(latest.root, latest.height)
        draft = self._new_draft(NO_CONTENT, alike)
        staged = StagedFile(
            draft_id=self._ambient.random_bytes(16).hex(),
            name=name,
            draft=draft,
            next_id=self._ambient.new_uuid(),
            changed_at=self._ambient.now(),
        )
        staged.mode, staged.uid, staged.gid = mode & 0o7777, uid, gid
        staged.changed = True
        with self._lock:
            self._check_name(name, but=None)
            if name in self._files or name in self._folders:
                raise NameTaken(volume=volume_of(name), staged=name)
            staged.writers = 1
            self._files[name] = staged
        return WriteHandle(staged)

    def unlink(self, name: str) -> None:
        """Forget what is staged; its backups stay. Raises: DraftNotFound, StorageError."""
        staged = self._must_find(name)
        with staged.lock, self._lock:
            self._forget(staged)
        self.events.add("forgot", name)

    def rename(self, old: str, new: str) -> None:
        """Give a staged file another name, replacing what is staged there; may publish it.

        Raises: DraftNotFound, InvalidName, NameTaken, StorageError.
        """
        staged = self._must_find(old)
        if old == new:
            return
        with staged.lock:
            with self._lock:
                self._check_name(new, but=old)
                replaced = self._files.get(new)
                self._keep_as(staged, new)
                # Never in neither list: gc, which is answered from these, would not hear of it.
                if replaced is not None:
                    self._nameless.add(replaced)
                self._files[new] = staged
                del self._files[old]
                if replaced is not None:
                    self._forget_replaced(replaced)
            self._decider.decide(staged)

    def _forget_replaced(self, staged: StagedFile) -> None:
        """The rename is done and durable. A state that cannot be removed is older than that of the
        file which has its name now, so the next start knows what to do with it."""
        try:
            self._keeper.forget(staged)
        except StorageError as error:
            staged.unlinked = True
            self.events.add("could not remove the state of", staged.name, str(error))
        if not (staged.writers or staged.readers):
            self._nameless.discard(staged)

    def _keep_as(self, staged: StagedFile, name: str) -> None:
        """Make a new name durable; should that fail, the file has its old one."""
        volume, before = staged.volume, staged.name
        state, changed, changed_at = staged.state, staged.changed, staged.changed_at
        staged.left_partial |= self._is_left_partial(staged, before)
        staged.name = name
        # Should the daemon die before the one it replaces is forgotten, the newer of the two stays.
        staged.changed_at = self._ambient.now()
        if staged.volume != volume and (staged.size or staged.written):
            staged.changed = True
        # Decided anew: should the daemon die now, the next one is to decide it by its new name.
        staged.state = State.OPEN
        try:
            self._keeper.save(staged)
        except StorageError:
            staged.name, staged.state = before, state
            staged.changed, staged.changed_at = changed, changed_at
            raise
        staged.renamed = True

    def make_folder(self, path: str) -> None:
        """Raises: InvalidName, StorageError."""
        with self._lock:
            problem = check_volume_name(path)
            if problem:
                raise InvalidName(name=path, reason=problem)
            self._states.save_folders(self._folders | {path})
            self._folders.add(path)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder. Raises: StorageError."""
        with self._lock:
            self._states.save_folders(self._folders - {path})
            self._folders.discard(path)

    def is_empty_folder(self, path: str) -> bool:
        prefix = f"{path}/"
        return not any(name.startswith(prefix) for name in (*self._files, *self._folders))

    # -- writing -----------------------------------------------------------------------------------

    def open_write(self, staged: StagedFile, *, truncate: bool) -> WriteHandle:
        """Open for writing; with ``truncate`` the content goes. Raises: BackupfsError."""
        with staged.lock:
            if truncate:
                self._clear(staged)
            staged.writers += 1
            staged.state, staged.settle_at = State.OPEN, None
        return WriteHandle(staged)

    def begin_writing(self, handle: WriteHandle) -> None:
        """Mark the file as being written. Raises: StorageError."""
        self._keeper.mark(handle.staged)

    def note_write(self, handle: WriteHandle) -> None:
        """The content is about to change through ``handle``. Never waits; who calls makes sure
        that the file no longer ``wants_mark`` before the write is answered."""
        staged = handle.staged
        staged.unflushed.add(id(handle))
        staged.content_changed(self._ambient.now())
        staged.written = True
        handle.was_sized = False

    def truncate(self, staged: StagedFile, size: int, handle: WriteHandle | None) -> None:
        """Set the size, through a handle or by name. Raises: BackupfsError."""
        with staged.lock:
            if handle is not None:
                handle.was_sized = True
                if size > staged.size:  # by zeros, which are no copy
                    handle.copied = Extents()
            if size == staged.size:
                return
            if handle is not None:
                staged.unflushed.add(id(handle))
            self._keeper.mark(staged)
            if size:
                staged.draft.truncate(size)
                staged.content_changed(self._ambient.now())
            else:
                self._clear(staged)
            if handle is None and not staged.writers:
                self._keeper.flush(staged, interrupted=False)
                self._decider.decide(staged)

    def flush(self, handle: WriteHandle, *, interrupted: bool, goes_on: bool = False) -> None:
        """What close(2) waits for: all written so far is durable, with the file's own state.

        ``interrupted``: whoever opened it was killed. ``goes_on``: this was a duplicate, and whoever
        opened it has it open still, so should the daemon die, it was in the middle of writing.
        Raises: BackupfsError.
        """
        staged = handle.staged
        with staged.lock:
            if handle.is_complete and not interrupted:
                staged.interrupted = staged.left_partial = False
                staged.failure = ""
                handle.copied = Extents()
            elif handle.is_cut_short and id(handle) in staged.unflushed:
                staged.left_partial = True
            if not goes_on:
                staged.unflushed.discard(id(handle))
            self._keeper.flush(staged, interrupted=interrupted)

    def sync(self, handle: WriteHandle) -> None:
        """What fsync(2) waits for. The copy goes on: this is no close. Raises: BackupfsError."""
        with handle.staged.lock:
            self._keeper.persist(handle.staged)

    def release(self, handle: WriteHandle, *, interrupted: bool) -> None:
        """The handle is gone; the last one's release may publish. Keeps its errors to itself."""
        staged = handle.staged
        with staged.lock:
            staged.writers -= 1
            staged.unflushed.discard(id(handle))
            staged.interrupted |= interrupted and staged.changed
            if staged.writers:
                return
            if staged.unlinked:
                self._let_go(staged)
                return
            if staged.draft.error is not None:
                staged.failure = str(staged.draft.error)
                staged.draft.forgive()
            try:
                # A writer through mmap may change pages after its last close.
                if staged.draft.is_dirty or staged.is_marked or not staged.is_saved:
                    self._keeper.flush(staged, interrupted=staged.interrupted)
            except BackupfsError as error:
                staged.draft.forgive()  # the next one to write is not to be told of it
                self._decider.hold(staged, f"writing failed: {error}")
            else:
                self._decider.decide_alone(staged)

    def end_reading(self, staged: StagedFile) -> None:
        """The last reader is gone, of a file without a name."""
        with staged.lock:
            if not staged.writers:
                self._let_go(staged)

    def _let_go(self, staged: StagedFile) -> None:
        """Of a file without a name, and without writers: give back what it holds in memory."""
        if not staged.readers:
            staged.draft.clear()
            self._nameless.discard(staged)

    def set_attributes(
        self,
        staged: StagedFile,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """What chmod, chown and utimens set; also accepted after publishing. Raises: StorageError."""
        with staged.lock:
            if mode is not None:
                staged.mode = mode & 0o7777
            if uid is not None:
                staged.uid = uid
            if gid is not None:
                staged.gid = gid
            if mtime_ns is not None:
                staged.mtime_ns, staged.mtime_given = mtime_ns, True
            if staged.is_saved and not staged.writers and not staged.unlinked:
                self._keeper.save(staged)

    # -- publishing --------------------------------------------------------------------------------

    def publish_now(self, name: str) -> Record:
        """Publish what is staged, whatever speaks against it.

        Raises: DraftNotFound, NothingToPublish, BackupfsError.
        """
        staged = self._must_find(name)
        with staged.lock:
            if staged.volume is None:
                raise InvalidName(name=name, reason=RENAME_FIRST)
            self._keeper.flush(staged, interrupted=False)
            record = self._decider.decide(staged, explicit=True)
            if record is None:
                why = why_not_published(staged.state, staged.reason)
                raise NothingToPublish(name=name, reason=why)
            return record

    def settled(self) -> list[StagedFile]:
        """Those that were quiet long enough; never waits."""
        return [staged for staged in self.files() if self._decider.has_settled(staged)]

    def publish_settled(self, staged: StagedFile) -> None:
        """Publish what has settled, unless it was touched again. Keeps its errors to itself."""
        with staged.lock:
            if self._decider.has_settled(staged):
                self._decider.decide_alone(staged, settled=True)

    # -- durability --------------------------------------------------------------------------------

    def _checkpoint_all(self) -> set[Root]:
        """For gc: nothing that was built so far may be known to memory only."""
        roots = set()
        for staged in [*self.files(), *list(self._nameless)]:
            try:
                content = staged.draft.checkpoint()
            except BackupfsError as error:
                staged.failure = str(error)
                content = staged.draft.saved
            roots.add(content.root)
            # Any other image that it resembles gc may take from now on.
            staged.draft.resembles(content.root)
        return roots

    def _clear(self, staged: StagedFile) -> None:
        staged.draft.clear()
        staged.written = staged.interrupted = staged.left_partial = False
        staged.failure = ""
        staged.content_changed(self._ambient.now())

    # -- start -------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Take up what an earlier daemon left: publish what was complete, hold the rest."""
        self._files, self.unreadable = load_staged(self._states, self._new_draft)
        for damage in self.unreadable:
            self.events.add("could not read", damage.name, damage.reason)
        for staged in self.files():
            # Should their list be lost: a file without its folder could not be reached.
            self._folders.update(folders_of(staged.name))
            with staged.lock:
                self._take_up(staged)

    def _take_up(self, staged: StagedFile) -> None:
        published = self._catalogue.get(staged.next_id)
        content = staged.draft.saved
        if published is not None and (published.volume, published.size, published.root) == (
            staged.volume,
            content.size,
            content.root.root,
        ):
            try:
                make_lasting(self._repository, published)
            except StorageError as error:
                self._decider.hold(staged, f"publishing failed: {error}", may_retry=True)
                return
            staged.became_backup(published.backup_id, self._ambient.new_uuid())
            self._keeper.save_if_possible(staged)
            self._states.unmark_writing(staged.draft_id)  # void with it, or later writes are held
        elif self._states.was_writing(staged.draft_id, staged.sequence):
            staged.changed = staged.interrupted = staged.is_marked = True
            self._decider.hold(staged, "backupfs ended while it was being written")
        elif staged.state is State.HELD or not self._decides_at_start:
            return  # what is held stays so
        elif staged.changed and staged.interrupted:
            self._decider.hold(staged, "backupfs ended while it was being written")
        elif staged.changed:
            # A rename that had returned had published; of any other nobody was told.
            staged.renamed = not self._policy.publish_on_rename_only
            self._decider.decide_alone(staged)

    # -- helpers -----------------------------------------------------------------------------------

    def _new_draft(self, content: Content, alike: Root | None = None) -> Draft:
        return Draft(
            reader=self._repository.reader,
            store=self._writer.store,
            workers=self._writer.workers,
            credit=self._writer.credit,
            share=self._writer.open_share,
            content=content,
            alike=alike or content.root,
        )

    def _must_find(self, name: str) -> StagedFile:
        staged = self._files.get(name)
        if staged is None:
            raise DraftNotFound(name=name)
        return staged

    def _check_name(self, name: str, *, but: str | None) -> None:
        volume = volume_of(name)
        problem = check_volume_name(volume)
        if len(name.rpartition("/")[2].encode("utf-8", "replace")) > PART_SIZE_MAX:
            problem = f"it is longer than {PART_SIZE_MAX} bytes"
        if problem:
            raise InvalidName(name=name, reason=problem)
        for other in self.files():
            if other.name not in (name, but) and other.volume == volume:
                raise NameTaken(volume=volume, staged=other.name)

    def _forget(self, staged: StagedFile) -> None:
        self._keeper.forget(staged)
        if staged.writers or staged.readers:
            self._nameless.add(staged)
        if self._files.get(staged.name) is staged:
            del self._files[staged.name]

    @staticmethod
    def _is_left_partial(staged: StagedFile, old: str) -> bool:
        """rsync gives what it keeps of an interrupted transfer the time 0 before it renames it."""
        name = old.rpartition("/")[2]
        return is_rsync_temporary(name) and staged.mtime_given and staged.mtime_ns == 0
