"""Every recipe of docs/recovery.md, run as it stands there but for the names of folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from lifecycle_mount import KIB, MIB, Site, assert_same, becomes, content, is_alive

DOCUMENT = Path(__file__).parents[2] / "docs" / "recovery.md"
EXAMPLE_ID = "0b0e4f2c-4f0e-4ad2-8a54-0c7f2a6f2a11"
EXAMPLE_DRAFT = "00112233445566778899aabbccddeeff"
DATA = content(4 * MIB, 1)


def recipes() -> dict[str, list[str]]:
    """Title -> its blocks of commands."""
    found: dict[str, list[str]] = {}
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
        found[title] = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]
    return found


class Follow:
    """Runs the recipes of one section, one after the other as they are asked for."""

    def __init__(self, site: Site, title: str) -> None:
        self._site = site
        self._blocks = recipes()[title]
        self._places = {
            "/srv/backups": str(site.repo),
            "/mnt/backups": str(site.path),
            "/safe": str(site.folder / "safe"),
            "/copy/of/backups": str(site.folder / "copy"),
            "/var/cache/backupfs": str(site.folder / "cache/backupfs"),
        }
        (site.folder / "safe").mkdir(exist_ok=True)

    def block(self, number: int, *, code: int = 0, **names: str) -> str:
        """Run a block of commands; gives what it wrote to stdout."""
        script = self._blocks[number]
        for example, real in (self._places | names).items():
            script = script.replace(example, real)
        ended = subprocess.run(
            ["bash", "-euc", script],
            cwd=self._site.folder,
            env=os.environ | self._site.environment | {"TMPDIR": str(self._site.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == code, (script, ended.stdout, ended.stderr)
        return ended.stdout


@pytest.fixture
def kept(site: Site) -> Site:
    """A mounted repository with one backup, made of a file that is still there."""
    site.may_log_errors = True
    site.mount()
    site.run("cp", site.image(DATA, "vm.img"), site.staging)
    assert_kept(site)
    return site


def assert_kept(site: Site) -> None:
    assert_same(site.latest("vm").read_bytes(), DATA, "vm")


def assert_clean(site: Site) -> None:
    site.assert_verified()
    site.command("gc")
    assert_kept(site)


def id_of(site: Site) -> str:
    (item,) = site.listed("list", "--volume", "vm")
    return str(item["id"])


def export(site: Site) -> str:
    """The id of the only backup; its record is in the safe."""
    Follow(site, "A damaged or lost record").block(1)
    return id_of(site)


def hold(site: Site, data: bytes) -> None:
    """A copy that was killed half-way over the head."""
    copy = site.start("dd", f"of={site.staging}/vm.img", stdin=subprocess.PIPE)
    assert copy.stdin is not None
    copy.stdin.write(data[: len(data) // 2])
    copy.stdin.flush()
    staged = site.staging / "vm.img"
    assert becomes(lambda: staged.stat().st_size > len(data) // 4, seconds=10)
    time.sleep(0.1)
    copy.kill()
    copy.wait(timeout=20)
    assert becomes(lambda: "vm.img" in site.drafts(), seconds=10)


def test_after_a_crash(kept: Site) -> None:
    hold(kept, content(4 * MIB, 2))
    kept.kill()

    told = Follow(kept, "After a crash").block(0)

    assert "vm.img" in told and "held" in told
    assert_kept(kept)


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "running"])
def test_mount_that_does_not_answer(kept: Site, is_stopped: bool) -> None:
    daemon = kept.daemon()
    if is_stopped:
        os.kill(daemon, signal.SIGSTOP)

    Follow(kept, "A mount that does not answer").block(0, hostname="echo " + host_folder(kept))

    assert not is_alive(daemon)
    assert kept.daemon() != daemon
    assert_kept(kept)


def host_folder(site: Site) -> str:
    (folder,) = (site.repo / "drafts").iterdir()
    return folder.name


def test_the_folder_of_drafts_has_the_name_of_the_host(kept: Site) -> None:
    assert host_folder(kept) == re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())


@pytest.mark.parametrize("number", [0, 1], ids=["copy again", "copy the rest"])
def test_held_draft_is_completed(kept: Site, number: int) -> None:
    new = content(4 * MIB, 3)
    hold(kept, new)
    kept.remount()
    assert "vm.img" in kept.drafts()
    kept.image(new, "vm.img")

    Follow(kept, "A held draft").block(number)

    assert kept.drafts() == {}
    assert_same(kept.latest("vm").read_bytes(), new, "vm")


def test_held_draft_is_published_dropped_or_renamed(kept: Site) -> None:
    follow = Follow(kept, "A held draft")
    smaller = DATA[:MIB]
    kept.run("cp", kept.image(smaller), kept.staging / "vm.img")
    assert "smaller" in kept.drafts()["vm.img"]["reason"]

    follow.block(2)
    assert_same(kept.latest("vm").read_bytes(), smaller, "vm")

    hold(kept, DATA)
    follow.block(3)
    assert os.listdir(kept.staging) == [] and len(kept.names("vm")) == 2

    kept.run("cp", kept.image(DATA), kept.staging / "vm.img.part")
    follow.block(4)
    assert_kept(kept)
    assert kept.listed("list")[-1]["kind"] in ("full", "incremental")


def test_full_disk(kept: Site) -> None:
    """That it works without a free byte is tested in test_full_disk; here, that it frees."""
    older = content(4 * MIB, 4)
    kept.run("cp", kept.image(older), kept.staging / "vm.img")
    kept.run("cp", kept.image(DATA), kept.staging / "vm.img")

    Follow(kept, "A full disk").block(0)

    stored = sum(path.stat().st_size for path in kept.packs())
    assert stored < 5 * MIB
    assert_kept(kept)


def damage_chunk(site: Site) -> Path:
    pack = site.packs()[0]
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        file.write(b"damage")
    return pack


def test_damage_is_healed_by_copying(kept: Site) -> None:
    damage_chunk(kept)
    follow = Follow(kept, "Damage")

    assert "vm" in follow.block(0, code=3)
    follow.block(1, code=3)
    follow.block(2)

    for name in kept.names("vm"):
        assert_same((kept.volumes / "vm" / name).read_bytes(), DATA, name)


def test_damage_is_healed_from_a_copy_of_the_repository(kept: Site) -> None:
    shutil.copytree(kept.repo, kept.folder / "copy")
    damage_chunk(kept)
    kept.command("verify", check=False)

    Follow(kept, "Damage").block(3)

    kept.mount()
    assert_kept(kept)


def test_rest_of_a_damaged_backup_is_saved(kept: Site) -> None:
    damage_chunk(kept)
    kept.remount()

    Follow(kept, "Damage").block(4)

    saved = (kept.folder / "saved.img").read_bytes()
    assert len(saved) == len(DATA)
    chunks = [
        saved[start : start + 64 * KIB] == DATA[start : start + 64 * KIB]
        for start in range(0, len(DATA), 64 * KIB)
    ]
    assert chunks.count(False) == 1


def test_packs_without_footers_are_repaired_beside_the_mount(kept: Site) -> None:
    for path in (kept.repo / "packs").glob("*/*"):
        os.truncate(path, path.stat().st_size - 60)
    follow = Follow(kept, "Damage")

    assert "would be saved" in follow.block(5, code=3)
    assert "nothing is gone" in follow.block(6)
    assert_kept(kept)
    assert_clean(kept)
    assert len(list((kept.repo / "damaged").iterdir())) >= 2


def test_configuration_is_all_that_cannot_be_made_again(kept: Site) -> None:
    copy = (kept.repo / "config").read_bytes()
    kept.unmount()
    (kept.repo / "config").unlink()
    assert kept.try_mount().returncode == 1

    (kept.repo / "config").write_bytes(copy)

    kept.mount()
    assert_clean(kept)


def test_damaged_record_is_replaced_by_its_copy(kept: Site) -> None:
    backup_id = export(kept)
    record = kept.repo / "records" / f"{backup_id}.msgpack"
    record.write_bytes(b"damage")
    kept.remount()
    assert kept.names("vm") == []
    assert kept.command("gc", check=False).returncode == 3

    Follow(kept, "A damaged or lost record").block(0, **{EXAMPLE_ID: backup_id})

    assert_clean(kept)


def test_lost_record_is_found_in_its_head(kept: Site) -> None:
    (kept.repo / "records" / f"{id_of(kept)}.msgpack").unlink()
    kept.remount()

    Follow(kept, "A damaged or lost record").block(2)

    assert_same(kept.latest("vm-found").read_bytes(), DATA, "vm-found")


def test_image_of_a_lost_record_is_adopted(kept: Site) -> None:
    root = json.loads(kept.command("show", "vm@latest", "--json").stdout)["root"]
    (kept.staging / "vm.img").unlink()
    (kept.repo / "records" / f"{id_of(kept)}.msgpack").unlink()
    example = {"3f9a01c27b45": root[:12], "20G": str(len(DATA))}

    told = Follow(kept, "A damaged or lost record").block(3, **example)

    assert root in told
    assert becomes(lambda: kept.names("vm-found") != [], seconds=20)
    assert_same(kept.latest("vm-found").read_bytes(), DATA, "vm-found")
    kept.command("gc")
    kept.assert_verified()


def test_damaged_record_is_given_up(kept: Site) -> None:
    backup_id = id_of(kept)
    (kept.repo / "records" / f"{backup_id}.msgpack").write_bytes(b"damage")

    Follow(kept, "A damaged or lost record").block(4, **{EXAMPLE_ID: backup_id})

    kept.command("gc")
    kept.assert_verified()


def test_backup_deleted_by_mistake(kept: Site) -> None:
    backup_id = export(kept)
    (kept.staging / "vm.img").unlink()
    (kept.volumes / "vm" / kept.names("vm")[0]).unlink()

    Follow(kept, "A backup deleted by mistake").block(0, **{EXAMPLE_ID: backup_id})

    assert becomes(lambda: kept.names("vm") != [], seconds=20)
    assert_clean(kept)


def test_damaged_draft(kept: Site) -> None:
    (state,) = (kept.repo / "drafts").glob("*/*.msgpack")
    state.write_bytes(b"damage")
    kept.remount()
    assert state.name in str(kept.status()["unreadable_drafts"])
    assert kept.command("gc", check=False).returncode == 3

    Follow(kept, "A damaged draft").block(0, **{EXAMPLE_DRAFT: state.stem})

    assert_clean(kept)


def test_lost_index(kept: Site) -> None:
    (index,) = (kept.folder / "cache/backupfs").iterdir()
    (index / "mark").touch()

    Follow(kept, "A lost or doubtful index").block(0)

    assert index.exists() and not (index / "mark").exists()
    assert_clean(kept)


def test_another_host_takes_over(kept: Site) -> None:
    patched = b"patched" + DATA[7:]
    kept.unmount()
    (ours,) = (kept.repo / "drafts").iterdir()
    ours.rename(ours.with_name("old-host"))
    kept.mount()
    assert_kept(kept)
    assert os.listdir(kept.staging) == []
    kept.command("gc")
    kept.unmount()

    Follow(kept, "Another host takes over").block(0)

    kept.mount()
    assert os.listdir(kept.staging) == ["vm.img"]
    with (kept.staging / "vm.img").open("r+b") as file:
        file.write(b"patched")
    assert_same(kept.latest("vm").read_bytes(), patched, "vm")
    kept.assert_verified()


def test_every_recipe_is_tried() -> None:
    """A section that gets commands needs a test; so does a block, which changes the count."""
    text = Path(__file__).read_text()

    for title, blocks in recipes().items():
        assert not blocks or f'"{title}"' in text, title
    assert sum(map(len, recipes().values())) == 24
