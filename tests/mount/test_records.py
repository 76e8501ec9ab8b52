"""Export and import of backups by copying their records out and in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifecycle.command_server import CommandServer
from mounted import (
    MIB,
    Mounted,
    assert_same,
    becomes,
    mounted_repository,
    patched,
    random_bytes,
    run,
    shell,
)

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")


@dataclass(frozen=True)
class Exported:
    """A backup that was copied out by its record."""

    backup_id: str
    name: str  # of its file in volumes/
    path: Path  # of the copy of its record
    content: bytes  # of the record


@pytest.fixture
def exported(mounted: Mounted) -> Exported:
    """The first of two backups; it is still there."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    (record,) = mounted.backups.glob("*.msgpack")
    run("cp", mounted.image(CHANGED), mounted.staging / "web01.img")
    copy = mounted.folder / "elsewhere" / record.name
    copy.parent.mkdir()
    run("cp", "-p", record, copy)
    return Exported(record.stem, mounted.names("web01")[0], copy, copy.read_bytes())


def delete(mounted: Mounted, exported: Exported) -> None:
    run("rm", mounted.backups / f"{exported.backup_id}.img")


def errno_of_writing(path: Path, content: bytes) -> int:
    """How copying a record in fails when it is closed; 0 where it does not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, content)
    except OSError as error:
        os.close(descriptor)
        return error.errno or -1
    try:
        os.close(descriptor)
    except OSError as error:
        return error.errno or -1
    return 0


# -- what works --------------------------------------------------------------------------------


def test_record_is_a_small_file_and_the_same_as_the_command_exports(
    mounted: Mounted, exported: Exported
) -> None:
    record = mounted.backups / f"{exported.backup_id}.msgpack"

    assert record.stat().st_size == len(exported.content) < 4096
    mounted.command("export", exported.backup_id, mounted.folder / "export")
    assert (mounted.folder / "export").read_bytes() == exported.content


def test_record_that_is_copied_in_again_and_again(mounted: Mounted, exported: Exported) -> None:
    """Under one name that is no backup's: what one copy leaves to be tidied up harms not the next."""
    target = mounted.backups / "x.msgpack"

    ended = shell('for _ in {1..25}; do cp "$1" "$2"; cp -p "$1" "$2"; done', exported.path, target)

    assert ended.stderr == b""
    assert f"took in 'backups/{target.name}'" in mounted.events()


@pytest.mark.parametrize(
    "script",
    [
        'cp "$1" "$2/"',
        'cp -p "$1" "$2/"',
        'cp -a "$1" "$2/"',
        'mv "$1" "$2/"',
        'rsync "$1" "$2/"',
        'rsync -a "$1" "$2/"',
        'rsync -a --inplace "$1" "$2/"',
        'install -m 600 -p "$1" "$2/"',
        'cat "$1" > "$2/any name.msgpack"',
        'dd if="$1" of="$2/x.msgpack" bs=10 status=none',
        'tar -C "${1%/*}" -cf - . | tar -C "$2" -xf - --no-overwrite-dir',
        'cp "$1" "$2/.x.msgpack.tmp"; mv "$2/.x.msgpack.tmp" "$2/x.msgpack"',
    ],
)
def test_record_that_is_copied_in_brings_its_backup_back(
    mounted: Mounted, exported: Exported, script: str
) -> None:
    delete(mounted, exported)
    mounted.assert_backups("web01", CHANGED)

    shell(script, exported.path, mounted.backups)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    assert mounted.names("web01")[0] == exported.name
    record = mounted.backups / f"{exported.backup_id}.msgpack"
    assert record.read_bytes() == exported.content
    assert (mounted.backups / f"{exported.backup_id}.img").read_bytes() == IMAGE
    assert len(os.listdir(mounted.backups)) == 4
    assert "took in" in mounted.events()


def test_record_is_imported_again_and_again(mounted: Mounted, exported: Exported) -> None:
    for _ in range(2):
        run("cp", exported.path, mounted.backups)

    mounted.assert_backups("web01", IMAGE, CHANGED)


def test_volume_that_is_gone_comes_back_by_its_records(
    mounted: Mounted, exported: Exported
) -> None:
    records = mounted.folder / "records"
    run("cp", "-r", mounted.backups, records)
    run("rm", "-r", mounted.volumes / "web01")
    for image in records.glob("*.img"):
        image.unlink()

    shell('cp "$1"/*.msgpack "$2"', records, mounted.backups)

    mounted.assert_backups("web01", IMAGE, CHANGED)
    mounted.command("verify")


