"""A pack: many blobs in one object, then a footer that lists them and a fixed tail (pure).

Footer last: the sizes are known only when the pack is complete, and one ranged read of its end
lists it. The tail's digest covers footer, tail and the pack's own id, so a footer of another pack
is refused. Layout in docs/format.md, "Pack".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from backupfs.format.blob import HEADER, LEVEL_MAX, PLAIN_SIZE_MAX
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.types import HOLE, BlobId, Buffer, ObjectName, PackId

MAGIC = b"BFSpack1"
VERSION = 1
VERSION_WITH_BASES = 2  # its entries name the chunks that differences are to
# magic, version, reserved (zero), entry count, size of all blobs in bytes
TAIL = struct.Struct("<8sHHIQ")
assert TAIL.size == 24
TAIL_SIZE = TAIL.size + DIGEST_SIZE
# blob id, offset in the pack, size with its header, level
ENTRY = struct.Struct("<32sIII")
assert ENTRY.size == 44
# The same, then the id of the base; zeros where there is none.
ENTRY_WITH_BASE = struct.Struct("<32sIII32s")
assert ENTRY_WITH_BASE.size == 76

PACK_SIZE_MAX = 1 << 30  # an entry's offset has 32 bits
# A footer is read, listed and entered as a whole: so many take 20 MiB meanwhile.
ENTRY_COUNT_MAX = 1 << 17
BLOB_SIZE_MAX = HEADER.size + PLAIN_SIZE_MAX
PACKS_PREFIX = "packs/"


class BadPackError(ValueError):
    """The bytes are not the end of the pack they should be; the text says in what way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackEntry:
    """Where one blob lies. Holds: offset + size <= size of all blobs of the pack."""

    blob_id: BlobId
    offset: int  # bytes from the start of the pack
    size: int  # bytes as stored, with the blob's header
    level: int
    base: BlobId | None = None  # the chunk that it is a difference to

    @property
    def listed_size(self) -> int:
        """Bytes that listing it takes, at least."""
        return ENTRY.size if self.base is None else ENTRY_WITH_BASE.size


def pack_name(pack_id: PackId) -> ObjectName:
    """The object that holds a pack: "packs/ab/abcd…"."""
    text = pack_id.hex()
    return ObjectName(f"{PACKS_PREFIX}{text[:2]}/{text}")


def pack_id_of(name: str) -> PackId | None:
    """The id in an object's name, or None where the name is no pack's."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] != "packs" or len(parts[2]) != 32 or parts[2][:2] != parts[1]:
        return None
    try:
        pack_id = PackId(bytes.fromhex(parts[2]))
    except ValueError:
        return None
    # Upper case and spaces are hexadecimal too, but no name of ours.
    return pack_id if pack_name(pack_id) == name else None


def encode_footer(
    pack_id: PackId, entries: Sequence[PackEntry], *, blobs_size: int, ids: IdScheme
) -> bytes:
    """Footer and tail, to be written right after the blobs."""
    assert len(entries) <= ENTRY_COUNT_MAX
    if any(entry.base is not None for entry in entries):
        version = VERSION_WITH_BASES
        listed = [
            ENTRY_WITH_BASE.pack(e.blob_id, e.offset, e.size, e.level, e.base or HOLE)
            for e in entries
        ]
    else:
        version = VERSION
        listed = [ENTRY.pack(e.blob_id, e.offset, e.size, e.level) for e in entries]
    footer = b"".join(listed)
    tail = TAIL.pack(MAGIC, version, 0, len(listed), blobs_size)
    return footer + tail + ids.digest("pack", footer + tail + pack_id)


def footer_size(tail: Buffer) -> int:
    """Bytes of footer and tail together, read from the last ``TAIL_SIZE`` bytes of a pack.

    Raises:
        BadPackError: this is no pack's tail.
    """
    if len(tail) != TAIL_SIZE:
        raise BadPackError("shorter than a pack's tail")
    magic, version, reserved, entry_count, blobs_size = TAIL.unpack_from(tail)
    if magic != MAGIC:
        raise BadPackError("no pack ends here")
    if version not in (VERSION, VERSION_WITH_BASES) or reserved:
        raise BadPackError(f"pack version {version} is unknown")
    if entry_count > ENTRY_COUNT_MAX or entry_count * HEADER.size > blobs_size:
        raise BadPackError("too many entries")
    return int(entry_count) * _entry_struct(version).size + TAIL_SIZE


def _entry_struct(version: int) -> struct.Struct:
    return ENTRY if version == VERSION else ENTRY_WITH_BASE


def decode_footer(
    pack_id: PackId, data: Buffer, *, pack_size: int, ids: IdScheme
) -> list[PackEntry]:
    """The entries listed by footer and tail ``data`` of a pack of ``pack_size`` bytes in all.

    Raises:
        BadPackError: damaged, of another pack, or listing blobs that cannot be.
    """
    view = memoryview(data)
    if len(view) != footer_size(view[-TAIL_SIZE:]):
        raise BadPackError("footer is cut off")
    if ids.digest("pack", bytes(view[:-DIGEST_SIZE]) + pack_id) != view[-DIGEST_SIZE:]:
        raise BadPackError("footer does not match its digest")
    _, version, _, _, blobs_size = TAIL.unpack_from(view, len(view) - TAIL_SIZE)
    if blobs_size + len(view) != pack_size:
        raise BadPackError("pack has another size than its footer says")
    entries = []
    for blob_id, offset, size, level, *bases in _entry_struct(version).iter_unpack(
        view[:-TAIL_SIZE]
    ):
        base = BlobId(bases[0]) if bases and bases[0] != HOLE else None
        if not HEADER.size <= size <= BLOB_SIZE_MAX or offset + size > blobs_size:
            raise BadPackError("footer lists an impossible blob")
        if level > LEVEL_MAX or (base is not None and (level or base == blob_id)):
            raise BadPackError("footer lists an impossible blob")
        entries.append(
            PackEntry(blob_id=BlobId(blob_id), offset=offset, size=size, level=level, base=base)
        )
    return entries
