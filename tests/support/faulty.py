"""A local storage that fails when told to, and one that lets a test step in between two calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backupfs.ambient import Ambient
from backupfs.errors import StorageError, StorageFull, StorageUnavailable
from backupfs.storage.base import ObjectInfo, SpooledFile
from backupfs.storage.local import LocalStorage
from backupfs.types import Buffer, ObjectName

# How a call fails: what is raised, and whether the call had its effect before (its
# acknowledgement was lost).
FULL = (StorageFull, False)
UNAVAILABLE = (StorageUnavailable, False)
LOST_ACKNOWLEDGEMENT = (StorageUnavailable, True)


class FaultyStorage(LocalStorage):
    """Fails one call, counted from ``fail_at`` on; ``stay_broken``: and every one after it.

    Calls of the session's own thread come at any time, so they are neither counted nor failed.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(Path(folder), Ambient())
        self._counter_lock = threading.Lock()
        self.calls: list[str] = []
        self.fired = False
        self._fail_at: int | None = None
        self._stay_broken = False
        self._error: type[StorageError] = StorageUnavailable
        self._after_effect = False

    def fail_at(
        self,
        number: int,
        how: tuple[type[StorageError], bool] = UNAVAILABLE,
        *,
        stay_broken: bool = False,
    ) -> None:
        """Have call ``number`` from now (the next is 1) fail."""
        with self._counter_lock:
            self.calls = []
            self.fired = False
            self._fail_at = number
            self._error, self._after_effect = how
            self._stay_broken = stay_broken

    def repair(self) -> None:
        """From now on everything works."""
        with self._counter_lock:
            self._fail_at = None

    def put_new(self, name: ObjectName, data: Buffer | SpooledFile) -> None:
        self._call("put_new", name, lambda: super(FaultyStorage, self).put_new(name, data))

    def replace(self, name: ObjectName, data: Buffer) -> None:
        self._call("replace", name, lambda: super(FaultyStorage, self).replace(name, data))

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        return self._call(
            "get", name, lambda: super(FaultyStorage, self).get(name, size_max=size_max)
        )

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        return self._call(
            "get_range", name, lambda: super(FaultyStorage, self).get_range(name, offset, size)
        )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from self._call("list", prefix, lambda: [*super(FaultyStorage, self).list(prefix)])

    def names(self, prefix: str) -> set[str]:
        return set(self._call("list", prefix, lambda: super(FaultyStorage, self).names(prefix)))

    def delete(self, name: ObjectName) -> None:
        self._call("delete", name, lambda: super(FaultyStorage, self).delete(name))

    def _call(self, verb: str, name: str, act: Callable[[], Any]) -> Any:
        if not self._is_to_fail(verb, name):
            return act()
        if self._after_effect:
            act()
        raise self._error(reason=f"as told, in {verb} of {name}")

    def _is_to_fail(self, verb: str, name: str) -> bool:
        if threading.current_thread().name == "session":
            return False
        with self._counter_lock:
            self.calls.append(f"{verb} {name}")
            if self._fail_at is None:
                return False
            count = len(self.calls)
            fails = count == self._fail_at or (self._stay_broken and count > self._fail_at)
            self.fired |= fails
            return fails


class SteppedStorage(LocalStorage):
    """Calls ``before(verb, name)`` and ``after(verb, name)`` around every call."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(Path(folder), Ambient())
        self.before: Callable[[str, str], None] = lambda _verb, _name: None
        self.after: Callable[[str, str], None] = lambda _verb, _name: None

    def put_new(self, name: ObjectName, data: Buffer | SpooledFile) -> None:
        self.before("put_new", name)
        super().put_new(name, data)
        self.after("put_new", name)

    def get(self, name: ObjectName, *, size_max: int) -> bytes:
        self.before("get", name)
        data = super().get(name, size_max=size_max)
        self.after("get", name)
        return data

    def get_range(self, name: ObjectName, offset: int, size: int) -> bytes:
        self.before("get_range", name)
        data = super().get_range(name, offset, size)
        self.after("get_range", name)
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.before("list", prefix)
        listed = [*super().list(prefix)]
        self.after("list", prefix)
        return iter(listed)

    def names(self, prefix: str) -> set[str]:
        self.before("list", prefix)
        listed = super().names(prefix)
        self.after("list", prefix)
        return listed

    def delete(self, name: ObjectName) -> None:
        self.before("delete", name)
        super().delete(name)
        self.after("delete", name)
