"""What becomes of a staged file: asks ``lifecycle`` and does what it says, publishes or holds.

The caller holds the staged file's lock, and has made its content durable before.
"""

from __future__ import annotations

import contextlib
from typing import Any

from backupfs.catalogue import Catalogue
from backupfs.errors import BackupExists, BackupfsError, DamageError, ObjectExists
from backupfs.format.record import Record
from backupfs.repository.repository import Repository
from backupfs.staging.events import EventLog
from backupfs.staging.keeper import Keeper
from backupfs.staging.lifecycle import Policy, State, decide
from backupfs.staging.publish import Publication, publish
from backupfs.staging.staged_file import StagedFile

RETRY_SECONDS = 30.0  # until a publish that failed is tried again


class Decider:
    """Moves staged files from state to state by one policy."""

    def __init__(
        self,
        repository: Repository,
        catalogue: Catalogue,
        keeper: Keeper,
        policy: Policy,
        events: EventLog,
    ) -> None:
        self._repository = repository
        self._catalogue = catalogue
        self._keeper = keeper
        self._policy = policy
        self._events = events
        self._ambient = repository.ambient
        self._session = repository.writer().session

    def has_settled(self, staged: StagedFile) -> bool:
        """Whether it has been quiet for long enough, or is to be published again after an error."""
        settle_at = staged.settle_at
        return (
            not staged.unlinked and settle_at is not None and settle_at <= self._ambient.monotonic()
        )

    def decide_alone(self, staged: StagedFile, *, settled: bool = False) -> None:
        """For nobody who waits for the answer: an error holds the file, which says why."""
        with contextlib.suppress(BackupfsError):
            self.decide(staged, settled=settled)

    def decide(
        self, staged: StagedFile, *, settled: bool = False, explicit: bool = False
    ) -> Record | None:
        """Publish or not. Raises: BackupfsError (publishing failed, and the file is held)."""
        volume = staged.volume
        latest = self._catalogue.latest(volume) if volume else None
        facts = staged.facts(
            latest_size=latest.size if latest else None, settled=settled, explicit=explicit
        )
        decision = decide(facts, self._policy)
        if decision.state is State.HELD:
            self.hold(staged, decision.reason)
            return None
        before = staged.state, staged.reason
        staged.state, staged.reason, staged.settle_at = decision.state, decision.reason, None
        if decision.state is State.SETTLING:
            staged.settle_at = self._ambient.monotonic() + self._policy.settle_seconds
        if decision.state is not State.PUBLISHING:
            return None
        try:
            return self._publish(staged)
        except BackupfsError as error:
            staged.state, staged.reason = before  # told once, however often it is tried
            self.hold(staged, f"publishing failed: {error}", may_retry=True)
            raise

    def _publish(self, staged: StagedFile) -> Record:
        assert staged.volume is not None
        try:
            record = self._write_record(staged, staged.volume)
        except (BackupExists, ObjectExists):
            # An earlier try did write its record, unknown to us, and the content is another now.
            staged.next_id = self._ambient.new_uuid()
            self._keeper.save(staged)
            record = self._write_record(staged, staged.volume)
        staged.became_backup(record.backup_id, self._ambient.new_uuid())
        self._events.add("published", staged.name, f"{record.backup_id} as {record.name}")
        # The backup exists, whether or not this is kept: its record tells the next start as well.
        self._keeper.save_if_possible(staged)
        return record

    def _write_record(self, staged: StagedFile, volume: str) -> Record:
        content = staged.draft.saved
        publication = Publication(
            volume=volume,
            backup_id=staged.next_id,
            data_timestamp=self._ambient.now(),
            source_mtime_ns=staged.mtime_ns if staged.mtime_given else None,
            source_mode=staged.mode,
            stored_bytes=staged.stored_bytes,
            metadata=self._metadata_of(volume),
        )
        with self._session.holding(content.root):
            return publish(self._repository, self._catalogue, content, publication)

    def _metadata_of(self, volume: str) -> dict[str, Any] | None:
        """A backup without its volume's metadata is better than none."""
        try:
            return self._repository.metadata.get(volume) or None
        except DamageError as error:
            self._events.add("published without metadata", volume, str(error))
            return None

    def hold(self, staged: StagedFile, reason: str, *, may_retry: bool = False) -> None:
        """``may_retry``: nothing speaks against the content; it is tried again, here or by the next
        start."""
        if (staged.state, staged.reason) != (State.HELD, reason):
            self._events.add("held", staged.name, reason)
        staged.state, staged.reason, staged.settle_at = State.HELD, reason, None
        staged.may_retry = may_retry
        if may_retry:
            staged.settle_at = self._ambient.monotonic() + RETRY_SECONDS
        self._keeper.save_if_possible(staged)
