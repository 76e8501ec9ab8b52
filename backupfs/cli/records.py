"""Commands on records and volumes' metadata: export, import, metadata."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from backupfs.cli import output
from backupfs.cli.describe import label, record_summary, short_id
from backupfs.cli.exit_codes import DONE, exit_code
from backupfs.cli.parameters import json_option, repository_argument
from backupfs.errors import (
    BackupExists,
    BackupfsError,
    InvalidMetadata,
    InvalidRecord,
    MissingData,
)
from backupfs.format.record import METADATA_SIZE_MAX, RECORD_SIZE_MAX
from backupfs.hostsources import STREAM_WORD
from backupfs.hosttargets import FileTarget, check_lies_outside
from backupfs.service import ImportOutcome, Service

# What is wrong with one record, and leaves the others to be taken in.
RECORD_ERRORS = (InvalidRecord, MissingData, BackupExists)


@click.command("export")
@repository_argument
@click.argument("backup", metavar="BACKUP")
@click.argument("file", default=STREAM_WORD, metavar="[FILE]")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export_command(repo: str, backup: str, file: str, force: bool) -> None:
    """Write a backup's record to a file.

    The record is small and describes the backup completely: together with the repository's packs
    it brings a deleted backup back ('backupfs import'). Without FILE, or with '-', it goes to
    standard output.

    \b
    backupfs export /srv/backups web01@latest web01.msgpack
    backupfs export /srv/backups 0b0e4f2c | ssh safe 'cat > 0b0e4f2c.msgpack'
    """
    if file == STREAM_WORD and sys.stdout.isatty():
        raise click.UsageError("a record is nothing for a terminal: give a FILE, or redirect")
    with Service.open(repo) as service:
        data = service.export_record(service.resolve(backup))
        if file != STREAM_WORD:
            check_lies_outside(file, service.repository.folder)
    if file == STREAM_WORD:
        sys.stdout.buffer.write(data)
        return
    # Never a device: to a disk, named by mistake, a record is a few bytes over its start.
    with FileTarget(file, force=force, mode=0o644) as target:
        target.write(0, data)
        target.finish(len(data))


@click.command("import")
@repository_argument
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
def import_command(repo: str, files: tuple[str, ...], is_json: bool) -> int:
    """Take backups in again from their records.

    A record is taken if it is intact, of this repository, and its data are still there. One that
    is there already is no error. If one of several fails, the others are taken all the same.

    \b
    backupfs import /srv/backups web01.msgpack
    backupfs import /srv/backups exported/*.msgpack
    """
    taken: list[dict[str, Any]] = []
    failures: list[BackupfsError] = []
    try:
        with Service.open(repo) as service:
            for file in files:
                try:
                    outcome = service.import_record(read_bounded(file, RECORD_SIZE_MAX))
                except RECORD_ERRORS as error:
                    failures.append(error)
                    output.report(f"{file!r}: {error}")
                    continue
                except OSError as error:
                    failures.append(InvalidRecord(reason=error.strerror))
                    output.report(f"{file!r}: {error.strerror}")
                    continue
                there = {"already_there": outcome.already_there}
                taken.append(record_summary(outcome.record) | there)
                if not is_json:
                    output.print_line(import_line(outcome))
    finally:
        if is_json:
            output.print_json(taken)
    return exit_code(failures[0]) if failures else DONE


def import_line(outcome: ImportOutcome) -> str:
    what = "already there:" if outcome.already_there else "imported"
    return f"{what} {label(outcome.record)} ({short_id(outcome.record)})"


@click.command("metadata")
@repository_argument
@click.argument("volume", metavar="VOLUME")
@click.option("--set", "file", metavar="FILE", help="Replace it by the JSON object in FILE.")
@click.option("--json", is_flag=True, expose_value=False, help="Changes nothing: it is JSON.")
def metadata_command(repo: str, volume: str, file: str | None) -> None:
    """Print or replace a volume's metadata.

    The metadata is a JSON object that backupfs keeps and never interprets; later backups of the
    volume carry it in their records.

    \b
    backupfs metadata /srv/backups web01
    backupfs metadata /srv/backups web01 --set web01.json
    echo '{"owner": "anna"}' | backupfs metadata /srv/backups web01 --set -
    """
    replacement = None if file is None else parse_metadata(read_bounded(file, METADATA_SIZE_MAX))
    with Service.open(repo) as service:
        if replacement is not None:
            service.put_metadata(volume, replacement)
        else:
            output.print_json(service.get_metadata(volume))


def parse_metadata(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. Raises: InvalidMetadata."""
    if len(data) > METADATA_SIZE_MAX:
        raise InvalidMetadata(reason=f"it has more than {METADATA_SIZE_MAX} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(reason=f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidMetadata(reason="it is JSON, but no object")
    return value


def read_bounded(file: str, size_max: int) -> bytes:
    """A file's bytes, '-' for standard input; of a larger one, just too many for its reader."""
    if file == STREAM_WORD:
        return sys.stdin.buffer.read(size_max + 1)
    with Path(file).open("rb") as opened:
        return opened.read(size_max + 1)
