"""Sessions and plans: who waits for whom, and what each side may believe."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faulty import FULL, LOST_ACKNOWLEDGEMENT, FaultyStorage

from backupfs.ambient import Ambient
from backupfs.errors import CorruptObject, StorageFull, StorageUnavailable
from backupfs.format import codec
from backupfs.repository import sessions as sessions_module
from backupfs.repository.avoided import Avoided
from backupfs.repository.images import Root
from backupfs.repository.sessions import (
    ACKS_PREFIX,
    Plan,
    Session,
    SessionWatch,
    ack_name,
    decode_ack,
    decode_plan,
    encode_ack,
    encode_plan,
    plan_name,
    read_plans,
)
from backupfs.storage.locks import is_held, try_lock
from backupfs.types import BlobId, ObjectName, PackId

PACK_A, PACK_B = PackId(b"a" * 16), PackId(b"b" * 16)
ROOT_1, ROOT_2 = Root(BlobId(b"1" * 32), 1), Root(BlobId(b"2" * 32), 2)

DIE_WITH_A_SESSION = """
import os, sys
from pathlib import Path
from backupfs.ambient import Ambient
from backupfs.repository.avoided import Avoided
from backupfs.repository.sessions import Session
from backupfs.storage.local import LocalStorage
folder = Path(sys.argv[1])
session = Session(folder=folder, storage=LocalStorage(folder, Ambient()), ambient=Ambient(),
                  avoided=Avoided(), refresh=lambda: None)
