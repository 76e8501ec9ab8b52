"""Many programs at once: none of them waits for ever, and none sees the bytes of another."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from mounted import MIB, Mounted, assert_same, random_bytes, run, shell

COUNT = 24


def images(folder: Path, *, seed: int = 0, size: int = 4 * MIB) -> dict[str, bytes]:
    """``COUNT`` images, each half its own and half shared, as files in ``folder``."""
    shared = random_bytes(size // 2, 999)
    contents = {}
    for number in range(COUNT):
        contents[f"vm{number:02}"] = random_bytes(size // 2, seed + number) + shared
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.img").write_bytes(content)
    return contents


@pytest.mark.parametrize("program", ["cp", "cat", "dd"])
def test_copies_of_24_volumes_at_once(mounted: Mounted, program: str) -> None:
    contents = images(mounted.folder / "images")
    copy = {
        "cp": 'cp "$f" "$2/"',
        "cat": 'cat "$f" > "$2/${f##*/}"',
        "dd": 'dd if="$f" of="$2/${f##*/}" bs=100k status=none',
    }[program]

    shell(f'for f in "$1"/*; do {copy} & done; wait', mounted.folder / "images", mounted.staging)

    assert sorted(os.listdir(mounted.volumes)) == sorted(contents)
    for name, content in contents.items():
        mounted.assert_kept(name, content)
    assert mounted.drafts() == {}
    mounted.command("verify")


def test_second_copies_at_once_while_the_first_are_read(mounted: Mounted) -> None:
    first = images(mounted.folder / "first")
    second = images(mounted.folder / "second", seed=100)
    run("cp", "-r", f"{mounted.folder}/first/.", mounted.staging)
    links = mounted.folder / "links"
    links.mkdir()
    for name in first:
        (links / f"{name}.img").symlink_to(mounted.volumes / name / mounted.names(name)[0])
    script = """
        for f in "$1"/*; do
            cp "$f" "$2/" &
            cmp "$3/${f##*/}" "$4/${f##*/}" &
        done
        for job in $(jobs -p); do wait "$job"; done
    """

    shell(script, mounted.folder / "second", mounted.staging, mounted.folder / "first", links)

    for name in first:
        mounted.assert_kept(name, first[name], second[name])
    assert mounted.drafts() == {}


def test_many_readers_of_one_backup(mounted: Mounted) -> None:
    content = random_bytes(16 * MIB)
    run("cp", mounted.image(content, "vm.img"), mounted.staging)

    script = 'for n in $(seq 12); do cmp "$1" "$2" & done; for j in $(jobs -p); do wait $j; done'

    shell(script, mounted.folder / "vm.img", mounted.latest("vm"))


def test_writers_of_one_file_at_once_end_with_one_consistent_head(mounted: Mounted) -> None:
    """Nobody should; the head is then what the file is, and each backup is what it was once."""
    target = mounted.staging / "vm.img"
    sources = [mounted.image(bytes([65 + n]) * (2 * MIB), f"s{n}") for n in range(4)]
    run("cp", sources[0], target)
    script = 'for s in "${@:2}"; do cp "$s" "$1" & done; for j in $(jobs -p); do wait $j; done'

    shell(script, target, *sources)

    assert 2 <= len(mounted.names("vm")) <= 5
    assert_same(mounted.latest("vm"), target.read_bytes())
    assert target.stat().st_size == 2 * MIB


def test_listing_while_copies_come_and_go(mounted: Mounted) -> None:
    source = mounted.image(random_bytes(100_000))
    script = """
        (for n in $(seq 40); do cp "$1" "$2/staging/v$n.img"; done) &
        (for n in $(seq 40); do cp "$1" "$2/staging/w$n.img"; rm "$2/staging/w$n.img"; done) &
        for n in $(seq 25); do
            find "$2" > /dev/null 2>&1 || true
            cat "$2/.backupfs/status.json" > /dev/null
        done
        wait
    """

    shell(script, source, mounted.path)

    assert len(os.listdir(mounted.volumes)) == 80
    assert len(os.listdir(mounted.staging)) == 40
    assert len(os.listdir(mounted.backups)) == 160


def test_copy_is_seen_at_once_beside_many_readers(mounted: Mounted) -> None:
    """The kernel sends the end of a copy among the read-aheads of others, and after its answer."""
    content = random_bytes(48 * MIB)
    run("cp", mounted.image(content), mounted.staging / "large.img")
    small = mounted.image(content[:5000], "small")
    backup = mounted.latest("large").resolve()
    ended = threading.Event()

    def read() -> None:
        with backup.open("rb", buffering=0) as file:
            while not ended.is_set():
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                while file.read(MIB) and not ended.is_set():
                    pass

    readers = [threading.Thread(target=read) for _ in range(24)]
    for reader in readers:
        reader.start()
    try:
        started, copies, late = time.monotonic(), 0, []
        while time.monotonic() < started + 6:
            run("cp", small, mounted.staging / f"v{copies}.img")
            if not (mounted.volumes / f"v{copies}").exists():
                late.append(copies)
            copies += 1
    finally:
        ended.set()
        for reader in readers:
            reader.join()

    assert late == []
    assert len(os.listdir(mounted.volumes)) == copies + 1


def test_a_file_that_children_inherit_keeps_no_looks_waiting(mounted: Mounted) -> None:
    """Each program of a shell's group closes the group's output; the group has it open still. Were
    every look to wait for a release then, this took longer than any program is given here."""
    piece = mounted.image(random_bytes(1000))
    run("cp", piece, mounted.staging / "other.img")
    script = """
        {
            for n in $(seq 70); do
                cat "$1"
                ls "$2/volumes/vm" "$2/volumes/vm/latest.img" > "$3" 2>&1 || true
                ls "$2/volumes" "$2/backups" "$2/volumes/other/latest.img" > "$3"
            done
        } > "$2/staging/vm.img"
        ls "$2/volumes/vm/latest.img"
    """

    shell(script, piece, mounted.path, mounted.folder / "seen")

    assert_same(mounted.latest("vm"), piece.read_bytes() * 70)
