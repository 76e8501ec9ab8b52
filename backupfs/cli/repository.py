"""Commands on a repository as a whole: init, stats, gc, verify."""

from __future__ import annotations

import click

from backupfs import service
from backupfs.cli import output
from backupfs.cli.describe import as_json, compact_time, counted, human_size
from backupfs.cli.escaping import printable
from backupfs.cli.exit_codes import DAMAGE_FOUND, DONE
from backupfs.cli.parameters import json_option, parse_size, repository_argument
from backupfs.format import config
from backupfs.service import Damage, RepositoryStats, Service, VerifyReport


@click.command("init")
@repository_argument
@click.option(
    "--chunk-size",
    type=parse_size,
    default=config.CHUNK_SIZE_DEFAULT,
    metavar="SIZE",
    help="Piece of an image that is stored once; a power of two from 16K to 4M (64K).",
)
@click.option(
    "--pack-size",
    type=parse_size,
    default=config.PACK_SIZE_DEFAULT,
    metavar="SIZE",
    help="Size of the files that pieces are stored in, from 1M to 512M (64M).",
)
@click.option(
    "--compression-level",
    type=int,
    default=config.COMPRESSION_LEVEL_DEFAULT,
    metavar="N",
    help="Level of zstd, from 1 (quick, the default) to 19 (small).",
)
def init_command(repo: str, chunk_size: int, pack_size: int, compression_level: int) -> None:
    """Make a new repository in an absent or empty folder.

    The chunk size cannot be changed later. Smaller chunks make smaller increments and a larger
    index; the default suits virtual machines. A folder that is made is readable by you alone; one
    that is there keeps its mode.

    \b
    backupfs init /srv/backups
    backupfs init --chunk-size 16K --compression-level 3 /srv/backups
    """
    made = service.init(
        repo, chunk_size=chunk_size, pack_size=pack_size, compression_level=compression_level
    )
    output.print_line(f"made repository {made.repository_id} at {printable(repo)}")


@click.command("stats")
@repository_argument
@json_option
def stats_command(repo: str, is_json: bool) -> None:
    """Show how much is kept and what it takes.

    \b
    backupfs stats /srv/backups
    backupfs stats --json /srv/backups | jq .stored_bytes
    """
    with Service.open(repo) as opened:
        stats = opened.stats()
    if is_json:
        output.print_json(stats)
    else:
        output.print_pairs(stats_pairs(stats))


def stats_pairs(stats: RepositoryStats) -> list[tuple[str, str]]:
    return [
        ("repository", printable(stats.repository_id)),
        ("location", printable(stats.location)),
        ("created", compact_time(stats.created_at)),
        ("chunk size", human_size(stats.chunk_size)),
        ("pack size", human_size(stats.pack_size)),
        ("compression", f"zstd {stats.compression_level}"),
        ("volumes", str(stats.volumes)),
        ("backups", str(stats.backups)),
        ("images", f"{human_size(stats.image_bytes)}, {human_size(stats.data_bytes)} of it data"),
        ("stored", f"{human_size(stats.stored_bytes)} in {counted(stats.packs, 'pack')}"),
    ]


@click.command("gc")
@repository_argument
@json_option
def gc_command(repo: str, is_json: bool) -> None:
    """Free the space that no backup needs any more.

    Runs beside backups and mounts, and may be interrupted at any time.

    \b
    backupfs gc /srv/backups
    """
    with (
        Service.open(repo) as opened,
        output.progress("reclaiming", total=opened.stats().stored_bytes) as progress,
    ):
        done = opened.gc(progress=progress)
    freed = done.bytes_before - done.bytes_after
    if is_json:
        output.print_json(as_json(done) | {"bytes_freed": freed})
        return
    packs = counted(done.packs_before, "pack")
    output.print_line(
        f"deleted {done.packs_deleted} and repacked {done.packs_repacked} of {packs}: "
        f"{human_size(max(freed, 0))} freed, {human_size(done.bytes_after)} in use"
    )


@click.command("verify")
@repository_argument
@click.argument("backups", nargs=-1, metavar="[BACKUP]...")
@click.option("--quick", is_flag=True, help="Only look whether everything is there; read no data.")
@json_option
def verify_command(repo: str, backups: tuple[str, ...], quick: bool, is_json: bool) -> int:
    """Check that every backup can be restored.

    Reads all that the backups consist of (or only those of the given ones), compares it with
    its ids, and says which backups are hit by damage. Exit code 3 if there is any.

    \b
    backupfs verify /srv/backups
    backupfs verify --quick /srv/backups
    backupfs verify /srv/backups web01@latest db01@latest
    """
    with Service.open(repo) as opened:
        records = [opened.resolve(selector) for selector in backups] or None
        # At most: what no backup needs is not read. Of some backups nobody knows it beforehand.
        total = None if records or quick else opened.stats().stored_bytes
        with output.progress("verifying", total=total) as progress:
            found = opened.verify(records, quick=quick, progress=progress)
        names = {record.backup_id: record.name for record in opened.backups()}
    if is_json:
        output.print_json(found)
    else:
        for damage in found.damage:
            output.print_line(damage_line(damage, names))
        output.print_line(verify_summary(found))
    return DAMAGE_FOUND if found.damage else DONE


def damage_line(damage: Damage, names: dict[str, str]) -> str:
    """One thing that is wrong, beginning with the backup that it hits, if that is known."""
    what = f"{printable(damage.object_name)}: {printable(damage.reason)}"
    if damage.backup_id is None:
        return what
    volume = printable(damage.volume or "?")
    stamp = names.get(damage.backup_id, "?").removesuffix(".img")
    place = ""
    if damage.offset is not None and damage.size is not None:
        place = f" at {damage.offset}, {damage.size} bytes"
    return f"{volume}@{stamp} ({damage.backup_id}){place}: {what}"


def verify_summary(found: VerifyReport) -> str:
    checked = counted(found.backups_checked, "backup")
    how = f"verified {checked}, {human_size(found.bytes_checked)} read"
    if not found.complete:
        how = f"looked up all that {checked} need, without reading data"
    if not found.damage:
        return f"{how}: no damage"
    hit = len({damage.backup_id for damage in found.damage} - {None})
    return f"{how}: damage in {counted(len(found.damage), 'place')}, {counted(hit, 'backup')} hit"
