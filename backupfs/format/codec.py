"""msgpack, in one canonical form and with bounds: the only module that imports the library.

Every structured object of the repository (configuration, record, plan, draft state…) is a msgpack
map with string keys. Decoding is bounded before anything is allocated and accepts just what
``encode`` makes: the same value never has two encodings, so a digest over bytes is one over values.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgpack

from backupfs.types import Buffer

# An empty container takes one byte here and eighty in memory: so many are always taken, and beyond
# them one for so many bytes.
CONTAINER_COUNT_FREE = 64
CONTAINER_SIZE_MIN = 16
# So few bytes hold no more containers than cost nothing worth checking.
SMALL_SIZE = 4096


class UndecodableError(ValueError):
    """The bytes are not a canonical, bounded msgpack map."""


def encode(value: dict[str, Any]) -> bytes:
    """Encode a map; the keys keep the order they have."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def decode(data: Buffer, *, size_max: int) -> dict[str, Any]:
    """Decode one map of at most ``size_max`` bytes.

    Raises:
        UndecodableError: too large, not msgpack, not one map with string keys, or not canonical.
    """
    if len(data) > size_max:
        raise UndecodableError(f"{len(data)} bytes, more than the {size_max} allowed")
    _check_claims(memoryview(data))
    value = _unpacked(data, size_max, list_length_max=size_max)
    try:
        canonical = encode(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UndecodableError("values that have no canonical form") from error
    if canonical != bytes(data):
        raise UndecodableError("not in canonical form")
    return value


def decode_small(data: Buffer) -> dict[str, Any]:
    """Decode one map without lists, of at most ``SMALL_SIZE`` bytes and in whatever form: the caller
    encodes what it understood, and compares. Only lists take memory for what they claim.

    Raises:
        UndecodableError: too large, not msgpack, or not one map with string keys.
    """
    if len(data) > SMALL_SIZE:
        raise UndecodableError(f"{len(data)} bytes, more than the {SMALL_SIZE} allowed")
    return _unpacked(data, SMALL_SIZE, list_length_max=0)


def decode_own(data: Buffer) -> dict[str, Any]:
    """Decode what ``encode`` made on this host and a digest has proven since: nothing is checked."""
    value: dict[str, Any] = msgpack.unpackb(data, raw=False)
    return value


def _unpacked(data: Buffer, size_max: int, *, list_length_max: int) -> dict[str, Any]:
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=size_max,
            max_bin_len=size_max,
            max_array_len=list_length_max,
            max_map_len=min(size_max, 4096),
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise UndecodableError(f"not msgpack ({type(error).__name__})") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UndecodableError("not a map with text keys")
    return value


def _forms() -> list[tuple[int, int, int] | None]:
    """What the first byte of an item says: (size of its length field, length, items per unit).

    The length is the one given where there is no length field. It counts bytes where no items are
    contained. None: a form that ``encode`` never makes.
    """
    forms: list[tuple[int, int, int] | None] = [(0, 0, 0)] * 256  # a number in the byte itself
    for length in range(16):
        forms[0x80 + length] = (0, length, 2)
        forms[0x90 + length] = (0, length, 1)
    for length in range(32):
        forms[0xA0 + length] = (0, length, 0)
    for power, length_size in enumerate((1, 2, 4)):
        forms[0xC4 + power] = forms[0xD9 + power] = (length_size, 0, 0)
    for power, size in enumerate((1, 2, 4, 8)):
        forms[0xCC + power] = forms[0xD0 + power] = (0, size, 0)
    forms[0xCB] = (0, 8, 0)
    forms[0xDC], forms[0xDD] = (2, 0, 1), (4, 0, 1)
    forms[0xDE], forms[0xDF] = (2, 0, 2), (4, 0, 2)
    for unused in (0xC1, 0xC7, 0xC8, 0xC9, 0xCA, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
        forms[unused] = None
    return forms


_FORMS = _forms()


def _check_claims(data: memoryview) -> None:
    """Walk the items without building any, so that no length is believed before it is checked."""
    position, pending = 0, 1
    containers_left = CONTAINER_COUNT_FREE + len(data) // CONTAINER_SIZE_MIN
    while pending:
        # Each item still due takes a byte at least.
        if position + pending > len(data):
            raise UndecodableError("cut off, or claims more than its bytes can hold")
        form = _FORMS[data[position]]
        if form is None:
            raise UndecodableError("not in canonical form")
        length_size, length, weight = form
        position += 1
        if length_size:
            length = int.from_bytes(data[position : position + length_size], "big")
            position += length_size
        pending -= 1
        if weight:
            pending += length * weight
            containers_left -= 1
            if containers_left < 0:
                raise UndecodableError("too many maps and lists")
        else:
            position += length
    if position != len(data):
        raise UndecodableError("cut off, or followed by other bytes")


class Fields:
    """Typed reading of a decoded map: every getter checks kind and bounds, and names the field."""

    def __init__(self, value: dict[str, Any]) -> None:
        self._value = value

    def keys(self) -> list[str]:
        return list(self._value)

    def text(self, key: str, *, size_max: int = 1024, empty: bool = True) -> str:
        found = self._get(key, str)
        if len(found.encode("utf-8", "surrogatepass")) > size_max or (not empty and not found):
            raise UndecodableError(f"field {key!r}: length out of bounds")
        return str(found)

    def optional_text(self, key: str, *, size_max: int = 1024) -> str | None:
        return None if self._value.get(key) is None else self.text(key, size_max=size_max)

    def integer(self, key: str, *, low: int = 0, high: int = (1 << 63) - 1) -> int:
        found = self._get(key, int)
        if isinstance(found, bool) or not low <= found <= high:
            raise UndecodableError(f"field {key!r}: number out of bounds")
        return int(found)

    def optional_integer(self, key: str, *, low: int, high: int = (1 << 63) - 1) -> int | None:
        return None if self._value.get(key) is None else self.integer(key, low=low, high=high)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool))

    def raw(self, key: str, *, size: int) -> bytes:
        found = self._get(key, bytes)
        if len(found) != size:
            raise UndecodableError(f"field {key!r}: {len(found)} bytes, not {size}")
        return bytes(found)

    def moment(self, key: str) -> datetime:
        """A time, aware and in UTC."""
        text = self.text(key, size_max=64)
        try:
            found = datetime.fromisoformat(text)
            if found.utcoffset() is not None:
                return found.astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise UndecodableError(f"field {key!r} is no time") from error
        raise UndecodableError(f"field {key!r} has no time zone")

    def mapping(self, key: str) -> dict[str, Any]:
        found = self._get(key, dict)
        return dict(found)

    def sequence(self, key: str, *, length_max: int) -> list[Any]:
        found = self._get(key, list)
        if len(found) > length_max:
            raise UndecodableError(f"field {key!r}: too many entries")
        return list(found)

    def _get(self, key: str, kind: type) -> Any:
        if key not in self._value:
            raise UndecodableError(f"field {key!r} is missing")
        found = self._value[key]
        if not isinstance(found, kind):
            raise UndecodableError(f"field {key!r} is a {type(found).__name__}")
        return found
