"""A worker process and its client: the verbs, and every way in which either may go away."""

from __future__ import annotations

import base64
import errno
import fcntl
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.images import noise

from backupfs.errors import (
    BackupfsError,
    BackupNotFound,
    InvalidOption,
    LockTimeout,
    RepositoryNotFound,
    SourceFailed,
    StorageUnavailable,
)
from backupfs.openvolume import VolumeSource, VolumeTarget
from backupfs.service import Service
from backupfs.worker import frames
from backupfs.worker.client import Worker
from backupfs.worker.frames import Channel, Disconnected

MIB = 1 << 20
IMAGE = noise(2 * MIB, seed=1) + bytes(3 * MIB) + noise(MIB + 77, seed=2) + bytes(MIB)


def nothing() -> None:
    """What a caller does before the end that has nothing to do."""


def new_backup(**more: object) -> dict[str, object]:
    return {"id": str(uuid.uuid4()), "volume_id": "volume", **more}


def take(location: str, image: bytes = IMAGE, **more: object) -> dict[str, object]:
    backup = new_backup(**more)
    with Worker(location, lock_seconds_max=5) as worker:
        source = VolumeSource(io.BytesIO(image), "volume")
        worker.backup(backup, source, metadata=None, before_end=nothing)
    return backup


def ids(location: str) -> list[str]:
    with Service.open(location) as service:
        return [record.backup_id for record in service.backups()]


def test_image_goes_in_and_comes_out(location):
    backup = take(location)
    target = io.BytesIO(b"\xff" * len(IMAGE) + b"behind")

    with Worker(location, lock_seconds_max=5) as worker:
        answer = worker.restore(backup, VolumeTarget(target, "volume"))

    assert target.getvalue() == IMAGE + b"behind"
    assert (answer["kind"], answer["size"]) == ("full", len(IMAGE))


def test_holes_are_left_out_of_a_new_volume_which_gets_its_size(location):
    image = IMAGE + bytes(4 * MIB)
    backup = take(location, image)
    written = []

    class Target(io.BytesIO):
        def write(self, data: bytes) -> int:
            written.append(len(data))
            return super().write(data)

    target = Target()
    with Worker(location, lock_seconds_max=5) as worker:
        worker.restore(backup, VolumeTarget(target, "volume", is_new=True))

    assert target.getvalue() == image
    assert sum(written) < 5 * MIB


def test_errors_come_across_as_they_are(location, tmp_path):
    backup = new_backup()
    with Worker(location, lock_seconds_max=5) as worker, pytest.raises(BackupNotFound) as caught:
        worker.ask("export", backup=backup)
    assert caught.value.selector == backup["id"]

    with (
        Worker(str(tmp_path), lock_seconds_max=5) as worker,
        pytest.raises(RepositoryNotFound, match="backupfs init"),
    ):
        worker.ask("check")

    with (
        Worker(location, compression_level=99, lock_seconds_max=5) as worker,
        pytest.raises(InvalidOption, match="compression level"),
    ):
        worker.ask("check")


def test_mistake_in_a_worker_is_an_error_that_says_so(location, capfd):
    with (
        Worker(location, lock_seconds_max=5) as worker,
        pytest.raises(StorageUnavailable, match="KeyError"),
    ):
        worker.ask("no such verb")

    assert "KeyError" in capfd.readouterr().err


