"""export, import and metadata on a real repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, on_terminal

COMMAND = [sys.executable, "-m", "backupfs.cli.main"]


def exported(run: Run, repo: Path) -> bytes:
    ended = run("export", repo, "vm@latest")
    assert ended.code == 0, ended.err
    return ended.output


def ids(run: Run, repo: Path) -> list[str]:
    return [made["id"] for made in run("list", "--json", repo).json]


# -- export ------------------------------------------------------------------------------------


def test_record_goes_to_a_file_or_to_stdout(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    ended = run("export", repo, backup["id"], tmp_path / "vm.msgpack")

    assert (ended.code, ended.out) == (0, "")
    assert (tmp_path / "vm.msgpack").read_bytes() == exported(run, repo)
    assert run("export", repo, "vm@latest", "-").output == exported(run, repo)


def test_exported_file_is_replaced_by_force_only(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "vm.msgpack"
    target.write_bytes(b"precious")

    refused = run("export", repo, "vm@latest", target)

    assert refused.code == 1
    assert target.read_bytes() == b"precious"
    assert run("export", repo, "vm@latest", target, "--force").code == 0
    assert target.read_bytes() == exported(run, repo)


@pytest.mark.tools
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_record_does_not_overwrite_the_start_of_a_device(
    run: Run, repo: Path, backup: dict[str, Any], disk: Path, device: str, force: tuple[str, ...]
) -> None:
    before = disk.read_bytes()

    refused = run("export", repo, "vm@latest", device, *force)

    assert refused.code == 1
    assert "no regular file" in refused.error_line
    assert disk.read_bytes() == before


def test_terminal_gets_no_record(repo: Path, backup: dict[str, Any]) -> None:
    code, shown = on_terminal([*COMMAND, "export", repo, "vm@latest"])

    assert code == 2
    assert shown.startswith("backupfs: a record is nothing for a terminal")


# -- import ------------------------------------------------------------------------------------


def test_deleted_backup_comes_back_by_its_record(
    run: Run, repo: Path, image: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    record = tmp_path / "vm.msgpack"
    record.write_bytes(exported(run, repo))
    run("delete", repo, backup["id"])

    first = run("import", repo, record)
    second = run("import", repo, record)

    assert first.out == f"imported vm@{backup['name'][:-4]} ({backup['id'][:8]})\n"
    assert second.out.startswith("already there: vm@")
    assert (first.code, second.code) == (0, 0)
    assert ids(run, repo) == [backup["id"]]
    assert run("restore", repo, backup["id"], tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_record_can_come_from_standard_input(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    ended = run("import", repo, "-", "--json", stdin=exported(run, repo))

    assert ended.code == 0
    assert ended.json[0]["id"] == backup["id"]
    assert ended.json[0]["already_there"] is True


def test_bad_records_are_refused_and_good_ones_taken(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    good, bad, large = (tmp_path / name for name in ("good", "bad\x1b", "large"))
    good.write_bytes(exported(run, repo))
    record = exported(run, repo)
    bad.write_bytes(record[:-1] + bytes([record[-1] ^ 1]))
    large.write_bytes(bytes(5 << 20))
    run("delete", repo, backup["id"])

    ended = run("import", repo, bad, large, tmp_path / "absent", good, "--json")

    assert ended.code == 1
    assert len(ended.err.splitlines()) == 3
    assert r"bad\x1b" in ended.err and "\x1b" not in ended.err
    assert [taken["id"] for taken in ended.json] == ids(run, repo) == [backup["id"]]


def test_record_of_another_repository_is_refused(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    record = tmp_path / "vm.msgpack"
    record.write_bytes(exported(run, repo))
    run("init", tmp_path / "other")

    ended = run("import", tmp_path / "other", record)

    assert ended.code == 1
    assert "repository" in ended.error_line
    assert ids(run, tmp_path / "other") == []


def test_absent_record_file_is_said_so(run: Run, repo: Path, tmp_path: Path) -> None:
    ended = run("import", repo, tmp_path / "absent")

    assert ended.code == 1
    assert ended.error_line.endswith("absent': No such file or directory")


# -- metadata ----------------------------------------------------------------------------------


def test_metadata_comes_back_as_it_was_put(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "vm.json"
    file.write_text('{"owner": "anna", "tags": ["a", 1, null]}')

    before = run("metadata", repo, "vm").json
    put = run("metadata", repo, "vm", "--set", file)

    assert before == {}
    assert (put.code, put.out) == (0, "")
    assert run("metadata", repo, "vm").json == {"owner": "anna", "tags": ["a", 1, None]}
    assert run("metadata", repo, "vm", "--json").json["owner"] == "anna"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[1]", "no object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "more than"),
    ],
    ids=["cut", "encoding", "array", "deep", "large"],
)
def test_what_is_no_metadata_changes_nothing(
    run: Run, repo: Path, backup: dict[str, Any], data: bytes, reason: str
) -> None:
    run("metadata", repo, "vm", "--set", "-", stdin=b'{"kept": true}')

    ended = run("metadata", repo, "vm", "--set", "-", stdin=data)

    assert ended.code == 1
    assert reason in ended.error_line
    assert run("metadata", repo, "vm").json == {"kept": True}