def test_record_of_the_command_import_shows_in_the_mount(
    mounted: Mounted, exported: Exported
) -> None:
    delete(mounted, exported)

    mounted.command("import", exported.path)

    image = mounted.backups / f"{exported.backup_id}.img"
    assert becomes(image.exists, seconds=20)
    assert_same(image, IMAGE)


def test_second_of_one_second_keeps_its_name(mounted: Mounted) -> None:
    script = 'for n in 1 2 3; do echo $n | dd of="$1" conv=notrunc status=none; done'
    target = mounted.staging / "web01.img"
    names: list[str] = []
    while not any(name.endswith("Z-2.img") for name in names):
        shell(script, target)
        names = mounted.names("web01")
    numbered = next(name for name in names if name.endswith("Z-2.img"))
    backup_id = mounted.xattr(mounted.volumes / "web01" / numbered, "id")
    copy = mounted.folder / f"{backup_id}.msgpack"
    run("cp", mounted.backups / copy.name, copy)

    run("rm", mounted.volumes / "web01" / numbered)
    run("cp", copy, mounted.backups)

    assert mounted.names("web01") == names


# -- what is refused ---------------------------------------------------------------------------


def test_damaged_record_is_refused(mounted: Mounted, exported: Exported) -> None:
    delete(mounted, exported)
    damaged = bytearray(exported.content)
    damaged[len(damaged) // 2] ^= 1

    assert errno_of_writing(mounted.backups / "x.msgpack", damaged) == errno.EINVAL

    assert "refused 'backups/x.msgpack'" in mounted.events()
    assert not (mounted.backups / "x.msgpack").exists()
    mounted.assert_backups("web01", CHANGED)
    ended = run("cp", mounted.image(bytes(damaged), "y.msgpack"), mounted.backups, check=False)
    assert ended.returncode != 0 and b"Invalid argument" in ended.stderr


def test_record_in_the_place_of_another_is_taken_for_what_it_says(
    mounted: Mounted, exported: Exported
) -> None:
    """The name under which it is written does not matter; other records stay as they are."""
    other = mounted.backups / f"{mounted.xattr(mounted.latest('web01'), 'id')}.msgpack"
    before = other.read_bytes()

    assert errno_of_writing(other, exported.content) == 0

    assert other.read_bytes() == before
    assert f"took in 'backups/{other.name}'" in mounted.events()
    mounted.assert_backups("web01", IMAGE, CHANGED)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -40])
def test_cut_record_is_refused(mounted: Mounted, exported: Exported, size: int) -> None:
    delete(mounted, exported)

    code = errno_of_writing(mounted.backups / "x.msgpack", exported.content[:size])

    assert code == (errno.EINVAL if size else 0)  # an empty file is no record yet
    assert not (mounted.backups / "x.msgpack").exists()
    mounted.assert_backups("web01", CHANGED)


@pytest.mark.parametrize("size", [(1 << 20) + 1, 20 << 20])
def test_record_that_is_too_large_is_refused(
    mounted: Mounted, exported: Exported, size: int
) -> None:
    delete(mounted, exported)
    large = mounted.image(exported.content.ljust(size, b"\0"), "large.msgpack")

    ended = run("cp", large, mounted.backups, check=False)

    assert ended.returncode != 0 and b"Invalid argument" in ended.stderr
    mounted.assert_backups("web01", CHANGED)
    assert "large.msgpack" not in os.listdir(mounted.backups)
    assert "refused 'backups/large.msgpack'" in mounted.events()
    assert "it has more than 1048576 bytes" in mounted.events()


def test_record_without_its_data_is_refused(mounted: Mounted, exported: Exported) -> None:
    run("rm", "-r", mounted.volumes / "web01", mounted.staging / "web01.img")
    mounted.command("gc")

    assert errno_of_writing(mounted.backups / "x.msgpack", exported.content) == errno.ENODATA

    assert "refused" in mounted.events()
    assert os.listdir(mounted.volumes) == []
    assert os.listdir(mounted.backups) == []


