"""kill -9 of the daemon: what was closed before is kept whole, what was not is held, never more.

Right after a program returned its backup may not be published yet; but mv has removed its source by
then, so everything must be found again at the next start.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from lifecycle_mount import KIB, MIB, Site, assert_same, content, kill_and_wait

DELAYS_MS = (0, 0, 0.2, 1, 2, 5, 10, 30)  # after the program returned; two are as soon as can be


def run_then_kill(site: Site, script: str, *words: str | Path, delay_ms: float) -> None:
    """Run a script of sh; in the same breath, or after a moment, the daemon is killed."""
    daemon = str(site.daemon())
    if delay_ms:
        site.run("sh", "-euc", script, "sh", *words)
        time.sleep(delay_ms / 1000)
        kill_and_wait(int(daemon))
    else:
        site.run("sh", "-euc", f"{script}; kill -9 {daemon}", "sh", *words)
        kill_and_wait(int(daemon))
    site.mount()


def assert_kept(site: Site, volume: str, contents: list[bytes]) -> None:
    """The volume's backups have these contents; nothing is held, and all can be verified."""
    assert site.drafts() == {}, site.drafts()
    found = [(site.volumes / volume / name).read_bytes() for name in by_time(site.names(volume))]
    assert len(found) == len(contents)
    for number, (one, other) in enumerate(zip(found, contents, strict=True)):
        assert_same(one, other, f"backup {number} of {volume}")


def by_time(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (name[:18], int(name[18:-4].lstrip("-") or 1)))


def test_mv_that_returned_has_lost_nothing(mounted: Site) -> None:
    for number, delay_ms in enumerate(DELAYS_MS * 3):
        data = content(random.Random(number).randint(1, 3 * MIB), number)
        source = mounted.image(data)

        run_then_kill(
            mounted, 'mv "$1" "$2"', source, mounted.staging / f"v{number}.img", delay_ms=delay_ms
        )

        assert not source.exists()
        assert_kept(mounted, f"v{number}", [data])
    mounted.assert_verified()


def test_mv_over_a_head_that_returned_has_lost_nothing(mounted: Site) -> None:
    contents: list[bytes] = []
    for number, delay_ms in enumerate(DELAYS_MS):
        contents.append(content(MIB, 100 + number))
        words = (mounted.image(contents[-1]), mounted.staging / "vm.img")

        run_then_kill(mounted, 'mv "$1" "$2"', *words, delay_ms=delay_ms)

        assert_kept(mounted, "vm", contents)
    mounted.assert_verified()


@pytest.mark.parametrize(
    "script",
    [
        'cp "$1" "$2"',
        'rsync --ignore-times "$1" "$2"',
        'rsync --ignore-times --inplace --no-whole-file "$1" "$2"',
        'cat "$1" > "$2"',
        'cp "$1" "$2.part" && mv "$2.part" "$2"',
    ],
    ids=["cp", "rsync", "rsync-inplace", "redirect", "rename"],
)
def test_copy_that_returned_is_kept(mounted: Site, script: str) -> None:
    contents: list[bytes] = []
    rng = random.Random(script)
    for delay_ms in DELAYS_MS:
        data = bytearray(contents[-1] if contents else content(2 * MIB, 1))
        offset = rng.randrange(len(data) - 64 * KIB)
        data[offset : offset + 5000] = rng.randbytes(5000)
        contents.append(bytes(data))
        words = (mounted.image(contents[-1]), mounted.staging / "vm.img")

        run_then_kill(mounted, script, *words, delay_ms=delay_ms)

        assert_kept(mounted, "vm", contents)
    mounted.assert_verified()


