"""The power is cut at every sync of every verb, and what was not synced is lost in many ways.

Whatever a close or a command had acknowledged is there and byte-identical, nothing half is visible,
``verify`` is clean, gc runs, and what was cut short succeeds when it is tried again. The index, which
is never synced, is lost, or of the start, or ahead of the packs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_check import BrokenPromiseError, Crash, Explorer, Recording, examine
from support.crash_disk import Disk, picks, read_image
from support.crash_program import RandomProgram, life_by_commands, staged_life
from support.crash_run import Promise
from support.os_calls import Call

from backupfs.errors import BackupfsError
from backupfs.repository import gc, sessions
from backupfs.service import init


@pytest.fixture(autouse=True)
def quick(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An index that is quick to make, no waiting for a session's thread, and no log of errors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "cache"))
    monkeypatch.setattr(sessions, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(gc, "ACKNOWLEDGE_POLL_SECONDS", 0.002)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("program", "count"), [(staged_life, 350), (life_by_commands, 200)])
def test_power_cut_at_any_sync_keeps_what_was_promised(location, scratch, program, count):
    """As many of all the outcomes as a short time allows; ``scripts/soak --what crash`` has more."""
    explorer = Explorer(Path(location), scratch)

    explorer.run(program, random.Random(1), count_max=count)

    assert explorer.count == count


@pytest.mark.parametrize("seed", range(3))
def test_random_use_with_several_power_cuts_in_a_row(location, scratch, seed):
    explorer = Explorer(Path(location), scratch)

    for number in range(3):
        rng = random.Random(f"{seed}-{number}")
        explorer.run(RandomProgram(rng, 12), rng, count_max=15)

    assert explorer.count == 45


def test_repository_cut_short_while_it_is_made_is_none_or_whole(scratch):
    """Otherwise it might be taken for one whose data are lost."""
    folder = scratch / "made"
    folder.mkdir()
    recording = Recording(folder)
    recording.note(Promise(what="init"))
    with recording.running():
        init(str(folder))
    crashes = list(recording.crashes(random.Random(1), random_count=3))

    for crash in crashes:
        try:
            examine(crash, scratch / "crashed", None)
        except BrokenPromiseError as error:
            assert isinstance(error.__cause__, (BackupfsError, FileNotFoundError)), error
            assert "config" not in crash.image, error
    assert len(crashes) > 5


def test_the_check_finds_what_it_looks_for(location, scratch):
    """A promise that nobody kept, and a backup that nobody promised."""
    explorer = Explorer(Path(location), scratch)
    explorer.run(life_by_commands, random.Random(1), count_max=1)
    image = read_image(Path(location))
    lost = Promise(what="backup", must={"0b0e4f2c-0000-4000-8000-000000000000": ("vm", b"x")})

    with pytest.raises(BrokenPromiseError, match="is lost"):
        examine(Crash("lost", image, lost), scratch / "crashed", None)


# -- the disk that loses what was not synced ---------------------------------------------------


def outcomes(*calls: Call) -> set[tuple[tuple[str, bytes | None], ...]]:
    """All that is left of a file "old" after some calls, in one way or another."""
    disk = Disk({"old": b"old"})
    for call in calls:
        disk.apply(call)
    return {
        tuple(sorted(disk.image(pick).items()))
        for pick in picks(random.Random(1), random_count=200)
    }


def test_an_unsynced_file_may_be_there_with_or_without_its_bytes():
    found = outcomes(
        Call(kind="open", path="new", opened=1),
        Call(kind="write", path="new", opened=1, data=b"new"),
    )

    old = ("old", b"old")
    assert found >= {(old,), (("new", b""), old), (("new", b"new"), old), (("new", bytes(3)), old)}


def test_a_synced_file_in_an_unsynced_folder_may_be_gone_but_is_never_half():
    found = outcomes(
        Call(kind="open", path="new", opened=1),
        Call(kind="write", path="new", opened=1, data=b"new"),
        Call(kind="sync", path="new", opened=1),
    )

    assert found == {(("old", b"old"),), (("new", b"new"), ("old", b"old"))}


def test_what_was_synced_with_its_folder_stays():
    found = outcomes(
        Call(kind="open", path="new", opened=1),
        Call(kind="write", path="new", opened=1, data=b"new"),
        Call(kind="sync", path="new", opened=1),
        Call(kind="rename", path="new", target="old"),
        Call(kind="open", path="", opened=2, is_folder=True),
        Call(kind="sync", path="", opened=2, is_folder=True),
    )

    assert found == {(("old", b"new"),)}


def test_an_unsynced_rename_leaves_the_old_or_the_new():
    found = outcomes(
        Call(kind="open", path="new", opened=1),
        Call(kind="write", path="new", opened=1, data=b"new"),
        Call(kind="sync", path="new", opened=1),
        Call(kind="rename", path="new", target="old"),
    )

    assert {dict(image)["old"] for image in found} == {b"old", b"new"}
