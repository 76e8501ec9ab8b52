"""One opening of a staged file for writing, and what its program has shown by how it wrote."""

from __future__ import annotations

from dataclasses import dataclass

from backupfs.staging.staged_file import StagedFile


@dataclass(slots=True)
class WriteHandle:
    """One open-for-writing of a staged file."""

    staged: StagedFile
    sets_size_last: bool = False  # its program does so when it has written all, and only then
    was_sized: bool = False  # its last change of data was setting the size
    was_grown: bool = False  # … to more than what was written

    @property
    def is_complete(self) -> bool:
        """Whether its program has shown that all is written: rsync and scp set the size last."""
        # Beyond what was written there are zeros, not a copy, unless the program is known.
        return self.was_sized and (self.sets_size_last or not self.was_grown)

    @property
    def is_cut_short(self) -> bool:
        """Whether its program would have shown that all is written, and did not."""
        return self.sets_size_last and not self.was_sized
