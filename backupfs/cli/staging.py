"""Commands on what is staged in the mount: drafts, publish."""

from __future__ import annotations

import click

from backupfs.cli import output
from backupfs.cli.describe import compact_time, human_size, label, short_id
from backupfs.cli.escaping import printable
from backupfs.cli.output import Column
from backupfs.cli.parameters import json_option, repository_argument
from backupfs.service import DraftInfo, Service

DRAFT_COLUMNS = (
    Column("NAME", is_whole=False),
    Column("STATE"),
    Column("SIZE", is_number=True),
    Column("CHANGED"),
    Column("REASON", is_whole=False),
)


@click.command("drafts")
@repository_argument
@json_option
def drafts_command(repo: str, is_json: bool) -> None:
    """List what is staged and not a backup yet.

    An image whose copy was interrupted is held: it becomes a backup by 'backupfs publish', or by
    a complete copy over it, and goes away by rm.

    \b
    backupfs drafts /srv/backups
    backupfs drafts --json /srv/backups | jq '.[] | select(.state == "held")'
    """
    with Service.open(repo) as service:
        drafts = service.drafts()
    if is_json:
        output.print_json(drafts)
    else:
        output.print_table(DRAFT_COLUMNS, map(draft_row, drafts))


def draft_row(draft: DraftInfo) -> tuple[str, ...]:
    size, changed = human_size(draft.size), compact_time(draft.changed_at)
    return (printable(draft.name), draft.state, size, changed, printable(draft.reason))


@click.command("publish")
@repository_argument
@click.argument("name", metavar="NAME")
def publish_command(repo: str, name: str) -> None:
    """Make a held draft a backup.

    NAME is its path below staging/, as 'backupfs drafts' lists it.

    \b
    backupfs publish /srv/backups vm.img
    """
    with Service.open(repo) as service:
        record = service.publish(name)
    output.print_line(f"published {label(record)} ({short_id(record)})")
