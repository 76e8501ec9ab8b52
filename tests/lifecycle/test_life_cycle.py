"""How a mount begins and ends: commands, signals, the logs, mount(8), and a dead mount's removal."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lifecycle_mount import (
    BACKUPFS,
    MIB,
    Ended,
    Site,
    assert_same,
    becomes,
    content,
    end_process,
    is_alive,
    kill_and_wait,
)

from backupfs import daemon
from backupfs.daemon import MountOptions
from backupfs.errors import MountFailed, StorageUnavailable, UnmountFailed
from backupfs.service import Service
from backupfs.staging import drafts

IS_ROOT = os.geteuid() == 0


def reason_of(ended: Ended) -> str:
    """The one line in which a command said why it failed."""
    assert ended.returncode != 0, ended.stdout
    assert ended.stderr.startswith("backupfs: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stdout == ""
    return ended.stderr.removeprefix("backupfs: ").rstrip("\n")


class SlowCopy:
    """A copy into the mount that has begun and does not end."""

    def __init__(self, site: Site, name: str, data: bytes) -> None:
        self.process = site.start("dd", f"of={site.staging / name}", stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()
        staged = site.staging / name
        assert becomes(lambda: staged.exists() and staged.stat().st_size > 0, seconds=20)

    def end(self) -> int:
        """What it says when it goes on."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(timeout=30)


# -- starting ----------------------------------------------------------------------------------


def test_mount_answers_when_the_command_returns(site: Site) -> None:
    site.run(BACKUPFS, "mount", site.repo, site.path)

    assert sorted(os.listdir(site.path)) == [
        ".backupfs",
        "README.txt",
        "backups",
        "staging",
        "volumes",
    ]
    assert is_alive(site.daemon())
    site.run(BACKUPFS, "unmount", site.path)
    assert os.listdir(site.path) == []


def test_daemon_has_no_terminal_no_folder_and_no_streams_of_its_starter(site: Site) -> None:
    site.run(BACKUPFS, "mount", site.repo, site.path)

    process = Path(f"/proc/{site.daemon()}")
    assert os.readlink(process / "cwd") == "/"
    assert {os.readlink(process / f"fd/{stream}") for stream in range(3)} == {"/dev/null"}
    session = process.joinpath("stat").read_text().rpartition(")")[2].split()[3]
    assert int(session) == site.daemon()