os._exit(9)
"""


@pytest.fixture
def storage(scratch: Path) -> FaultyStorage:
    folder = scratch / "repository"
    folder.mkdir()
    return FaultyStorage(folder)


@pytest.fixture
def avoided() -> Avoided:
    return Avoided()


class Refreshes:
    """Counts refreshes, and what was avoided at each."""

    def __init__(self, avoided: Avoided) -> None:
        self.seen: list[frozenset[PackId]] = []
        self._avoided = avoided

    def __call__(self) -> None:
        self.seen.append(self._avoided.packs)


@pytest.fixture
def refreshes(avoided: Avoided) -> Refreshes:
    return Refreshes(avoided)


@pytest.fixture
def start(
    storage: FaultyStorage, avoided: Avoided, refreshes: Refreshes
) -> Iterator[Callable[[], Session]]:
    started: list[Session] = []

    def start_one() -> Session:
        session = Session(
            folder=storage.folder,
            storage=storage,
            ambient=Ambient(),
            avoided=avoided,
            refresh=refreshes,
        )
        started.append(session)
        return session

    yield start_one
    for session in started:
        session.close()


@pytest.fixture
def watch(storage: FaultyStorage) -> SessionWatch:
    return SessionWatch(storage.folder, storage)


def publish_plan(storage: FaultyStorage, name: str, *condemned: PackId) -> Plan:
    plan = Plan(name * 32, frozenset(condemned))
    storage.put_new(plan_name(plan.plan_id), encode_plan(plan))
    return plan


def eventually(condition: Callable[[], object]) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def acks(storage: FaultyStorage) -> set[str]:
    return {info.name for info in storage.list(ACKS_PREFIX)}


def session_files(storage: FaultyStorage) -> set[str]:
    return {path.name for path in (storage.folder / "sessions").iterdir() if path.is_file()}


# -- forms -------------------------------------------------------------------------------------


def test_plans_and_acknowledgements_come_back_as_they_were():
    plan = Plan("d" * 32, frozenset([PACK_A, PACK_B]))

    assert decode_plan(encode_plan(plan), plan_name(plan.plan_id)) == plan
    assert decode_ack(encode_ack({ROOT_1, ROOT_2}), "ack") == {ROOT_1, ROOT_2}


@pytest.mark.parametrize(
    "value",
    [
        {"version": 2, "id": "d" * 32, "condemned": b""},
        {"version": 1, "id": "d" * 32, "condemned": b"x" * 17},
        {"version": 1, "id": "d" * 32, "condemned": "text"},
        {"version": 1, "id": "d" * 32},
        {"version": 1, "id": "e" * 32, "condemned": b""},
        {"version": 1, "condemned": b""},
    ],
)
def test_a_plan_that_cannot_be_is_refused(value):
    with pytest.raises(CorruptObject):
        decode_plan(codec.encode(value), plan_name("d" * 32))


@pytest.mark.parametrize("plan_id", ["../" * 10 + "x", "a\0b", "p", "D" * 32, "d" * 32 + "\n"])
def test_a_plan_whose_id_is_none_is_refused_under_every_name(plan_id):
    """Answers are named by it: they would be written anywhere."""
    value = {"version": 1, "id": plan_id, "condemned": b""}

    with pytest.raises(CorruptObject):
        decode_plan(codec.encode(value), plan_name(plan_id))


@pytest.mark.parametrize(
    "roots", [[[b"x", 1]], [[b"x" * 32]], [b"x" * 32], [["x" * 32, 1]], [[b"x" * 32, "one"]], 7]
)
def test_an_acknowledgement_that_cannot_be_is_refused(roots):
    with pytest.raises(CorruptObject):
        decode_ack(codec.encode({"version": 1, "roots": roots}), "ack")


# -- a session ---------------------------------------------------------------------------------


def test_a_session_is_seen_from_its_start_to_its_end(start, watch, storage):
    session = start()
    assert watch.waiting_for("d" * 32, but=None) == [
        storage.folder / "sessions" / session.session_id
    ]

    session.close()

    assert watch.waiting_for("d" * 32, but=None) == []
    assert session_files(storage) == set()


def test_a_plan_is_avoided_then_acknowledged_with_all_roots(start, watch, storage, avoided):
    session = start()
    order: list[object] = []

    def checkpoint() -> set[Root]:
        order.append(avoided.packs)
        return {ROOT_1}

    session.settle = lambda: session.add_checkpoint(checkpoint)  # a writer that starts meanwhile
    session.hold(ROOT_2)

    plan = publish_plan(storage, "d", PACK_A)

    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))
    assert order == [frozenset([PACK_A])], "avoided first, so that nothing new relies on it"
    assert watch.acknowledged_roots(plan.plan_id) == {ROOT_1, ROOT_2}


def test_what_is_held_no_more_is_not_named(start, watch, storage):
    session = start()
    with session.holding(ROOT_1):
        session.hold(ROOT_1)
    session.let_go(ROOT_1)
    session.hold(ROOT_2)

    plan = publish_plan(storage, "d", PACK_A)

    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))
    assert watch.acknowledged_roots(plan.plan_id) == {ROOT_2}


def test_a_session_that_starts_during_a_plan_avoids_its_packs_from_the_start(
    start, watch, storage, avoided
):
    plan = publish_plan(storage, "d", PACK_A)

    start()

    assert avoided.packs == {PACK_A}
    assert watch.waiting_for(plan.plan_id, but=None) == []


def test_a_session_looks_at_the_packs_anew_before_it_relies_on_any(start, refreshes):
    """A gc that ended, or failed half way, since the repository was opened has deleted packs."""
    start()

    assert len(refreshes.seen) == 1


def test_packs_are_avoided_until_the_index_knows_what_became_of_them(
    start, watch, storage, avoided, refreshes
):
    start()
    plan = publish_plan(storage, "d", PACK_A)
    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))
    refreshes.seen.clear()

    storage.delete(plan_name(plan.plan_id))

    assert eventually(lambda: not avoided.packs)
    assert refreshes.seen == [frozenset([PACK_A])]


def test_two_plans_add_up(start, watch, storage, avoided):
    start()
    first = publish_plan(storage, "d", PACK_A)
    second = publish_plan(storage, "e", PACK_B)
    assert eventually(lambda: not watch.waiting_for(second.plan_id, but=None))
    assert eventually(lambda: avoided.packs == {PACK_A, PACK_B})

    storage.delete(plan_name(first.plan_id))

    assert eventually(lambda: avoided.packs == {PACK_B})


def test_acknowledgements_go_when_their_plan_is_gone(start, watch, storage):
    """A mount lives for months, with a gc each night."""
    session = start()
    plan = publish_plan(storage, "d", PACK_A)
    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))
    assert acks(storage) == {ack_name(session.session_id, plan.plan_id)}

    storage.delete(plan_name(plan.plan_id))

    assert eventually(lambda: not acks(storage))


def test_the_end_of_a_session_takes_its_acknowledgements_along(start, watch, storage):
    session = start()
    plan = publish_plan(storage, "d", PACK_A)
    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))

    session.close()

    assert acks(storage) == set()
    assert watch.acknowledged_roots(plan.plan_id) == set()


def test_a_failing_checkpoint_is_tried_again_and_nothing_acknowledged_before(
    start, watch, storage, avoided
):
    session = start()
    tries: list[int] = []

    def checkpoint() -> set[Root]:
        tries.append(1)
        if len(tries) < 3:
            assert acks(storage) == set()
            raise StorageFull(reason="test")
        return {ROOT_1}

    session.add_checkpoint(checkpoint)
    plan = publish_plan(storage, "d", PACK_A)

    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))
    assert len(tries) == 3
    assert avoided.packs == {PACK_A}


def test_an_acknowledgement_whose_own_was_lost_counts(
    start, watch, storage, avoided, refreshes, monkeypatch
):
    """The second try names other roots by then, so it finds another object of that name."""
    session = start()
    roots = iter([{ROOT_1}, {ROOT_2}, {ROOT_1, ROOT_2}])
    session.add_checkpoint(lambda: next(roots))
    real, lost = storage.put_new, []

    def lose_first(name, data):
        real(name, data)
        if name.startswith(ACKS_PREFIX) and not lost:
            lost.append(name)
            raise StorageUnavailable(reason="the acknowledgement was lost")

    monkeypatch.setattr(storage, "put_new", lose_first)
    plan = publish_plan(storage, "d", PACK_A)
    assert eventually(lambda: lost)
    assert eventually(lambda: session._acknowledged == {plan.plan_id})
    refreshes.seen.clear()

    storage.delete(plan_name(plan.plan_id))

    assert eventually(lambda: not avoided.packs)
    assert refreshes.seen == [frozenset([PACK_A])]


def test_no_checkpoint_runs_once_watching_has_stopped(start, storage):
    """What a checkpoint needs, the packer's threads, ends after that and before the session."""
    session = start()
    session.stop_watching()
    session.add_checkpoint(lambda: pytest.fail("called"))

    publish_plan(storage, "d", PACK_A)

    time.sleep(3 * sessions_module.POLL_SECONDS)
    assert is_held(storage.folder / "sessions" / session.session_id), "gc still waits for it"


