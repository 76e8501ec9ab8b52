"""What is held stays held when the daemon is started again, and what was being written is held:
an incomplete image must not become a backup because some time has passed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from lifecycle_mount import KIB, MIB, Site, assert_same, content


def start_again(site: Site, how: str, options: str = "") -> None:
    if how == "killed":
        site.kill()
    else:
        site.unmount()
    site.mount(options)


restarts = pytest.mark.parametrize("how", ["killed", "unmounted"])


def reason_held(site: Site, name: str) -> str:
    draft = site.drafts()[name]
    assert draft["state"] == "held"
    return str(draft["reason"])


@restarts
def test_what_rsync_kept_of_a_broken_transfer_stays_held(mounted: Site, how: str) -> None:
    part = mounted.staging / ".vm.img.AbCdEf"
    part.write_bytes(content(MIB, 1))
    os.utime(part, ns=(0, 0))
    part.rename(mounted.staging / "vm.img")
    assert "rsync was interrupted" in reason_held(mounted, "vm.img")

    start_again(mounted, how)

    assert "rsync was interrupted" in reason_held(mounted, "vm.img")
    assert mounted.names("vm") == []


@restarts
def test_what_is_smaller_than_the_latest_stays_held_when_that_is_deleted(
    mounted: Site, how: str
) -> None:
    mounted.copy_in("vm.img", content(2 * MIB, 2))
    mounted.run("cp", mounted.image(content(MIB, 2)), mounted.staging / "vm.img")
    assert "smaller" in reason_held(mounted, "vm.img")
    (mounted.volumes / "vm" / mounted.names("vm")[0]).unlink()

    start_again(mounted, how)

    assert "smaller" in reason_held(mounted, "vm.img")
    assert mounted.names("vm") == []


@restarts
def test_what_waits_for_a_rename_stays_held(site: Site, how: str) -> None:
    site.mount("publish=rename")
    site.run("cp", site.image(content(MIB, 3)), site.staging / "vm.img")
    assert "renamed" in reason_held(site, "vm.img")

    start_again(site, how, "publish=rename")

    assert "renamed" in reason_held(site, "vm.img")
    assert site.names("vm") == []
    (site.staging / "vm.img").rename(site.staging / "other.img")
    assert len(site.names("other")) == 1


@restarts
def test_temporary_name_stays_held_and_is_published_by_its_rename(mounted: Site, how: str) -> None:
    data = content(MIB, 4)
    (mounted.staging / "vm.img.part").write_bytes(data)

    start_again(mounted, how)

    assert "temporary" in reason_held(mounted, "vm.img.part")
    (mounted.staging / "vm.img.part").rename(mounted.staging / "vm.img")
    assert_same(mounted.latest("vm").read_bytes(), data, "vm")


@restarts
def test_patch_of_what_is_held_does_not_complete_it(mounted: Site, how: str) -> None:
    part = mounted.staging / ".vm.img.AbCdEf"
    part.write_bytes(content(MIB, 5))
    os.utime(part, ns=(0, 0))
    part.rename(mounted.staging / "vm.img")
    with (mounted.staging / "vm.img").open("r+b") as file:
        file.write(b"patch")

    start_again(mounted, how)

    assert reason_held(mounted, "vm.img")
    assert mounted.names("vm") == []
    mounted.command("publish", "vm.img")
    assert len(mounted.names("vm")) == 1


def test_kill_while_one_of_two_writers_still_writes_holds_the_file(mounted: Site) -> None:
    """The first one's close makes durable what the second one has written so far, half of it."""
    data = content(4 * MIB, 6)
    mounted.copy_in("vm.img", data)
    path = mounted.staging / "vm.img"
    first, second = os.open(path, os.O_WRONLY), os.open(path, os.O_WRONLY)
    os.pwrite(second, content(256 * KIB, 7), MIB)
    os.pwrite(first, content(256 * KIB, 8), 0)
    os.close(first)

    mounted.kill()
    with pytest.raises(OSError):
        os.close(second)
    mounted.mount()

    assert "being written" in reason_held(mounted, "vm.img")
    assert len(mounted.names("vm")) == 1
    mounted.assert_verified()


