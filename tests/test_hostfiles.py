"""Files and devices of the host as sources and targets."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupfs import hostsources, hosttargets
from backupfs.errors import Busy, Cancelled, SourceFailed, TargetExists, TargetFailed
from backupfs.hostsources import READ_SIZE, HostSource, open_source
from backupfs.hosttargets import FileTarget, open_target

MIB = 1 << 20


def read_all(source: HostSource) -> tuple[bytes, list[tuple[int, int]]]:
    """The image a source gives, and where its pieces lay."""
    image, places, end = bytearray(), [], 0
    for offset, data in source.extents():
        assert offset >= end, "pieces must ascend"
        end = offset + len(data)
        image.extend(bytes(offset - len(image)))
        image.extend(data)
        places.append((offset, len(data)))
    image.extend(bytes(source.size() - len(image)))
    return bytes(image), places


def written_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# -- sources -----------------------------------------------------------------------------------


def test_file_is_read_in_aligned_pieces(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    content = os.urandom(2 * MIB + 4321)
    path.write_bytes(content)

    with open_source(str(path)) as source:
        image, places = read_all(source)

    assert image == content
    assert places == [(0, MIB), (MIB, MIB), (2 * MIB, 4321)]
    assert source.size_hint == len(content)


def test_holes_of_a_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(300 * MIB + 8192)
        file.write(b"x" * 4096)

    with open_source(str(path)) as source:
        places = [(offset, len(data)) for offset, data in source.extents()]

    assert sum(size for _, size in places) <= 128 << 10
    assert any(offset <= 300 * MIB + 8192 < offset + size for offset, size in places)
    assert source.size() == 1 << 30


def test_pieces_end_at_multiples_of_the_read_size_also_behind_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.seek(MIB // 2)
        file.write(os.urandom(2 * MIB))

    with open_source(str(path)) as source:
        image, places = read_all(source)

    assert image == path.read_bytes()
    assert all(offset // READ_SIZE == (offset + size - 1) // READ_SIZE for offset, size in places)


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_file_without_data_has_no_pieces(tmp_path: Path, size: int) -> None:
    path = tmp_path / "blank.img"
    path.touch()
    os.truncate(path, size)

    with open_source(str(path)) as source:
        assert list(source.extents()) == []
        assert source.size() == size


def test_file_system_that_cannot_tell_holes_is_read_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"\0" * MIB + b"tail")

    def seek_without_holes(descriptor: int, offset: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_seek(descriptor, offset, how)

    real_seek = os.lseek
    monkeypatch.setattr(hostsources.os, "lseek", seek_without_holes)

    with open_source(str(path)) as source:
        image, places = read_all(source)

    assert image == b"\0" * MIB + b"tail"
    assert places == [(0, MIB), (MIB, 4)]


@pytest.mark.parametrize("change", [+4096, -MIB], ids=["grown", "shrunk"])
def test_file_that_changes_size_while_read_fails(tmp_path: Path, change: int) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * (3 * MIB))

    with open_source(str(path)) as source, pytest.raises(SourceFailed, match="3145728"):
        for offset, _data in source.extents():
            if offset == 0:
                os.truncate(path, 3 * MIB + change)


def test_file_that_shrinks_below_the_reader_fails(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * (3 * MIB))

    with open_source(str(path)) as source, pytest.raises(SourceFailed, match="ends at byte"):
        for _ in source.extents():
            os.truncate(path, 10)


def test_file_that_says_it_is_empty_and_is_not_fails() -> None:
    """Files of procfs say so; they were backed up as 0 bytes, with success."""
    with (
        open_source("/proc/cpuinfo") as source,
        pytest.raises(SourceFailed, match="goes on behind the 0 bytes"),
    ):
        list(source.extents())


def test_file_with_more_bytes_than_it_says_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * (MIB + 10))

    with open_source(str(path)) as source:
        monkeypatch.setattr(hostsources.os, "pread", lambda _file, size, _offset: b"a" * size)
        with pytest.raises(SourceFailed, match="goes on behind the 1048586 bytes"):
            list(source.extents())


def test_file_written_to_while_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * (2 * MIB))

    with open_source(str(path)) as source:
        for _ in source.extents():
            with path.open("r+b") as file:
                file.write(b"b")
            os.utime(path, ns=(0, 12345))

    assert source.was_changed


def test_file_whose_writer_puts_the_time_back_is_told(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * (2 * MIB))
    before = path.stat()

    with open_source(str(path)) as source:
        for _ in source.extents():
            # Some file systems count time in steps of a few milliseconds.
            while path.stat().st_ctime_ns == before.st_ctime_ns:
                with path.open("r+b") as file:
                    file.write(b"b")
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert source.was_changed


def test_untouched_file_is_not_called_changed(tmp_path: Path) -> None:
    path = tmp_path / "vm.img"
    path.write_bytes(b"a" * 1000)
    path.chmod(0o640)
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))  # so old that reading sets the other time

    with open_source(str(path)) as source:
        read_all(source)

    assert not source.was_changed
    assert source.mtime_ns == 1_700_000_000_123_456_789
    assert source.mode == 0o640


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/nowhere/vm.img", "No such file"), ("/tmp", "folder"), ("/dev/zero", "character device")],
)
def test_what_has_no_image_is_refused(path: str, reason: str) -> None:
    with pytest.raises(SourceFailed, match=reason):
        open_source(path)


def test_stream_is_gathered_into_whole_pieces(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    content = os.urandom(2 * MIB + 77)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()

    with open_source(str(fifo)) as source:
        image, places = read_all(source)
    writer.join()

    assert image == content
    assert places == [(0, MIB), (MIB, MIB), (2 * MIB, 77)]
    assert source.size_hint is None


def test_stream_without_a_byte_fails(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"",))
    writer.start()

    with open_source(str(fifo)) as source, pytest.raises(SourceFailed, match="single byte"):
        list(source.extents())
    writer.join()


def test_silent_stream_can_be_cancelled(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    held_open = os.open(fifo, os.O_RDWR)

    try:
        with (
            open_source(str(fifo), cancelled=lambda: True) as source,
            pytest.raises(Cancelled),
        ):
            list(source.extents())
    finally:
        os.close(held_open)


def test_named_pipe_without_a_writer_can_be_cancelled(tmp_path: Path) -> None:
    """It could not be, before the first writer came: nothing but a kill ended the backup."""
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) == 2

    with open_source(str(fifo), cancelled=cancelled) as source, pytest.raises(Cancelled):
        list(source.extents())


def test_named_pipe_is_read_whenever_its_writer_comes(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    content = os.urandom(MIB + 5)
    writers: list[threading.Thread] = []

    def write_at_last() -> bool:
        if not writers:
            writers.append(threading.Thread(target=fifo.write_bytes, args=(content,)))
            writers[0].start()
        return False

    with open_source(str(fifo), cancelled=write_at_last) as source:
        image, _places = read_all(source)
    writers[0].join()

    assert image == content


def test_named_pipe_that_another_reader_drains_waits_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    real_read = os.read
    others = [None]

    def read_second(descriptor: int, size: int) -> bytes:
        if others:
            others.pop()
            real_read(descriptor, size)
        return real_read(descriptor, size)

    monkeypatch.setattr(hostsources.os, "read", read_second)
    with open_source(str(fifo)) as source:
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"theirs")
        timer = threading.Timer(0.1, lambda: (os.write(writer, b"ours"), os.close(writer)))
        timer.start()
        image, _places = read_all(source)
    timer.join()

    assert image == b"ours"


# -- files as targets --------------------------------------------------------------------------


def test_new_file_is_sparse_and_appears_when_finished(tmp_path: Path) -> None:
    path = tmp_path / "out.img"

    with open_target(str(path), size=64 * MIB) as target:
        target.write(0, b"begin")
        target.write_hole(MIB, 63 * MIB)
        names_before = os.listdir(tmp_path)
        target.finish(64 * MIB)

    assert path.name not in names_before
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size == 64 * MIB
    assert path.read_bytes() == b"begin".ljust(64 * MIB, b"\0")
    assert written_bytes(path) < MIB


def test_what_is_written_is_sent_to_the_disk_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def refused(_file: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        sent.append((offset, offset + size))
        raise OSError(errno.EINVAL, "it is only advice")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    monkeypatch.setattr(hosttargets, "WRITE_OUT_SIZE", 3 * MIB)
    content = os.urandom(MIB)

    with open_target(str(tmp_path / "new.img"), size=12 * MIB) as target:
        for place in (0, 1, 2, 3, 8, 9, 10):
            target.write(place * MIB, content)
        target.finish(12 * MIB)

    assert sent == [(0, 3 * MIB), (3 * MIB, 9 * MIB)]
    gap = bytes(4 * MIB)
    assert (tmp_path / "new.img").read_bytes() == content * 4 + gap + content * 3 + bytes(MIB)


def test_unfinished_file_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        open_target(str(tmp_path / "out.img"), size=10) as target,
    ):
        target.write(0, b"half")
        raise RuntimeError

    assert os.listdir(tmp_path) == []


def test_existing_file_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"mine")

    with pytest.raises(TargetExists):
        open_target(str(path), size=10)

    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == [path.name]


def test_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.img"

    with pytest.raises(TargetExists), open_target(str(path), size=4) as target:
        target.write(0, b"ours")
        path.write_bytes(b"mine")
        target.finish(4)

    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == [path.name]


def test_file_system_without_hard_links_gets_the_file_by_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.img"

    def no_link(_source: str, _target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(hosttargets.os, "link", no_link)
    with open_target(str(path), size=4) as target:
        target.write(0, b"ours")
        target.finish(4)

    assert path.read_bytes() == b"ours"
    assert os.listdir(tmp_path) == [path.name]


def test_forced_file_takes_owner_and_mode_of_the_replaced_one(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"an old and longer file")
    path.chmod(0o640)
    if os.getuid() == 0:
        os.chown(path, 1234, 1235)
    owner = path.stat().st_uid

    with open_target(str(path), size=4, force=True, mode=0o600) as target:
        target.write(0, b"new!")
        assert path.read_bytes() == b"an old and longer file"
        target.finish(4)

    assert path.read_bytes() == b"new!"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_uid == owner


def test_file_is_its_owners_alone_until_it_is_whole(tmp_path: Path) -> None:
    """A file with mode 0600, replaced by a backup of a 0644 one, stood open to all meanwhile."""
    path = tmp_path / "out.img"
    path.write_bytes(b"secret")
    path.chmod(0o600)

    with open_target(str(path), size=6, force=True, mode=0o644) as target:
        target.write(0, b"SECRET")
        modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        target.finish(6)

    assert modes == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"SECRET"


def test_forced_file_that_replaces_none_gets_its_own_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.img"

    with open_target(str(path), size=0, force=True, mode=0o640) as target:
        target.finish(0)

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("status", [None, b"Name: python\n"], ids=["absent", "without it"])
def test_file_of_a_system_that_hides_the_umask_is_its_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: bytes | None
) -> None:
    if status is not None:
        (tmp_path / "status").write_bytes(status)
    monkeypatch.setattr(hosttargets, "PROCESS_STATUS", tmp_path / "status")

    with open_target(str(tmp_path / "out.img"), size=0, mode=0o644) as target:
        target.finish(0)

    assert stat.S_IMODE((tmp_path / "out.img").stat().st_mode) == 0o600


def test_link_is_followed_so_that_its_image_is_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "real.img", tmp_path / "link.img"
    path.write_bytes(b"old")
    link.symlink_to(path)

    with open_target(str(link), size=3, force=True) as target:
        target.write(0, b"new")
        target.finish(3)

    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)

    with open_target(str(path), size=1) as target:
        target.write(0, b"x")
        target.finish(1)

    assert path.read_bytes() == b"x"


@pytest.mark.parametrize(
    ("mode", "expected"), [(None, 0o600), (0o644, 0o640), (0o400, 0o400), (0o4755, 0o640)]
)
def test_new_file_gets_the_mode_less_the_umask(
    tmp_path: Path, mode: int | None, expected: int
) -> None:
    path = tmp_path / "out.img"
    umask = os.umask(0o027)
    try:
        with open_target(str(path), size=0, mode=mode) as target:
            target.finish(0)
    finally:
        os.umask(umask)

    assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("path", ["/tmp", "/dev/null", "/nowhere/out.img"])
def test_what_cannot_hold_an_image_is_refused(path: str) -> None:
    with pytest.raises(TargetFailed):
        open_target(path, size=10, force=True)


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("name", ["new/", "new//", "new/.", "new/..", "old.img/", ".", "folder"])
def test_name_of_a_folder_is_not_made_a_file(tmp_path: Path, name: str, is_forced: bool) -> None:
    (tmp_path / "old.img").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()

    with pytest.raises(TargetFailed, match="names a folder"):
        open_target(f"{tmp_path}/{name}", size=1, force=is_forced)

    assert sorted(os.listdir(tmp_path)) == ["folder", "old.img"]
    assert (tmp_path / "old.img").read_bytes() == b"mine"


@pytest.mark.parametrize("is_forced", [False, True])
def test_file_takes_the_place_of_files_only(tmp_path: Path, is_forced: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    for path in (str(pipe), "/dev/null"):
        with pytest.raises(TargetFailed, match="no regular file"):
            FileTarget(path, force=is_forced)

    assert os.listdir(tmp_path) == ["pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_failing_write_says_the_name_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _data: object, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hosttargets.os, "pwrite", full)
    with (
        pytest.raises(TargetFailed, match=r"out\.img.*No space left"),
        FileTarget(str(tmp_path / "out.img")) as target,
    ):
        target.write(0, b"x")

    assert os.listdir(tmp_path) == []


# -- devices -----------------------------------------------------------------------------------


@pytest.fixture
def make_device(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Makes loop devices over files; they are gone when the test ends."""
    devices: list[str] = []

    def make(path: Path) -> str:
        command = ["losetup", "--find", "--show", str(path)]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs loop devices, and losetup says: {error}")
        devices.append(made.stdout.strip())
        return devices[-1]

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.tools
def test_device_is_read_from_start_to_end(
    tmp_path: Path, make_device: Callable[[Path], str]
) -> None:
    content = os.urandom(2 * MIB + 512)
    (tmp_path / "disk").write_bytes(content)

    with open_source(make_device(tmp_path / "disk")) as source:
        image, places = read_all(source)

    assert image == content
    assert len(places) == 3
    assert source.size_hint == len(content)


@pytest.mark.tools
def test_device_gets_its_zeros_written_and_keeps_what_is_behind(
    tmp_path: Path, make_device: Callable[[Path], str]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * (4 * MIB))

    with open_target(make_device(path), size=3 * MIB) as target:
        target.write(0, b"a" * 512)
        target.write_hole(512, 3 * MIB - 512)
        target.finish(3 * MIB)

    assert path.read_bytes() == b"a" * 512 + bytes(3 * MIB - 512) + b"\xff" * MIB


@pytest.mark.tools
def test_device_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, make_device: Callable[[Path], str]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * MIB)

    with pytest.raises(TargetFailed, match="1048576"):
        open_target(make_device(path), size=MIB + 1)

    assert path.read_bytes() == b"\xff" * MIB


@pytest.mark.tools
def test_device_in_use_is_refused(tmp_path: Path, make_device: Callable[[Path], str]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    device = make_device(path)
    held = os.open(device, os.O_RDONLY | os.O_EXCL)

    try:
        with pytest.raises(Busy, match=device):
            open_target(device, size=MIB)
    finally:
        os.close(held)
