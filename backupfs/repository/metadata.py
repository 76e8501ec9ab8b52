"""A volume's metadata: a JSON object, kept by generation; the highest one counts.

Each put writes a new object and then deletes all but it and the one before, so that a crash, or a
look meanwhile, finds the old or the new, never neither. Layout in docs/format.md, "Metadata".
"""

from __future__ import annotations

from typing import Any

from backupfs.errors import CorruptObject, InvalidMetadata, ObjectExists, ObjectNotFound
from backupfs.format import codec
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.format.record import (
    METADATA_DEPTH_MAX,
    METADATA_SIZE_MAX,
    decode_metadata,
    is_deeper,
    metadata_text,
)
from backupfs.storage.base import Storage
from backupfs.types import ObjectName

METADATA_PREFIX = "metadata/"
VERSION = 1
OBJECT_SIZE_MAX = METADATA_SIZE_MAX + 16384
GENERATION_DIGITS = 12  # in an object's name
GENERATION_MAX = 10**GENERATION_DIGITS - 1


def check_metadata(metadata: Any) -> str:
    """The text a volume's metadata is kept as. Raises: InvalidMetadata."""
    if not isinstance(metadata, dict):
        raise InvalidMetadata(reason="it must be a JSON object")
    if is_deeper(metadata, METADATA_DEPTH_MAX):
        raise InvalidMetadata(reason=f"it is nested more than {METADATA_DEPTH_MAX} deep")
    try:
        text = metadata_text(metadata)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMetadata(reason=f"it cannot be written as JSON ({error})") from error
    if size > METADATA_SIZE_MAX:
        raise InvalidMetadata(reason=f"{size} bytes, more than {METADATA_SIZE_MAX}")
    return text


class MetadataStore:
    """The metadata of all volumes of one repository."""

    def __init__(self, storage: Storage, ids: IdScheme) -> None:
        self._storage = storage
        self._ids = ids

    def get(self, volume: str) -> dict[str, Any]:
        """A volume's metadata, {} where none was put. Raises: CorruptObject, StorageError."""
        while True:
            generations = self._generations(volume)
            if not generations:
                return {}
            try:
                return self._read(volume, max(generations))
            except ObjectNotFound:
                continue  # replaced since it was listed

    def put(self, volume: str, metadata: dict[str, Any]) -> None:
        """Replace a volume's metadata. Durable on return.

        Raises:
            InvalidMetadata, StorageError.
            CorruptObject: an object has the highest generation, which no put came to.
        """
        text = check_metadata(metadata)
        while True:
            older = self._generations(volume)
            generation = max(older, default=0) + 1
            if generation > GENERATION_MAX:
                name = self._name(volume, GENERATION_MAX)
                raise CorruptObject(name=name, reason="no generation can follow; delete it")
            try:
                self._storage.put_new(
                    self._name(volume, generation), self._encode(volume, generation, text)
                )
                break
            except ObjectExists:
                continue  # another process took this generation
        # The one before stays: a listing under way may pass over what is put and deleted meanwhile.
        for old in sorted(older)[:-1]:
            self._storage.delete(self._name(volume, old))

    def _generations(self, volume: str) -> set[int]:
        """The generations that exist, as two listings in a row agree."""
        before = None
        while (found := self._listed(volume)) != before:
            before = found
        return found

    def _listed(self, volume: str) -> set[int]:
        prefix = self._prefix(volume)
        found = set()
        for info in self._storage.list(prefix):
            stem = info.name.removeprefix(prefix).removesuffix(".msgpack")
            if stem.isdecimal() and len(stem) == GENERATION_DIGITS:
                found.add(int(stem))
        return found

    def _read(self, volume: str, generation: int) -> dict[str, Any]:
        name = self._name(volume, generation)
        # One byte more than it may have: a longer one is damage of this object alone.
        data = self._storage.get_range(name, 0, OBJECT_SIZE_MAX + 1)
        try:
            value = codec.decode(data, size_max=OBJECT_SIZE_MAX)
            fields = codec.Fields(value)
            body = {key: item for key, item in value.items() if key != "digest"}
            digest = fields.raw("digest", size=DIGEST_SIZE)
            if self._ids.digest("state", codec.encode(body)) != digest:
                raise codec.UndecodableError("its digest does not match")
            if fields.integer("version") != VERSION:
                raise codec.UndecodableError("its version is unknown")
            if fields.text("volume", size_max=4096) != volume:
                raise codec.UndecodableError("it is of another volume")
            if fields.integer("generation") != generation:
                raise codec.UndecodableError("it is of another generation")
            return decode_metadata(fields.text("metadata", size_max=METADATA_SIZE_MAX))
        except ValueError as error:
            raise CorruptObject(name=name, reason=str(error)) from error

    def _encode(self, volume: str, generation: int, text: str) -> bytes:
        value: dict[str, Any] = {
            "version": VERSION,
            "volume": volume,
            "generation": generation,
            "metadata": text,
        }
        value["digest"] = self._ids.digest("state", codec.encode(value))
        return codec.encode(value)

    def _prefix(self, volume: str) -> str:
        # A digest, as volumes' names may be longer than a file's may be.
        return f"{METADATA_PREFIX}{self._ids.digest('state', volume.encode())[:16].hex()}/"

    def _name(self, volume: str, generation: int) -> ObjectName:
        return ObjectName(f"{self._prefix(volume)}{generation:0{GENERATION_DIGITS}d}.msgpack")
