"""A daemon whose mount was unmounted lazily, and what is mounted in its place meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from command_server import CommandServer
from lifecycle_mount import MIB, assert_same, becomes, content, is_alive, site_in


def test_mount_that_took_the_place_of_a_lazily_unmounted_one_is_left_alone(
    tmp_path: Path, commands: CommandServer
) -> None:
    """A program keeps the first daemon running; what is mounted there now is another repository."""
    with (
        site_in(tmp_path / "first", commands) as first,
        site_in(tmp_path / "second", commands) as second,
    ):
        for site in (first, second):
            site.init()
        first.mount(path=second.path)
        lingering = first.daemon(second.path)
        shutil.copyfile(first.image(content(MIB, 1)), second.staging / "vm.img")
        held = os.open(second.latest("vm"), os.O_RDONLY)
        try:
            first.run("umount", "-l", second.path)
            second.mount()
            second.copy_in("vm.img", content(2 * MIB, 2))
            shutil.copyfile(second.image(content(MIB, 3)), second.staging / "vm.img")
            assert second.drafts()["vm.img"]["state"] == "held"

            for command in (("drafts",), ("publish", "vm.img")):
                ended = first.command(*command, check=False)
                assert ended.returncode == 1 and "no more" in ended.stderr, ended
            assert len(second.names("vm")) == 1
            os.kill(lingering, signal.SIGTERM)
            assert becomes(lambda: not is_alive(lingering), seconds=20)
        finally:
            with contextlib.suppress(OSError):  # its daemon has ended
                os.close(held)

        assert second.is_mounted()
        assert_same(second.latest("vm").read_bytes(), content(2 * MIB, 2), "of the second")
