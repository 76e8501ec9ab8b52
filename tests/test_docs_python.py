"""Runs the examples of docs/python.md as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

from support.images import noise

from backupfs.driver import BackupDriver
from backupfs.format.record import DESCRIPTION_SIZE_MAX, Description
from backupfs.service import Service

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "python.md"
TEXT = DOCUMENT.read_text()


def examples() -> list[tuple[int, str]]:
    """(line of the document, source) of each example."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [(TEXT.count("\n", 0, match.start(1)), match[1]) for match in found]


def test_examples_run_and_do_what_they_say(scratch, monkeypatch, capsys):
    monkeypatch.chdir(scratch)
    image = noise(300_000, seed=1) + bytes(100_000)
    (scratch / "vm.img").write_bytes(image)
    names: dict[str, object] = {}

    for line, source in examples():
        # Empty lines in front, so that a failure names the line of the document.
        exec(compile("\n" * line + source, str(DOCUMENT), "exec"), names)

    assert (scratch / "restored.img").read_bytes() == image
    assert (scratch / "old-volume").read_bytes() == image
    assert " full " in capsys.readouterr().out
    with Service.open("backups") as service:
        assert [record.volume for record in service.backups()] == ["text", "vm", "volume-1"]


def test_document_names_every_method_of_the_driver_and_every_descriptive_field():
    methods = [name for name in vars(BackupDriver) if not name.startswith("_")]

    assert len(methods) == 8
    for name in (*methods, *Description.__dataclass_fields__):
        assert name in TEXT
    assert f"{DESCRIPTION_SIZE_MAX:,} bytes" in TEXT
