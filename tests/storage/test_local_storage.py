"""What only a local folder does: temporary files, change marks, folders that vanish."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.ambients import SetClock

from backupfs.ambient import Ambient
from backupfs.errors import (
    InvalidOption,
    ObjectExists,
    ObjectNotFound,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
)
from backupfs.storage import local
from backupfs.storage.base import SpooledFile
from backupfs.storage.local import LocalStorage, read_all, replace_file, write_all
from backupfs.storage.locate import local_folder
from backupfs.storage.oserrors import storage_error
from backupfs.types import ObjectName

NAME = ObjectName("records/one.msgpack")


@pytest.fixture
def storage(scratch: Path) -> LocalStorage:
    folder = scratch / "storage"
    folder.mkdir()
    return LocalStorage(folder, Ambient())


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_object_is_left_after_a_put(storage):
    storage.put_new(NAME, b"data")

    assert files_below(storage.folder) == {NAME}


def test_temporary_files_are_not_listed(storage):
    storage.put_new(NAME, b"data")
    (storage.folder / "records" / ".half.tmp").write_bytes(b"ha")

    assert [info.name for info in storage.list("records/")] == [NAME]


def test_a_full_disk_leaves_nothing_behind(storage, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local, "write_all", full)

    with pytest.raises(StorageFull):
        storage.put_new(NAME, b"data")

    assert files_below(storage.folder) == set()


@pytest.mark.parametrize("spooled", [False, True])
def test_file_systems_without_links_are_served_by_a_rename(storage, monkeypatch, spooled):
    def no_link(_source, target):
        code = errno.EEXIST if Path(target).exists() else errno.EPERM
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    path = storage.folder / "spooled"
    path.write_bytes(b"data")

    storage.put_new(NAME, SpooledFile(path=path, size=4) if spooled else b"data")
    storage.put_new(NAME, b"data")
    with pytest.raises(ObjectExists):
        storage.put_new(NAME, b"other")

    assert storage.get(NAME, size_max=10) == b"data"
    assert files_below(storage.folder) <= {NAME, "spooled"}


def test_a_repository_whose_folder_is_gone_is_not_made_again(storage):
    storage.folder.rmdir()

    with pytest.raises(StorageUnavailable):
        storage.put_new(NAME, b"data")

    assert not storage.folder.exists()


def test_an_unchanged_folder_keeps_its_mark_and_every_change_moves_it(storage):
    storage.put_new(NAME, b"data")
    past = 1_700_000_000
    os.utime(storage.folder / "records", (past, past))

    mark = storage.change_mark("records/")
    assert mark is not None
    assert storage.change_mark("records/") == mark

    storage.delete(NAME)
    assert storage.change_mark("records/") is None, "changed just now: cannot be told yet"
    assert storage.change_mark("nothing/") == 0


def test_a_mark_of_the_future_is_not_believed(scratch):
    clock = SetClock(datetime(2001, 1, 1, tzinfo=UTC))
    storage = LocalStorage(scratch, clock)
    storage.put_new(NAME, b"data")

    assert storage.change_mark("records/") is None


def test_old_temporary_files_are_cleaned_and_new_ones_kept(storage):
    storage.put_new(NAME, b"data")
    folder = storage.folder / "records"
    for name in (".old.0011.tmp", ".new.0022.tmp"):
        (folder / name).write_bytes(b"half")
    os.utime(folder / ".old.0011.tmp", (1_700_000_000, 1_700_000_000))

    storage.clean_temporary()

    assert files_below(storage.folder) == {NAME, "records/.new.0022.tmp"}


def test_cleaning_runs_beside_writers_whose_files_and_folders_come_and_go(storage):
    """A gc must not fail because a writer's temporary file went between two looks at it."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            name = ObjectName(f"records/{os.urandom(4).hex()}")
            storage.put_new(name, b"data")
            storage.delete(name)
            folder = storage.folder / "spool" / os.urandom(4).hex()
            folder.mkdir(parents=True)
            (folder / ".x.tmp").write_bytes(b"")
            (folder / ".x.tmp").unlink()
            folder.rmdir()

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            storage.clean_temporary()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_an_object_that_is_deleted_while_another_is_put_under_its_name_was_there(
    storage, monkeypatch
):
    """Who puts metadata deletes older ones, which somebody else may be about to write."""
    storage.put_new(NAME, b"first")
    same_bytes = local.same_bytes

    def deleted_first(source: Path, target: Path) -> bool:
        target.unlink()
        return same_bytes(source, target)

    monkeypatch.setattr(local, "same_bytes", deleted_first)

    with pytest.raises(ObjectExists):
        storage.put_new(NAME, b"second")

    assert files_below(storage.folder) == set()


