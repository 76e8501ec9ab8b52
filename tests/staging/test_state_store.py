"""The states of drafts on this host: one holder, each state whole, marks that outlive a death."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.images import CHUNK_SIZE
from support.processes import in_a_child

from backupfs.ambient import Ambient
from backupfs.errors import Busy, StorageError
from backupfs.format import codec
from backupfs.format.draft_state import DraftState
from backupfs.format.ids import IdScheme
from backupfs.staging import state_store
from backupfs.staging.state_store import (
    Holder,
    StateStore,
    current_holder,
    host_folder,
)
from backupfs.types import HOLE

IDS = IdScheme()
STATE = DraftState(
    draft_id="a" * 32,
    name="folder/vm.img",
    size=CHUNK_SIZE,
    root=HOLE,
    height=1,
    data_count=0,
    mode=0o640,
    uid=1000,
    gid=100,
    mtime_ns=-5,
    written=True,
    changed=True,
    interrupted=False,
    held="",
    stored_bytes=7,
    next_id="0b0e4f2c-0000-4000-8000-000000000000",
    published_id=None,
    changed_at=datetime(2026, 11, 22, tzinfo=UTC),
    sequence=3,
)


def open_store(folder: Path, *, mountpoint: str | None = None) -> StateStore:
    return StateStore.open(
        folder, IDS, chunk_size=CHUNK_SIZE, ambient=Ambient(), mountpoint=mountpoint
    )


@pytest.fixture
def store(scratch: Path) -> Iterator[StateStore]:
    opened = open_store(scratch)
    yield opened
    opened.close()


@pytest.fixture
def folder(scratch: Path) -> Path:
    return host_folder(scratch, Ambient())


def states(store: StateStore) -> list[DraftState]:
    """All states, none of them damaged."""
    found, damage = _load(store)
    assert damage == []
    return found


def _load(store: StateStore) -> tuple[list[DraftState], list[Exception]]:
    found, damage = store.load_all()
    return list(found), list(damage)


def test_states_come_back_as_they_were_saved_last(store):
    other = replace(STATE, draft_id="b" * 32, name="other.img")

    store.save(STATE)
    store.save(other)
    store.save(replace(STATE, sequence=4))

    assert states(store) == [replace(STATE, sequence=4), other]
    store.remove(STATE.draft_id)
    store.remove(STATE.draft_id)
    assert states(store) == [other]


def test_one_process_holds_them_and_says_where_it_is_mounted(scratch, folder):
    first = open_store(scratch, mountpoint="/mnt/backups")

    with pytest.raises(Busy, match="/mnt/backups"):
        open_store(scratch)
    assert current_holder(folder) == Holder(os.getpid(), "/mnt/backups")

    first.close()
    assert current_holder(folder) is None
    open_store(scratch).close()


def test_a_holder_that_left_no_word_still_holds(scratch, folder, store):
    (folder / "lock").write_text("?")

    assert current_holder(folder) == Holder(0, None)
    with pytest.raises(Busy, match="another process"):
        open_store(scratch)


@pytest.mark.parametrize(
    "word",
    [
        *("{", "[]", "5", '{"pid": 5}', "[" * 1000, '{"pid": Infinity, "mountpoint": null}'),
        *('{"pid": "5", "mountpoint": null}', '{"pid": 5, "mountpoint": ["/"]}'),
    ],
)
def test_a_word_that_makes_no_sense_is_none(scratch, folder, word):
    store = open_store(scratch)
    (folder / "lock").write_text(word)

    assert current_holder(folder) == Holder(0, None)
    store.close()


def test_the_death_of_the_holder_frees_them(scratch):
    def hold_and_die() -> None:
        open_store(scratch)
        os._exit(3)

    assert in_a_child(hold_and_die) == 3
    open_store(scratch).close()


def test_damaged_states_stay_where_they_are_and_hide_no_other(store, folder):
    store.save(STATE)
    whole = (folder / f"{STATE.draft_id}.msgpack").read_bytes()
    (folder / f"{'c' * 32}.msgpack").write_bytes(whole[:-1])
    (folder / f"{'d' * 32}.msgpack").write_bytes(b"")
    (folder / f"{'e' * 32}.msgpack").write_bytes(os.urandom(100_000))

    found, damage = _load(store)

    assert found == [STATE]
    assert len(damage) == 3
    assert (folder / f"{'d' * 32}.msgpack").exists()


def test_a_failed_save_leaves_the_state_before(store, monkeypatch):
    store.save(STATE)

    def fails(_file):
        raise OSError(28, "no space")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fails)
        with pytest.raises(StorageError):
            store.save(replace(STATE, sequence=9))

    assert states(store) == [STATE]


# -- marks -------------------------------------------------------------------------------------


def test_a_mark_says_that_writing_went_on_after_a_flush(store):
    assert not store.was_writing(STATE.draft_id, 3)

    store.mark_writing(STATE.draft_id, 3)
    assert store.was_writing(STATE.draft_id, 3)
    assert not store.was_writing(STATE.draft_id, 4), "a later flush voids it"

    store.unmark_writing(STATE.draft_id)
    store.unmark_writing(STATE.draft_id)
    assert not store.was_writing(STATE.draft_id, 3)


def test_a_mark_that_cannot_be_read_counts(scratch, folder):
    store = open_store(scratch)
    store.save(STATE)
    store.close()
    mark = folder / f"{STATE.draft_id}.writing"
    mark.write_text("")

    store = open_store(scratch)
    assert store.was_writing(STATE.draft_id, 3)
    store.unmark_writing(STATE.draft_id)
    store.close()
    assert not mark.exists()


def test_a_mark_without_its_draft_is_removed(scratch, folder):
    open_store(scratch).close()
    (folder / f"{STATE.draft_id}.3.writing").write_text("")

    open_store(scratch).close()

    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_mark_outlives_its_holder(scratch):
    store = open_store(scratch)
    store.save(STATE)
    store.mark_writing(STATE.draft_id, 2)
    store.mark_writing(STATE.draft_id, 3)
    store.close()

    store = open_store(scratch)
    assert store.was_writing(STATE.draft_id, 3)
    assert not store.was_writing(STATE.draft_id, 4)
    store.close()


def test_a_mark_goes_with_its_draft(store, folder):
    store.save(STATE)
    store.mark_writing(STATE.draft_id, 3)

    store.remove(STATE.draft_id)

    assert [path.name for path in folder.iterdir()] == ["lock"]


# -- folders and names -------------------------------------------------------------------------


def test_folders_are_kept(store):
    assert store.load_folders() == set()

    store.save_folders({"a", "a/b", "ü"})

    assert store.load_folders() == {"a", "a/b", "ü"}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80", b"\x81\xa7folders\x01", b"x" * 100),
        *(
            codec.encode({"version": 1, "folders": ["a", path]})
            for path in ("", "..", "a/../b", "/", "a//b", "a\0b", "a" * 256, 5, ["a"])
        ),
        codec.encode({"version": 2, "folders": ["a"]}),
    ],
)
def test_a_damaged_list_of_folders_is_an_empty_one(store, folder, content):
    (folder / state_store.FOLDERS_NAME).write_bytes(content)

    assert store.load_folders() == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web01", "web01"),
        ("a.b-c_d", "a.b-c_d"),
        ("../etc", "_etc"),
        ("...", "host"),
        ("ü/x", "__x"),
    ],
)
def test_a_host_keeps_its_drafts_in_a_folder_of_its_name(name, expected):
    class Host(Ambient):
        def host_name(self) -> str:
            return name

    assert host_folder(Path("/repo"), Host()) == Path("/repo/drafts") / expected


def test_two_hosts_do_not_disturb_each_other(scratch, store):
    class Other(Ambient):
        def host_name(self) -> str:
            return "the other"

    other = StateStore.open(scratch, IDS, chunk_size=CHUNK_SIZE, ambient=Other(), mountpoint="/mnt")
    other.save(STATE)

    assert states(store) == []
    other.close()


def test_the_word_of_the_holder_is_json_for_other_commands(scratch, folder):
    store = open_store(scratch, mountpoint='/mnt/with "quotes"\n')

    assert json.loads((folder / "lock").read_text()) == {
        "pid": os.getpid(),
        "mountpoint": '/mnt/with "quotes"\n',
    }
    store.close()
