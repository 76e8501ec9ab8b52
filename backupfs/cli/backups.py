"""Commands on backups: backup, restore, list, show, delete, prune."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from backupfs.cli import output
from backupfs.cli.describe import (
    compact_time,
    counted,
    human_size,
    label,
    record_details,
    record_summary,
    short_id,
    stamp,
)
from backupfs.cli.escaping import printable
from backupfs.cli.exit_codes import DONE, exit_code
from backupfs.cli.interruption import cancellable
from backupfs.cli.output import Column
from backupfs.cli.parameters import json_option, repository_argument
from backupfs.errors import BackupfsError, ImageTooLarge, ImageTooSmall, InvalidName, SourceFailed
from backupfs.format.names import volume_of
from backupfs.format.record import Record
from backupfs.hostsources import STREAM_WORD, open_source
from backupfs.hosttargets import check_lies_outside, open_target
from backupfs.service import LATEST, RetentionPolicy, Service

# What is wrong with one source, and leaves the others to be backed up.
SOURCE_ERRORS = (SourceFailed, InvalidName, ImageTooLarge, ImageTooSmall)


@click.command("backup")
@repository_argument
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--volume", metavar="NAME", help="The volume's name; only with one SOURCE.")
@click.option("--full", is_flag=True, help="Make a full backup, related to no earlier one.")
@click.option(
    "--allow-smaller",
    is_flag=True,
    help="Back up also what is empty, or smaller than the volume's latest backup.",
)
@json_option
def backup_command(
    repo: str,
    sources: tuple[str, ...],
    volume: str | None,
    full: bool,
    allow_smaller: bool,
    is_json: bool,
) -> int:
    """Back up image files or block devices.

    Holes of files are not read. The volume is called as the file, without .img or .raw. After a
    volume's first backup only what has changed is stored. '-' is standard input, which needs
    --volume. If one of several sources fails, the others are backed up all the same.

    What is empty, or smaller than the volume's latest backup, is refused: an image that was cut
    short looks like that. A stream without a single byte always is.

    \b
    backupfs backup /srv/backups vm.img
    backupfs backup /srv/backups /dev/vg0/web01-snapshot --volume web01
    zstd -dc vm.img.zst | backupfs backup /srv/backups - --volume vm
    """
    volumes = volume_names(sources, volume)
    made: list[dict[str, Any]] = []
    failures: list[BackupfsError] = []
    try:
        with cancellable() as cancelled, Service.open(repo) as service:
            for source, name in zip(sources, volumes, strict=True):
                latest = service.catalogue.latest(name)
                size_min = 0 if allow_smaller else max(1, latest.size if latest else 0)
                try:
                    record, was_changed = back_up(
                        service, source, name, full=full, size_min=size_min, cancelled=cancelled
                    )
                except SOURCE_ERRORS as error:
                    failures.append(error)
                    output.report(why_refused(error, latest))
                    continue
                made.append(record_summary(record) | {"changed_while_read": was_changed})
                if not is_json:
                    output.print_line(backup_line(record))
    finally:
        # Also when it ended early: what was made by then is there, and a script has to know.
        if is_json:
            output.print_json(made)
    return exit_code(failures[0]) if failures else DONE


def volume_names(sources: Sequence[str], volume: str | None) -> list[str]:
    """The volume of each source, in their order; refuses what would be unclear."""
    if volume is not None and len(sources) > 1:
        raise click.UsageError("--volume goes with one SOURCE only")
    if volume is not None:
        return [volume]
    for source in sources:
        if source == STREAM_WORD or Path(source).is_fifo():
            raise click.UsageError(f"{source!r} has no name of its own: give --volume")
    names = [volume_of(Path(source).name) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"several sources would be volume {name!r}")
    return names


def why_refused(error: BackupfsError, latest: Record | None) -> str:
    """What is wrong with a source, for the user; ``latest`` is its volume's backup before."""
    if not isinstance(error, ImageTooSmall):
        return str(error)
    found = f"{error.name!r} is empty"
    if latest is not None and latest.size:
        what = f"the latest backup of {latest.volume!r} has {latest.size}"
        found = f"{error.name!r} has {error.size} bytes, {what}"
    return f"{found}: not backed up; give --allow-smaller if it is whole"


