"""A blob: one chunk or tree node as it lies in a pack, header and payload (pure).

The header says what the payload is, so that a pack whose footer is lost can still be read.
Layout in docs/format.md, "Blob". Nothing here trusts a size it read: the payload is as long as the
pack says, and decompresses to exactly the size the header and the caller agree on, or not at all.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from typing import Any

import zstandard

from backupfs.format.ids import IdScheme
from backupfs.format.tree import NODE_SIZE
from backupfs.types import BLOB_ID_SIZE, BlobId, Buffer

MAGIC = b"BFSb"
# magic, level, method, reserved (zero), stored size, plain size, id, CRC-32 of all before it
HEADER = struct.Struct("<4sBBHII32sI")
assert HEADER.size == 52

METHOD_RAW = 0
METHOD_ZSTD = 1

# Compression must gain more than one part in this many to be kept: reading raw is faster.
GAIN_PARTS = 20

LEVEL_MAX = 7  # 128 ** 7 chunks is far beyond the largest image
PLAIN_SIZE_MAX = 4 << 20


class BadBlobError(ValueError):
    """The bytes are not the blob they should be; the text says in what way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobHeader:
    """What a blob says of itself."""

    level: int  # 0: a chunk; n > 0: a node whose entries are of level n - 1
    method: int
    stored_size: int  # bytes of the payload, without this header
    plain_size: int
    blob_id: BlobId


def pack_header(header: BlobHeader) -> bytes:
    """The header's bytes."""
    body = HEADER.pack(
        MAGIC,
        header.level,
        header.method,
        0,
        header.stored_size,
        header.plain_size,
        header.blob_id,
        0,
    )[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack_header(data: Buffer) -> BlobHeader:
    """Read a header from the start of ``data``.

    Raises:
        BadBlobError: too short, wrong magic, checksum or reserved bytes, or sizes out of bounds.
    """
    if len(data) < HEADER.size:
        raise BadBlobError("shorter than a blob's header")
    magic, level, method, reserved, stored_size, plain_size, blob_id, crc = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BadBlobError("no blob begins here")
    if zlib.crc32(memoryview(data)[: HEADER.size - 4]) != crc:
        raise BadBlobError("header checksum does not match")
    if reserved or level > LEVEL_MAX or method > METHOD_ZSTD:
        raise BadBlobError("header has unknown values")
    if (
        plain_size > PLAIN_SIZE_MAX
        or stored_size > plain_size
        or (level and plain_size != NODE_SIZE)
    ):
        raise BadBlobError("header has impossible sizes")
    return BlobHeader(
        level=level,
        method=method,
        stored_size=stored_size,
        plain_size=plain_size,
        blob_id=BlobId(blob_id),
    )


class BlobEncoder:
    """Compresses plain bytes to blobs. Thread-safe: each thread has a compressor of its own."""

    def __init__(self, *, compression_level: int) -> None:
        self._level = compression_level
        self._local = threading.local()

    def encode_many(self, plains: list[Buffer], ids: list[BlobId], *, level: int) -> list[bytes]:
        """Blobs of ``plains``, in order; ``level`` as in ``BlobHeader``.

        One call compresses all of them without giving up the interpreter lock in between.
        """
        if level or not plains:
            payloads: list[Buffer] = list(plains)  # nodes are ids: random bytes, not worth a try
        else:
            payloads = self._compress(plains)
        return [
            self._assemble(plain, payload, blob_id, level)
            for plain, payload, blob_id in zip(plains, payloads, ids, strict=True)
        ]

    def _compress(self, plains: list[Buffer]) -> list[Buffer]:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self._level, write_content_size=True)
            self._local.compressor = compressor
        if len(plains) == 1:
            return [compressor.compress(plains[0])]
        segments: Any = compressor.multi_compress_to_buffer(plains, threads=1)
        return list(segments)

    def _assemble(self, plain: Buffer, payload: Buffer, blob_id: BlobId, level: int) -> bytes:
        method = METHOD_ZSTD
        if len(payload) >= len(plain) - len(plain) // GAIN_PARTS:
            payload, method = plain, METHOD_RAW
        header = BlobHeader(
            level=level,
            method=method,
            stored_size=len(payload),
            plain_size=len(plain),
            blob_id=blob_id,
        )
        return b"".join((pack_header(header), payload))


_decompressors = threading.local()


def decode(data: Buffer, *, expected: BlobId, level: int, ids: IdScheme) -> bytes:
    """The plain bytes of the blob in ``data``, proven to be those of ``expected``.

    Raises:
        BadBlobError: they are not, whatever the reason.
    """
    header = unpack_header(data)
    if header.blob_id != expected or header.level != level:
        raise BadBlobError("another blob lies here")
    payload = memoryview(data)[HEADER.size :]
    if len(payload) != header.stored_size:
        raise BadBlobError("payload is cut off")
    plain = bytes(payload) if header.method == METHOD_RAW else _decompress(payload, header)
    if len(plain) != header.plain_size:
        raise BadBlobError("payload has another size than its header says")
    if ids.blob_id(plain, level=level) != expected:
        raise BadBlobError("content does not match its id")
    return plain


def _decompress(payload: memoryview, header: BlobHeader) -> bytes:
    decompressor = getattr(_decompressors, "decompressor", None)
    if decompressor is None:
        decompressor = _decompressors.decompressor = zstandard.ZstdDecompressor(
            max_window_size=PLAIN_SIZE_MAX
        )
    try:
        # Checked first: the library allocates whatever size the frame claims.
        if zstandard.get_frame_parameters(payload).content_size != header.plain_size:
            raise BadBlobError("payload claims another size than its header")
        plain: bytes = decompressor.decompress(payload, max_output_size=header.plain_size)
    except zstandard.ZstdError as error:
        raise BadBlobError("payload cannot be decompressed") from error
    return plain


assert BLOB_ID_SIZE == 32
