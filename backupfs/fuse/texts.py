"""The small files of the mount that are made when they are read: README, status, events, records,
metadata."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from backupfs import __version__
from backupfs.errors import BackupNotFound
from backupfs.fuse.layout import Entry, Kind
from backupfs.service import Service, StagingArea

README = """\
This is a backupfs mount: a file system whose files are backups of volume images.

  staging/    Copy an image here, and that is a backup: when cp returns, it is kept. The file stays
              as the writable head of its volume: write into it (rsync --inplace, dd conv=notrunc,
              qemu-img) and close it, and only what changed is stored as the next backup.
  volumes/    One folder for each volume. Each backup is an ordinary read-only file, named by its
              time in UTC; latest.img is a link to the newest. Read, loop-mount or boot them.
              Delete one with rm; "backupfs gc" then frees the space.
  backups/    The same files by id, each beside its record, ID.msgpack. Copy a record out to export
              a backup, copy it in again to import it.
  .backupfs/  status.json and events.log say what the file system is doing and why a copy was held.

A copy that was interrupted is no backup: it is held in staging/ until it is copied again, published
("backupfs publish") or removed. volumes/NAME/metadata.json is yours to write: a JSON object.

Restore with any tool. To keep holes as holes: cp --sparse=always, rsync -SL or qemu-img convert.
Mount a backup:  mount -o loop,ro,noload volumes/NAME/latest.img /mnt
"""


class Texts:
    """Contents of those files; but for METADATA and RECORD from memory, so that the event loop may
    ask. Sizes of records are from memory too."""

    def __init__(
        self,
        service: Service,
        area: StagingArea | None,
        *,
        mountpoint: str,
        mounted_at: datetime,
        process_id: int,
    ) -> None:
        self._service = service
        self._area = area
        self._fixed = {
            "version": __version__,
            "process_id": process_id,
            "location": service.location,
            "mountpoint": mountpoint,
            "mounted_at": mounted_at.isoformat(),
            "repository_id": service.config.repository_id,
            "read_only": area is None,
        }

    def content(self, entry: Entry) -> bytes:
        """All bytes of a made file. Raises: BackupfsError."""
        if entry.kind is Kind.README:
            return README.encode()
        if entry.kind is Kind.EVENTS:
            return self._area.events.text().encode() if self._area else b""
        if entry.kind is Kind.STATUS:
            return _json(self._status())
        if entry.kind is Kind.METADATA:
            return _json(self._service.get_metadata(entry.key))
        assert entry.kind is Kind.RECORD
        return self._service.export_record(self._service.resolve(entry.key))

    def record_size(self, entry: Entry) -> int:
        """Bytes of a record's content; from memory. Raises: BackupNotFound."""
        record = self._service.catalogue.get(entry.key)
        if record is None:
            raise BackupNotFound(selector=entry.key)
        return self._service.record_size(record)

    def _status(self) -> dict[str, Any]:
        catalogue = self._service.catalogue
        return {
            **self._fixed,
            "volumes": len(catalogue.volumes()),
            "backups": len(catalogue.all()),
            "index_lookups": self._service.repository.index.lookup_count,
            "unreadable_records": [str(error) for error in catalogue.unreadable()],
            "unreadable_drafts": [str(error) for error in self._area.unreadable]
            if self._area
            else [],
            "drafts": [] if self._area is None else list(_drafts(self._area)),
        }


def _drafts(area: StagingArea) -> list[dict[str, Any]]:
    return [
        {
            "name": staged.name,
            "volume": staged.volume,
            "state": str(staged.state),
            "reason": staged.reason,
            "size": staged.size,
            "changed_at": staged.changed_at.isoformat(),
        }
        for staged in sorted(area.files(), key=lambda staged: staged.name)
        if staged.changed
    ]


def _json(value: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair in metadata, or a path that is no UTF-8
        return f"{json.dumps(value, indent=2)}\n".encode()
