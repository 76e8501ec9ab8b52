"""Compares the bytes of backups with their ids, and says what is wrong as users want to know it."""

from __future__ import annotations

from collections.abc import Sequence

from backupfs.catalogue import Catalogue
from backupfs.format.record import Record, backup_id_of
from backupfs.reports import Damage, VerifyReport
from backupfs.repository.records import as_damage
from backupfs.repository.repository import Repository
from backupfs.repository.verify import Finding, Verification
from backupfs.types import Progress


def verify(
    repository: Repository,
    catalogue: Catalogue,
    records: Sequence[Record] | None,
    *,
    quick: bool,
    progress: Progress,
) -> VerifyReport:
    """Check some backups, or all; with ``quick`` data are looked up but not read.

    Raises: StorageError.
    """
    catalogue.refresh()
    run = Verification(repository, progress)
    # Read again: what this process has in memory says nothing of the disk.
    readable, unreadable = repository.records.get_all()
    if records is None:
        chosen = sorted(readable.values(), key=lambda record: (record.volume, record.name))
        run.note_objects([as_damage(*item) for item in unreadable.items()])
    else:
        chosen = list(records)
        wanted = {record.object_name for record in chosen} & unreadable.keys()
        run.note_objects([as_damage(name, unreadable[name]) for name in sorted(wanted)])
    run.run(chosen, quick=quick)
    return VerifyReport(
        backups_checked=len(chosen),
        bytes_checked=run.bytes_checked,
        damage=[_as_damage(finding) for finding in run.findings],
        complete=not quick,
    )


def _as_damage(finding: Finding) -> Damage:
    record = finding.record
    return Damage(
        object_name=finding.object_name,
        reason=finding.reason,
        # The backup that it was found in, or whose record it is.
        backup_id=record.backup_id if record else backup_id_of(finding.object_name),
        volume=record.volume if record else None,
        offset=finding.offset,
        size=finding.size,
    )
