"""A blob: one chunk or tree node as it lies in a pack, header and payload (pure).

The header says what the payload is, so that a pack whose footer is lost can still be read. A chunk
may be kept as its *difference* to another one, its base: reading it then takes both.
Layout in docs/format.md, "Blob". Nothing here trusts a size it read: the payload is as long as the
pack says, and decompresses to exactly the size the header and the caller agree on, or not at all.
"""

from __future__ import annotations

import functools
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard

from backupfs.format import pieces
from backupfs.format.ids import IdScheme
from backupfs.format.tree import NODE_SIZE
from backupfs.types import BLOB_ID_SIZE, HOLE, BlobId, Buffer

MAGIC = b"BFSb"
# magic, level, method, reserved (zero), stored size, plain size, id, CRC-32 of all before it
HEADER = struct.Struct("<4sBBHII32sI")
assert HEADER.size == 52
METHOD_OFFSET = 5

METHOD_RAW = 0
METHOD_ZSTD = 1
# The base's id, then a zstd frame with all bytes of the base as dictionary; read, not written any more.
METHOD_WHOLE_DIFFERENCE = 2
# The base's id, a map of the pieces that changed, and these as a zstd frame, with what the base has
# there as dictionary: what did not change is neither compressed nor looked through.
METHOD_DIFFERENCE = 3
_DIFFERENCES = (METHOD_WHOLE_DIFFERENCE, METHOD_DIFFERENCE)

# A base may itself be a difference, where it was stored again after damage; so many in a row are read.
DIFFERENCES_MAX = 4

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
    if reserved or level > LEVEL_MAX or method > METHOD_DIFFERENCE:
        raise BadBlobError("header has unknown values")
    if method in _DIFFERENCES and (level or stored_size <= BLOB_ID_SIZE):
        raise BadBlobError("header of an impossible difference")
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


def base_of(blob: Buffer) -> BlobId | None:
    """The chunk that a blob with a good header is a difference to; None where it is none."""
    view = memoryview(blob)
    if len(view) < HEADER.size or view[METHOD_OFFSET] not in _DIFFERENCES:
        return None
    base_id = BlobId(bytes(view[HEADER.size : HEADER.size + BLOB_ID_SIZE]))
    return base_id if len(base_id) == BLOB_ID_SIZE and base_id != HOLE else None


def check_listed_base(blob: Buffer, base_id: BlobId | None) -> None:
    """Refuse a blob with a good header whose pack's footer says that it is a difference to another.

    gc goes by the footers: what these do not name as a base may be deleted.

    Raises: BadBlobError.
    """
    if base_of(blob) != base_id:
        raise BadBlobError("its pack's footer names another base")


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

    def encode_difference(
        self, plain: Buffer, blob_id: BlobId, base: Buffer, base_id: BlobId, changed: bytes
    ) -> bytes | None:
        """A chunk as its difference to ``base``, of the same size; None where that gains nothing.

        ``changed``: where they differ, by ``pieces.find_changed``.
        """
        new, old = pieces.pick(plain, changed), pieces.pick(base, changed)
        compressor = zstandard.ZstdCompressor(
            compression_params=_difference_parameters(self._level, len(new)),
            dict_data=_dictionary(old),
        )
        payload = b"".join((base_id, pieces.pack_map(changed), compressor.compress(new)))
        if len(payload) > len(plain):
            return None
        header = BlobHeader(
            level=0,
            method=METHOD_DIFFERENCE,
            stored_size=len(payload),
            plain_size=len(plain),
            blob_id=blob_id,
        )
        return pack_header(header) + payload

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


def _difference_parameters(level: int, size: int) -> zstandard.ZstdCompressionParameters:
    """Those of the level for ``size`` bytes and a dictionary of as many."""
    return _parameters_up_to(level, (size - 1).bit_length())


