"""Commands on a repository that is mounted: each shows what the other did."""

from __future__ import annotations

import subprocess

import pytest
from mounted import (
    COMMAND,
    MIB,
    Mounted,
    assert_same,
    becomes,
    patched,
    random_bytes,
    run,
    shell,
)

IMAGE = random_bytes(2 * MIB)
CHANGED = patched(IMAGE, MIB, b"changed")


def test_backup_by_the_command_appears(mounted: Mounted) -> None:
    source = mounted.image(IMAGE, "web01.img")

    mounted.command("backup", source)

    assert becomes(lambda: mounted.names("web01") != [], seconds=20)
    mounted.assert_backups("web01", IMAGE)


def test_delete_by_the_command_shows(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(CHANGED), mounted.staging / "web01.img")
    first, second = (mounted.volumes / "web01" / name for name in mounted.names("web01"))

    mounted.command("delete", mounted.xattr(second, "id"))
    assert becomes(lambda: not second.exists(), seconds=20)
    mounted.assert_kept("web01", IMAGE)
    mounted.command("delete", "web01@latest")

    assert becomes(lambda: not first.exists() and not first.parent.exists(), seconds=20)
    assert_same(mounted.staging / "web01.img", CHANGED)


def test_import_by_the_command_shows(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    record = mounted.folder / "record"
    mounted.command("export", "web01@latest", record)
    backup = mounted.volumes / "web01" / mounted.names("web01")[0]
    run("rm", backup)

    mounted.command("import", record)

    assert becomes(backup.exists, seconds=20)
    mounted.assert_backups("web01", IMAGE)


def test_commands_see_a_copy_as_soon_as_it_has_ended(mounted: Mounted) -> None:
    source = mounted.image(IMAGE)

    for count in range(1, 6):
        run("cp", source, mounted.staging / "web01.img")
        assert len(mounted.listed("list", "--volume", "web01")) == count


def test_drafts_are_listed_and_published_by_commands(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(IMAGE[:100]), mounted.staging / "web01.img")
    (draft,) = mounted.listed("drafts")
    assert (draft["name"], draft["state"], draft["size"]) == ("web01.img", "held", 100)
    assert draft["reason"]

    mounted.command("publish", "web01.img")

    assert mounted.listed("drafts") == []
    mounted.assert_backups("web01", IMAGE, IMAGE[:100])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.img", "nothing is staged under 'absent.img' (see 'backupfs drafts')"),
        ("../x", "nothing is staged under '../x' (see 'backupfs drafts')"),
        ("web01.img", "'web01.img' cannot be published: it is a backup already"),
        ("touched.img", "'touched.img' cannot be published: no byte was written yet"),
        (".held", "'.held' is not a name backupfs can keep: a temporary name; rename it first"),
    ],
)
def test_publishing_what_cannot_be_published_says_why(
    mounted: Mounted, name: str, reason: str
) -> None:
    """The same, whether the daemon or the command itself looks."""
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")
    run("cp", mounted.image(IMAGE), mounted.staging / ".held")
    run("touch", mounted.staging / "touched.img")

    ended = mounted.command("publish", name, check=False)
    mounted.assert_kept("web01", IMAGE)
    mounted.unmount()
    without_mount = mounted.command("publish", name, check=False)

    assert ended.returncode in (1, 2)
    assert ended.stderr.decode() == f"backupfs: {reason}\n"
    assert without_mount.stderr == ended.stderr


def test_publishing_what_is_being_written_says_so(mounted: Mounted) -> None:
    with (mounted.staging / "web01.img").open("wb") as file:
        file.write(IMAGE)

        ended = mounted.command("publish", "web01.img", check=False)

    assert ended.stderr.decode().endswith("cannot be published: it is being written\n")
    mounted.assert_backups("web01", IMAGE)


def test_backup_by_the_command_over_that_of_the_mount_is_incremental(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.command("backup", mounted.image(CHANGED, "web01.img"))

    assert becomes(lambda: len(mounted.names("web01")) == 2, seconds=20)
    assert mounted.stored_bytes("web01") < 200_000
    run("dd", "if=/dev/zero", f"of={mounted.staging}/web01.img", "count=1", "conv=notrunc")
    mounted.assert_backups("web01", IMAGE, CHANGED, bytes(512) + IMAGE[512:])


def test_restore_reads_what_was_just_copied(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / "web01.img")

    mounted.command("restore", "web01@latest", mounted.folder / "out.img")

    assert_same(mounted.folder / "out.img", IMAGE)


def test_gc_and_verify_beside_copies(mounted: Mounted) -> None:
    """Backups come and go while gc deletes what is not needed any more."""
    copying = """
        for n in $(seq 25); do
            head -c 3000000 /dev/urandom > "$2/u$1"
            cp "$2/u$1" "$3/staging/v$1.img"
            cmp "$2/u$1" "$3/volumes/v$1/latest.img"
            [ $((n % 3)) = 0 ] || rm "$3/volumes/v$1/$(readlink "$3/volumes/v$1/latest.img")"
        done
    """
    writers = [
        mounted.start("bash", "-euc", copying, "bash", str(number), mounted.folder, mounted.path)
        for number in (1, 2)
    ]
    runs = 0
    while any(writer.poll() is None for writer in writers):
        collected = mounted.command("gc", check=False)
        assert collected.returncode == 0, collected.stderr
        runs += 1
    assert [writer.wait(timeout=10) for writer in writers] == [0, 0]

    assert runs > 2
    mounted.command("gc")
    mounted.command("verify")
    assert [len(mounted.names(f"v{number}")) for number in (1, 2)] == [8, 8]
    mounted.remount()
    mounted.command("verify")
    for number in (1, 2):
        shell('cmp "$1" "$2"', mounted.folder / f"u{number}", mounted.staging / f"v{number}.img")


def test_gc_spares_what_is_being_copied(mounted: Mounted) -> None:
    with (mounted.staging / "web01.img").open("xb", buffering=0) as file:
        for offset in range(0, len(IMAGE), MIB // 2):
            file.write(IMAGE[offset : offset + MIB // 2])
            mounted.command("gc")

    mounted.assert_backups("web01", IMAGE)
    mounted.command("verify")


def test_gc_spares_held_drafts_and_heads_without_backups(mounted: Mounted) -> None:
    run("cp", mounted.image(IMAGE), mounted.staging / ".held")
    run("cp", mounted.image(CHANGED), mounted.staging / "web01.img")
    run("rm", "-r", mounted.volumes / "web01")

    mounted.command("gc")
    mounted.remount()
    mounted.command("gc")

    assert_same(mounted.staging / ".held", IMAGE)
    assert_same(mounted.staging / "web01.img", CHANGED)


def test_second_mount_of_the_repository_is_refused(mounted: Mounted) -> None:
    other = mounted.folder / "other"
    other.mkdir()

    ended = subprocess.run(
        [*COMMAND, "mount", mounted.repo, other], capture_output=True, timeout=60, check=False
    )

    assert ended.returncode == 1
    assert str(mounted.path).encode() in ended.stderr
    assert not other.is_mount()
