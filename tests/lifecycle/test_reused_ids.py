"""A mount of a repository in which another process uses an id again."""

from __future__ import annotations

from pathlib import Path

from command_server import CommandServer
from lifecycle_mount import MIB, assert_same, becomes, content, site_in
from support.images import BytesSource

from backupfs.service import Service


def test_backup_under_an_id_that_was_used_again_is_shown_as_it_is(
    tmp_path: Path, commands: CommandServer
) -> None:
    backup_id = "0b0e4f2c-0000-4000-8000-000000000000"
    with site_in(tmp_path / "site", commands) as site:
        site.init()
        site.mount()
        with Service.open(str(site.repo)) as service:
            before = service.backup(BytesSource(content(MIB, 1)), volume="vm", backup_id=backup_id)
            shown = site.backups / f"{backup_id}.img"
            assert becomes(shown.exists, seconds=20)
            assert_same(shown.read_bytes(), content(MIB, 1), "the first")

            held = shown.open("rb", buffering=0)
            service.delete(before)
            service.backup(BytesSource(content(MIB, 2)), volume="vm", backup_id=backup_id)

            assert_same(shown.read_bytes(), content(MIB, 2), "the second")
            assert_same(site.latest("vm").read_bytes(), content(MIB, 2), "the second")
            held.seek(0)
            assert_same(held.read(), content(MIB, 1), "the first, still open")
            held.close()
            for _ in range(2):
                assert_same(shown.read_bytes(), content(MIB, 2), "the second")
