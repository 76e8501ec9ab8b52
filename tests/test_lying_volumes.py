"""Volumes that say one thing and do another: no backup is made of what cannot be told to be whole, and
no restore is called complete that was not taken in full."""

from __future__ import annotations

import io
import random
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.images import CHUNK_SIZE, is_clean, noise

from backupfs.driver import BackupDriver
from backupfs.errors import SourceFailed, TargetFailed

IMAGE = noise(3 * (1 << 20) + 12_345, seed=1)


@pytest.fixture
def driver(location: str) -> Iterator[BackupDriver]:
    with BackupDriver(location) as opened:
        yield opened


def new_backup() -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "volume_id": "volume-1"}


def restored(driver: BackupDriver, backup: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    driver.restore(backup, "volume-2", target)
    return target.getvalue()


class Volume(io.BytesIO):
    """A volume whose reads are what a test makes of them."""

    def __init__(self, content: bytes = IMAGE) -> None:
        super().__init__(content)
        self.reads = 0

    def read(self, size: int | None = -1) -> Any:
        self.reads += 1
        return self.answer(size)

    def answer(self, size: int | None) -> Any:
        return super().read(size)


class EndsEarly(Volume):
    def answer(self, size: int | None) -> Any:
        return b"" if self.reads == 2 else super().answer(size)


class SaysMore(Volume):
    def tell(self) -> int:
        return super().tell() + 1


class SaysLess(Volume):
    def tell(self) -> int:
        return super().tell() - 1


class Shrinks(Volume):
    def answer(self, size: int | None) -> Any:
        data = super().answer(size)
        if self.reads == 2:
            self.truncate(1 << 20)
        return data


class GivesTooMuch(Volume):
    def answer(self, size: int | None) -> Any:
        return super().answer(None if size is None else size + 1)


class GivesTheWhole(Volume):
    def answer(self, size: int | None) -> Any:
        return self.getvalue()


class GivesNothingYet(Volume):
    def answer(self, size: int | None) -> Any:
        return None if self.reads == 2 else super().answer(size)


class GivesText(Volume):
    def answer(self, size: int | None) -> Any:
        return "text"


class GivesNumbers(Volume):
    def answer(self, size: int | None) -> Any:
        return [1, 2, 3]


@pytest.mark.parametrize(
    "kind",
    [
        *(EndsEarly, SaysMore, SaysLess, Shrinks, GivesTooMuch, GivesTheWhole),
        *(GivesNothingYet, GivesText, GivesNumbers),
    ],
)
def test_no_backup_is_made_of_a_volume_that_lies(driver, kind):
    backup = new_backup()

    with pytest.raises(SourceFailed, match="volume-1"):
        driver.backup(backup, kind())

    assert driver.service.backups() == []
    driver.backup(backup, io.BytesIO(IMAGE))
    assert restored(driver, backup) == IMAGE


class CannotTell(Volume):
    """As wrappers that have only what is needed."""

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence:
            raise NotImplementedError("whence")
        return super().seek(offset)

    def tell(self) -> int:
        raise NotImplementedError("tell")


class TellsNothing(Volume):
    def tell(self) -> Any:
        return None


class GivesViews(Volume):
    def answer(self, size: int | None) -> Any:
        return memoryview(bytearray(super().answer(size)))


@pytest.mark.parametrize("kind", [CannotTell, TellsNothing, GivesViews])
def test_a_volume_that_cannot_tell_its_end_is_read_until_nothing_comes(driver, kind):
    backup = new_backup()

    driver.backup(backup, kind())

    assert restored(driver, backup) == IMAGE


class Target(io.BytesIO):
    """A volume to restore to; ``taken`` is what each write says of itself."""

    def __init__(self, taken: Any) -> None:
        super().__init__()
        self.taken = taken
        self.writes = 0

    def write(self, data: Any) -> Any:
        self.writes += 1
        assert self.writes < 1000, "it is written to without end"
        super().write(data)
        return self.taken(len(data))


@pytest.mark.parametrize(
    "taken",
    [
        lambda size: 0,
        lambda size: -1,
        lambda size: -size,
        lambda size: size + 1,
        lambda size: 1 << 63,
        lambda size: "all",
        lambda size: float(size),
        lambda size: [],
    ],
)
def test_a_restore_to_a_volume_that_lies_is_not_complete(driver, taken):
    backup = new_backup()
    driver.backup(backup, io.BytesIO(IMAGE))

    with pytest.raises(TargetFailed, match="volume-2"):
        driver.restore(backup, "volume-2", Target(taken))


def test_a_volume_open_for_appending_is_refused_untouched(driver, tmp_path):
    """The image came to lie behind what was there, and the restore was called complete."""
    backup = new_backup()
    driver.backup(backup, io.BytesIO(IMAGE))
    path = tmp_path / "volume"
    path.write_bytes(b"there before")

    with path.open("ab") as file, pytest.raises(TargetFailed, match="appending"):
        driver.restore(backup, "volume-2", file)

    assert path.read_bytes() == b"there before"


class Appends(io.BytesIO):
    """Writes behind what is there, as what has no descriptor may do as well."""

    def write(self, data: Any) -> int:
        super().seek(0, io.SEEK_END)
        return super().write(data)


class Misplaces(io.BytesIO):
    """Goes nowhere: the first write stands at what was read last."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset


@pytest.mark.parametrize("kind", [Appends, Misplaces])
def test_a_volume_that_writes_elsewhere_is_not_complete(driver, kind):
    backup = new_backup()
    driver.backup(backup, io.BytesIO(IMAGE))
    target = kind(b"there before")
    io.BytesIO.seek(target, 5)

    with pytest.raises(TargetFailed, match="the last write ended at byte"):
        driver.restore(backup, "volume-2", target)


@pytest.mark.parametrize("place", [None, "end", NotImplementedError])
def test_a_volume_that_cannot_tell_its_place_is_written(driver, place):
    class Untold(io.BytesIO):
        def tell(self) -> Any:
            if place is NotImplementedError:
                raise NotImplementedError
            return place

    backup = new_backup()
    driver.backup(backup, io.BytesIO(IMAGE))
    target = Untold()

    driver.restore(backup, "volume-2", target)

    assert target.getvalue() == IMAGE


class Erratic(io.RawIOBase):
    """Reads of any length, sometimes nothing, sometimes what it should not give."""

    def __init__(self, content: bytes, seed: int, oddness: float) -> None:
        self.content = io.BytesIO(content)
        self.rng = random.Random(seed)
        self.oddness = oddness

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.content.seek(offset, whence)

    def tell(self) -> int:
        return self.content.tell()

    def read(self, size: int = -1) -> Any:
        if self.rng.random() < self.oddness:
            answers = (b"", None, "", self.content.read(size + 1), self.content.read())
            return self.rng.choice(answers)
        return self.content.read(self.rng.randint(1, size))


@given(
    st.integers(0, 5 * CHUNK_SIZE) | st.integers(0, 3 << 20),
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 0.05, 0.3]),
)
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_a_volume_does_its_backup_is_right_or_none(driver, size, seed, oddness):
    content = noise(size, seed=seed)
    backup = new_backup()
    try:
        driver.backup(backup, Erratic(content, seed, oddness))
    except SourceFailed:
        assert oddness
        assert not driver.service.repository.records.exists(backup["id"])
    else:
        assert restored(driver, backup) == content
        driver.delete_backup(backup)


def test_what_lies_left_behind_is_collected(driver):
    for kind in (EndsEarly, GivesTooMuch, GivesNothingYet):
        with pytest.raises(SourceFailed):
            driver.backup(new_backup(), kind())

    driver.service.gc()

    assert driver.service.stats().packs == 0
    assert is_clean(driver.service)
