"""The program ``backupfs``: finds the command, and turns every way it can end into an exit code.

The commands' modules bring the engine with them, so each is imported when its command runs: what a
help text needs of them stands in ``FAMILIES``.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from backupfs import __version__
from backupfs.cli import output
from backupfs.cli.exit_codes import DONE, FAILED, INTERRUPTED, WRONG_USAGE, exit_code
from backupfs.errors import BackupfsError

# Title -> module -> command -> first line of its help (a test compares).
FAMILIES = {
    "Repositories": {
        "repository": {
            "init": "Make a new repository in an absent or empty folder.",
            "stats": "Show how much is kept and what it takes.",
            "verify": "Check that every backup can be restored.",
            "gc": "Free the space that no backup needs any more.",
        },
        "repair": {"repair": "Save what can be saved of a damaged repository."},
    },
    "Backups": {
        "backups": {
            "backup": "Back up image files or block devices.",
            "restore": "Write a backup's image to a file or block device.",
            "list": "List backups by volume and time.",
            "show": "Show everything known about a backup.",
            "delete": "Delete backups, in any order.",
            "prune": "Delete the backups that no keep rule holds.",
        }
    },
    "Records": {
        "records": {
            "export": "Write a backup's record to a file.",
            "import": "Take backups in again from their records.",
            "metadata": "Print or replace a volume's metadata.",
        }
    },
    "Mounting": {
        "mounting": {
            "mount": "Mount a repository as a folder.",
            "unmount": "Unmount, when everything is safely stored.",
        },
        "staging": {
            "drafts": "List what is staged and not a backup yet.",
            "publish": "Make a held draft a backup.",
        },
    },
}
MODULES = {
    command: module
    for modules in FAMILIES.values()
    for module, commands in modules.items()
    for command in commands
}


class CommandGroup(click.Group):
    """All commands, each imported at its first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"backupfs.cli.{MODULES[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # mount(8) and fstab call "backupfs REPO MOUNTPOINT -o OPTIONS".
        if args[0] not in MODULES and is_location(args[0]):
            args = ["mount", *args]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, modules in FAMILIES.items():
            with formatter.section(title):
                formatter.write_dl([row for rows in modules.values() for row in rows.items()])


def is_location(word: str) -> bool:
    """Whether ``word`` names a repository's place rather than a command."""
    return "/" in word or Path(word).exists()


@click.group(
    cls=CommandGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="See 'backupfs COMMAND --help' for examples of each.",
)
@click.version_option(__version__, "--version", message="backupfs %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback of an error.")
def commands() -> None:
    """Backups of volume images, through a mounted folder or by command.

    REPO is the folder (or URL) of a repository. BACKUP is a backup's id, a unique beginning of
    one, VOLUME@latest or VOLUME@TIMESTAMP.

    \b
    backupfs init /srv/backups
    backupfs mount /srv/backups /mnt/backups
    cp vm.img /mnt/backups/staging/
    ls -l /mnt/backups/volumes/vm/
    backupfs restore /srv/backups vm@latest restored.img

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damage found.
    """


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and raises nothing.

    Every failure is one line on stderr; ``--debug`` before the command adds the traceback.
    """
    words = sys.argv[1:] if words is None else words
    output.prepare()
    try:
        with output.reported_log():
            code = run(words)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        # Any exception: nothing is above us, and nobody is helped by a traceback they did not want.
        if "--debug" in words[:1]:
            traceback.print_exception(error)
        code = explain(error)
    output.settle()
    return code


def run(words: Sequence[str]) -> int:
    """The exit code of a command that ended by itself; what it raises passes through."""
    try:
        with commands.make_context("backupfs", list(words)) as context:
            return commands.invoke(context) or DONE
    except click.exceptions.Exit as ending:
        return ending.exit_code


def explain(error: BaseException) -> int:
    """Print the line that says what went wrong; returns the exit code."""
    match error:
        case BackupfsError():
            output.report(str(error))
            return exit_code(error)
        case click.UsageError():
            output.report(usage_line(error))
            return WRONG_USAGE
        case click.ClickException():
            output.report(error.format_message())
        case KeyboardInterrupt() | click.Abort():
            output.report("interrupted")
            return INTERRUPTED
        case BrokenPipeError():
            pass  # whoever read our output has gone, and knows it
        case OSError():
            output.report(system_line(error))
        case _:
            output.report(f"internal error: {type(error).__name__}: {error}")
    return FAILED


def usage_line(error: click.UsageError) -> str:
    """What is wrong with the command line, and where it is told how it should be."""
    path = error.ctx.command_path if error.ctx else "backupfs"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]} (see '{path} --help')"


def system_line(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{error.filename!r}: {reason}"


if __name__ == "__main__":
    sys.exit(main())
