"""A process that runs out of files or memory has not found damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE, back_up, is_clean, noise

from backupfs.ambient import Ambient
from backupfs.errors import StorageUnavailable
from backupfs.repository.repository import Repository
from backupfs.service import Service
from backupfs.storage.local import LocalStorage
from backupfs.storage.oserrors import storage_error
from backupfs.types import ObjectName

IMAGE = noise(100 * CHUNK_SIZE, seed=1)


class Wanting(LocalStorage):
    """Fails the reads of one kind of objects, as the system does where something is used up."""

    def __init__(self, folder: str) -> None:
        super().__init__(Path(folder), Ambient())
        self.prefix = "nothing"
        self.number = errno.EMFILE

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        self._want(name)
        return super().get(name, size_max=size_max)

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        self._want(name)
        return super().get_range(name, offset, size)

    def _want(self, name: str) -> None:
        if name.startswith(self.prefix):
            error = OSError(self.number, os.strerror(self.number))
            raise storage_error(error) from error


@pytest.mark.parametrize("prefix", ["packs/", "records/"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_verify_fails_and_blames_nothing(location, number, prefix):
    """Every chunk was noted as damaged, and the next backup stored all of them again."""
    storage = Wanting(location)
    with Service(Repository(storage, Ambient())) as service:
        back_up(service, IMAGE)
        storage.prefix, storage.number = prefix, number

        with pytest.raises(StorageUnavailable, match=os.strerror(number)):
            service.verify()

        storage.prefix = "nothing"
        assert service.repository.index.damaged() == frozenset()
        assert back_up(service, IMAGE, volume="again").stored_bytes == 0
        assert is_clean(service)


def test_packs_are_not_left_out_of_the_index(location, tmp_path, monkeypatch):
    with Service.open(location) as service:
        back_up(service, IMAGE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    storage = Wanting(location)
    storage.prefix = "packs/"

    with pytest.raises(StorageUnavailable, match="Too many open files"):
        Repository(storage, Ambient())


def test_what_the_disk_cannot_read_is_still_damage(location):
    storage = Wanting(location)
    with Service(Repository(storage, Ambient())) as service:
        record = back_up(service, IMAGE)
        storage.prefix, storage.number = "packs/", errno.EIO

        hit = [damage for damage in service.verify().damage if damage.backup_id is not None]

        assert [(damage.backup_id, damage.offset, damage.size) for damage in hit] == [
            (record.backup_id, 0, len(IMAGE))
        ]
