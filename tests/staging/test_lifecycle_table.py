"""When a staged file becomes a backup, as a table; and which names are temporary."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.staging.lifecycle import (
    Facts,
    Policy,
    State,
    decide,
    is_rsync_temporary,
    is_temporary,
    likely_path,
)

DEFAULT = Policy()
SETTLE_ALL = Policy(settle_all=True)
ON_RENAME = Policy(publish_on_rename_only=True)

# A complete copy, closed, as most are.
COMPLETE = Facts(
    writers=0,
    changed=True,
    written=True,
    size=1000,
    latest_size=None,
    has_data=True,
    temporary=False,
    renamed=False,
    interrupted=False,
    left_partial=False,
    failure="",
    settled=False,
    explicit=False,
)


@pytest.mark.parametrize(
    ("changes", "policy", "expected"),
    [
        ({}, DEFAULT, "publishing"),
        ({"writers": 1}, DEFAULT, "open"),
        ({"writers": 2, "interrupted": True, "failure": "full"}, DEFAULT, "open"),
        ({"changed": False}, DEFAULT, "published"),
        ({"changed": False, "temporary": True}, DEFAULT, "published"),
        # nothing in it
        ({"written": False, "size": 0, "has_data": False}, DEFAULT, "held: no byte"),
        ({"written": False, "size": 0, "has_data": False, "explicit": True}, DEFAULT, "held: no"),
        ({"written": False, "size": 9, "has_data": False}, DEFAULT, "settling: holds only zeros"),
        ({"has_data": False}, DEFAULT, "settling: holds only zeros"),
        ({"has_data": False, "settled": True}, DEFAULT, "publishing"),
        ({"written": False, "has_data": False, "settled": True}, DEFAULT, "publishing"),
        # settle_all
        ({}, SETTLE_ALL, "settling: waits for quiet"),
        ({"settled": True}, SETTLE_ALL, "publishing"),
        ({"explicit": True}, SETTLE_ALL, "publishing"),
        # the size of the latest backup
        ({"latest_size": 1000}, DEFAULT, "publishing"),
        ({"latest_size": 999}, DEFAULT, "publishing"),
        ({"latest_size": 1001}, DEFAULT, "held: smaller than the latest"),
        ({"latest_size": 1001, "settled": True}, DEFAULT, "held: smaller than the latest"),
        ({"latest_size": 1001, "explicit": True}, DEFAULT, "publishing"),
        # signs of an interrupted copy
        ({"interrupted": True}, DEFAULT, "held: the program that wrote it was killed"),
        ({"interrupted": True, "renamed": True}, DEFAULT, "held: the program"),
        ({"interrupted": True, "explicit": True}, DEFAULT, "publishing"),
        ({"left_partial": True, "renamed": True}, DEFAULT, "held: rsync was interrupted"),
        ({"failure": "no space left"}, DEFAULT, "held: writing failed: no space left"),
        ({"failure": "no space left", "explicit": True}, DEFAULT, "held: writing failed"),
        # names
        ({"temporary": True}, DEFAULT, "held: a temporary name"),
        ({"temporary": True, "renamed": True}, DEFAULT, "held: a temporary name"),
        ({}, ON_RENAME, "held: waits to be renamed"),
        ({"settled": True}, ON_RENAME, "held: waits to be renamed"),
        ({"renamed": True}, ON_RENAME, "publishing"),
        ({"explicit": True}, ON_RENAME, "publishing"),
    ],
    ids=str,
)
def test_what_becomes_of_a_staged_file(changes, policy, expected):
    decision = decide(replace(COMPLETE, **changes), policy)

    state, _, reason = expected.partition(": ")
    assert decision.state == state
    assert decision.reason.startswith(reason)
    assert bool(decision.reason) == (state in ("held", "settling"))


FACTS = st.builds(
    Facts,
    writers=st.integers(0, 2),
    changed=st.booleans(),
    written=st.booleans(),
    size=st.integers(0, 3),
    latest_size=st.none() | st.integers(0, 3),
    has_data=st.booleans(),
    temporary=st.booleans(),
    renamed=st.booleans(),
    interrupted=st.booleans(),
    left_partial=st.booleans(),
    failure=st.sampled_from(["", "lost"]),
    settled=st.booleans(),
    explicit=st.booleans(),
)
POLICIES = st.builds(Policy, settle_all=st.booleans(), publish_on_rename_only=st.booleans())


@given(FACTS, POLICIES)
def test_nothing_publishes_by_itself_against_evidence(facts, policy):
    decision = decide(facts, policy)

    if decision.state is State.PUBLISHING and not facts.explicit:
        assert not (facts.writers or facts.temporary or facts.interrupted or facts.left_partial)
        assert facts.latest_size is None or facts.size >= facts.latest_size
        assert facts.has_data or facts.settled
    if decision.state is State.PUBLISHING:
        assert not (facts.writers or facts.failure)
        assert facts.changed
        assert facts.written or facts.size


@given(FACTS, POLICIES)
def test_settling_ends_in_publishing(facts, policy):
    if decide(facts, policy).state is State.SETTLING:
        assert decide(replace(facts, settled=True), policy).state is State.PUBLISHING


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vm.img", False),
        ("vm", False),
        ("part", False),
        ("vm.part.img", False),
        ("vm.img.part", True),
        ("vm.img.filepart", True),
        ("vm.tmp", True),
        (".hidden", True),
        (".goutputstream-AB12CD", True),
        (".vm.img.x7Yz01", True),
        ("._vm.img", True),
    ],
)
def test_names_that_programs_use_until_a_copy_is_complete(name, expected):
    assert is_temporary(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".vm.img.x7Yz01", True),
        (".a\nb.x7Yz01", True),
        (".vm.img.x7Yz012", False),
        ("vm.img.x7Yz01", False),
        (".goutputstream-AB12CD", False),
        (".x7Yz01", False),
    ],
)
def test_names_that_rsync_makes_up(name, expected):
    assert is_rsync_temporary(name) is expected


@pytest.mark.parametrize(
    ("path", "likely"),
    [
        ("web01.img", "web01.img"),
        ("100/disk-0.raw", "100/disk-0.raw"),
        (".web01.img.x7Yz01", "web01.img"),
        ("100/.disk-0.raw.AbCdEf", "100/disk-0.raw"),
        (".web01.img", "web01.img"),
        ("web01.img.part", "web01.img"),
        ("web01.img.filepart", "web01.img"),
        (".web01.img.tmp", "web01.img"),
        (".", ""),
        ("", ""),
    ],
)
def test_a_temporary_name_tells_what_the_file_will_be_called(path, likely):
    assert likely_path(path) == likely
