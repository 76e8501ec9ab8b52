"""What a repository must hold after a mix of actions, some of them cut short by a kill (pure).

An action says before it runs what it may and what it must change, its ``Promise``. ``settle`` compares
the repository, as found afterwards, with the promises and with what was there, raises ``Broken`` where
the two cannot both be true, and takes over what was open: an action that was cut short may have
happened or not, but nothing else may have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


class Broken(AssertionError):
    """Something is lost, wrong, or there without a reason."""


@dataclass(frozen=True, slots=True)
class Backup:
    volume: str
    name: str  # its file's, a time
    content: bytes

    @property
    def order(self) -> tuple[str, int]:
        stamp, _, number = self.name.removesuffix(".img").partition("Z")
        return stamp, int(number.removeprefix("-") or 1)


@dataclass(slots=True)
class Head:
    """A staged file."""

    content: bytes
    is_held: bool = False


@dataclass(slots=True)
class Kept:
    """A record that was copied out; its backup can be had back from it while its data exist."""

    volume: str
    content: bytes
    record: bytes
    is_certain: bool = True  # no gc has run since the backup was deleted


@dataclass(slots=True)
class Promise:
    """What one action does to the volume that it works on, and its head."""

    volume: str
    name: str  # of the head
    what: str  # for people
    published: bytes | None = None  # content of the backup it makes; None: it makes none
    held: bytes | None = None  # content of the head that it leaves, held
    head: bytes | None = None  # content of the head that it leaves, published
    forgets_head: bool = False
    may_lose_head: bool = False  # where cut short: it removes the head before it stages another
    deleted: str | None = None  # id of the backup that it deletes
    imported: str | None = None  # id of the backup that it brings back
    exported: str | None = None
    may_fail: bool = False  # also where nothing was killed
    is_done: bool = False  # set afterwards: its program ended well

    @property
    def touches_head(self) -> bool:
        return self.head is not None or self.held is not None or self.forgets_head


@dataclass(slots=True)
class Found:
    """The repository as it is."""

    backups: dict[str, tuple[str, str]]  # id -> volume, name
    heads: dict[str, bytes]  # name -> content
    held: dict[str, str]  # name -> reason
    read: Callable[[str], bytes]  # id -> content


@dataclass(slots=True)
class Model:
    """The repository as it must be."""

    backups: dict[str, Backup] = field(default_factory=dict)  # by id
    heads: dict[str, Head] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)

    def of_volume(self, volume: str) -> list[str]:
        """Ids of a volume's backups, oldest first."""
        ids = [i for i, backup in self.backups.items() if backup.volume == volume]
        return sorted(ids, key=lambda backup_id: self.backups[backup_id].order)

    def lost(self, volume: str) -> list[str]:
        """Ids of backups that were exported and deleted."""
        return [
            backup_id
            for backup_id, kept in self.kept.items()
            if kept.volume == volume and backup_id not in self.backups
        ]

    def gc_ran(self) -> None:
        """What was deleted before may be gone for good now."""
        for backup_id, kept in self.kept.items():
            if backup_id not in self.backups:
                kept.is_certain = False

    def settle(self, promises: list[Promise], found: Found) -> None:
        """Compare; afterwards the model is what was found. Raises: Broken."""
        by_volume = {promise.volume: promise for promise in promises}
        by_name = {promise.name: promise for promise in promises}
        self._settle_missing(by_volume, found)
        made = self._settle_new(by_volume, found)
        for promise in promises:
            if promise.is_done:
                _check_done(promise, found, made)
        for name in self.heads.keys() | found.heads.keys():
            self._settle_head(name, by_name.get(name), found, made)

    def _settle_missing(self, promises: dict[str, Promise], found: Found) -> None:
        for backup_id in self.backups.keys() - found.backups.keys():
            volume = self.backups.pop(backup_id).volume
            promise = promises.get(volume)
            if promise is None or promise.deleted != backup_id:
                raise Broken(f"backup {backup_id} of {volume} is gone")

    def _settle_new(self, promises: dict[str, Promise], found: Found) -> dict[str, str]:
        """Ids of the backups made, by volume."""
        made: dict[str, str] = {}
        for backup_id in found.backups.keys() - self.backups.keys():
            volume, name = found.backups[backup_id]
            promise = promises.get(volume)
            content = found.read(backup_id)
            if promise is not None and promise.imported == backup_id:
                expected = self.kept[backup_id].content
            elif promise is not None and promise.published is not None and volume not in made:
                expected = promise.published
                made[volume] = backup_id
            else:
                raise Broken(f"backup {backup_id} of {volume} came from nowhere: {promise}")
            if content != expected:
                where = first_difference(content, expected)
                raise Broken(f"new backup {backup_id} of {volume}: {where}; {promise.what}")
            self.backups[backup_id] = Backup(volume, name, content)
        return made

    def _settle_head(
        self, name: str, promise: Promise | None, found: Found, made: dict[str, str]
    ) -> None:
        before = self.heads.pop(name, None)
        content = found.heads.get(name)
        is_held = name in found.held
        if content is None:
            self._check_head_gone(name, before, promise)
            return
        self.heads[name] = Head(content, is_held)
        if promise is not None and promise.touches_head:
            if not promise.is_done:
                _check_cut_short(promise, before, content, is_held=is_held, made=made)
        elif before is None:
            raise Broken(f"head {name} came from nowhere")
        elif content != before.content or is_held != before.is_held:
            where = first_difference(content, before.content)
            raise Broken(f"head {name} changed by itself (held: {is_held}): {where}")

    @staticmethod
    def _check_head_gone(name: str, before: Head | None, promise: Promise | None) -> None:
        if promise is not None and (promise.forgets_head or promise.may_lose_head):
            return
        if before is not None:
            raise Broken(f"head {name} is gone: {promise}")


