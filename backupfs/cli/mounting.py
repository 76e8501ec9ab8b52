"""Commands on mounts: mount, unmount.

What they need beyond the rest of backupfs is imported when they run, so that a host without it
can do everything else.
"""

from __future__ import annotations

import click

from backupfs.cli import output
from backupfs.cli.parameters import repository_argument
from backupfs.errors import MountFailed


@click.command("mount")
@repository_argument
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPTIONS",
    help="ro, allow_other, umask=, uid=, gid=, settle=SECONDS, settle_all, publish=rename, "
    "log_file=PATH; what else fstab may hold is ignored.",
)
@click.option("--foreground", "-f", is_flag=True, help="Stay, and log to standard error.")
def mount_command(repo: str, mountpoint: str, options: tuple[str, ...], foreground: bool) -> None:
    """Mount a repository as a folder.

    Returns when the mount answers. Copy images to staging/ to back them up, read them in
    volumes/. The word 'mount' may be left out, as mount(8) does.

    \b
    backupfs mount /srv/backups /mnt/backups
    backupfs mount /srv/backups /mnt/backups -o allow_other,umask=022
    mount -t fuse.backupfs /srv/backups /mnt/backups
    """
    try:
        from backupfs import daemon
    except ImportError as error:
        raise MountFailed(mountpoint=mountpoint, reason=missing_part(error)) from error
    parsed = daemon.parse_mount_options(",".join(options))
    if foreground:
        output.end_reported_log()
    daemon.mount(repo, mountpoint, parsed, foreground=foreground)


@click.command("unmount")
@click.argument("mountpoint", metavar="MOUNTPOINT")
def unmount_command(mountpoint: str) -> None:
    """Unmount, when everything is safely stored.

    Returns when all that was copied is durable and the mount's process is gone; refuses while a
    program uses the mount.

    \b
    backupfs unmount /mnt/backups
    """
    try:
        from backupfs import daemon
    except ImportError as error:
        raise MountFailed(mountpoint=mountpoint, reason=missing_part(error)) from error
    daemon.unmount(mountpoint)


def missing_part(error: ImportError) -> str:
    return f"{error.name or error} is not installed (pip install 'backupfs[mount]')"