def test_record_of_another_repository_is_refused(
    mounted: Mounted, exported: Exported, work: Path, commands: CommandServer
) -> None:
    (work / "other").mkdir()
    with mounted_repository(work / "other", commands) as other:
        run("cp", other.image(IMAGE), other.staging / "web01.img")

        assert errno_of_writing(other.backups / "x.msgpack", exported.content) == errno.EINVAL

        assert "refused" in other.events()
        other.assert_backups("web01", IMAGE)


def test_name_that_is_taken_by_another_backup_is_refused(mounted: Mounted) -> None:
    """Two backups cannot have one file name in a volume."""
    target = mounted.staging / "web01.img"
    for _ in range(20):
        shell('echo 1 > "$1"; echo 2 > "$1"', target)
        name = mounted.names("web01")[-1]
        backup_id = mounted.xattr(mounted.latest("web01"), "id")
        content = (mounted.backups / f"{backup_id}.msgpack").read_bytes()
        run("rm", mounted.volumes / "web01" / name)
        shell('echo 3 > "$1"', target)
        if mounted.names("web01")[-1] == name:
            break
    else:
        pytest.skip("no two backups of one second could be made")

    assert errno_of_writing(mounted.backups / "x.msgpack", content) == errno.EEXIST

    assert not (mounted.backups / f"{backup_id}.img").exists()


@pytest.mark.parametrize("words", [["cp"], ["mv"], ["rsync"], ["rsync", "--inplace"]])
def test_tools_fail_on_a_bad_record_and_keep_their_source(
    mounted: Mounted, exported: Exported, words: list[str]
) -> None:
    content = exported.content
    bad = mounted.image(content[:-1] + bytes([content[-1] ^ 1]), "bad.msgpack")

    assert run(*words, bad, mounted.backups, check=False).returncode != 0

    assert bad.exists()
    assert len(os.listdir(mounted.backups)) == 4
    mounted.assert_backups("web01", IMAGE, CHANGED)


def test_other_names_are_refused_in_backups(mounted: Mounted, exported: Exported) -> None:
    for name in ("x.txt", "x.img", f"{exported.backup_id}.msgpack.img", "msgpack"):
        with pytest.raises(PermissionError):
            (mounted.backups / name).write_bytes(exported.content)


# -- hostile records ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, commands: CommandServer
) -> Iterator[tuple[Mounted, bytes]]:
    """A mount with one backup that was deleted, and its record; for all examples."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("LC_ALL", "C.UTF-8")
        with mounted_repository(folder, commands) as mounted:
            run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
            (record,) = mounted.backups.glob("*.msgpack")
            content = record.read_bytes()
            run("rm", mounted.backups / f"{record.stem}.img")
            yield mounted, content
            assert os.listdir(mounted.backups) == []
            assert errno_of_writing(mounted.backups / "x.msgpack", content) == 0
            mounted.assert_backups("web01", IMAGE)


flips = st.tuples(st.integers(0, 1 << 30), st.integers(1, 255))
cuts = st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.binary(max_size=50))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(flips, min_size=1, max_size=4))
def test_record_with_flipped_bits_is_refused(
    hostile: tuple[Mounted, bytes], changes: list[tuple[int, int]]
) -> None:
    mounted, content = hostile
    damaged = bytearray(content)
    for place, bits in changes:
        damaged[place % len(damaged)] ^= bits
    if damaged == content:
        return

    assert errno_of_writing(mounted.backups / "x.msgpack", damaged) == errno.EINVAL


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cut=cuts)
def test_record_with_a_piece_replaced_is_refused(
    hostile: tuple[Mounted, bytes], cut: tuple[int, int, bytes]
) -> None:
    mounted, content = hostile
    start, end = sorted((cut[0] % len(content), cut[1] % (len(content) + 1)))
    damaged = content[:start] + cut[2] + content[end:]
    if damaged == content:
        return

    code = errno_of_writing(mounted.backups / "x.msgpack", damaged)

    assert code == (errno.EINVAL if damaged else 0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=2000))
def test_bytes_that_are_no_record_are_refused(hostile: tuple[Mounted, bytes], data: bytes) -> None:
    mounted, _content = hostile

    assert errno_of_writing(mounted.backups / "x.msgpack", data) == errno.EINVAL


def test_nothing_of_all_that_stayed(hostile: tuple[Mounted, bytes]) -> None:
    mounted, _content = hostile

    assert os.listdir(mounted.backups) == []
    assert os.listdir(mounted.volumes) in ([], ["web01"])
    assert json.loads(mounted.command("list", "--json").stdout) == []
