"""Ids and digests: keyed BLAKE3, one derived key per domain; the only module that imports the library.

A chunk, a node of each level, a record and a pack's directory are hashed under different keys, so
that bytes of one domain can never pass as another's. Without encryption the repository's key is
a published constant: equal content has equal ids in every plain repository of one chunk size.
"""

from __future__ import annotations

from functools import lru_cache

from blake3 import blake3

from backupfs.types import BlobId, Buffer

DIGEST_SIZE = 32

# The key of every repository without encryption. Published on purpose; see docs/format.md.
PLAIN_KEY = blake3(b"backupfs repository without encryption, format 1").digest()


def _derive(key: bytes, domain: str) -> bytes:
    return blake3(key, derive_key_context=f"backupfs 2026-11 format 1 {domain}").digest()


class IdScheme:
    """The ids of one repository, from its key (32 bytes)."""

    def __init__(self, key: bytes = PLAIN_KEY) -> None:
        self._chunk_key = _derive(key, "data chunk")
        self._object_keys = {
            domain: _derive(key, domain) for domain in ("record", "pack", "config", "state")
        }
        self._node_key = lru_cache(maxsize=None)(lambda level: _derive(key, f"node level {level}"))

    def chunk_id(self, data: Buffer) -> BlobId:
        """Id of one chunk: ``data`` is exactly one chunk long."""
        return BlobId(blake3(data, key=self._chunk_key).digest())

    def node_id(self, data: Buffer, *, level: int) -> BlobId:
        """Id of a node's bytes; ``level`` counts from 1, the nodes right above the chunks."""
        return BlobId(blake3(data, key=self._node_key(level)).digest())

    def blob_id(self, data: Buffer, *, level: int) -> BlobId:
        """Id of a blob of either kind: level 0 is a chunk."""
        return self.node_id(data, level=level) if level else self.chunk_id(data)

    def digest(self, domain: str, data: Buffer) -> bytes:
        """Digest of an object's bytes; ``domain`` is record, pack, config or state."""
        return blake3(data, key=self._object_keys[domain]).digest()
