"""From a user's words to the one backup they mean."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

from backupfs.catalogue import Catalogue
from backupfs.errors import AmbiguousBackup, BackupNotFound
from backupfs.format.names import LATEST_NAME
from backupfs.format.record import Record


def select(catalogue: Catalogue, selector: str) -> Record:
    """The backup that an id, the unique start of one, ``VOLUME@latest`` or ``VOLUME@TIMESTAMP``
    (or the start of a timestamp) stands for.

    Raises: BackupNotFound, AmbiguousBackup.
    """
    record = catalogue.get(selector)
    if record is not None:
        return record
    volume, separator, moment = selector.rpartition("@")
    if separator:
        found = _at(catalogue.backups(volume), moment)
    else:
        ids = catalogue.ids_starting_with(selector.lower()) if selector else []
        found = [record for backup_id in ids if (record := catalogue.get(backup_id))]
    if not found:
        raise BackupNotFound(selector=selector)
    if len(found) > 1:
        raise AmbiguousBackup(selector=selector, count=len(found))
    return found[0]


def _at(backups: list[Record], moment: str) -> list[Record]:
    """The backups that a timestamp, or the start of one, or "latest", stands for."""
    if moment in ("latest", LATEST_NAME):
        return backups[-1:]
    plain = moment.removesuffix(".img")
    named = [record for record in backups if record.name.removesuffix(".img") == plain]
    if named:
        return named
    with contextlib.suppress(ValueError, OverflowError):
        exact = datetime.fromisoformat(moment)
        if "T" in moment and exact.tzinfo is not None:
            at = exact.astimezone(UTC).replace(microsecond=0)
            same = [record for record in backups if record.data_timestamp == at]
            if same:
                return same
    return [record for record in backups if plain and record.name.startswith(plain)]
