"""Every error says what happened, in one line, with its own fields."""

from __future__ import annotations

import inspect
import string

import pytest

from backupfs import errors
from backupfs.errors import BackupfsError


def classes_below(parent: type[BackupfsError]) -> list[type[BackupfsError]]:
    return [found for child in parent.__subclasses__() for found in (child, *classes_below(child))]


ALL = [
    BackupfsError,
    *(kind for kind in classes_below(BackupfsError) if kind.__module__ == errors.__name__),
]
# Those with a sentence of their own can be raised; the others only group them.
RAISED = [kind for kind in ALL if "template" in vars(kind) and kind is not BackupfsError]


def field_names(kind: type[BackupfsError]) -> dict[str, str]:
    """Fields of the sentence, each with its format."""
    return {
        name: spec or ""
        for _text, name, spec, _conversion in string.Formatter().parse(kind.template)
        if name is not None
    }


def make(kind: type[BackupfsError], *, mark: str = "the {}") -> BackupfsError:
    return kind(
        **{name: 12.0 if spec else mark.format(name) for name, spec in field_names(kind).items()}
    )


def test_every_class_of_the_module_is_in_the_one_tree():
    defined = {
        kind
        for _name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }

    assert defined == set(ALL)


def test_every_leaf_has_a_sentence_of_its_own():
    leaves = [kind for kind in ALL if not kind.__subclasses__()]

    assert [kind for kind in leaves if "template" not in vars(kind)] == []
    sentences = [kind.template for kind in RAISED]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_an_error_formats_with_the_fields_of_its_sentence(kind):
    error = make(kind)
    sentence = str(error)

    assert len(sentence.splitlines()) == 1
    assert sentence == sentence.strip() and not sentence.endswith(".")
    for name, spec in field_names(kind).items():
        assert ("12" if spec else f"the {name}") in sentence
        assert getattr(error, name) == error.fields[name]


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_a_sentence_names_at_least_one_thing_and_only_plain_fields(kind):
    names = field_names(kind)

    assert names
    assert all(name.isidentifier() for name in names)
    assert not {name for name in names if hasattr(BackupfsError(), name)}


def test_a_name_that_breaks_lines_is_quoted():
    """Names come from users and from other machines; a line of a log stays one line."""
    for kind in RAISED:
        names = {"name", "volume", "staged", "path", "location", "mountpoint", "selector", "option"}
        for name in names & set(field_names(kind)):
            fields = make(kind).fields | {name: "two\nlines"}
            assert len(str(kind(**fields)).splitlines()) == 1, (kind, name)


def test_a_field_that_was_not_given_is_no_attribute():
    error = errors.InvalidName(name="x", reason="y")

    assert not hasattr(error, "size")
    with pytest.raises(AttributeError, match="size"):
        _ = error.size


def test_the_root_formats_without_fields():
    assert str(BackupfsError()) == "backupfs failed"
    assert all(str(kind()) for kind in ALL if kind not in RAISED)
