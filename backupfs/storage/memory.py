"""A repository in memory, for tests: the contract of ``base`` and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from backupfs.errors import CorruptObject, ObjectExists, ObjectNotFound
from backupfs.storage.base import ObjectInfo, SpooledFile
from backupfs.types import Buffer, ObjectName


class MemoryStorage:
    """Objects in a dictionary."""

    def __init__(self, location: str = "memory:") -> None:
        self.location = location
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put_new(self, name: ObjectName, data: Buffer | SpooledFile) -> None:
        if isinstance(data, SpooledFile):
            content = data.path.read_bytes()
            data.path.unlink()
        else:
            content = bytes(data)
        with self._lock:
            if self.objects.setdefault(name, content) != content:
                raise ObjectExists(name=name)

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        data = self._find(name)
        if len(data) > size_max:
            raise CorruptObject(name=name, reason=f"it is larger than {size_max} bytes")
        return data

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        return self._find(name)[offset : offset + size]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            found = [(name, len(data)) for name, data in self.objects.items()]
        for name, size in found:
            if name.startswith(prefix):
                yield ObjectInfo(name=ObjectName(name), size=size)

    def delete(self, name: ObjectName) -> None:
        with self._lock:
            self.objects.pop(name, None)

    def _find(self, name: ObjectName) -> bytes:
        with self._lock:
            if name not in self.objects:
                raise ObjectNotFound(name=name)
            return self.objects[name]