def back_up(
    service: Service,
    source: str,
    volume: str,
    *,
    full: bool,
    size_min: int,
    cancelled: Callable[[], bool],
) -> tuple[Record, bool]:
    """Make one backup; also says whether the source was changed while it was read."""
    with (
        open_source(source, cancelled=cancelled) as image,
        output.progress(printable(volume), total=image.size_hint) as progress,
    ):
        if image.size_hint and image.size_hint < size_min:
            # Files and devices know their size, so nothing needs to be read; but a file may only say
            # that it has none, and is told from an empty one by reading it.
            raise ImageTooSmall(name=image.name, size=image.size_hint, size_min=size_min)
        record = service.backup(
            image,
            volume=volume,
            parent=None if full else LATEST,
            source_mtime_ns=image.mtime_ns,
            source_mode=image.mode,
            size_min=size_min,
            progress=progress,
            cancelled=cancelled,
        )
    if image.was_changed:
        output.report(f"warning: {source!r} was changed while it was read")
    return record, image.was_changed


def backup_line(record: Record) -> str:
    size, stored = human_size(record.size), human_size(record.stored_bytes)
    return f"{label(record)} ({short_id(record)}): {record.kind}, {size}, {stored} stored"


@click.command("restore")
@repository_argument
@click.argument("backup", metavar="BACKUP")
@click.argument("dest", metavar="DEST")
@click.option("--force", is_flag=True, help="Replace DEST if it is an existing file.")
@json_option
def restore_command(repo: str, backup: str, dest: str, force: bool, is_json: bool) -> None:
    """Write a backup's image to a file or block device.

    A file is made sparse and appears when it is complete; with --force it takes the place, owner
    and mode of the old one. A device is overwritten in full. Everything is verified as it is
    written: damage ends the restore with exit code 3.

    \b
    backupfs restore /srv/backups web01@latest web01.img
    backupfs restore /srv/backups web01@2026-11-22T142503Z /dev/vg0/web01
    """
    if dest == STREAM_WORD:
        raise click.UsageError(
            "'-' is no file or device to restore to; a file of that name is './-'"
        )
    with cancellable() as cancelled, Service.open(repo) as service:
        record = service.resolve(backup)
        check_lies_outside(dest, service.repository.folder)
        target = open_target(dest, size=record.size, force=force, mode=record.source_mode)
        try:
            with target, output.progress(label(record), total=record.size) as progress:
                service.restore(record, target, progress=progress, cancelled=cancelled)
        finally:
            if target.is_partial:
                output.report(f"warning: {dest!r} is overwritten in part and holds no whole image")
    if is_json:
        output.print_json(record_summary(record) | {"target": dest})
    else:
        size = human_size(record.size)
        output.print_line(f"restored {label(record)} to {printable(dest)} ({size})")


@click.command("list")
@repository_argument
@click.option("--volume", metavar="NAME", help="Only the backups of this volume.")
@json_option
def list_command(repo: str, volume: str | None, is_json: bool) -> None:
    """List backups by volume and time.

    Each can be called by its id, a beginning of that, or VOLUME@BACKUP as the table has them.

    \b
    backupfs list /srv/backups
    backupfs list /srv/backups --volume web01
    backupfs list --json /srv/backups | jq -r '.[] | select(.size > 1e9) | .id'
    """
    with Service.open(repo) as service:
        records = service.backups(volume)
    if is_json:
        output.print_json(records)
    else:
        output.print_table(LIST_COLUMNS, map(list_row, records))


LIST_COLUMNS = (
    Column("ID"),
    Column("VOLUME", is_whole=False),
    Column("BACKUP"),
    Column("KIND"),
    Column("SIZE", is_number=True),
    Column("DATA", is_number=True),
    Column("STORED", is_number=True),
)


