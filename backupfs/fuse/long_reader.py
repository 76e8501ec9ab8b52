"""Long reads of backups, those of a program that reads on and on: by processes, or by a thread."""

from __future__ import annotations

from backupfs.image import Image
from backupfs.repository.blobs import BlobReader
from backupfs.repository.decoders import Decoders
from backupfs.types import HOLE, Buffer


class LongReader:
    """Reads for the handlers of one mount, in its threads. Thread-safe."""

    def __init__(self, reader: BlobReader, decoders: Decoders) -> None:
        self._reader = reader
        self._decoders = decoders

    def read(self, image: Image, offset: int, size: int) -> Buffer:
        """As ``Image.read``; what is returned is to be let go soon, see ``Decoders.read``."""
        whole = image.whole_chunks(offset, size)
        if whole is not None:
            first, count, size = whole
            ids = image.chunk_ids(first, count)
            if ids.count(HOLE) < count:
                answer = self._decoders.read(ids, size, self._reader)
                if answer is not None:
                    return answer
        return image.read(offset, size)
