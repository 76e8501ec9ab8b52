"""init, stats, gc and verify on a real repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import MIB, Run, damage_data

# -- init --------------------------------------------------------------------------------------


def test_init_takes_sizes_with_units(run: Run, tmp_path: Path) -> None:
    options = ("--chunk-size", "16KiB", "--pack-size", "8m", "--compression-level", "3")

    made = run("init", tmp_path / "repo", *options)

    stats = run("stats", tmp_path / "repo", "--json").json
    assert made.code == 0
    assert made.out == f"made repository {stats['repository_id']} at {tmp_path / 'repo'}\n"
    assert (stats["chunk_size"], stats["pack_size"]) == (16384, 8 * MIB)
    assert stats["compression_level"] == 3


@pytest.mark.parametrize(
    "options", [("--chunk-size", "65K"), ("--pack-size", "1"), ("--compression-level", "77")]
)
def test_init_with_impossible_options_is_wrong_usage(
    run: Run, tmp_path: Path, options: tuple[str, str]
) -> None:
    ended = run("init", tmp_path / "repo", *options)

    assert ended.code == 2
    assert "option" in ended.error_line
    assert not (tmp_path / "repo").exists()


def test_init_makes_a_folder_for_its_owner_alone(run: Run, tmp_path: Path) -> None:
    """It will hold whole disks. What is there already was given its mode by somebody."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)

    run("init", tmp_path / "above" / "repo")
    run("init", shared)

    assert (tmp_path / "above" / "repo").stat().st_mode & 0o7777 == 0o700
    assert shared.stat().st_mode & 0o7777 == 0o750


def test_init_refuses_a_folder_in_use(run: Run, repo: Path, tmp_path: Path) -> None:
    before = sorted(repo.rglob("*"))

    again = run("init", repo)
    elsewhere = run("init", tmp_path)

    assert (again.code, elsewhere.code) == (1, 1)
    assert "nothing was changed" in again.error_line
    assert sorted(repo.rglob("*")) == before


# -- stats -------------------------------------------------------------------------------------


def test_stats_count_what_is_there(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    stats = run("stats", repo, "--json").json
    shown = run("stats", repo)

    assert (stats["volumes"], stats["backups"]) == (1, 1)
    assert stats["image_bytes"] == 8 * MIB
    assert stats["data_bytes"] == backup["data_size"]
    assert stats["stored_bytes"] >= backup["stored_bytes"] > MIB
    assert shown.code == 0
    assert stats["repository_id"] in shown.out and "8.0 MiB" in shown.out


# -- gc ----------------------------------------------------------------------------------------


def test_gc_frees_what_a_deleted_backup_took(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    run("delete", repo, backup["id"])

    done = run("gc", repo, "--json")

    assert done.code == 0, done.err
    assert done.json["bytes_freed"] == done.json["bytes_before"] - done.json["bytes_after"] > MIB
    assert run("stats", repo, "--json").json["stored_bytes"] < MIB


def test_gc_says_what_it_did(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    done = run("gc", repo)

    assert done.code == 0
    assert "0 B freed" in done.out


# -- verify ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("vm@latest",)])
def test_verify_of_what_is_intact(
    run: Run, repo: Path, backup: dict[str, Any], words: tuple[str, ...]
) -> None:
    shown = run("verify", repo, *words)
    found = run("verify", repo, *words, "--json").json

    assert shown.code == 0
    assert shown.out.startswith("verified 1 backup, ") and shown.out.endswith(": no damage\n")
    assert found["damage"] == [] and found["complete"] is True
    assert found["backups_checked"] == 1 and found["bytes_checked"] > MIB


def test_quick_verify_says_that_it_was_quick(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    shown = run("verify", repo, "--quick")

    assert shown.code == 0
    assert "without reading data: no damage" in shown.out
    assert run("verify", repo, "--quick", "--json").json["complete"] is False


def test_damage_ends_with_3_and_names_the_backup(
    run: Run, repo: Path, backup: dict[str, Any]
) -> None:
    damage_data(repo)

    shown = run("verify", repo)
    found = run("verify", repo, "--json")

    assert (shown.code, found.code) == (3, 3)
    assert backup["id"] in shown.out
    assert shown.out.endswith(", 1 backup hit\n")
    hit = [damage for damage in found.json["damage"] if damage["backup_id"] == backup["id"]]
    assert hit and hit[0]["volume"] == "vm"
    assert hit[0]["offset"] is not None and hit[0]["size"] > 0


def test_damaged_record_is_no_silent_loss(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    (record,) = (repo / "records").iterdir()
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 1
    record.chmod(0o600)
    record.write_bytes(content)

    shown, verified = run("list", repo), run("verify", repo)

    assert "error: object 'records/" in shown.error_line and backup["id"] in shown.error_line
    assert verified.code == 3
    assert backup["id"] in verified.out


def test_verify_of_an_unknown_backup_fails(run: Run, repo: Path) -> None:
    assert run("verify", repo, "vm@latest").code == 1


def test_repository_whose_config_is_damaged_ends_with_3(run: Run, repo: Path) -> None:
    config = repo / "config"
    content = bytearray(config.read_bytes())
    content[len(content) // 2] ^= 1
    config.chmod(0o600)
    config.write_bytes(content)

    ended = run("list", repo)

    assert ended.code == 3
    assert "'config' is damaged" in ended.error_line


# -- repair ------------------------------------------------------------------------------------


def cut_footers(repo: Path) -> None:
    for path in (repo / "packs").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-60])


def test_repair_says_what_it_saved(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    cut_footers(repo)

    told = run("repair", repo, "--dry-run")
    done = run("repair", repo, "--json")

    assert "blobs would be saved" in told.out and not (told.code and "gone:" not in told.out)
    assert done.code == 0 and done.json["damage"] == []
    assert {pack["set_aside"].partition("/")[0] for pack in done.json["packs"]} == {"damaged"}
    assert run("verify", repo).code == 0
    assert run("repair", repo).out == "nothing is gone: 1 backup verified\n"


def test_repair_says_what_is_gone(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    damage_data(repo)

    ended = run("repair", repo)

    assert ended.code == 3
    assert f"gone: vm@{backup['name'].removesuffix('.img')} ({backup['id']}) at " in ended.out


def test_repair_adopts_an_image_without_a_record(
    run: Run, repo: Path, backup: dict[str, Any], image: Path, tmp_path: Path
) -> None:
    run("delete", repo, backup["id"])
    (lost,) = run("repair", repo, "--json").json["trees"]
    assert lost["root"] in run("repair", repo).out

    made = run("repair", repo, "--adopt", lost["root"][:10], "--volume", "found", "--size", "8M")

    assert made.code == 0 and "made found@" in made.out
    run("restore", repo, "found@latest", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("--adopt", "abcdef0123"),
        ("--volume", "vm"),
        ("--size", "1M"),
        ("--adopt", "abcdef0123", "--volume", "vm"),
        ("--adopt", "abcdef0123", "--volume", "vm", "--dry-run"),
        ("--adopt", "", "--volume", "vm"),
        ("--adopt", "abcdef0123", "--volume", "../x"),
    ],
)
def test_repair_with_options_that_do_not_fit_is_wrong_usage(
    run: Run, repo: Path, backup: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert run("repair", repo, *words).code == 2
