"""Files that are truncated, grown, punched and patched while a backup reads them.

Then there is no backup, or one that says so; one that does not say so is what the file was.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.images import noise, restored

from backupfs.errors import SourceFailed
from backupfs.hostsources import FileSource, open_source
from backupfs.service import Service
from backupfs.types import Buffer

MIB = 1 << 20
SIZE = 4 * MIB + 777
PUNCH_HOLE_KEEP_SIZE = 3
OLD = 1_700_000_000 * 10**9  # so that every change shows, whatever the grain of the clock

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Changing:
    """A file source that changes its own file after some of its pieces."""

    def __init__(self, source: FileSource, path: Path, changes: dict[int, list[tuple]]) -> None:
        self.name = source.name
        self.size_hint = source.size_hint
        self._source = source
        self._path = path
        self._changes = changes
        self.versions = [path.read_bytes()]

    def extents(self) -> Iterator[tuple[int, Buffer]]:
        for number, piece in enumerate(self._source.extents()):
            for change in self._changes.pop(number, []):
                self._apply(*change)
            yield piece

    def size(self) -> int:
        return self._source.size()

    def _apply(self, what: str, offset: int, size: int) -> None:
        with self._path.open("r+b") as file:
            if what == "patch":
                os.pwrite(file.fileno(), b"\xa5" * size, offset)
            elif what == "punch":
                libc.fallocate(file.fileno(), PUNCH_HOLE_KEEP_SIZE, offset, size)
            elif what == "shrink":
                os.ftruncate(file.fileno(), offset)
            elif what == "grow":
                os.ftruncate(file.fileno(), SIZE + size)
            elif what == "shrink and grow again":
                os.ftruncate(file.fileno(), offset)
                os.ftruncate(file.fileno(), SIZE)
            elif what == "replace":
                other = self._path.with_name("other")
                other.write_bytes(b"other" * 1000)
                other.rename(self._path)
        self.versions.append(self._path.read_bytes())


changes = st.dictionaries(
    st.integers(0, 5),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["patch", "punch", "shrink", "grow", "shrink and grow again", "replace"]
            ),
            st.integers(0, SIZE),
            st.integers(1, MIB),
        ),
        max_size=2,
    ),
    max_size=3,
)


@pytest.mark.parametrize("holes", [(), ((MIB // 2, MIB), (3 * MIB, MIB))], ids=["full", "sparse"])
def test_a_backup_of_a_file_that_changes_is_none_or_says_so_or_is_whole(
    service: Service, tmp_path: Path, holes: tuple[tuple[int, int], ...]
) -> None:
    path = tmp_path / "vm.img"

    @given(changes)
    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(drawn: dict[int, list[tuple]]) -> None:
        content = bytearray(noise(SIZE, seed=1))
        with path.open("wb") as file:
            file.write(content)
            for start, size in holes:
                libc.fallocate(file.fileno(), PUNCH_HOLE_KEEP_SIZE, start, size)
                content[start : start + size] = bytes(size)
        os.utime(path, ns=(OLD, OLD))
        with open_source(str(path)) as opened:
            assert isinstance(opened, FileSource)
            source = Changing(opened, path, dict(drawn))
            try:
                record = service.backup(source, volume="vm")
            except SourceFailed as error:
                assert "vm.img" in str(error)
                return
        image = restored(service, record)
        assert len(image) == SIZE
        if not opened.was_changed:
            assert image == content
        # Every piece of a sector is one that lay there at some time.
        for start in range(0, SIZE, 512):
            piece = image[start : start + 512]
            assert any(
                version[start : start + 512].ljust(len(piece), b"\0").startswith(piece)
                for version in source.versions
            )
        service.delete(record)

    check()


def test_a_file_that_grows_for_ever_is_no_endless_backup(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(noise(2 * MIB, seed=1))
    with open_source(str(path)) as opened:
        assert isinstance(opened, FileSource)

        class Growing(Changing):
            def extents(self) -> Iterator[tuple[int, Buffer]]:
                for piece in self._source.extents():
                    with self._path.open("ab") as file:
                        file.write(noise(2 * MIB, seed=2))
                    yield piece

        with pytest.raises(SourceFailed, match="size changed"):
            service.backup(Growing(opened, path, {}), volume="log")
    assert service.backups() == []
