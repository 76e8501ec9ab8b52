"""The table of exit codes against the tree of errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backupfs import errors
from backupfs.cli.exit_codes import DAMAGE_FOUND, EXIT_CODES, FAILED, exit_code


def leaves(root: type[errors.BackupfsError]) -> Iterator[type[errors.BackupfsError]]:
    children = root.__subclasses__()
    if not children:
        yield root
    for child in children:
        yield from leaves(child)


@pytest.mark.parametrize("leaf", sorted(set(leaves(errors.BackupfsError)), key=str))
def test_every_error_has_its_exit_code(leaf: type[errors.BackupfsError]) -> None:
    assert leaf in EXIT_CODES


def test_damage_and_only_damage_ends_with_3() -> None:
    for leaf, code in EXIT_CODES.items():
        assert (code == DAMAGE_FOUND) == issubclass(leaf, errors.DamageError)


def test_what_is_not_in_the_table_goes_by_what_it_is() -> None:
    assert exit_code(errors.DamageError()) == DAMAGE_FOUND
    assert exit_code(errors.RequestError()) == FAILED