@pytest.mark.parametrize("how", [FULL, LOST_ACKNOWLEDGEMENT], ids=["full", "lost"])
def test_a_session_that_cannot_start_leaves_no_lock_that_gc_would_wait_for(
    start, watch, storage, how
):
    publish_plan(storage, "d", PACK_A)
    storage.fail_at(1, how, stay_broken=True)

    with pytest.raises((StorageFull, StorageUnavailable)):
        start()

    storage.repair()
    assert watch.waiting_for("d" * 32, but=None) == []
    assert session_files(storage) == set()


# -- gc's view ---------------------------------------------------------------------------------


def test_a_dead_session_is_not_waited_for_and_cleaned_up(watch, storage):
    subprocess.run([sys.executable, "-c", DIE_WITH_A_SESSION, str(storage.folder)], check=False)
    assert len(session_files(storage)) == 1
    storage.put_new(ack_name("0" * 32, "d" * 32), encode_ack({ROOT_1}))

    assert watch.waiting_for("d" * 32, but=None) == []
    assert watch.clean() == set()

    assert session_files(storage) == set()
    assert acks(storage) == set()


def test_what_living_sessions_acknowledged_is_kept_by_the_cleaning(start, watch, storage):
    session = start()
    plan = publish_plan(storage, "d", PACK_A)
    assert eventually(lambda: not watch.waiting_for(plan.plan_id, but=None))

    assert watch.clean() == {session.session_id}

    assert acks(storage) == {ack_name(session.session_id, plan.plan_id)}


def test_an_unreadable_acknowledgement_is_no_empty_one(watch, storage):
    storage.put_new(ack_name("0" * 32, "d" * 32), b"damaged")

    with pytest.raises(CorruptObject):
        watch.acknowledged_roots("d" * 32)
    assert watch.acknowledged_roots("q" * 32) == set()


def test_an_unreadable_plan_is_no_empty_one_while_a_gc_may_carry_it_out(storage, tmp_path):
    storage.put_new(plan_name("d" * 32), b"damaged")
    gc_lock = tmp_path / "gc"
    lock = try_lock(gc_lock)

    with pytest.raises(CorruptObject):
        read_plans(storage, gc_lock=gc_lock)

    lock.release()
    assert read_plans(storage, gc_lock=gc_lock) == []


def test_a_session_never_starts_unseen_while_gc_looks(storage, watch):
    """gc removes the files of the dead: never one that a session has just made and is about to
    lock, or gc would not wait for that session, and delete what it builds on."""
    stop = threading.Event()
    problems: list[object] = []

    def look() -> None:
        while not stop.is_set():
            try:
                watch.waiting_for("d" * 32, but=None)
            except Exception as error:
                problems.append(error)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(500):
            path = storage.folder / "sessions" / os.urandom(16).hex()
            lock = sessions_module.take_session_lock(path, Ambient())
            if try_lock(path) is not None or not path.exists():
                problems.append("a session holds a lock that nobody finds")
            lock.release(remove=True)
    finally:
        stop.set()
        for looker in lookers:
            looker.join()

    assert problems == []


def test_names_of_sessions_are_never_taken_for_folders(storage, watch):
    (storage.folder / "sessions" / "acks").mkdir(parents=True)

    assert watch.clean() == set()
    assert [*storage.list(ACKS_PREFIX)] == []
    assert (storage.folder / ObjectName("sessions/acks")).is_dir()
