"""The command repair: saving what damage has left."""

from __future__ import annotations

import click

from backupfs.cli import output
from backupfs.cli.describe import as_json, compact_time, counted, human_size, label
from backupfs.cli.escaping import printable
from backupfs.cli.exit_codes import DAMAGE_FOUND, DONE
from backupfs.cli.parameters import json_option, parse_size, repository_argument
from backupfs.cli.repository import damage_line
from backupfs.service import Repaired, Service


@click.command("repair")
@repository_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--adopt", metavar="ROOT", help="Make this image without a record a backup.")
@click.option("--volume", metavar="NAME", help="Of which volume the adopted image is a backup.")
@click.option("--size", type=parse_size, metavar="SIZE", help="Its exact size, if you know it.")
@json_option
def repair_command(
    repo: str,
    dry_run: bool,
    adopt: str | None,
    volume: str | None,
    size: int | None,
    is_json: bool,
) -> int:
    """Save what can be saved of a damaged repository.

    Packs that have lost their list of contents are read through; what is whole in them is stored
    again, and the old file moved to the repository's folder "damaged". The index is made anew. Says
    what is gone (exit code 3), and lists complete images that no backup names: a deleted backup's,
    until gc runs, or that of a lost record. Nothing is deleted. It may run beside mounts, and be
    interrupted and run again.

    \b
    backupfs repair --dry-run /srv/backups
    backupfs repair /srv/backups
    backupfs repair /srv/backups --adopt 3f9a01c2 --volume vm --size 20G
    """
    if (adopt is None) != (volume is None):
        raise click.UsageError("--adopt and --volume go together")
    if size is not None and adopt is None:
        raise click.UsageError("--size is for --adopt")
    if dry_run and adopt is not None:
        raise click.UsageError("--dry-run and --adopt do not go together")
    with Service.open(repo) as opened:
        if adopt is not None and volume is not None:
            record = opened.adopt(adopt, volume=volume, size=size)
            if is_json:
                output.print_json(record)
            else:
                output.print_line(f"made {label(record)} ({record.backup_id})")
            return DONE
        with output.progress("looking at packs") as progress:
            done = opened.repair(dry_run=dry_run, progress=progress)
        with output.progress("verifying") as progress:
            found = opened.verify(progress=progress)
        names = {record.backup_id: record.name for record in opened.backups()}
    if is_json:
        output.print_json(as_json(done) | {"dry_run": dry_run, "damage": as_json(found.damage)})
    else:
        for line in repair_lines(done, dry_run=dry_run):
            output.print_line(line)
        for damage in found.damage:
            output.print_line(f"gone: {damage_line(damage, names)}")
        if not found.damage:
            output.print_line(
                f"nothing is gone: {counted(found.backups_checked, 'backup')} verified"
            )
    return DAMAGE_FOUND if found.damage else DONE


def repair_lines(done: Repaired, *, dry_run: bool) -> list[str]:
    """What was done, a line each."""
    lines = []
    for pack in done.packs:
        what = "would be saved" if dry_run else "saved"
        where = f"; moved to {pack.set_aside}" if pack.set_aside else ""
        lines.append(
            f"{printable(pack.object_name)}: {printable(pack.reason)}: "
            f"{counted(pack.blobs, 'blob')} {what}, {pack.bytes_lost} bytes are none{where}"
        )
    lines.extend(
        f"image without a record: {lost.root}, {human_size(lost.size)} or a little less, "
        f"{human_size(lost.data_size)} of it data, stored {compact_time(lost.stored_at)}"
        for lost in done.trees
    )
    return lines
