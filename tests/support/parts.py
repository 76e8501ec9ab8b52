"""The writing parts of a repository, made by hand and without its sessions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support.images import CHUNK_SIZE, PACK_SIZE

from backupfs.ambient import Ambient
from backupfs.format.ids import IdScheme
from backupfs.repository.avoided import Avoided
from backupfs.repository.blobs import BlobReader
from backupfs.repository.chunks import ChunkStore
from backupfs.repository.index import Index
from backupfs.repository.packer import Packer
from backupfs.repository.rebuild import refresh_index
from backupfs.repository.workers import Credit, Share, Workers
from backupfs.storage.local import LocalStorage


@dataclass
class Parts:
    """One of each, connected as ``Repository`` and ``Writer`` do it."""

    storage: LocalStorage
    ids: IdScheme
    index: Index
    packer: Packer
    reader: BlobReader
    avoided: Avoided
    store: ChunkStore
    workers: Workers
    credit: Credit
    share: Share
    spool: Path

    def close(self) -> None:
        self.workers.close()
        self.packer.close()
        self.index.close()
        self.storage.close()


def make_parts(folder: Path, storage: LocalStorage, *, pack_size: int = PACK_SIZE) -> Parts:
    """Parts over ``storage``, their index and spool in ``folder``."""
    ids, avoided = IdScheme(), Avoided()
    index = Index.open(folder / "index")
    spool = folder / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    packer = Packer(
        storage=storage,
        ids=ids,
        index=index,
        pack_size=pack_size,
        spool=spool,
        ambient=Ambient(),
    )
    reader = BlobReader(
        storage=storage,
        ids=ids,
        index=index,
        chunk_size=CHUNK_SIZE,
        avoided=avoided,
        refresh=lambda *, is_known: refresh_index(storage, ids, index),
    )
    reader.attach(packer)
    store = ChunkStore(
        ids=ids,
        index=index,
        packer=packer,
        chunk_size=CHUNK_SIZE,
        compression_level=1,
        avoided=avoided,
        reader=reader,
        with_differences=True,
    )
    return Parts(
        storage=storage,
        ids=ids,
        index=index,
        packer=packer,
        reader=reader,
        avoided=avoided,
        store=store,
        workers=Workers(2),
        credit=Credit(8 << 20),
        share=Share(64),
        spool=spool,
    )
