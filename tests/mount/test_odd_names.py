"""Names of all kinds: what is valid UTF-8 and fits is a volume."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifecycle.command_server import CommandServer
from mounted import MIB, Mounted, assert_same, mounted_repository, needs, random_bytes, run
from support.hostile import TRAPS

IMAGE = random_bytes(MIB)

NAMES = {
    "spaces": " web  01 .img",
    "unicode": "größe-Ωмир-日本語-🗄️.img",
    "combining": "cafe\u0301.img",
    "newline": "web\n01\n.img",
    "tab and bell": "web\t\x07\x1b[31m.img",
    "leading dash": "-rf.img",
    "two dashes": "--help.img",
    "quotes": "'\"`$(touch x)`;&|.img",
    "backslash": "web\\01\\x41.img",
    "star": "*?[a-z].img",
    "longest": "x" * 251 + ".img",
    "longest unicode": "ä" * 127 + "x",
    "no suffix": "web01",
    "two suffixes": "web01.img.img",
    "other suffix": "disk.qcow2",
    "only the suffix": "a.raw",
    "at": "web01@latest.img",
    "colon": "2026-11-22T14:25:03Z.img",
    "dots": "a..b...img",
    "percent": "100%.img",
    "tilde": "~root.img",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_name_is_kept_everywhere(mounted: Mounted, name: str) -> None:
    volume = (
        name.removesuffix(".img").removesuffix(".raw") if name != "web01.img.img" else name[:-4]
    )

    run("cp", "--", mounted.image(IMAGE), mounted.staging / name)

    assert os.listdir(mounted.staging) == [name]
    assert os.listdir(mounted.volumes) == [volume]
    mounted.assert_backups(volume, IMAGE)
    (listed,) = mounted.listed("list")
    assert listed["volume"] == volume
    assert mounted.xattr(mounted.latest(volume), "volume") == volume
    assert len(mounted.events().splitlines()) == 1  # whatever is in the name
    mounted.remount()
    assert os.listdir(mounted.staging) == [name]
    mounted.assert_backups(volume, IMAGE)


def test_name_with_bytes_that_are_no_utf8_is_invalid(mounted: Mounted) -> None:
    target = os.fsencode(mounted.staging) + b"/web\xff01.img"

    for act in (
        lambda: os.close(os.open(target, os.O_WRONLY | os.O_CREAT)),
        lambda: os.mkdir(target),
        lambda: os.rename(os.fsencode(mounted.staging) + b"/.part", target),
    ):
        (mounted.staging / ".part").write_bytes(b"x")
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == errno.EINVAL
    assert os.listdir(mounted.staging) == [".part"]


@pytest.mark.tools
@needs("rsync")
def test_rsync_of_the_longest_name(mounted: Mounted) -> None:
    """Its temporary name has to be as short as any."""
    name = NAMES["longest"]

    run("rsync", mounted.image(IMAGE), mounted.staging / name)

    mounted.assert_backups(name.removesuffix(".img"), IMAGE)


def test_name_that_is_too_long_is_refused(mounted: Mounted) -> None:
    for name in ("x" * 256, "ä" * 128, "x" * 252 + ".img"):
        with pytest.raises(OSError) as caught:
            (mounted.staging / name).write_bytes(b"x")
        assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError) as caught:
        (mounted.staging / ("x" * 256)).mkdir()
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize(
    "name", ["latest.img.img", "metadata.json", "2026-11-22T142503Z.img.img", "latest.img.raw"]
)
def test_names_of_files_beside_backups_are_no_volumes(mounted: Mounted, name: str) -> None:
    with pytest.raises(OSError) as caught:
        (mounted.staging / name).write_bytes(b"x")

    assert caught.value.errno == errno.EINVAL
    (mounted.staging / ".part").write_bytes(b"x")
    with pytest.raises(OSError) as caught:
        (mounted.staging / ".part").rename(mounted.staging / name)
    assert caught.value.errno == errno.EINVAL


def test_volume_called_latest(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "latest.img")

    mounted.assert_backups("latest", IMAGE)


def test_deep_folders(mounted: Mounted) -> None:
    path = "/".join(f"folder {number}" for number in range(60))
    (mounted.staging / path).mkdir(parents=True)

    run("cp", mounted.image(IMAGE), mounted.staging / path / "disk.img")

    mounted.assert_backups(f"{path}/disk", IMAGE)
    mounted.remount()
    mounted.assert_backups(f"{path}/disk", IMAGE)


def test_path_that_is_too_long_is_refused(mounted: Mounted) -> None:
    """A volume's name has a bound, as it stands in every record."""
    folder = mounted.staging
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            for _ in range(40):
                os.mkdir("x" * 200, dir_fd=descriptor)
                inner = os.open("x" * 200, os.O_RDONLY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
        assert caught.value.errno in (errno.EINVAL, errno.ENAMETOOLONG)
    finally:
        os.close(descriptor)


def test_commands_take_odd_names(mounted: Mounted) -> None:
    name = "-odd\nname 'x'.img"
    run("cp", "--", mounted.image(IMAGE), mounted.staging / name)
    volume = name.removesuffix(".img")

    (shown,) = mounted.listed("list", "--volume", volume)
    out = mounted.folder / "out.img"
    mounted.command("restore", "--", f"{volume}@latest", out)
    mounted.command("show", "--", f"{volume}@latest")

    assert shown["volume"] == volume
    assert_same(out, IMAGE)


@pytest.mark.parametrize("name", [b"no \xff utf-8", "a\u2028b\x0bc\td\ne\\040f=h".encode()])
def test_folders_of_any_bytes_can_hold_repository_and_mount(
    work: Path, commands: CommandServer, name: bytes
) -> None:
    folder = work / os.fsdecode(name)
    folder.mkdir()
    with mounted_repository(folder, commands) as mounted:
        assert mounted.status()["location"] == str(mounted.repo)
        run("cp", mounted.image(IMAGE), mounted.staging / "vm.part")
        assert list(mounted.drafts()) == ["vm.part"]
        assert [item["name"] for item in mounted.listed("drafts")] == ["vm.part"]
        run("mv", mounted.staging / "vm.part", mounted.staging / "vm.img")
        mounted.assert_backups("vm", IMAGE)
        mounted.remount()
        mounted.assert_backups("vm", IMAGE)


# What a program may ask for in a folder: the kernel itself takes "/" and zeros apart.
PARTS = st.sampled_from(
    [os.fsencode(word) for word in TRAPS if word and "/" not in word and "\0" not in word]
) | st.binary(min_size=1, max_size=300).map(
    lambda data: data.replace(b"/", b"").replace(b"\0", b"") or b"x"
)
ERRORS = {errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOENT}


def test_any_name_is_staged_as_it_is_or_refused(mounted: Mounted) -> None:
    """What is listed is what was made, and every other part of the mount stays as it was."""
    staging = os.fsencode(mounted.staging)

    @given(st.lists(PARTS, min_size=1, max_size=2))
    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    def check(parts: list[bytes]) -> None:
        folder = staging
        made = []
        try:
            for part in parts[:-1]:
                folder = os.path.join(folder, part)
                os.mkdir(folder)
                made.append(folder)
            path = os.path.join(folder, parts[-1])
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except OSError as error:
            assert error.errno in ERRORS, (parts, error)
        else:
            assert os.listdir(folder) == [parts[-1]]
            parts[-1].decode()
            os.unlink(path)
        for folder in reversed(made):
            os.rmdir(folder)
        assert os.listdir(staging) == []
        for place in (mounted.volumes, mounted.backups, mounted.path):
            for part in parts:
                path = os.path.join(os.fsencode(place), part)
                if part not in (b".", b".."):
                    with pytest.raises(OSError) as caught:
                        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    assert caught.value.errno in {*ERRORS, errno.EPERM}

    check()
    assert mounted.drafts() == {}
    assert set(os.listdir(mounted.path)) == {
        *(".backupfs", "README.txt", "backups", "staging", "volumes"),
    }
