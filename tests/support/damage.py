"""Damage to what is stored: a bit flipped where a blob lies."""

from __future__ import annotations

from pathlib import Path

from backupfs.format.pack import pack_name
from backupfs.repository.index import BlobLocation


def flip(repository: Path | str, at: BlobLocation, *, within: int = 60) -> None:
    """Flip a bit of a stored blob; bytes up to 51 are its header, those below 0 count from its end."""
    path = Path(repository) / pack_name(at.pack_id)
    with path.open("r+b") as file:
        place = at.offset + (within if within >= 0 else at.size + within)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))
