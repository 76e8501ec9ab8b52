"""One file in ``staging/``: a draft's content with a name, attributes and a place in the lifecycle.

Only ``area`` changes these; who reads a single attribute needs no lock.
"""

from __future__ import annotations

import threading
from datetime import datetime

from backupfs.format.draft_state import DraftState
from backupfs.format.names import volume_of
from backupfs.repository.images import Root
from backupfs.staging.draft import Content, Draft
from backupfs.staging.lifecycle import Facts, State, is_temporary_path


class StagedFile:
    """A head or an unpublished draft."""

    def __init__(
        self, *, draft_id: str, name: str, draft: Draft, next_id: str, changed_at: datetime
    ) -> None:
        self.lock = threading.RLock()  # held over a flush or a publish; never by the event loop
        self.draft_id = draft_id
        self.name = name  # path below staging/
        self.draft = draft
        self.mode = 0o644
        self.uid = 0
        self.gid = 0
        self.mtime_ns: int = int(changed_at.timestamp() * 1e9)
        self.mtime_given = False  # by the client, rather than by the last write
        self.writers = 0
        self.readers = 0
        self.written = False
        self.changed = False
        self.interrupted = False
        self.left_partial = False
        self.renamed = False
        self.failure = ""
        self.unlinked = False
        self.state = State.OPEN
        self.reason = ""
        self.may_retry = False  # held for an error of publishing, which is tried again
        self.settle_at: float | None = None  # on the monotonic clock
        self.stored_bytes = 0
        self.next_id = next_id
        self.published_id: str | None = None
        self.changed_at = changed_at
        self.sequence = 0
        self.is_marked = False  # as being written, for the next start of the daemon
        self.state_lock = threading.RLock()  # held while its state or mark is written
        self.unflushed: set[int] = set()  # ids of handles that wrote, and were not closed since
        self.is_saved = False  # some durable state of it exists

    @classmethod
    def from_state(cls, state: DraftState, draft: Draft) -> StagedFile:
        """A staged file as it was at its last checkpoint."""
        staged = cls(
            draft_id=state.draft_id,
            name=state.name,
            draft=draft,
            next_id=state.next_id,
            changed_at=state.changed_at,
        )
        staged.mode, staged.uid, staged.gid = state.mode, state.uid, state.gid
        staged.mtime_ns, staged.mtime_given = state.mtime_ns, True
        staged.written, staged.changed = state.written, state.changed
        staged.interrupted = state.interrupted
        staged.reason = state.held
        staged.state = State.HELD if state.held else State.PUBLISHED
        staged.stored_bytes = state.stored_bytes
        staged.published_id = state.published_id
        staged.sequence = state.sequence
        staged.is_saved = True
        return staged

    @property
    def is_temporary(self) -> bool:
        return is_temporary_path(self.name)

    @property
    def volume(self) -> str | None:
        """The volume it is for; None while its name is a temporary one."""
        return None if self.is_temporary else volume_of(self.name)

    @property
    def wants_mark(self) -> bool:
        """Whether a write must not be answered before the file is marked as being written."""
        return not (self.is_marked or self.unlinked)

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is known to be no whole copy, until somebody shows the contrary."""
        return self.interrupted or self.left_partial or bool(self.failure)

    @property
    def size(self) -> int:
        return self.draft.size

    def to_state(self, content: Content) -> DraftState:
        return DraftState(
            draft_id=self.draft_id,
            name=self.name,
            size=content.size,
            root=content.root.root,
            height=content.root.height,
            data_count=content.data_count,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            mtime_ns=self.mtime_ns,
            written=self.written,
            changed=self.changed,
            # Somebody in the middle of writing: the mark says so too, but may not be durable yet.
            interrupted=self.is_in_doubt or bool(self.unflushed),
            held=self.reason[:1000] if self.state is State.HELD and not self.may_retry else "",
            stored_bytes=self.stored_bytes,
            next_id=self.next_id,
            published_id=self.published_id,
            changed_at=self.changed_at,
            sequence=self.sequence,
        )

    def facts(self, *, latest_size: int | None, settled: bool, explicit: bool) -> Facts:
        """What ``lifecycle.decide`` wants to know; all of the content is at its checkpoint."""
        content = self.draft.saved
        return Facts(
            writers=self.writers,
            changed=self.changed,
            written=self.written,
            size=content.size,
            latest_size=latest_size,
            has_data=content.data_count > 0,
            temporary=self.is_temporary,
            renamed=self.renamed,
            interrupted=self.interrupted,
            left_partial=self.left_partial,
            failure=self.failure,
            settled=settled,
            explicit=explicit,
        )

    def content_changed(self, now: datetime) -> None:
        """Its content is about to change."""
        self.changed = True
        self.changed_at = now
        self.mtime_ns = int(now.timestamp() * 1e9)
        self.mtime_given = False
        self.renamed = False

    def became_backup(self, backup_id: str, next_id: str) -> None:
        """Its content is that of a backup now."""
        self.published_id, self.next_id = backup_id, next_id
        self.draft.resembles(self.draft.saved.root)
        self.changed = self.interrupted = self.left_partial = self.renamed = False
        self.failure = ""
        self.stored_bytes = 0
        self.state, self.reason, self.settle_at = State.PUBLISHED, "", None


def root_of(state: DraftState) -> Root:
    """The tree that a durable state names."""
    return Root(state.root, state.height)
