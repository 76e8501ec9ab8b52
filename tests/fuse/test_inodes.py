"""Inode numbers: what the kernel was told of stays known until it has forgotten all of it."""

from __future__ import annotations

import pytest

from backupfs.fuse.inodes import Inodes
from backupfs.fuse.layout import BACKUPS, ROOT, Entry, Kind, Layout
from backupfs.service import Service

SIDECAR = Entry(Kind.SIDECAR, "vm.msgpack")  # has no name in the tree that a walk could find


@pytest.fixture
def inodes(service: Service) -> Inodes:
    return Inodes(Layout(service.catalogue, None))


def test_number_that_was_told_anew_before_it_was_forgotten_stays_known(inodes: Inodes) -> None:
    """The kernel's news of forgetting an old copy may come after the next one was made."""
    number = inodes.number(SIDECAR)
    inodes.tell(SIDECAR)
    inodes.tell(SIDECAR)

    inodes.forget(number, 1)

    assert inodes.entry(number) == SIDECAR


def test_number_that_was_forgotten_as_often_as_it_was_told_is_gone(inodes: Inodes) -> None:
    number = inodes.number(SIDECAR)
    for _ in range(3):
        inodes.tell(SIDECAR)

    inodes.forget(number, 1)
    inodes.forget(number, 2)

    assert inodes.entry(number) is None


def test_forgotten_number_of_what_has_a_name_is_found_again(inodes: Inodes) -> None:
    """As file handles of NFS need it."""
    number = inodes.number(BACKUPS)
    inodes.tell(BACKUPS)

    inodes.forget(number, 1)

    assert inodes.entry(number) == BACKUPS


def test_root_is_never_forgotten(inodes: Inodes) -> None:
    inodes.tell(ROOT)
    inodes.forget(inodes.number(ROOT), 1)

    assert inodes.entry(1) == ROOT