@functools.lru_cache(maxsize=32)
def _parameters_up_to(level: int, size_log: int) -> zstandard.ZstdCompressionParameters:
    """With a window that reaches over a whole dictionary, and tables with room for it: without, the
    fast levels find little again of one of 256 KiB and more."""
    size = 1 << size_log
    usual = zstandard.ZstdCompressionParameters.from_level(level, source_size=size, dict_size=size)
    return zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=2 * size,
        window_log=max(usual.window_log, size_log),
        hash_log=max(usual.hash_log, size_log - 2),
        write_content_size=True,
    )


_decompressors = threading.local()

# The bytes of a chunk that others are differences to; raises BadBlobError where it has none.
FindBase = Callable[[BlobId], bytes]


def decode(
    data: Buffer, *, expected: BlobId, level: int, ids: IdScheme, find_base: FindBase | None = None
) -> bytes:
    """The plain bytes of the blob in ``data``, proven to be those of ``expected``.

    Without ``find_base`` a difference counts as one whose base is missing.

    Raises:
        BadBlobError: they are not, whatever the reason.
    """
    header = unpack_header(data)
    if header.blob_id != expected or header.level != level:
        raise BadBlobError("another blob lies here")
    payload = memoryview(data)[HEADER.size :]
    if len(payload) != header.stored_size:
        raise BadBlobError("payload is cut off")
    if header.method == METHOD_RAW:
        plain = bytes(payload)
    elif header.method == METHOD_ZSTD:
        plain = _decompress(payload, header.plain_size, _plain_decompressor())
    else:
        plain = _apply(payload, header, base_of(data), find_base)
    if len(plain) != header.plain_size:  # stored as it is
        raise BadBlobError("payload has another size than its header says")
    if ids.blob_id(plain, level=level) != expected:
        raise BadBlobError("content does not match its id")
    return plain


def _apply(
    payload: memoryview, header: BlobHeader, base_id: BlobId | None, find_base: FindBase | None
) -> bytes:
    """The chunk that differs so from its base."""
    if base_id is None or find_base is None:
        raise BadBlobError("the chunk that it differs from is missing")
    base = find_base(base_id)
    if len(base) != header.plain_size:
        raise BadBlobError("the chunk that it differs from has another size")
    rest = payload[BLOB_ID_SIZE:]
    if header.method == METHOD_WHOLE_DIFFERENCE:
        return _decompress(rest, header.plain_size, _decompressor_with(base))
    try:
        map_size = pieces.map_size(header.plain_size)
    except ValueError as error:
        raise BadBlobError(str(error)) from error
    changed = pieces.unpack_map(rest[:map_size])
    old = pieces.pick(base, changed)
    if not old:
        raise BadBlobError("nothing differs in it")
    new = _decompress(rest[map_size:], len(old), _decompressor_with(old))
    return pieces.put(base, changed, new)


def _dictionary(base: Buffer) -> zstandard.ZstdCompressionDict:
    # As raw content: whatever the base begins with, it is never taken for a trained dictionary.
    return zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _decompressor_with(dictionary: Buffer) -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(
        max_window_size=PLAIN_SIZE_MAX, dict_data=_dictionary(dictionary)
    )


def _plain_decompressor() -> zstandard.ZstdDecompressor:
    decompressor = getattr(_decompressors, "decompressor", None)
    if decompressor is None:
        decompressor = _decompressors.decompressor = zstandard.ZstdDecompressor(
            max_window_size=PLAIN_SIZE_MAX
        )
    return decompressor


def _decompress(payload: memoryview, size: int, decompressor: zstandard.ZstdDecompressor) -> bytes:
    """What a frame holds, of exactly ``size`` bytes. Raises: BadBlobError."""
    try:
        # Checked first: the library allocates whatever size the frame claims.
        if zstandard.get_frame_parameters(payload).content_size != size:
            raise BadBlobError("payload claims another size than its header")
        plain: bytes = decompressor.decompress(payload, max_output_size=size)
    except zstandard.ZstdError as error:
        raise BadBlobError("payload cannot be decompressed") from error
    if len(plain) != size:
        raise BadBlobError("payload has another size than its header says")
    return plain
