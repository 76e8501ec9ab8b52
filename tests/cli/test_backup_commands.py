"""backup, restore, list, show, delete and prune on a real repository."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from command_line import MIB, Run, damage_data

from backupfs import hostsources
from backupfs.hosttargets import DeviceTarget, FileTarget

COMMAND = [sys.executable, "-m", "backupfs.cli.main"]

SUMMARY_KEYS = {
    "id",
    "volume",
    "name",
    "created_at",
    "data_timestamp",
    "size",
    "data_size",
    "stored_bytes",
    "kind",
    "parent_id",
    "host",
}


def listed(run: Run, repo: Path) -> list[dict[str, Any]]:
    shown = run("list", "--json", repo)
    assert shown.code == 0, shown.err
    found: list[dict[str, Any]] = shown.json
    return found


# -- backup ------------------------------------------------------------------------------------


def test_backup_is_called_as_its_file_and_listed(run: Run, repo: Path, image: Path) -> None:
    made = run("backup", repo, image)

    (found,) = listed(run, repo)
    assert made.code == 0
    assert made.out.startswith(f"vm@{found['name'][:-4]} ({found['id'][:8]}): full, 8.0 MiB, ")
    assert made.err == ""


def test_listed_backup_has_the_fields_that_scripts_use(
    run: Run, repo: Path, backup: dict[str, Any]
) -> None:
    (found,) = listed(run, repo)

    assert set(found) == SUMMARY_KEYS
    assert found == {key: backup[key] for key in SUMMARY_KEYS}
    assert found["size"] == 8 * MIB
    assert MIB < found["data_size"] < 3 * MIB
    assert MIB < found["stored_bytes"] < 3 * MIB
    assert (found["kind"], found["parent_id"], found["volume"]) == ("full", None, "vm")
    for key in ("created_at", "data_timestamp"):
        assert datetime.fromisoformat(found[key]).utcoffset() is not None


def test_second_backup_is_incremental_and_stores_what_changed(
    run: Run, repo: Path, image: Path, backup: dict[str, Any]
) -> None:
    with image.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096))

    (second,) = run("backup", repo, image, "--json").json

    assert (second["kind"], second["parent_id"]) == ("incremental", backup["id"])
    assert second["stored_bytes"] < backup["stored_bytes"] / 4


def test_full_backup_has_no_parent(
    run: Run, repo: Path, image: Path, backup: dict[str, Any]
) -> None:
    (second,) = run("backup", repo, image, "--full", "--json").json

    assert (second["kind"], second["parent_id"]) == ("full", None)


@pytest.mark.parametrize(
    ("file", "volume"),
    [("db.raw", "db"), ("a.img.raw", "a.img"), ("plain", "plain"), ("x.qcow2", "x.qcow2")],
)
def test_volume_is_the_file_without_one_image_suffix(
    run: Run, repo: Path, tmp_path: Path, file: str, volume: str
) -> None:
    (tmp_path / file).write_bytes(b"data")

    (made,) = run("backup", repo, tmp_path / file, "--json").json

    assert made["volume"] == volume


def test_volume_can_be_named(run: Run, repo: Path, image: Path) -> None:
    (made,) = run("backup", repo, image, "--volume", "100/disk-0", "--json").json

    assert made["volume"] == "100/disk-0"


def test_volume_that_cannot_be_a_name_is_wrong_usage(run: Run, repo: Path, image: Path) -> None:
    ended = run("backup", repo, image, "--volume", "../escape")

    assert ended.code == 2
    assert "'../escape'" in ended.error_line
    assert listed(run, repo) == []


def test_image_from_far_in_the_future_is_backed_up_and_shown(
    run: Run, repo: Path, image: Path
) -> None:
    moment_ns = 9_300_000_000 * 10**9  # beyond what a record holds
    os.utime(image, ns=(0, moment_ns))
    if image.stat().st_mtime_ns != moment_ns:
        pytest.skip("the file system does not keep such times")

    made = run("backup", repo, image)

    assert made.code == 0, made.err
    assert made.err == ""
    assert run("show", repo, "vm@latest", "--json").json["source_mtime_ns"] == (1 << 63) - 1


def test_several_sources_are_backed_up_though_one_fails(
    run: Run, repo: Path, image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "db.img"
    other.write_bytes(b"d" * 70000)

    ended = run("backup", repo, image, tmp_path / "absent.img", other, "--json")

    assert ended.code == 1
    assert "absent.img" in ended.error_line and "No such file" in ended.error_line
    assert [made["volume"] for made in ended.json] == ["vm", "db"]
    assert sorted(made["volume"] for made in listed(run, repo)) == ["db", "vm"]


def test_folder_is_no_source(run: Run, repo: Path, tmp_path: Path) -> None:
    ended = run("backup", repo, tmp_path)

    assert ended.code == 1
    assert "it is a folder" in ended.error_line


def test_backup_from_a_pipe_needs_a_name_and_gets_all(run: Run, repo: Path, tmp_path: Path) -> None:
    content = os.urandom(3 * MIB + 17)
    words = ["backup", str(repo), "-", "--volume", "piped"]

    ended = subprocess.run([*COMMAND, *words], input=content, capture_output=True, check=False)
    restored = run("restore", repo, "piped@latest", tmp_path / "out")

    assert ended.returncode == 0, ended.stderr
    assert restored.code == 0
    assert (tmp_path / "out").read_bytes() == content


def test_pipe_that_ends_empty_makes_no_backup(run: Run, repo: Path) -> None:
    words = ["backup", str(repo), "-", "--volume", "piped"]

    ended = subprocess.run([*COMMAND, *words], input=b"", capture_output=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith(b"backupfs: reading 'standard input' failed")
    assert listed(run, repo) == []


def test_empty_file_is_backed_up_only_where_that_is_allowed(
    run: Run, repo: Path, image: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.img"
    empty.touch()

    ended = run("backup", repo, empty, image, "--json")

    assert ended.code == 1
    assert f"'{empty}' is empty: not backed up" in ended.error_line
    assert "--allow-smaller" in ended.error_line
    assert [made["volume"] for made in ended.json] == ["vm"]

    (made,) = run("backup", repo, empty, "--allow-smaller", "--json").json
    assert (made["volume"], made["size"]) == ("empty", 0)


@pytest.mark.parametrize("option", [(), ("--allow-smaller",)])
def test_file_that_only_says_it_is_empty_is_not_called_so(
    run: Run, repo: Path, option: tuple[str, ...]
) -> None:
    ended = run("backup", repo, "/proc/cpuinfo", *option)

    assert ended.code == 1
    assert "it goes on behind the 0 bytes" in ended.error_line
    assert listed(run, repo) == []


def test_image_smaller_than_the_latest_backup_is_backed_up_only_where_that_is_allowed(
    run: Run, repo: Path, image: Path, backup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one more prune, what was cut short was all there was."""
    os.truncate(image, 1000)

    def unread(_descriptor: int, _size: int, _offset: int) -> bytes:
        raise AssertionError("its size is known")

    with monkeypatch.context() as patch:
        patch.setattr("backupfs.hostsources.os.pread", unread)
        refused = run("backup", repo, image, "--full")

    assert refused.code == 1
    assert "has 1000 bytes, the latest backup of 'vm' has 8388608" in refused.error_line
    assert "--allow-smaller" in refused.error_line
    assert [made["id"] for made in listed(run, repo)] == [backup["id"]]

    (made,) = run("backup", repo, image, "--allow-smaller", "--json").json
    assert made["size"] == 1000
    assert run("backup", repo, image).code == 0


