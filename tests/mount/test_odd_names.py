"""Names of all kinds: what is valid UTF-8 and fits is a volume."""

from __future__ import annotations

import errno
import os

import pytest
from mounted import MIB, Mounted, assert_same, needs, random_bytes, run

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
