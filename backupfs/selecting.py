"""From a user's words to the one backup they mean."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

from backupfs.catalogue import Catalogue
from backupfs.errors import (
    AmbiguousBackup,
    BackupNotFound,
    CorruptObject,
    InvalidRecord,
    VolumeNamed,
)
from backupfs.format.names import LATEST_NAME
from backupfs.format.record import Record, canonical_backup_id, record_name

LATEST_WORDS = ("latest", LATEST_NAME)


def select(catalogue: Catalogue, selector: str) -> Record:
    """The backup that an id, the unique start of one, ``VOLUME@latest`` or ``VOLUME@TIMESTAMP``
    (or the start of a timestamp) stands for.

    Raises:
        BackupNotFound, AmbiguousBackup
        VolumeNamed: it is the name of a volume.
        CorruptObject: the record meant is damaged, or may be, as that of the latest backup.
    """
    record = catalogue.get(selector)
    if record is not None:
        return record
    volume, separator, moment = selector.rpartition("@")
    if separator:
        if moment in LATEST_WORDS:
            _check_latest_is_known(catalogue)
        found = _at(catalogue.backups(volume), moment)
    else:
        # A volume called "db" may just as well be the beginning of an id: nobody means that.
        if catalogue.backups(selector):
            raise VolumeNamed(selector=selector)
        ids = catalogue.ids_starting_with(selector.lower()) if selector else []
        found = [record for backup_id in ids if (record := catalogue.get(backup_id))]
        if not found:
            _check_is_readable(catalogue, selector)
    if not found:
        raise BackupNotFound(selector=selector)
    if len(found) > 1:
        raise AmbiguousBackup(selector=selector, count=len(found))
    return found[0]


def _check_latest_is_known(catalogue: Catalogue) -> None:
    """Of a damaged record nobody can tell the volume: it may be the one that is asked for."""
    for damage in catalogue.unreadable():
        reason = f"{damage.reason}; it may be of the latest backup, so name one by its time or id"
        raise CorruptObject(name=damage.name, reason=reason)


def _check_is_readable(catalogue: Catalogue, selector: str) -> None:
    with contextlib.suppress(InvalidRecord):
        name = record_name(canonical_backup_id(selector))
        for damage in catalogue.unreadable():
            if damage.name == name:
                raise damage


def _at(backups: list[Record], moment: str) -> list[Record]:
    """The backups that a timestamp, or the start of one, or "latest", stands for."""
    if moment in LATEST_WORDS:
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
