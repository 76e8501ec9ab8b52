"""The options of a mount: what stands behind ``-o``, in fstab or on the command line (pure)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from backupfs.errors import InvalidOption

SETTLE_SECONDS_MAX = 24 * 3600.0

# Words of mount(8), fstab(5) and systemd that say nothing to us.
_IGNORED = {
    *("rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group"),
    *("dev", "nodev", "suid", "nosuid", "exec", "noexec", "async", "sync", "dirsync"),
    *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime"),
    *("lazytime", "nolazytime", "nofail", "_netdev", "silent", "loud", "mand", "nomand"),
    *("default_permissions", "nonempty"),
}
_IGNORED_PREFIXES = ("x-", "comment=", "fsname=", "subtype=", "context=", "setuid=")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """What a mount is to be like."""

    read_only: bool = False
    allow_other: bool = False
    umask: int = 0o022
    uid: int | None = None  # None: of whoever staged a file, of the daemon for the rest
    gid: int | None = None
    settle: float = 5.0  # seconds
    settle_all: bool = False
    publish_on_rename_only: bool = False
    log_file: Path | None = None


def parse_mount_options(text: str) -> MountOptions:
    """Read "ro,allow_other,umask=022,uid=1000,settle=5,publish=rename".

    Raises:
        InvalidOption: names the word that is wrong.
    """
    options = MountOptions()
    for word in text.split(","):
        word = word.strip()
        if word and word not in _IGNORED and not word.startswith(_IGNORED_PREFIXES):
            options = _apply(options, word)
    return options


def _apply(options: MountOptions, word: str) -> MountOptions:
    name, separator, value = word.partition("=")
    if not separator:
        if name == "ro":
            return replace(options, read_only=True)
        if name == "allow_other":
            return replace(options, allow_other=True)
        if name == "settle_all":
            return replace(options, settle_all=True)
        raise InvalidOption(option=word, reason="not an option of a backupfs mount")
    if name == "umask":
        return replace(options, umask=_number(word, value, base=8, high=0o777))
    if name == "uid":
        return replace(options, uid=_number(word, value, base=10, high=(1 << 32) - 2))
    if name == "gid":
        return replace(options, gid=_number(word, value, base=10, high=(1 << 32) - 2))
    if name == "settle":
        return replace(options, settle=_seconds(word, value))
    if name == "publish":
        if value not in ("rename", "close"):
            raise InvalidOption(option=word, reason="'rename' or 'close' (the default)")
        return replace(options, publish_on_rename_only=value == "rename")
    if name == "log_file":
        if not value.startswith("/"):
            raise InvalidOption(option=word, reason="a path that begins with '/' is missing")
        return replace(options, log_file=Path(value))
    raise InvalidOption(option=word, reason="not an option of a backupfs mount")


def _number(word: str, value: str, *, base: int, high: int) -> int:
    try:
        if not value.isascii() or not value.isdigit():
            raise ValueError(value)
        number = int(value, base)
    except ValueError as error:
        raise InvalidOption(option=word, reason="a number is missing") from error
    if number > high:
        raise InvalidOption(option=word, reason="the number is too large")
    return number


def _seconds(word: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError as error:
        raise InvalidOption(option=word, reason="a number of seconds is missing") from error
    if not 0 <= seconds <= SETTLE_SECONDS_MAX:
        raise InvalidOption(option=word, reason=f"from 0 to {SETTLE_SECONDS_MAX:.0f} seconds")
    return seconds
