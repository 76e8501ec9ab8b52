"""msgpack, in one canonical form and with bounds: the only module that imports the library.

Every structured object of the repository (configuration, record, plan, draft state…) is a msgpack
map with string keys. Decoding is bounded before anything is allocated and accepts just what
``encode`` makes: the same value never has two encodings, so a digest over bytes is one over values.
"""

from __future__ import annotations

from typing import Any

import msgpack

from backupfs.types import Buffer


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
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=size_max,
            max_bin_len=size_max,
            max_array_len=size_max,
            max_map_len=min(size_max, 4096),
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise UndecodableError(f"not msgpack ({type(error).__name__})") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UndecodableError("not a map with text keys")
    try:
        canonical = encode(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UndecodableError("values that have no canonical form") from error
    if canonical != bytes(data):
        raise UndecodableError("not in canonical form")
    return value


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