def test_stream_that_is_cut_short_makes_no_backup(run: Run, repo: Path) -> None:
    words = [*COMMAND, "backup", str(repo), "-", "--volume", "piped"]
    whole = os.urandom(3 * MIB)
    subprocess.run(words, input=whole, capture_output=True, check=True)

    refused = subprocess.run(words, input=whole[:1000], capture_output=True, check=False)
    allowed = subprocess.run(
        [*words, "--allow-smaller"], input=whole[:1000], capture_output=True, check=False
    )

    assert refused.returncode == 1
    assert b"'standard input' has 1000 bytes, the latest backup of 'piped'" in refused.stderr
    assert allowed.returncode == 0, allowed.stderr
    assert [made["size"] for made in listed(run, repo)] == [3 * MIB, 1000]


def test_named_pipe_needs_a_name_for_its_volume(run: Run, repo: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    ended = run("backup", repo, tmp_path / "pipe")

    assert ended.code == 2
    assert "give --volume" in ended.error_line


def test_image_written_to_meanwhile_is_backed_up_with_a_warning(
    run: Run, repo: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read = os.pread

    def read_beside_a_writer(descriptor: int, size: int, offset: int) -> bytes:
        os.utime(image, ns=(0, offset + 1))
        return real_read(descriptor, size, offset)

    monkeypatch.setattr("backupfs.hostsources.os.pread", read_beside_a_writer)
    made = run("backup", repo, image, "--json")

    assert made.code == 0
    assert made.json[0]["changed_while_read"] is True
    assert "warning" in made.error_line and "was changed" in made.error_line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_backup_that_waits_for_the_writer_of_a_pipe_can_be_interrupted(
    run: Run, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    os.mkfifo(tmp_path / "pipe")
    real_open = hostsources.open_source

    def be_signalled(path: str, **arguments: Any) -> hostsources.HostSource:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        return real_open(path, **arguments)

    monkeypatch.setattr("backupfs.cli.backups.open_source", be_signalled)
    ended = run("backup", repo, tmp_path / "pipe", "--volume", "piped")

    assert ended.code == 130
    assert "cancelled" in ended.error_line
    assert listed(run, repo) == []


def test_interrupted_backup_leaves_none(run: Run, repo: Path) -> None:
    words = [*COMMAND, "backup", str(repo), "-", "--volume", "piped"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(os.urandom(5 * MIB))  # more than a pipe holds: it is being read
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=30)
        error = process.stderr.read().decode()

    assert code == 130
    assert error.startswith("backupfs: cancelled") and error.count("\n") == 1
    assert listed(run, repo) == []
    assert run("verify", repo).code == 0


# -- restore -----------------------------------------------------------------------------------


def test_restored_image_is_the_same_and_sparse(
    run: Run, repo: Path, image: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "out.img"

    ended = run("restore", repo, backup["id"][:8], target)

    assert ended.code == 0
    assert ended.out == f"restored vm@{backup['name'][:-4]} to {target} (8.0 MiB)\n"
    assert target.read_bytes() == image.read_bytes()
    assert target.stat().st_blocks * 512 < 3 * MIB


@pytest.mark.parametrize("form", ["{id}", "vm@latest", "vm@{name}", "vm@{stamp}"])
def test_backup_can_be_called_in_every_form(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path, form: str
) -> None:
    selector = form.format(**backup, stamp=backup["name"].removesuffix(".img"))

    ended = run("restore", repo, selector, tmp_path / "out.img", "--json")

    assert ended.code == 0, ended.err
    assert ended.json["id"] == backup["id"]
    assert ended.json["target"] == str(tmp_path / "out.img")


def test_existing_file_is_replaced_by_force_only(
    run: Run, repo: Path, image: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "out.img"
    target.write_bytes(b"precious")

    refused = run("restore", repo, "vm@latest", target)

    assert refused.code == 1
    assert "give --force" in refused.error_line
    assert target.read_bytes() == b"precious"

    assert run("restore", repo, "vm@latest", target, "--force").code == 0
    assert target.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("place", ["config", "records/new.img", "new.img"])
def test_nothing_is_restored_into_the_repository(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path, place: str
) -> None:
    config = (repo / "config").read_bytes()
    (tmp_path / "link").symlink_to(repo)

    for target in (repo / place, tmp_path / "link" / place):
        refused = run("restore", repo, "vm@latest", target, "--force")

        assert refused.code == 1
        assert "it lies in the repository" in refused.error_line
    assert (repo / "config").read_bytes() == config
    assert not list(repo.rglob("new.img")) and not list(repo.rglob("*.part"))
    assert run("verify", repo).code == 0


def test_restore_has_no_stream(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who restores to '-' means standard output, and wants no file of that name."""
    monkeypatch.chdir(tmp_path)

    refused = run("restore", repo, "vm@latest", "-")

    assert refused.code == 2
    assert "'./-'" in refused.error_line
    assert not Path("-").exists()


def test_unknown_backup_leaves_no_file(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    ended = run("restore", repo, "vm@1999", tmp_path / "out.img")

    assert ended.code == 1
    assert "no backup 'vm@1999'" in ended.error_line
    assert not (tmp_path / "out.img").exists()


def test_damaged_backup_ends_with_3_and_leaves_no_file(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path
) -> None:
    damage_data(repo)
    folder = tmp_path / "out"
    folder.mkdir()

    ended = run("restore", repo, "vm@latest", folder / "vm.img")

    assert ended.code == 3
    assert "is damaged" in ended.error_line
    assert os.listdir(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_restore_leaves_nothing(
    run: Run,
    repo: Path,
    backup: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    real_write = FileTarget.write

    def write_and_be_signalled(self: FileTarget, offset: int, data: bytes) -> None:
        real_write(self, offset, data)
        os.kill(os.getpid(), number)
        monkeypatch.setattr(FileTarget, "write", real_write)

    monkeypatch.setattr(FileTarget, "write", write_and_be_signalled)
    ended = run("restore", repo, "vm@latest", folder / "vm.img")

    assert ended.code == 130
    assert "cancelled" in ended.error_line
    assert os.listdir(folder) == []


def test_second_signal_ends_at_once_and_leaves_nothing(
    run: Run, repo: Path, backup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def be_signalled_twice(self: FileTarget, offset: int, data: bytes) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FileTarget, "write", be_signalled_twice)
    ended = run("restore", repo, "vm@latest", folder / "vm.img")

    assert ended.code == 130
    assert ended.error_line == "interrupted"
    assert os.listdir(folder) == []


@pytest.mark.tools
def test_device_is_restored_in_full_and_backed_up_again(
    run: Run, repo: Path, image: Path, backup: dict[str, Any], disk: Path, device: str
) -> None:
    restored = run("restore", repo, "vm@latest", device)
    again = run("backup", repo, device, "--volume", "vm", "--json")

    assert restored.code == 0, restored.err
    assert disk.read_bytes() == image.read_bytes()
    assert again.json[0]["kind"] == "incremental"
    assert again.json[0]["stored_bytes"] < 65536


@pytest.mark.tools
def test_device_overwritten_in_part_is_told(
    run: Run, repo: Path, backup: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_signalled(self: DeviceTarget, offset: int, size: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DeviceTarget, "write_hole", be_signalled)
    image = Path(repo).parent / "long.img"
    with image.open("wb") as file:
        file.write(b"data")
        file.truncate(8 * MIB)
    run("backup", repo, image)

    ended = run("restore", repo, "long@latest", device)

    assert ended.code == 130
    assert f"warning: {device!r} is overwritten in part" in ended.err.splitlines()[0]


@pytest.mark.tools
def test_device_that_takes_no_byte_is_not_called_overwritten(
    run: Run,
    repo: Path,
    backup: dict[str, Any],
    disk: Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that is read-only, which some kernels say at the first write only."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    before = disk.read_bytes()
    monkeypatch.setattr(os, "pwrite", refuse)

    ended = run("restore", repo, "vm@latest", device)

    assert ended.code == 1
    assert "Operation not permitted" in ended.error_line
    assert disk.read_bytes() == before


def test_mode_of_the_source_comes_back_less_the_umask(run: Run, repo: Path, image: Path) -> None:
    image.chmod(0o640)
    run("backup", repo, image)

    assert run("restore", repo, "vm@latest", image.with_name("out.img")).code == 0

    assert image.with_name("out.img").stat().st_mode & 0o777 == 0o640


# -- list and show -----------------------------------------------------------------------------


def test_empty_repository_lists_nothing(run: Run, repo: Path) -> None:
    assert listed(run, repo) == []
    assert len(run("list", repo).out.splitlines()) == 1


def test_image_that_ends_within_a_chunk_has_no_more_data_than_bytes(
    run: Run, repo: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(b"x" * 70_001)

    run("backup", repo, odd)

    (backup,) = listed(run, repo)
    assert backup["data_size"] == backup["size"] == 70_001
    assert run("stats", repo, "--json").json["data_bytes"] == 70_001


def test_list_of_one_volume(run: Run, repo: Path, image: Path) -> None:
    for volume in ("a", "b", "a"):
        run("backup", repo, image, "--volume", volume)

    found = run("list", repo, "--volume", "a", "--json").json

    assert [made["volume"] for made in found] == ["a", "a"]
    assert found[1]["parent_id"] == found[0]["id"]


def test_list_of_an_unknown_volume_fails(run: Run, repo: Path) -> None:
    ended = run("list", repo, "--volume", "no\nsuch")

    assert ended.code == 1
    assert r"no volume 'no\nsuch'" in ended.error_line


@pytest.mark.parametrize(
    "name", ["a\nb", "-dash", "\x1b[31mred", "grün [b]", "back\\slash", "b" * 255]
)
def test_hostile_names_stay_in_their_row(run: Run, repo: Path, image: Path, name: str) -> None:
    made = run("backup", repo, image, f"--volume={name}")
    shown = run("list", repo)

    assert made.code == 0, made.err
    assert len(shown.out.splitlines()) == 2
    assert "\x1b" not in shown.out + made.out
    assert listed(run, repo)[0]["volume"] == name
    assert run("show", "--", repo, f"{name}@latest").code == 0


def test_show_says_everything(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    run("metadata", repo, "vm", "--set", "-", stdin=b'{"owner": "an\\u001bna"}')
    run("backup", repo, Path(repo).parent / "vm.img")

    shown = run("show", repo, "vm@latest").out
    details = run("show", repo, "vm@latest", "--json").json

    assert details["id"] in shown and backup["id"] in shown
    assert "\x1b" not in shown and r'{"owner": "an\u001bna"}' in shown
    assert details["metadata"] == {"owner": "an\x1bna"}
    assert set(details) > SUMMARY_KEYS
    assert details["source_mode"] == "0644"
    assert details["description"]["display_name"] is None


# -- delete and prune --------------------------------------------------------------------------


def test_delete_in_any_order(run: Run, repo: Path, image: Path, tmp_path: Path) -> None:
    first, second = (run("backup", repo, image, "--json").json[0] for _ in range(2))

    ended = run("delete", repo, first["id"])

    assert ended.code == 0
    assert ended.out == f"deleted vm@{first['name'][:-4]} ({first['id'][:8]})\n"
    assert [made["id"] for made in listed(run, repo)] == [second["id"]]
    assert run("restore", repo, second["id"], tmp_path / "out.img").code == 0


def test_delete_takes_none_if_one_is_not_there(
    run: Run, repo: Path, backup: dict[str, Any]
) -> None:
    ended = run("delete", repo, "vm@latest", "ffffffff")

    assert ended.code == 1
    assert "'ffffffff'" in ended.error_line
    assert len(listed(run, repo)) == 1


def test_delete_of_one_backup_called_twice(run: Run, repo: Path, backup: dict[str, Any]) -> None:
    ended = run("delete", repo, "vm@latest", backup["id"])

    assert ended.code == 0
    assert ended.out.count("deleted") == 1
    assert listed(run, repo) == []


def test_delete_of_a_volume_by_its_name_is_no_id(run: Run, repo: Path, image: Path) -> None:
    """Volume "a" was taken for the beginning of an id, and an arbitrary backup went away."""
    (made,) = run("backup", repo, image, "--json").json
    run("backup", repo, image, "--volume", made["id"][:2])

    ended = run("delete", repo, made["id"][:2])

    assert ended.code == 2
    assert "is a volume: name its backups" in ended.error_line
    assert len(listed(run, repo)) == 2


def test_prune_says_first_and_does_then(run: Run, repo: Path, image: Path) -> None:
    ids = [run("backup", repo, image, "--json").json[0]["id"] for _ in range(3)]

    dry = run("prune", repo, "--keep-last", "1", "--dry-run")
    assert dry.code == 0
    assert dry.out.count("would delete vm@") == 2
    assert dry.out.endswith("kept 1 backup, would delete 2\n")
    assert len(listed(run, repo)) == 3

    done = run("prune", repo, "--keep-last", "1", "--json").json
    assert done["dry_run"] is False
    assert [made["id"] for made in done["kept"]] == ids[2:]
    assert {made["id"] for made in done["deleted"]} == set(ids[:2])
    assert [made["id"] for made in listed(run, repo)] == ids[2:]


def test_prune_of_one_volume_leaves_the_others(run: Run, repo: Path, image: Path) -> None:
    for volume in ("a", "b", "a", "b"):
        run("backup", repo, image, "--volume", volume)

    assert run("prune", repo, "--keep-daily", "1", "--volume", "a").code == 0

    assert [made["volume"] for made in listed(run, repo)] == ["a", "b", "b"]


def test_json_of_what_was_made_comes_also_when_the_rest_fails(
    run: Run, repo: Path, image: Path, tmp_path: Path
) -> None:
    ended = run("backup", repo, image, tmp_path / "absent.img", "--json")

    assert ended.code == 1
    assert [made["volume"] for made in ended.json] == ["vm"]