def _check_done(promise: Promise, found: Found, made: dict[str, str]) -> None:
    """All that a program which ended well was promised is there."""
    if promise.published is not None and promise.volume not in made:
        raise Broken(f"acknowledged, and no backup: {promise.what} ({found.held})")
    if promise.imported is not None and promise.imported not in found.backups:
        raise Broken(f"acknowledged, and not imported: {promise.what}")
    if promise.deleted is not None and promise.deleted in found.backups:
        raise Broken(f"acknowledged, and not deleted: {promise.what}")
    content = found.heads.get(promise.name)
    expected = promise.head if promise.head is not None else promise.held
    if promise.forgets_head and content is not None:
        raise Broken(f"acknowledged, and the head is still there: {promise.what}")
    if expected is not None and content != expected:
        where = "gone" if content is None else first_difference(content, expected)
        raise Broken(f"head {promise.name} after {promise.what}: {where}")
    if promise.head is not None and promise.name in found.held:
        raise Broken(f"held ({found.held[promise.name]}): {promise.what}")
    if promise.held is not None and promise.name not in found.held:
        raise Broken(f"not held: {promise.what}")


def _check_cut_short(
    promise: Promise, before: Head | None, content: bytes, *, is_held: bool, made: dict[str, str]
) -> None:
    """A head whose writer did not end well is as before, complete and published, or held."""
    if is_held or (promise.held is not None and content == promise.held):
        return
    if before is not None and content == before.content and not before.is_held:
        return
    if content == promise.head and (promise.published is None or promise.volume in made):
        return
    was = "no head" if before is None else first_difference(content, before.content)
    raise Broken(f"head {promise.name} is neither old, new nor held ({was}): {promise.what}")


def first_difference(found: bytes, expected: bytes) -> str:
    """Where two contents part, in words."""
    pairs = zip(found, expected, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    sizes = f"{len(found)} bytes for {len(expected)}"
    return f"{sizes}, the same" if place is None else f"{sizes}, other from byte {place}"
