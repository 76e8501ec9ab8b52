"""Every error has an exception of Cinder's, with a message that fits."""

from __future__ import annotations

import pytest
from cinder import exception

from backupfs import cinder, errors
from backupfs.cinder.exceptions import EXCEPTIONS, MESSAGE_SIZE_MAX, cinder_exception
from backupfs.format.record import Description


def leaves(parent: type) -> list[type]:
    return [leaf for kind in parent.__subclasses__() for leaf in (leaves(kind) or [kind])]


def test_every_error_is_in_the_table():
    raised = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    raised = {kind for kind in raised if "template" in vars(kind)} - {errors.BackupfsError}

    assert set(EXCEPTIONS) == raised


@pytest.mark.parametrize("kind", list(EXCEPTIONS), ids=lambda kind: kind.__name__)
def test_message_fits(kind):
    names = {"seconds": 5.0}
    error = kind(**{name: names.get(name, "x" * 500) for name in fields_of(kind)})

    translation = cinder_exception(error)

    assert isinstance(translation, exception.CinderException)
    assert len(str(translation)) <= MESSAGE_SIZE_MAX


def fields_of(kind: type[errors.BackupfsError]) -> list[str]:
    import string

    return [name for _, name, _, _ in string.Formatter().parse(kind.template) if name]


def test_worker_is_told_all_that_a_record_keeps():
    kept = set(Description.__dataclass_fields__)

    assert kept <= set(cinder.BACKUP_FIELDS)
