"""Parts of a repository over a storage that fails when told to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faulty import FaultyStorage
from support.parts import Parts, make_parts


@pytest.fixture
def parts(scratch: Path) -> Iterator[Parts]:
    folder = scratch / "parts"
    folder.mkdir()
    made = make_parts(folder, FaultyStorage(folder))
    yield made
    made.close()