@pytest.fixture
def with_limit():
    """Sets how many descriptors this process may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("limit", "kept"), [(3, 1), (256, 64), (1024, 256), (4096, 1024)])
def test_a_quarter_of_the_descriptors_is_for_files_kept_open(with_limit, limit, kept):
    with_limit(limit)

    assert local.open_files_max() == kept


def test_many_threads_read_many_objects_through_few_descriptors(scratch, monkeypatch):
    monkeypatch.setattr(local, "OPEN_FILES_MAX", 32)
    storage = LocalStorage(scratch, Ambient())
    for number in range(100):
        storage.put_new(ObjectName(f"packs/aa/{number}"), b"%d" % number)
    wrong: list[int] = []

    def read() -> None:
        for number in range(100):
            if storage.get_range(ObjectName(f"packs/aa/{number}"), 0, 10) != b"%d" % number:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    before = len(os.listdir("/proc/self/fd"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + 32
    storage.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_files_kept_open_give_way_when_descriptors_run_out(storage, with_limit):
    for number in range(20):
        storage.put_new(ObjectName(f"packs/aa/{number}"), b"%d" % number)
        storage.get_range(ObjectName(f"packs/aa/{number}"), 0, 10)

    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    with_limit(lowest_free)
    with pytest.raises(OSError, match="Too many open files"):
        os.open(os.devnull, os.O_RDONLY)

    for number in (0, 19, 0):
        assert storage.get_range(ObjectName(f"packs/aa/{number}"), 0, 10) == b"%d" % number


def test_out_of_descriptors_without_any_kept_open_says_so(storage, with_limit):
    storage.put_new(ObjectName("packs/aa/1"), b"1")

    with_limit(3)

    with pytest.raises(StorageUnavailable, match="Too many open files"):
        storage.get_range(ObjectName("packs/aa/1"), 0, 10)


def test_a_replaced_file_has_the_old_or_the_new_content(scratch, monkeypatch):
    path = scratch / "state"
    replace_file(path, b"old", token="1")

    def fails(_file):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="broken"):
        replace_file(path, b"new", token="2")

    assert path.read_bytes() == b"old"
    assert files_below(scratch) == {"state"}


def test_short_writes_and_reads_are_completed(scratch, monkeypatch):
    path = scratch / "file"
    real_write, real_pread = os.write, os.pread
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, bytes(data[:3])))
    monkeypatch.setattr(os, "pread", lambda file, size, at: real_pread(file, min(size, 4), at))

    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        write_all(file, b"0123456789")
        assert read_all(file, 2, 100) == b"23456789"
        assert read_all(file, 20, 5) == b""
    finally:
        os.close(file)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageReadOnly),
        (errno.EACCES, StorageReadOnly),
        (errno.EIO, StorageUnavailable),
    ],
)
def test_errors_of_the_system_become_ours(code, expected):
    error = storage_error(OSError(code, os.strerror(code), "/repo/x"))

    assert type(error) is expected
    assert "/repo/x" in str(error)


def test_unreadable_objects_are_not_taken_for_absent_ones(storage):
    (storage.folder / "records").mkdir()
    (storage.folder / NAME).mkdir()

    with pytest.raises(StorageUnavailable):
        storage.get(NAME, size_max=10)
    with pytest.raises(StorageUnavailable):
        storage.get_range(NAME, 0, 10)
    with pytest.raises(ObjectNotFound):
        storage.get(ObjectName("records/none"), size_max=10)


def test_locations_are_folders(monkeypatch):
    monkeypatch.chdir("/tmp")

    assert local_folder("file:///a/b") == Path("/a/b")
    assert local_folder("x") == Path("/tmp/x")
    assert local_folder("~/x") == Path.home() / "x"
    for bad in ("", "s3://bucket", "file://"):
        with pytest.raises(InvalidOption):
            local_folder(bad)


def test_what_another_deleted_is_not_kept_open(storage):
    """A pack that was read takes room for as long as the daemon has it open, gc or not."""
    storage.put_new(NAME, b"data")
    kept = ObjectName("records/two.msgpack")
    storage.put_new(kept, b"kept")
    assert storage.get_range(NAME, 0, 4) == b"data"
    assert storage.get_range(kept, 0, 4) == b"kept"
    LocalStorage(storage.folder, Ambient()).delete(NAME)
    assert open_below(storage.folder) == {f"{NAME} (deleted)", kept}

    storage.close_deleted()

    assert open_below(storage.folder) == {kept}
    with pytest.raises(ObjectNotFound):
        storage.get_range(NAME, 0, 4)


def open_below(folder: Path) -> set[str]:
    """Files in ``folder`` that this process has open."""
    links = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    below = f"{folder}/"
    return {link.removeprefix(below) for link in links if link.startswith(below)}
