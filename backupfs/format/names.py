"""Names of volumes and backups: what is allowed, and how a backup's file is called (pure)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from datetime import UTC, datetime

PART_SIZE_MAX = 255
VOLUME_SIZE_MAX = 4096
IMAGE_SUFFIXES = (".img", ".raw")
LATEST_NAME = "latest.img"
METADATA_NAME = "metadata.json"

NUMBER_MAX = 999_999_999
# The UTC time of the data, then -2, -3… for further backups of the same second.
BACKUP_NAME = re.compile(
    r"\d{4}-\d\d-\d\dT\d{6}Z(?:-(?:[2-9]|[1-9]\d{1,8}))?\.img",
    re.ASCII,
)


def check_volume_name(volume: str) -> str:
    """Why ``volume`` cannot be a volume's name; empty where it can."""
    try:
        encoded = volume.encode()
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if not encoded or len(encoded) > VOLUME_SIZE_MAX:
        return f"it must have 1 to {VOLUME_SIZE_MAX} bytes"
    for part in volume.split("/"):
        if part in (LATEST_NAME, METADATA_NAME) or BACKUP_NAME.fullmatch(part):
            return f"{part!r} is the name of a file that stands beside backups"
    return check_path(volume)


def check_path(path: str) -> str:
    """Why ``path``, which is text in UTF-8, names nothing below a folder; empty where it may."""
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "it has an empty part or one of dots"
        if "\0" in part:
            return "it has a zero byte"
        if len(part.encode()) > PART_SIZE_MAX:
            return f"a part of it is longer than {PART_SIZE_MAX} bytes"
    return ""


def folders_of(path: str) -> list[str]:
    """The folders that a path lies in, the innermost first."""
    folders = []
    while path := path.rpartition("/")[0]:
        folders.append(path)
    return folders


def volume_of(staged: str) -> str:
    """The volume that a path below ``staging/`` is for: the path without one image suffix."""
    for suffix in IMAGE_SUFFIXES:
        stem = staged.removesuffix(suffix)
        if stem != staged and stem and not stem.endswith("/"):
            return stem
    return staged


def backup_name(data_timestamp: datetime, taken: Collection[str]) -> str:
    """The file name of a backup of that moment, behind all those of its second in ``taken``."""
    stamp = stamp_of(data_timestamp)
    numbers = {number for found, number in map(order_of, taken) if found == stamp}
    # Not the first that is free: the newest backup has the highest, whatever was deleted before it.
    number = max(numbers, default=0) + 1
    if number > NUMBER_MAX:  # only a forged record is called so
        number = next(free for free in itertools.count(1) if free not in numbers)
    return f"{stamp}Z.img" if number == 1 else f"{stamp}Z-{number}.img"


def stamp_of(moment: datetime) -> str:
    """How the names of all backups of that second begin; see ``order_of``."""
    # Not strftime: it writes years before 1000 with fewer digits.
    return (
        moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds").replace(":", "")
    )


def order_of(name: str) -> tuple[str, int]:
    """A key that sorts backups of one volume by time, then by number."""
    stamp, _, number = name.removesuffix(".img").partition("Z")
    return stamp, int(number.removeprefix("-") or 1)