def test_what_a_kill_held_is_a_head_like_any_other_once_published(mounted: Site) -> None:
    """The mark that it was being written must not outlive that: later patches would be held."""
    data = content(MIB, 1)
    mounted.copy_in("vm.img", data)
    file = os.open(mounted.staging / "vm.img", os.O_WRONLY)
    os.pwrite(file, b"half of a patch", 0)
    mounted.kill()
    with pytest.raises(OSError):
        os.close(file)
    mounted.mount()
    mounted.command("publish", "vm.img")

    mounted.kill()
    mounted.mount()

    assert mounted.drafts() == {}
    with (mounted.staging / "vm.img").open("r+b") as whole:
        whole.write(b"all of a patch")
    assert mounted.drafts() == {}
    assert_same(mounted.latest("vm").read_bytes(), b"all of a patch" + data[14:], "vm")


def test_writers_that_all_closed_are_published_after_a_kill(mounted: Site) -> None:
    data = content(4 * MIB, 9)
    mounted.copy_in("vm.img", data)
    path = mounted.staging / "vm.img"
    expected = bytearray(data)
    for offset in (0, MIB, 3 * MIB):
        one, other = os.open(path, os.O_WRONLY), os.open(path, os.O_WRONLY)
        for file, place in ((one, offset), (other, offset + 100 * KIB)):
            part = content(64 * KIB, place)
            os.pwrite(file, part, place)
            expected[place : place + len(part)] = part
        os.close(one)
        os.close(other)

    mounted.kill()
    mounted.mount()

    assert mounted.drafts() == {}
    assert_same(mounted.latest("vm").read_bytes(), bytes(expected), "vm")


def test_failed_rename_leaves_the_file_as_it_was(mounted: Site) -> None:
    """The states cannot be written: a rename that fails must not half happen."""
    (mounted.staging / "vm.img.part").write_bytes(content(MIB, 10))
    (folder,) = (mounted.repo / "drafts").iterdir()
    block, unblock = blocked(mounted, folder)
    block()
    try:
        with pytest.raises(OSError):
            (mounted.staging / "vm.img.part").rename(mounted.staging / "vm.img")
        assert os.listdir(mounted.staging) == ["vm.img.part"]
    finally:
        unblock()

    (mounted.staging / "vm.img.part").rename(mounted.staging / "vm.img")
    assert os.listdir(mounted.staging) == ["vm.img"]
    (mounted.staging / "vm.img").unlink()
    assert os.listdir(mounted.staging) == []


def test_publish_that_failed_is_tried_again_at_the_next_start(mounted: Site) -> None:
    """The data are complete and durable; only the record could not be written."""
    data = content(MIB, 11)
    mounted.may_log_errors = True
    block, unblock = blocked(mounted, mounted.repo / "records")
    block()
    try:
        mounted.run("cp", mounted.image(data), mounted.staging / "vm.img")
        assert "publishing failed" in reason_held(mounted, "vm.img")
        assert mounted.names("vm") == []
        mounted.kill()
        mounted.mount()
        assert "publishing failed" in reason_held(mounted, "vm.img")
    finally:
        unblock()

    mounted.remount()

    assert mounted.drafts() == {}
    assert_same(mounted.latest("vm").read_bytes(), data, "vm")


def test_publish_without_a_mount_decides_nothing_about_other_drafts(mounted: Site) -> None:
    mounted.may_log_errors = True
    contents = {f"v{number}": content(MIB, 20 + number) for number in range(3)}
    block, unblock = blocked(mounted, mounted.repo / "records")
    block()
    try:
        for volume, data in contents.items():
            mounted.run("cp", mounted.image(data), mounted.staging / f"{volume}.img")
        mounted.unmount()
    finally:
        unblock()

    mounted.command("publish", "v1.img")

    assert [item["volume"] for item in mounted.listed("list")] == ["v1"]
    mounted.mount()
    assert mounted.drafts() == {}
    for volume, data in contents.items():
        assert_same(mounted.latest(volume).read_bytes(), data, volume)


def blocked(site: Site, folder: object) -> tuple[Callable[[], None], Callable[[], None]]:
    """How to let nobody write into a folder, not even root, and how to allow it again."""
    probe = site.run("chattr", "+i", str(folder), check=False)
    if probe.returncode:
        pytest.skip("needs a file system with immutable folders, and root")
    site.run("chattr", "-i", str(folder))
    return (
        lambda: site.run("chattr", "+i", str(folder)) and None,
        lambda: site.run("chattr", "-i", str(folder)) and None,
    )