def test_failing_source_leaves_no_backup(location):
    class Source(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() >= 2 * MIB:
                raise OSError("the cable is out")
            return super().read(size)

    with Worker(location, lock_seconds_max=5) as worker, pytest.raises(SourceFailed):
        worker.backup(
            new_backup(), VolumeSource(Source(IMAGE), "volume"), metadata=None, before_end=nothing
        )

    assert ids(location) == []
    assert not worker.may_have_published


def test_what_is_raised_before_the_end_leaves_no_backup(location):
    def refuse() -> None:
        raise KeyError("not wanted")

    with Worker(location, lock_seconds_max=5) as worker, pytest.raises(KeyError):
        source = VolumeSource(io.BytesIO(IMAGE), "volume")
        worker.backup(new_backup(), source, metadata=None, before_end=refuse)

    assert ids(location) == []


@pytest.mark.parametrize(
    ("error", "is_open"),
    [("StorageUnavailable", True), ("StorageReadOnly", True), ("Busy", False)],
)
def test_only_a_failing_storage_leaves_open_whether_there_is_a_backup(location, error, is_open):
    """A record whose acknowledgement was lost may be there: who made it must take it back."""
    fields = {"what": "x", "holder": "y"} if error == "Busy" else {"reason": "lost"}
    told = {"error": error, "fields": fields, "text": "lost"}
    with Worker(location, lock_seconds_max=5) as worker:
        worker.may_have_published = True
        with pytest.raises(BackupfsError):
            worker._answered(frames.document(frames.REFUSAL, told))

    assert worker.may_have_published == is_open


def test_killed_worker_is_an_error(location):
    with Worker(location, lock_seconds_max=5) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(StorageUnavailable, match="ended before its work was done"):
            worker.ask("check")


def test_worker_that_does_not_end_is_killed(location, monkeypatch):
    monkeypatch.setattr("backupfs.worker.client.END_SECONDS_MAX", 0.2)
    worker = Worker(location, lock_seconds_max=5)
    os.kill(worker._process.pid, signal.SIGSTOP)

    worker.close()

    assert worker._process.returncode == -signal.SIGKILL


def test_answer_is_waited_for_within_bounds(location, monkeypatch):
    monkeypatch.setattr("backupfs.worker.client.ANSWER_SECONDS_MAX", 0.0)
    monkeypatch.setattr("backupfs.worker.client.END_SECONDS_MAX", 0.2)
    worker = Worker(location, lock_seconds_max=1)
    os.kill(worker._process.pid, signal.SIGSTOP)

    with worker, pytest.raises(LockTimeout):
        worker.ask("check")


def test_worker_whose_client_is_killed_publishes_nothing(location):
    """The client dies after all data were sent, before it said that they were all."""
    worker = left_by_a_killed_client(
        location,
        """
worker = Worker(sys.argv[1], lock_seconds_max=5)
worker.backup(backup, source, metadata=None, before_end=lambda: die(worker))
""",
    )

    wait_for_end(worker)
    assert ids(location) == []


def test_worker_whose_client_is_killed_while_it_waits_to_publish_publishes_nothing(location):
    """The client dies when it waits for the answer, and the worker for another that publishes."""
    path = Path(location) / "locks" / "publish"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker = left_by_a_killed_client(
            location,
            """
is_asked = False
def ask():
    global is_asked
    is_asked = True
worker = Worker(sys.argv[1], lock_seconds_max=60, waiting=lambda: is_asked and die(worker))
worker.backup(backup, source, metadata={"of": "it"}, before_end=ask)
""",
        )

    wait_for_end(worker)
    assert ids(location) == []
    with Service.open(location) as service:
        assert service.get_metadata("volume") == {}


def test_worker_whose_client_is_killed_while_it_restores_ends(location):
    backup = take(location, noise(8 * MIB, seed=5))
    worker = left_by_a_killed_client(
        location,
        f"""
class Target(io.BytesIO):
    def write(self, data):
        die(worker)
worker = Worker(sys.argv[1], lock_seconds_max=5)
worker.restore({backup!r}, VolumeTarget(Target(), "volume"))
""",
    )

    wait_for_end(worker)


def left_by_a_killed_client(location: str, act: str) -> int:
    """The worker of a client that does ``act`` and kills itself there by ``die(worker)``."""
    script = f"""
import io, os, signal, sys
from backupfs.openvolume import VolumeSource, VolumeTarget
from backupfs.worker.client import Worker
source = VolumeSource(io.BytesIO(os.urandom(3 << 20)), "volume")
backup = {new_backup()!r}
def die(worker):
    print(worker._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
{act}
"""
    result = subprocess.run(
        [sys.executable, "-c", script, location], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert result.returncode == -signal.SIGKILL
    return int(result.stdout)


def wait_for_end(process: int) -> None:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30)[0], "the worker did not end"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("call", ["socket.socketpair", "subprocess.Popen"])
def test_worker_that_cannot_be_started_is_an_error_and_leaves_no_descriptor(
    location, monkeypatch, call
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(f"backupfs.worker.client.{call}", refuse)

    with pytest.raises(StorageUnavailable, match="too many open files"):
        Worker(location, lock_seconds_max=5)

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_error_of_who_looks_while_it_waits_is_not_taken_for_the_workers_end(location):
    """Whether an operation is wanted is asked of a database, whose connection may be reset."""

    def look() -> None:
        raise ConnectionResetError("the database is gone")

    with Worker(location, lock_seconds_max=5, waiting=look) as worker:
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(ConnectionResetError, match="database"):
            worker.ask("check")
        os.kill(worker._process.pid, signal.SIGCONT)


def test_signals_for_the_service_do_not_end_its_worker(location):
    with Worker(location, lock_seconds_max=5) as worker:
        source = VolumeSource(io.BytesIO(IMAGE), "volume")

        def interrupt() -> None:
            os.kill(worker._process.pid, signal.SIGTERM)

        worker.backup(new_backup(), source, metadata=None, before_end=interrupt)

    assert len(ids(location)) == 1


def test_metadata_are_in_the_backup_and_kept_for_the_volume(location):
    backup = new_backup()
    with Worker(location, lock_seconds_max=5) as worker:
        source = VolumeSource(io.BytesIO(IMAGE), "volume")
        answer = worker.backup(backup, source, metadata={"a": [1]}, before_end=nothing)

    assert answer["metadata"] == {"a": [1]}
    with Service.open(location) as service:
        assert service.get_metadata("volume") == {"a": [1]}
        assert service.resolve(str(backup["id"])).metadata == {"a": [1]}


def test_importing_the_client_loads_no_thread_and_no_index():
    script = "import sys, backupfs.worker.client; print('lmdb' in sys.modules)"

    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"


# -- frames ----------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_frame_that_is_too_large_is_refused_before_it_is_read(ends):
    channel, other = ends
    other.sendall(frames.HEADER.pack(frames.DATA, 0, 1 << 40))

    with pytest.raises(StorageUnavailable):
        channel.receive()


def test_unknown_frame_is_refused(ends):
    channel, other = ends
    other.sendall(frames.HEADER.pack(b"?", 0, 0))

    with pytest.raises(StorageUnavailable):
        channel.receive()


def test_end_within_a_frame_is_a_disconnection(ends):
    channel, other = ends
    other.sendall(frames.HEADER.pack(frames.DATA, 0, 100) + b"only this")
    other.close()

    with pytest.raises(Disconnected):
        channel.receive()


def test_document_keeps_what_json_has(ends):
    channel, other = ends
    Channel(other).send(frames.document(frames.ANSWER, {"id": b"\x01\xff", "n": 5, "s": "ü"}))

    assert channel.receive().document() == {"id": "01ff", "n": 5, "s": "ü"}


def test_disconnection_is_seen_without_waiting(ends):
    channel, other = ends
    assert not channel.is_disconnected()
    other.close()
    assert channel.is_disconnected()


# -- a record for Cinder ---------------------------------------------------------------------------


def told_of(location: str, backup: dict[str, object], *words: str) -> dict[str, object]:
    """The fields in what Cinder is to import."""
    command = [sys.executable, "-m", "backupfs.cinder_url", location, str(backup["id"]), *words]
    told = json.loads(subprocess.check_output(command, text=True, timeout=60))
    assert told["backup_service"] == "backupfs.cinder.BackupfsBackupDriver"
    return json.loads(base64.b64decode(told["backup_url"]))


def test_record_becomes_what_cinder_imports(location):
    backup = take(location, display_name="nightly")

    fields = told_of(location, backup)

    needed = {"display_name", "display_description", "container", "size", "service_metadata"}
    assert needed | {"object_count", "id", "driver_info"} <= set(fields)
    assert (fields["id"], fields["size"]) == (backup["id"], 1)
    assert fields["volume_id"] == "00000000-0000-0000-0000-000000000000"
    assert fields["driver_info"]["id"] == backup["id"]
    assert told_of(location, backup, "--volume-id", "of-cinder")["volume_id"] == "of-cinder"


def test_texts_are_cut_to_what_cinders_database_holds(location):
    long = dict.fromkeys(
        ["display_name", "display_description", "container", "snapshot_id"], "é" * 999
    )
    backup = take(location, volume_id="/".join(["folder" * 30] * 3), **long)

    fields = told_of(location, backup)

    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    assert max(len(value) for value in texts.values()) == 255
    assert len(texts["snapshot_id"]) == 36
    assert len(texts["service_metadata"]) == 255
