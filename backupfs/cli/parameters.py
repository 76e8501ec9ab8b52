"""Arguments and options that several commands have."""

from __future__ import annotations

import re

import click

_SIZE = re.compile(r"(\d{1,18})\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

repository_argument = click.argument("repo", metavar="REPO")
json_option = click.option("--json", "is_json", is_flag=True, help="Print JSON, for scripts.")


def parse_size(value: str | int) -> int:
    """A size in bytes, also with a unit of powers of 1024: 65536, 64K, 64KiB.

    Raises:
        click.BadParameter: it is none.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size (say 65536, 64K or 64KiB)")
    number, unit = match.groups(default="")
    return int(number) * _UNITS[unit.upper()]