def test_group_of_a_shell_that_was_not_at_its_end_is_held(mounted: Site) -> None:
    """Each program that ends closes the file, which the shell has open still."""
    data = content(MIB, 12)
    script = 'exec > "$2"; head -c 500000 "$1"; echo written >&2; read line; tail -c 500000 "$1"'
    words = ("bash", "-c", script, "bash", mounted.image(data), mounted.staging / "vm.img")
    group = mounted.start(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert group.stderr is not None and group.stderr.readline() == b"written\n"

    mounted.kill()
    mounted.mount()

    assert "being written" in mounted.drafts()["vm.img"]["reason"]
    assert_same((mounted.staging / "vm.img").read_bytes(), data[:500_000], "vm.img")
    assert mounted.names("vm") == []


def test_patch_of_a_head_that_returned_is_kept(mounted: Site) -> None:
    contents = [content(2 * MIB, 2)]
    mounted.copy_in("vm.img", contents[0])
    rng = random.Random(3)
    for delay_ms in DELAYS_MS:
        offset, part = rng.randrange(4000) * 512, rng.randbytes(rng.randint(1, 200 * KIB))
        data = contents[-1]
        contents.append(data[:offset] + part + data[offset + len(part) :])
        script = 'dd if="$1" of="$2" bs=4k seek="$3" oflag=seek_bytes conv=notrunc status=none'
        words = (mounted.image(part), mounted.staging / "vm.img", str(offset))

        run_then_kill(mounted, script, *words, delay_ms=delay_ms)

        assert_kept(mounted, "vm", contents)
    mounted.assert_verified()


def test_removal_that_returned_stays_done(mounted: Site) -> None:
    data = content(MIB, 4)
    for delay_ms in DELAYS_MS[1:4]:
        mounted.copy_in("vm.img", data)
        (name,) = mounted.names("vm")
        words = (mounted.volumes / "vm" / name, mounted.staging / "vm.img")

        run_then_kill(mounted, 'rm -f "$1"; rm "$2"', *words, delay_ms=delay_ms)

        assert mounted.names("vm") == []
        assert os.listdir(mounted.staging) == []


def test_import_that_returned_is_kept(mounted: Site) -> None:
    data = content(MIB, 5)
    mounted.copy_in("vm.img", data)
    (name,) = mounted.names("vm")
    (record,) = mounted.backups.glob("*.msgpack")
    sidecar = mounted.image(record.read_bytes(), record.name)
    for delay_ms in DELAYS_MS[1:4]:
        (mounted.volumes / "vm" / name).unlink()

        run_then_kill(mounted, 'cp "$1" "$2"', sidecar, mounted.backups, delay_ms=delay_ms)

        assert_kept(mounted, "vm", [data])
    mounted.assert_verified()


def test_metadata_that_was_closed_is_kept(mounted: Site) -> None:
    mounted.copy_in("vm.img", content(MIB, 6))
    for number, delay_ms in enumerate(DELAYS_MS[1:4]):
        source = mounted.image(f'{{"number": {number}}}'.encode(), "metadata.json")
        words = (source, mounted.volumes / "vm/metadata.json")

        run_then_kill(mounted, 'cp "$1" "$2"', *words, delay_ms=delay_ms)

        found = mounted.command("metadata", "vm").stdout
        assert f'"number": {number}' in found


# -- during --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("cp",), ("rsync", "-I"), ("mv",)], ids=lambda words: words[0])
def test_kill_during_a_copy_leaves_the_old_backup_and_a_held_draft(
    mounted: Site, words: tuple[str, ...]
) -> None:
    old = content(4 * MIB, 7)
    new = content(24 * MIB, 8)
    mounted.copy_in("vm.img", old)
    rng = random.Random(words[0])
    contents = [old]
    for _ in range(6):
        source = mounted.image(new)
        copy = mounted.start(*words, source, mounted.staging / "vm.img", stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.005, 0.12))
        mounted.kill()
        if copy.wait(timeout=30) == 0:  # it was done before the kill
            contents.append(new)
        else:
            assert source.exists()
        mounted.mount()

        names = by_time(mounted.names("vm"))
        if len(names) == len(contents) + 1:  # all was flushed, only the answer was not given
            contents.append(new)
        found = [(mounted.volumes / "vm" / name).read_bytes() for name in names]
        assert found == contents
        for name, draft in mounted.drafts().items():
            assert draft["state"] == "held" and draft["reason"], draft
            assert_is_part((mounted.staging / name).read_bytes(), new, old)
        for path in mounted.staging.iterdir():
            if path.name.startswith("."):
                path.unlink()
    mounted.assert_verified()


