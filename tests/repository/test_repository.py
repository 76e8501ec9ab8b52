"""A repository as a whole: made once, opened often, closed in order."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from support.images import back_up, is_clean, noise, restored

from backupfs.ambient import Ambient
from backupfs.errors import (
    CorruptObject,
    InvalidOption,
    RepositoryExists,
    RepositoryNotFound,
    StorageError,
    StorageUnavailable,
)
from backupfs.repository import repository as repository_module
from backupfs.repository.repository import Repository
from backupfs.repository.workers import Credit, Share, Workers
from backupfs.service import Service, init


def test_a_repository_is_made_in_an_absent_or_an_empty_folder(scratch):
    (scratch / "empty").mkdir()

    for name in ("empty", "absent", "deep/below"):
        config = init(str(scratch / name))
        with Service.open(str(scratch / name)) as service:
            assert service.config == config


@pytest.mark.parametrize("what", ["repository", "file", "foreign"])
def test_nothing_is_made_where_something_is(scratch, what):
    place = scratch / what
    if what == "repository":
        init(str(place))
    elif what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine").touch()
    before = sorted(str(path) for path in scratch.rglob("*"))

    with pytest.raises(RepositoryExists):
        init(str(place))

    assert sorted(str(path) for path in scratch.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 5000}, {"chunk_size": 8 << 20}, {"pack_size": 1}, {"compression_level": 40}],
    ids=str,
)
def test_impossible_options_make_nothing(scratch, options):
    with pytest.raises(InvalidOption):
        init(str(scratch / "new"), **options)

    assert not (scratch / "new").exists()


def test_a_folder_without_a_whole_config_is_no_repository(scratch, location):
    with pytest.raises(RepositoryNotFound):
        Repository.open(str(scratch / "nothing"), Ambient())
    (scratch / "other").mkdir()
    with pytest.raises(RepositoryNotFound):
        Repository.open(str(scratch / "other"), Ambient())

    config = Path(location) / "config"
    config.write_bytes(config.read_bytes()[:-1])
    with pytest.raises(CorruptObject):
        Repository.open(location, Ambient())


def test_reading_starts_no_session(location, service):
    back_up(service, noise(50_000, seed=1))

    with Service.open(location) as reader:
        assert is_clean(reader)
        assert len(list((Path(location) / "sessions").glob("?" * 32))) == 1


def test_closing_leaves_no_thread_file_or_lock_behind(location):
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))

    for seed in range(3):
        with Service.open(location) as service:
            record = back_up(service, noise(50_000, seed=seed))
            assert restored(service, record)

    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    folder = Path(location)
    assert [path for path in (folder / "sessions").rglob("*") if path.is_file()] == []
    assert [path.name for path in (folder / "spool").iterdir()] == ["reserve"]


def test_a_writer_that_cannot_start_can_be_tried_again(location, service):
    spool = Path(location) / "spool"
    shutil.rmtree(spool)
    spool.touch()
    with pytest.raises(StorageError):
        service.repository.writer()
    assert list((Path(location) / "sessions").glob("?" * 32)) == []
    spool.unlink()

    record = back_up(service, noise(50_000, seed=1))

    assert is_clean(service)
    service.delete(record)
    assert service.gc().packs_deleted == 2


def test_many_start_writing_at_once_through_one_writer(repository):
    writers = []
    threads = [
        threading.Thread(target=lambda: writers.append(repository.writer())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(writers) == 8
    assert len({id(writer) for writer in writers}) == 1


@pytest.mark.parametrize(
    ("xdg", "root", "expected"),
    [
        ("/caches", True, "/caches/backupfs/name"),
        ("relative", True, "/var/cache/backupfs/name"),
        (None, True, "/var/cache/backupfs/name"),
        (None, False, "/home/ann/.cache/backupfs/name"),
    ],
)
def test_the_cache_lies_where_the_host_keeps_caches(monkeypatch, xdg, root, expected):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)

    assert repository_module.cache_folder("name") == Path(expected)


def test_a_user_without_a_home_is_told_how_to_name_a_place(monkeypatch):
    """As in a container that runs as a user who is a number only."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    for name in ("getuid", "geteuid"):
        monkeypatch.setattr(os, name, lambda: 54321)

    with pytest.raises(StorageUnavailable, match="set XDG_CACHE_HOME"):
        repository_module.cache_folder("name")


# -- threads and bounds ------------------------------------------------------------------------


def test_workers_finish_what_was_submitted_before_they_end():
    done: list[int] = []
    workers = Workers(2)
    for number in range(50):
        workers.submit(lambda number=number: done.append(number))

    workers.close()

    assert sorted(done) == list(range(50))


def test_a_job_that_breaks_its_promise_does_not_take_its_thread_along():
    done: list[int] = []
    workers = Workers(1)

    workers.submit(lambda: 1 / 0)
    workers.submit(lambda: done.append(1))
    workers.close()

    assert done == [1]


def test_credit_holds_writers_back_until_it_is_below_its_limit():
    credit = Credit(10)
    credit.take(25)
    called: list[str] = []
    assert credit.call_when_below(lambda: called.append("now"))
    waiting = threading.Thread(target=credit.wait)
    waiting.start()

    credit.give(15)
    waiting.join(0.05)
    assert waiting.is_alive() and not called, "exactly at the limit is not below it"
    credit.give(1)
    waiting.join(5)

    assert not waiting.is_alive()
    assert called == ["now"]
    assert not credit.call_when_below(lambda: called.append("never"))
    assert called == ["now"]


def test_open_chunks_are_shared_by_those_who_have_some():
    share = Share(12)
    assert share.part() == 12

    for parts in (12, 6, 4):
        share.join()
        assert share.part() == parts
    for _ in range(30):
        share.join()
    assert share.part() == 2
