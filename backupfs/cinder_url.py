"""``python -m backupfs.cinder_url REPO BACKUP``: what Cinder needs to import a backup it never saw.

Cinder imports a backup from a text that its own export gives: the fields of its database and what
the driver adds. For a backup that was made through a mount or by the command line, this makes the
same text from its record. Cinder itself is not needed.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import uuid
from typing import Any

from backupfs.driver import ENCRYPTION_KEY_ID, BackupDriver
from backupfs.errors import BackupfsError
from backupfs.service import Record
from backupfs.types import ceil_div

DRIVER_NAME = "backupfs.cinder.BackupfsBackupDriver"
# What Cinder itself says of a volume that it does not know.
UNKNOWN_VOLUME_ID = "00000000-0000-0000-0000-000000000000"
# Characters that Cinder's columns hold; a longer text fails the whole import there.
TEXT_SIZE_MAX = 255
SNAPSHOT_ID_SIZE_MAX = 36
GIB = 1 << 30


def backup_record(driver: BackupDriver, record: Record, *, volume_id: str | None = None) -> Any:
    """The arguments of Cinder's import: ``backup_service`` and ``backup_url``."""
    told = {"driver_info": driver.export_record({"id": record.backup_id})}
    told.update(_fields(record, volume_id or _volume_id(record.volume)))
    url = base64.b64encode(json.dumps(told).encode()).decode()
    return {"backup_service": DRIVER_NAME, "backup_url": url}


def _fields(record: Record, volume_id: str) -> dict[str, Any]:
    """A backup as Cinder's database would have it."""
    description = record.description
    return {
        "id": record.backup_id,
        "volume_id": volume_id,
        "parent_id": record.parent_id,
        "display_name": _cut(description.display_name or record.volume),
        "display_description": _cut(description.display_description),
        "container": _cut(description.container),
        "snapshot_id": _cut(description.snapshot_id, SNAPSHOT_ID_SIZE_MAX),
        # Cinder counts in GiB, and gives a volume to restore to of this size.
        "size": max(1, ceil_div(record.size, GIB)),
        "service_metadata": _cut(f"volumes/{record.volume}/{record.name}"),
        "object_count": 0,
        "data_timestamp": record.data_timestamp.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "encryption_key_id": (record.metadata or {}).get(ENCRYPTION_KEY_ID),
    }


def _cut(text: str | None, size_max: int = TEXT_SIZE_MAX) -> str | None:
    return None if text is None else text[:size_max]


def _volume_id(volume: str) -> str:
    try:
        return str(uuid.UUID(volume))
    except ValueError:
        return UNKNOWN_VOLUME_ID


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m backupfs.cinder_url", description=__doc__)
    parser.add_argument("repository", metavar="REPO")
    parser.add_argument("backup", metavar="BACKUP", help="an id, VOLUME@latest…")
    parser.add_argument("--volume-id", help="the id of the volume in Cinder, if it is there")
    given = parser.parse_args()
    try:
        with BackupDriver(given.repository) as driver:
            record = driver.service.resolve(given.backup)
            told = backup_record(driver, record, volume_id=given.volume_id)
    except BackupfsError as error:
        sys.exit(f"backupfs: {error}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