def test_failed_start_says_why_in_one_line(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    inside = site.repo / "inside"
    inside.mkdir()
    places = {
        tmp_path / "absent": "it is no folder",
        file: "it is no folder",
        inside: "must not lie in each other",
        site.repo: "must not lie in each other",
        site.folder: "must not lie in each other",
    }

    for place, reason in places.items():
        assert reason in reason_of(site.try_mount(path=place))
        assert not site.is_mounted(place)
    inside.rmdir()


@pytest.mark.parametrize("what", ["index", "log"])
def test_mount_over_what_the_daemon_writes_to_is_refused(site: Site, what: str) -> None:
    """It would wait for itself as soon as it looked there."""
    if what == "index":
        site.environment["XDG_CACHE_HOME"] = str(site.path / "cache")
    else:
        site.log_file = site.path / "backupfs.log"

    reason = reason_of(site.try_mount())

    assert f"own '{site.path}/" in reason and "must not lie below it" in reason
    assert not site.is_mounted()


def test_mount_through_a_link_into_the_repository_is_refused(site: Site, tmp_path: Path) -> None:
    (site.repo / "inside").mkdir()
    link = tmp_path / "link"
    link.symlink_to(site.repo / "inside")

    assert "must not lie in each other" in reason_of(site.try_mount(path=link))


def test_mount_of_no_repository_says_so(site: Site, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for place in (tmp_path / "empty", tmp_path / "absent"):
        ended = site.run(BACKUPFS, "mount", place, site.path, check=False)
        assert "no backupfs repository" in reason_of(ended)
        assert not site.is_mounted()


def test_second_mount_at_the_same_place_is_refused(mounted: Site) -> None:
    reason = reason_of(mounted.try_mount())

    assert "mounted there already" in reason
    assert (mounted.path / "README.txt").exists()


def test_second_writer_is_refused_and_told_where_the_first_is(mounted: Site) -> None:
    second = mounted.folder / "second"
    second.mkdir()
    mounted.may_log_errors = True

    reason = reason_of(mounted.try_mount(path=second))

    assert str(mounted.daemon()) in reason and str(mounted.path) in reason
    assert not mounted.is_mounted(second)
    assert mounted.staging.exists()


def test_mount_without_the_device_says_so(site: Site) -> None:
    """A private /dev without fuse, as in a container that was not given it."""
    script = 'mount -t tmpfs none /dev && exec "$@"'
    words = ("sh", "-c", script, "sh", BACKUPFS, "mount", site.repo, site.path)

    probe = site.run("unshare", "-m", "true", check=False)
    if not IS_ROOT or probe.returncode:
        pytest.skip("needs a mount namespace of its own")
    ended = site.run("unshare", "-m", *words, check=False)

    assert "device not found" in reason_of(ended)
    assert not site.is_mounted()


def test_mount_with_a_log_that_cannot_be_written_says_so(site: Site) -> None:
    ended = site.command("mount", site.path, "-o", "log_file=/no/such/folder/log", check=False)

    assert "/no/such/folder/log" in reason_of(ended)
    assert not site.is_mounted()


def test_mount_without_a_place_for_the_index_says_so(site: Site) -> None:
    """As of a user without a home, or one that is read-only; the log has its place there as well."""
    site.environment["XDG_CACHE_HOME"] = "/proc/no/such/folder"
    site.may_log_errors = True

    for words in (("mount", site.path), ("mount", site.path, "-o", f"log_file={site.log_file}")):
        ended = site.command(*words, check=False)
        assert "/proc/no" in reason_of(ended)
        assert "Error" not in ended.stderr
    ended = site.command("list", check=False)

    assert "its index cannot be kept in '/proc/no/such/folder" in reason_of(ended)
    assert "XDG_CACHE_HOME" in ended.stderr


def test_mount_at_and_beside_an_odd_place(mounted: Site) -> None:
    """The kernel's table of mounts escapes blanks, tabs, newlines and backslashes, and no more."""
    odd = mounted.folder / "a b\t\n\\040\r\x0c\x1c\x85\u2028\udcff"
    odd.mkdir()

    mounted.mount("ro", path=odd)
    mounted.remount()

    assert mounted.is_mounted(odd)
    mounted.unmount(path=odd)
    assert not mounted.is_mounted(odd)


def test_unknown_option_is_wrong_usage(site: Site) -> None:
    ended = site.try_mount("settle=5,colour=blue")

    assert ended.returncode == 2
    assert "colour=blue" in reason_of(ended)


# -- unmounting --------------------------------------------------------------------------------


def test_unmount_returns_when_the_process_is_gone(mounted: Site) -> None:
    daemon = mounted.daemon()
    mounted.copy_in("vm.img", content(3 * MIB, 1))

    mounted.unmount()

    assert not is_alive(daemon)
    assert not mounted.is_mounted()
    assert list((mounted.repo / "spool").iterdir()) == [mounted.repo / "spool" / "reserve"]
    assert [path for path in (mounted.repo / "sessions").iterdir() if path.is_file()] == []


def test_unmount_while_busy_is_refused_and_the_mount_works_on(mounted: Site) -> None:
    data = content(2 * MIB, 2)
    copy = SlowCopy(mounted, "vm.img", data)

    ended = mounted.try_unmount()
    mounted.copy_in("other.img", data)

    assert f"in use by a program (see 'fuser -vm {mounted.path}')" in reason_of(ended)
    assert copy.end() == 0
    assert_same(mounted.latest("vm").read_bytes(), data, "vm")
    assert_same(mounted.latest("other").read_bytes(), data, "other")
    mounted.unmount()


def test_unmount_of_what_is_not_ours_is_refused(site: Site) -> None:
    for place in (site.path, site.folder / "absent", Path("/")):
        ended = site.try_unmount(place)
        assert "no backupfs is mounted there" in reason_of(ended)


def test_unmount_by_a_relative_path_and_through_a_link(mounted: Site) -> None:
    link = mounted.folder / "link"
    link.symlink_to(mounted.folder)

    mounted.unmount(link / "mnt")

    assert not mounted.is_mounted()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_unmounts(mounted: Site, number: int) -> None:
    daemon = mounted.daemon()
    mounted.copy_in("vm.img", content(MIB, 3))

    kill_and_wait(daemon, number)

    assert not mounted.is_mounted()
    mounted.assert_verified()
    assert mounted.log_text().rstrip().endswith("unmounted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_a_copy_keeps_the_draft_held_and_resumable(
    mounted: Site, number: int
) -> None:
    data = content(6 * MIB, 4)
    copy = SlowCopy(mounted, "vm.img", data[: 2 * MIB])

    kill_and_wait(mounted.daemon(), number)

    assert copy.end() != 0
    assert not mounted.is_mounted()
    mounted.mount()
    draft = mounted.drafts()["vm.img"]
    assert draft["state"] == "held" and "while it was being written" in draft["reason"]
    assert mounted.names("vm") == []
    kept = (mounted.staging / "vm.img").read_bytes()
    assert len(kept) >= MIB
    assert_same(kept, data[: len(kept)], "what was kept")
    resume = ("rsync", "--inplace", "--append", mounted.image(data), mounted.staging / "vm.img")
    mounted.run(*resume)
    assert_same(mounted.latest("vm").read_bytes(), data, "the resumed copy")
    assert mounted.drafts() == {}


def test_what_was_closed_before_a_signal_is_there_after_it(mounted: Site) -> None:
    """Copies end all the time while the signal comes; each that ended well must be kept."""
    closed: list[tuple[str, int]] = []
    sources = {seed: mounted.image(content(MIB, seed), f"s{seed}") for seed in range(4)}

    def copy_on_and_on(part: int) -> None:
        for count in range(1000):
            seed = (part + count) % 4
            name = f"v{part}-{count}"
            try:
                shutil.copyfile(sources[seed], mounted.staging / f"{name}.img")
            except OSError:
                return
            closed.append((name, seed))

    writers = [threading.Thread(target=copy_on_and_on, args=(part,)) for part in range(3)]
    for writer in writers:
        writer.start()
    assert becomes(lambda: len(closed) > 20, seconds=30)
    kill_and_wait(mounted.daemon(), signal.SIGTERM)
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive()

    mounted.mount()
    for name, seed in closed:
        assert_same(mounted.latest(name).read_bytes(), content(MIB, seed), name)
    assert all(draft["state"] == "held" for draft in mounted.drafts().values())
    mounted.assert_verified()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_in_the_first_moments_leaves_nothing_that_hangs(site: Site, number: int) -> None:
    """A thread of the daemon that looks into the mount itself would never end, nor the mount."""
    for _ in range(3):
        words = (BACKUPFS, "mount", site.repo, site.path, "--foreground")
        process = site.start(*words, stderr=subprocess.DEVNULL)
        assert becomes(site.is_mounted, seconds=20)
        time.sleep(random.Random(number).uniform(0, 0.01))
        process.send_signal(number)
        assert process.wait(timeout=20) in (0, -number)

        with contextlib.suppress(OSError):
            site.path.stat()
        if site.is_mounted():
            site.unmount()
    site.mount()
    site.copy_in("vm.img", content(MIB, 1))


# -- dead mounts -------------------------------------------------------------------------------


def test_dead_mount_is_cleaned_up_at_the_next_start(mounted: Site) -> None:
    data = content(MIB, 5)
    mounted.copy_in("vm.img", data)
    mounted.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mounted.path)

    ended = mounted.try_mount()

    assert ended.returncode == 0
    assert ended.stderr == f"backupfs: warning: removing the dead mount at {mounted.path}\n"
    assert_same(mounted.latest("vm").read_bytes(), data, "vm")
    mounted.unmount()
    assert not mounted.is_mounted(), "the dead one is still below"


def test_dead_mount_behind_links_is_cleaned_up(mounted: Site) -> None:
    link, other = mounted.folder / "link", mounted.folder / "other"
    other.symlink_to(mounted.path.name)
    link.symlink_to(other)
    mounted.kill()

    mounted.mount(path=link)

    assert mounted.is_mounted()
    mounted.unmount(path=link)
    assert not mounted.is_mounted(), "the dead one is still below"


def test_dead_mount_can_be_unmounted(mounted: Site) -> None:
    mounted.kill()

    mounted.unmount()

    assert not mounted.is_mounted()


def test_dead_mount_that_programs_still_use_is_cleaned_up_all_the_same(mounted: Site) -> None:
    mounted.copy_in("vm.img", content(MIB, 5))
    user = mounted.start("sleep", "60", cwd=mounted.staging)
    reader = mounted.start("tail", "-f", mounted.latest("vm"), stdout=subprocess.DEVNULL)
    mounted.kill()

    mounted.mount()

    assert mounted.latest("vm").exists()
    for process in (user, reader):
        end_process(process)
    mounted.unmount()
    assert not mounted.is_mounted(), "the dead one is still below"


def test_dead_mount_of_something_else_is_left_alone(site: Site) -> None:
    """A dead FUSE mount that is not ours: another program's business."""
    script = (
        "import os, sys, pyfuse3\n"
        "options = {'fsname=other', 'subtype=other'}\n"
        "pyfuse3.init(pyfuse3.Operations(), sys.argv[1], options)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    site.run(Path(BACKUPFS).with_name("python"), "-c", script, site.path, check=False)
    assert site.is_mounted()

    reason = reason_of(site.try_mount())

    assert "not connected" in reason
    assert site.is_mounted()


def test_stopped_daemon_is_alive_and_left_alone(mounted: Site) -> None:
    """It does not answer, but it is not dead: a second start must not touch its mount."""
    daemon = mounted.daemon()
    os.kill(daemon, signal.SIGSTOP)
    try:
        process = mounted.start(
            BACKUPFS, "mount", mounted.repo, mounted.path, stderr=subprocess.DEVNULL
        )
        time.sleep(1.5)
        assert process.poll() != 0
        assert mounted.is_mounted()
    finally:
        os.kill(daemon, signal.SIGCONT)

    assert process.wait(timeout=30) != 0
    assert mounted.daemon() == daemon
    assert (mounted.path / "README.txt").exists()


def test_daemon_that_does_not_answer_is_waited_for_a_while_only(
    mounted: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon, "ANSWER_SECONDS_MAX", 1.0)
    monkeypatch.setattr(drafts, "MOUNT_SECONDS_MAX", 1.0)
    monkeypatch.setattr(drafts, "PUBLISH_SECONDS_MAX", 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", mounted.environment["XDG_CACHE_HOME"])
    process = mounted.daemon()
    os.kill(process, signal.SIGSTOP)
    try:
        with Service.open(str(mounted.repo)) as service:
            with pytest.raises(StorageUnavailable, match="does not answer"):
                service.drafts()
            with pytest.raises(StorageUnavailable, match="did not answer"):
                service.publish("vm.img")
        with pytest.raises(UnmountFailed, match="did not answer"):
            daemon.unmount(str(mounted.path))
        with pytest.raises(MountFailed, match="did not answer"):
            daemon.mount(str(mounted.repo), str(mounted.path), MountOptions(), foreground=True)
    finally:
        os.kill(process, signal.SIGCONT)

    assert f"{str(mounted.path)!r}: the mount does not answer" in caplog.text
    assert mounted.daemon() == process
    # Who asked may yet have something open, for a moment.
    assert becomes(lambda: mounted.try_unmount().returncode == 0, seconds=20)


# -- logs --------------------------------------------------------------------------------------


def test_log_file_tells_the_life_of_the_daemon(mounted: Site) -> None:
    mounted.copy_in("vm.img", content(MIB, 6))
    mounted.remount()

    log = mounted.log_text()
    assert "published 'vm.img'" in log and "unmounted" in log
    assert "Traceback" not in log


def test_without_a_system_log_there_is_a_file_beside_the_index(site: Site) -> None:
    if Path("/dev/log").exists():
        pytest.skip("the host has a system log, which gets the lines")
    site.command("mount", site.path)
    site.copy_in("vm.img", content(MIB, 7))
    site.unmount()

    assert "published 'vm.img'" in (site.folder / "cache/backupfs/log/backupfs.log").read_text()


def test_foreground_logs_to_stderr_and_returns_when_unmounted(site: Site) -> None:
    words = (BACKUPFS, "mount", site.repo, site.path, "--foreground")
    process = site.start(*words, stderr=subprocess.PIPE)
    assert becomes(lambda: (site.path / "README.txt").exists(), seconds=20)
    assert site.daemon() == process.pid

    site.copy_in("vm.img", content(MIB, 8))
    site.unmount()

    assert process.stderr is not None
    log = process.stderr.read().decode()
    assert process.wait(timeout=20) == 0
    assert f"mounted at {site.path}" in log and "published 'vm.img'" in log
    assert log.rstrip().endswith("unmounted")


def test_foreground_start_that_fails_says_why(site: Site) -> None:
    ended = site.command("mount", site.folder, "--foreground", check=False)

    assert "must not lie in each other" in reason_of(ended)


# -- mount(8) ----------------------------------------------------------------------------------


needs_mount8 = pytest.mark.skipif(
    not IS_ROOT or shutil.which("mount.fuse3") is None, reason="needs root and mount.fuse3"
)


@needs_mount8
def test_mount_by_the_helper_of_mount8(site: Site) -> None:
    options = f"rw,nosuid,allow_other,umask=027,log_file={site.log_file}"

    site.run("mount.fuse3", site.repo, site.path, "-t", "fuse.backupfs", "-o", options)

    site.copy_in("vm.img", content(MIB, 9))
    assert site.latest("vm").stat().st_mode & 0o777 == 0o440
    site.unmount()


@needs_mount8
def test_mount_by_a_line_of_fstab(site: Site) -> None:
    """mount(8) looks for backupfs in the system's folders only, so those of a private namespace."""
    fstab = site.folder / "fstab"
    options = (
        f"rw,allow_other,umask=022,nofail,_netdev,x-systemd.automount,log_file={site.log_file}"
    )
    fstab.write_text(f"{site.repo}  {site.path}  fuse.backupfs  {options}  0  0\n")
    script = """
        mount -t tmpfs none /usr/local/bin
        ln -s "$1" /usr/local/bin/backupfs
        mount -T "$2" "$3"
        cp "$4" "$3/staging/vm.img"
        cmp "$4" "$3/volumes/vm/latest.img"
        backupfs unmount "$3"
    """
    image = site.image(content(MIB, 10))
    words = ("sh", "-euc", script, "sh", BACKUPFS, fstab, site.path, image)

    site.run("unshare", "-m", *words)

    (made,) = site.listed("list")
    assert made["volume"] == "vm"


@needs_mount8
def test_mount_by_the_helper_reports_a_failure(site: Site) -> None:
    (site.folder / "empty").mkdir()
    words = ("mount.fuse3", site.folder / "empty", site.path, "-t", "fuse.backupfs", "-o", "rw")

    ended = site.run(*words, check=False)

    assert ended.returncode != 0
    assert "no backupfs repository" in ended.stderr
    assert not site.is_mounted()


# -- read-only mounts --------------------------------------------------------------------------


@pytest.fixture
def beside(mounted: Site) -> Iterator[Path]:
    """A read-only mount beside the one that writes."""
    path = mounted.folder / "beside"
    path.mkdir()
    mounted.mount("ro", path=path)
    yield path
    mounted.unmount(path)


def test_read_only_mount_shows_what_the_other_does(mounted: Site, beside: Path) -> None:
    data = content(3 * MIB, 11)
    mounted.copy_in("vm.img", data)
    shown = beside / "volumes/vm/latest.img"

    assert becomes(shown.exists, seconds=20)
    assert_same(shown.read_bytes(), data, "beside")

    (mounted.volumes / "vm" / mounted.names("vm")[0]).unlink()
    assert becomes(lambda: not shown.exists(), seconds=20)


def test_read_only_mount_takes_nothing(mounted: Site, beside: Path) -> None:
    mounted.copy_in("vm.img", content(MIB, 12))
    shown = beside / "volumes/vm/latest.img"
    assert becomes(shown.exists, seconds=20)

    for words in (
        ("cp", mounted.image(b"x"), beside / "staging/x.img"),
        ("touch", beside / "volumes/x"),
        ("rm", "-f", beside / "volumes/vm" / os.readlink(shown)),
        ("cp", mounted.image(b"{}"), beside / "volumes/vm/metadata.json"),
    ):
        assert mounted.run(*words, check=False).returncode != 0, words
    assert mounted.names("vm") == [os.readlink(shown)]


def test_read_only_mount_with_an_index_of_its_own_reads_new_backups_at_once(
    mounted: Site,
) -> None:
    """As on another host: packs it has not heard of are looked for whenever they are met."""
    path = mounted.folder / "beside"
    path.mkdir()
    mounted.environment["XDG_CACHE_HOME"] = str(mounted.folder / "other-cache")
    mounted.mount("ro", path=path)

    for number in range(6):
        data = content(MIB, 20 + number)
        mounted.copy_in(f"vm{number}.img", data)
        shown = path / f"volumes/vm{number}/latest.img"
        assert becomes(shown.exists, seconds=20)
        assert_same(shown.read_bytes(), data, shown)
    mounted.unmount(path)


def test_repository_on_a_read_only_file_system_can_be_mounted_read_only(site: Site) -> None:
    if not IS_ROOT:
        pytest.skip("needs root to mount")
    data = content(MIB, 13)
    site.may_log_errors = True
    site.mount()
    site.copy_in("vm.img", data)
    site.unmount()
    site.run("mount", "--bind", site.repo, site.repo)
    try:
        site.run("mount", "-o", "remount,bind,ro", site.repo)
        refused = reason_of(site.try_mount())
        site.mount("ro")
        assert_same(site.latest("vm").read_bytes(), data, "vm")
        site.unmount()
        site.assert_verified()
    finally:
        site.run("umount", site.repo)

    assert "Read-only file system" in refused
