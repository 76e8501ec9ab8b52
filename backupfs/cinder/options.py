"""The options that Cinder's configuration has for backupfs."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

backupfs_opts = [
    cfg.StrOpt(
        "backup_backupfs_repository",
        help="The backupfs repository that keeps the backups: a folder that 'backupfs init' made, "
        "and that the service's user can write to. Required by the backupfs driver.",
    ),
    cfg.IntOpt(
        "backup_backupfs_compression_level",
        min=1,
        max=19,
        help="Level of zstd for what is stored from now on. Without it, the level that the "
        "repository was made with.",
    ),
    cfg.IntOpt(
        "backup_backupfs_lock_timeout",
        default=60,
        min=1,
        help="Seconds that an operation waits for another process that uses the same repository "
        "before it fails.",
    ),
]

CONF = cfg.CONF
CONF.register_opts(backupfs_opts)


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator: the options by group."""
    return [("DEFAULT", backupfs_opts)]
