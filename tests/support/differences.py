"""Blobs that are differences, made without a repository."""

from __future__ import annotations

import zstandard

from backupfs.format import blob, pieces
from backupfs.format.ids import IdScheme

IDS = IdScheme()


def as_difference(plain: bytes, base: bytes, *, compression_level: int = 1) -> bytes:
    """A chunk as its difference to another one."""
    encoder = blob.BlobEncoder(compression_level=compression_level)
    made = encoder.encode_difference(
        plain,
        IDS.chunk_id(plain),
        base,
        IDS.chunk_id(base),
        pieces.find_changed(plain, base),
    )
    assert made is not None
    return made


def as_whole_difference(plain: bytes, base: bytes) -> bytes:
    """The same by method 2, which only earlier versions write."""
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(level=1, dict_data=dictionary, write_content_size=True)
    payload = IDS.chunk_id(base) + compressor.compress(plain)
    header = blob.BlobHeader(
        level=0,
        method=blob.METHOD_WHOLE_DIFFERENCE,
        stored_size=len(payload),
        plain_size=len(plain),
        blob_id=IDS.chunk_id(plain),
    )
    return blob.pack_header(header) + payload
