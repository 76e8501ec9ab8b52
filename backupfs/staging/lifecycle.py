"""When a staged file becomes a backup: the states, and the one decision between them (pure).

| state      | means                                            | left by                 |
|------------|--------------------------------------------------|-------------------------|
| open       | some handle may still write                      | release of the last one |
| settling   | complete as far as one can tell, but let us wait | quiet time; a writer    |
| held       | needs an explicit act or a better copy           | publish, rename, a copy |
| publishing | its record is being written                      | the record, or an error |
| published  | its content is that of a backup: a head          | a writer                |

An interrupted copy is never a backup: whatever speaks against completeness holds the draft.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OPEN = "open"
    SETTLING = "settling"
    HELD = "held"
    PUBLISHING = "publishing"
    PUBLISHED = "published"


# rsync's ".NAME." and gio's ".goutputstream-", each with six letters behind it, begin with a dot, as
# do "._NAME" of Finder.
_TEMPORARY_SUFFIXES = (".part", ".filepart", ".tmp")
RENAME_FIRST = "a temporary name; rename it first"
_RSYNC_NAME = re.compile(r"\.(.+)\.[A-Za-z0-9]{6}", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Whether a file's name (without folders) is one that programs use until a copy is complete."""
    return name.startswith(".") or name.endswith(_TEMPORARY_SUFFIXES)


def is_temporary_path(path: str) -> bool:
    """Whether a file below ``staging/``, or a folder that it lies in, has such a name."""
    return any(map(is_temporary, path.split("/")))


def why_not_published(state: str, reason: str) -> str:
    """In words for the user who said: publish; of a file that is in ``state`` for ``reason``."""
    if state == State.PUBLISHED:
        return "it is a backup already"
    return "it is being written" if state == State.OPEN else reason


def is_rsync_temporary(name: str) -> bool:
    """Whether rsync makes up names like this one."""
    return _RSYNC_NAME.fullmatch(name) is not None


def likely_path(path: str) -> str:
    """The path that a staged file will have in the end, as far as its temporary name tells."""
    folder, slash, name = path.rpartition("/")
    rsync = _RSYNC_NAME.fullmatch(name)
    if rsync:
        name = rsync[1]
    else:
        name = name.removeprefix(".")
        for suffix in _TEMPORARY_SUFFIXES:
            name = name.removesuffix(suffix)
    return f"{folder}{slash}{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the mount's options say about publishing."""

    settle_seconds: float = 5.0
    settle_all: bool = False
    publish_on_rename_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of a staged file when it must be decided what becomes of it."""

    writers: int  # handles open for writing
    changed: bool  # it differs from what it was last published as
    written: bool  # some byte was written into this content
    size: int
    latest_size: int | None  # of the volume's latest backup; None where it has none
    has_data: bool  # some byte is not zero
    temporary: bool  # by its name
    renamed: bool  # it got its present name by a rename, after its last write
    interrupted: bool  # its writer was killed
    left_partial: bool  # rsync left it without having written all of it
    failure: str  # why something written was lost; empty otherwise
    settled: bool  # it was quiet long enough
    explicit: bool  # the user said: publish


@dataclass(frozen=True, slots=True)
class Decision:
    state: State
    reason: str = ""  # in words for the user; why it is held or waits


def decide(facts: Facts, policy: Policy) -> Decision:
    """What becomes of a staged file now. First match counts, from the hardest reason down."""
    if facts.writers:
        return Decision(State.OPEN)
    if not facts.changed:
        return Decision(State.PUBLISHED)
    if facts.failure:
        return Decision(State.HELD, f"writing failed: {facts.failure}")
    if not facts.written and not facts.size:
        return Decision(State.HELD, "no byte was written yet")
    if facts.explicit:
        return Decision(State.PUBLISHING)
    against = _evidence_against(facts, policy)
    if against:
        return Decision(State.HELD, against)
    if not facts.settled and (policy.settle_all or not facts.has_data):
        return Decision(State.SETTLING, _why_settling(facts))
    return Decision(State.PUBLISHING)


def _evidence_against(facts: Facts, policy: Policy) -> str:
    if facts.temporary:
        return "a temporary name: rename it to publish it"
    if facts.interrupted:
        return "the program that wrote it was killed"
    if facts.left_partial:
        return "rsync was interrupted before it had written all"
    if facts.latest_size is not None and facts.size < facts.latest_size:
        return f"smaller than the latest backup ({facts.size} of {facts.latest_size} bytes)"
    if policy.publish_on_rename_only and not facts.renamed:
        return "waits to be renamed (publish=rename)"
    return ""


def _why_settling(facts: Facts) -> str:
    return "waits for quiet" if facts.has_data else "holds only zeros so far: waits for data"