def assert_is_part(found: bytes, new: bytes, old: bytes) -> None:
    """A held draft holds what of the new image was stored, in its place, or what was there."""
    if found == old:
        return
    for start in range(0, len(found), 64 * KIB):
        piece = found[start : start + 64 * KIB]
        allowed = (new[start : start + len(piece)], old[start : start + len(piece)])
        assert piece in allowed or not any(piece), f"foreign bytes from {start}"


def test_gc_killed_at_any_moment_loses_nothing(mounted: Site) -> None:
    kept = {f"v{number}": content(MIB, 20 + number) for number in range(6)}
    for volume, data in kept.items():
        mounted.copy_in(f"{volume}.img", data)
    rng = random.Random(9)
    for number in range(12):
        mounted.copy_in("old.img", content(MIB, 40 + number))
        for name in mounted.names("old")[:-1]:
            (mounted.volumes / "old" / name).unlink()
        collection = mounted.begin("gc")
        if not collection.ended.wait(rng.uniform(0, 0.15)):
            collection.kill()
        collection.wait()

    mounted.assert_verified()
    for volume, data in kept.items():
        assert_same(mounted.latest(volume).read_bytes(), data, volume)
    mounted.command("gc")
    assert list((mounted.repo / "plans").glob("*.msgpack")) == []
    for volume, data in kept.items():
        mounted.copy_in(f"again-{volume}.img", data)
    mounted.assert_verified()


def test_daemon_killed_during_gc_costs_nothing(mounted: Site) -> None:
    data = content(4 * MIB, 10)
    mounted.copy_in("vm.img", data)
    rng = random.Random(11)
    for number in range(6):
        mounted.copy_in("old.img", content(2 * MIB, 60 + number))
        for name in mounted.names("old")[:-1]:
            (mounted.volumes / "old" / name).unlink()
        collection = mounted.begin("gc")
        time.sleep(rng.uniform(0, 0.2))
        mounted.kill()
        assert collection.wait() == 0, collection.err()
        mounted.mount()

    assert_same(mounted.latest("vm").read_bytes(), data, "vm")
    mounted.assert_verified()


def test_command_killed_during_a_backup_leaves_no_backup_and_no_lock(mounted: Site) -> None:
    source = mounted.image(content(24 * MIB, 12))
    rng = random.Random(13)
    whole = 0
    for _ in range(6):
        backup = mounted.begin("backup", source, "--volume", "vm")
        if not backup.ended.wait(rng.uniform(0.02, 0.3)):
            backup.kill()
        whole += backup.wait() == 0
        assert whole <= len(mounted.listed("list")) <= whole + 1
        whole = len(mounted.listed("list"))

    mounted.command("gc")
    sessions = [path for path in (mounted.repo / "sessions").iterdir() if path.is_file()]
    assert len(sessions) == 1, "that of the mount"
    assert len(list((mounted.repo / "spool").iterdir())) == 2, "that of the mount, and the reserve"
    mounted.assert_verified()


def test_many_killed_commands_do_not_wear_the_index_out(mounted: Site) -> None:
    """Each of them leaves a reader of the shared index behind; there is room for so many only."""
    data = content(MIB, 14)
    mounted.copy_in("vm.img", data)
    for number in range(60):
        command = mounted.begin("verify")
        time.sleep(0.012 + number % 10 / 1000)
        command.kill()
        command.wait()

    mounted.copy_in("more.img", content(MIB, 15))
    mounted.assert_verified()
    assert_same(mounted.latest("vm").read_bytes(), data, "vm")
