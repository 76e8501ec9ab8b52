"""One opening of a staged file for writing, and what its program has shown by how it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field

from backupfs.staging.extents import Extents
from backupfs.staging.staged_file import StagedFile


@dataclass(slots=True)
class WriteHandle:
    """One open-for-writing of a staged file."""

    staged: StagedFile
    sets_size_last: bool = False  # its program does so when it has written all, and only then
    was_sized: bool = False  # its last change of data was setting the size
    copied: Extents = field(default_factory=Extents)  # written since the file is in doubt

    def note_written(self, offset: int, size: int) -> None:
        """Its program has written so many bytes there."""
        if self.staged.is_in_doubt:
            self.copied.add(offset, offset + size)

    @property
    def is_complete(self) -> bool:
        """Whether its program has shown that all is written: it has written all over what was in
        doubt, or is one that sets the size last and has done so, as rsync."""
        if self.sets_size_last:
            return self.was_sized
        return self.staged.size > 0 and self.copied.covers(self.staged.size)

    @property
    def is_cut_short(self) -> bool:
        """Whether its program would have shown that all is written, and did not."""
        return self.sets_size_last and not self.was_sized