def list_row(record: Record) -> tuple[str, ...]:
    sizes = map(human_size, (record.size, record.data_size, record.stored_bytes))
    return (short_id(record), printable(record.volume), stamp(record), record.kind, *sizes)


@click.command("show")
@repository_argument
@click.argument("backup", metavar="BACKUP")
@json_option
def show_command(repo: str, backup: str, is_json: bool) -> None:
    """Show everything known about a backup.

    \b
    backupfs show /srv/backups web01@latest
    backupfs show --json /srv/backups 0b0e4f2c | jq .metadata
    """
    with Service.open(repo) as service:
        record = service.resolve(backup)
    if is_json:
        output.print_json(record_details(record))
    else:
        output.print_pairs(show_pairs(record))


def show_pairs(record: Record) -> list[tuple[str, str]]:
    pairs = [
        ("id", record.backup_id),
        ("volume", printable(record.volume)),
        ("name", record.name),
        ("kind", record.kind),
        ("parent", record.parent_id or "-"),
        ("data of", compact_time(record.data_timestamp)),
        ("created", compact_time(record.created_at)),
        ("host", printable(record.host)),
        ("size", f"{human_size(record.size)} ({record.size} bytes)"),
        ("data", human_size(record.data_size)),
        ("stored", human_size(record.stored_bytes)),
        ("chunk size", human_size(record.chunk_size)),
        ("root", record.root.hex()),
    ]
    described = record_details(record)["description"].items()
    pairs += [(name, printable(text)) for name, text in described if text is not None]
    if record.metadata:
        pairs.append(("metadata", json.dumps(record.metadata)))
    return pairs


@click.command("delete")
@repository_argument
@click.argument("backups", nargs=-1, required=True, metavar="BACKUP...")
def delete_command(repo: str, backups: tuple[str, ...]) -> None:
    """Delete backups, in any order.

    No other backup depends on a deleted one. If one of those named is not there, none is deleted.
    'backupfs gc' frees the space.

    \b
    backupfs delete /srv/backups 0b0e4f2c
    backupfs delete /srv/backups web01@2026-11-20T020000Z web01@2026-11-21T020000Z
    """
    with Service.open(repo) as service:
        found = [service.resolve(selector) for selector in backups]
        for record in {record.backup_id: record for record in found}.values():
            service.delete(record)
            output.print_line(f"deleted {label(record)} ({short_id(record)})")


def keep_option(rule: str, what: str) -> Callable[[Any], Any]:
    return click.option(
        f"--keep-{rule}", rule, type=click.IntRange(min=0), default=0, metavar="N", help=what
    )


@click.command("prune")
@repository_argument
@keep_option("last", "Keep the last N backups.")
@keep_option("hourly", "Keep the last backup of each of the last N hours that have one.")
@keep_option("daily", "The same by days, in UTC.")
@keep_option("weekly", "The same by weeks, from Monday.")
@keep_option("monthly", "The same by months.")
@keep_option("yearly", "The same by years.")
@click.option("--volume", metavar="NAME", help="Only the backups of this volume.")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be deleted; delete nothing.")
@json_option
def prune_command(repo: str, volume: str | None, dry_run: bool, is_json: bool, **keep: int) -> None:
    """Delete the backups that no keep rule holds.

    The rules count for each volume by itself; a backup stays if any of them keeps it. At least
    one rule must keep something. 'backupfs gc' frees the space.

    \b
    backupfs prune /srv/backups --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
    backupfs prune /srv/backups --keep-last 3 --volume scratch
    """
    if not any(keep.values()):
        raise click.UsageError("give at least one --keep rule with N above 0")
    with Service.open(repo) as service:
        done = service.prune(RetentionPolicy(**keep), volume=volume, dry_run=dry_run)
    if is_json:
        output.print_json({"dry_run": dry_run, "kept": done.kept, "deleted": done.deleted})
        return
    deleted = "would delete" if dry_run else "deleted"
    for record in done.deleted:
        output.print_line(f"{deleted} {label(record)} ({short_id(record)})")
    kept = counted(len(done.kept), "backup")
    output.print_line(f"kept {kept}, {deleted} {len(done.deleted)}")
