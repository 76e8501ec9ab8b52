"""volumes/NAME/metadata.json: a volume's metadata as a file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from mounted import MIB, Mounted, becomes, random_bytes, run, shell

IMAGE = random_bytes(MIB)
METADATA = {"volume": {"name": "web01", "größe": 3, "bootable": True, "none": None}, "list": [1.5]}


@pytest.fixture
def path(mounted: Mounted) -> Path:
    """The metadata of a volume with one backup."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    return mounted.volumes / "web01" / "metadata.json"


def test_metadata_is_empty_at_first(path: Path) -> None:
    assert json.loads(path.read_text()) == {}
    assert path.stat().st_size == len(path.read_bytes())


def test_what_was_written_is_read(mounted: Mounted, path: Path) -> None:
    path.write_text(json.dumps(METADATA))

    assert json.loads(path.read_text()) == METADATA
    assert path.stat().st_size == len(path.read_bytes())
    assert json.loads(mounted.command("metadata", "web01").stdout) == METADATA
    mounted.remount()
    assert json.loads(path.read_text()) == METADATA


def test_every_way_of_writing_it(mounted: Mounted, path: Path) -> None:
    source = mounted.image(json.dumps(METADATA).encode(), "metadata.json")
    for script in (
        'cp "$1" "$2"',
        'cp -p "$1" "$2"',
        'cat "$1" > "$2"',
        'tee "$2" < "$1" > /dev/null',
        'dd if="$1" of="$2" bs=7 status=none',
        'cat "$1" 1<> "$2"',
    ):
        path.write_text("{}")
        shell(script, source, path)
        assert json.loads(path.read_text()) == METADATA, script


def test_shorter_text_replaces_a_longer_one(path: Path) -> None:
    path.write_text(json.dumps({"long": "x" * 5000}))

    path.write_text('{"a": 1}')

    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["", "not json", "[1]", '"text"', "{", '{"a": NaN}', '{"a": 1} x', b"\xff\xfe{}"]
)
def test_what_is_no_json_object_is_refused_at_close(
    mounted: Mounted, path: Path, text: str | bytes
) -> None:
    path.write_text('{"good": 1}')
    data = text if isinstance(text, bytes) else text.encode()

    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, data)
    if data:
        with pytest.raises(OSError) as caught:
            os.close(descriptor)
        assert caught.value.errno == errno.EINVAL
        assert "refused 'web01/metadata.json'" in mounted.events()
    else:
        os.close(descriptor)  # emptying a file is no text yet

    assert json.loads(path.read_text()) == {"good": 1}


def test_too_much_metadata_is_refused(mounted: Mounted, path: Path) -> None:
    source = mounted.image(json.dumps({"long": "x" * (8 << 20)}).encode(), "long.json")

    assert run("cp", source, path, check=False).returncode != 0

    assert json.loads(path.read_text()) == {}
    assert "not usable as a volume's metadata: it has more than" in mounted.events()


def test_metadata_whose_beginning_would_do_are_refused_for_their_length(
    mounted: Mounted, path: Path
) -> None:
    """The writer was told of an error: what came before it is not taken in."""
    source = mounted.image(b'{"a": 1}'.ljust(8 << 20), "long.json")

    assert run("dd", f"if={source}", f"of={path}", "bs=64k", check=False).returncode != 0

    assert json.loads(path.read_text()) == {}


HALF = '{"half a pair": "\\ud800", "\\udc80": ["\\udfff", "ü"]}'


def test_half_a_surrogate_pair_hides_nothing(mounted: Mounted, path: Path) -> None:
    """JSON has it, UTF-8 does not: the folder of the volume must be readable all the same."""
    path.write_text(HALF)

    assert json.loads(path.read_text()) == json.loads(HALF)
    assert path.stat().st_size == len(path.read_bytes())
    names = run("ls", "-l", path.parent).stdout.decode()
    assert "latest.img" in names and "metadata.json" in names
    assert json.loads(mounted.command("metadata", "web01").stdout) == json.loads(HALF)
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    (_first, second) = (mounted.listed("show", item["id"]) for item in mounted.listed("list"))
    assert second["metadata"] == json.loads(HALF)


def test_metadata_that_the_disk_cannot_read_hides_no_backup(mounted: Mounted, path: Path) -> None:
    mounted.expects_errors = True
    path.write_text('{"a": 1}')
    (stored,) = (mounted.repo / "metadata").rglob("*.msgpack")
    aside = stored.with_name("aside")
    stored.rename(aside)
    stored.symlink_to(stored)  # a loop: an error at every open

    assert "latest.img" in run("ls", "-l", path.parent).stdout.decode()
    mounted.assert_kept("web01", IMAGE)
    with pytest.raises(OSError):
        path.read_bytes()
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img", check=False)
    stored.unlink()
    aside.rename(stored)
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("depth", [63, 64, 65, 100, 5000])
def test_metadata_of_every_depth_is_refused_or_kept(
    mounted: Mounted, path: Path, depth: int
) -> None:
    text = '{"a": ' * depth + "1" + "}" * depth
    source = mounted.image(text.encode(), "deep.json")

    ended = run("cp", source, path, check=False)

    assert (ended.returncode == 0) == (depth <= 64)
    assert json.loads(path.read_text()) == (json.loads(text) if depth <= 64 else {})


def test_metadata_stands_in_the_records_of_later_backups(mounted: Mounted, path: Path) -> None:
    path.write_text(json.dumps(METADATA))

    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    first, second = (mounted.listed("show", item["id"]) for item in mounted.listed("list"))
    assert not first["metadata"]
    assert second["metadata"] == METADATA


def test_removed_metadata_is_empty_and_the_volume_stays(mounted: Mounted, path: Path) -> None:
    path.write_text(json.dumps(METADATA))

    path.unlink()

    assert json.loads(path.read_text()) == {}
    mounted.assert_backups("web01", IMAGE)


def test_metadata_set_by_the_command_shows(mounted: Mounted, path: Path) -> None:
    assert json.loads(path.read_text()) == {}
    source = mounted.image(json.dumps(METADATA).encode(), "new.json")

    mounted.command("metadata", "web01", "--set", source)

    assert becomes(lambda: json.loads(path.read_text()) == METADATA, seconds=20)
