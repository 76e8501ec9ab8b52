"""The repository's ``config`` object: what was fixed when the repository was made (pure)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from backupfs.errors import CorruptObject, InvalidOption, UnsupportedFormat
from backupfs.format import codec
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.types import Buffer, ObjectName

CONFIG_NAME = ObjectName("config")
FORMAT = "backupfs"
VERSION = 1
CONFIG_SIZE_MAX = 64 << 10

CHUNK_SIZE_MIN = 16 << 10
CHUNK_SIZE_MAX = 4 << 20
CHUNK_SIZE_DEFAULT = 64 << 10
PACK_SIZE_MIN = 1 << 20
PACK_SIZE_MAX = 512 << 20
PACK_SIZE_DEFAULT = 64 << 20
COMPRESSION_LEVEL_DEFAULT = 1

# A repository that needs a mandatory feature not named here is refused; optional ones are ignored.
# "differences": chunks may be stored as differences to others, so who deletes must look for these.
# "pieces": these hold what changed only; where it is missing, none is written.
DIFFERENCES = "differences"
PIECES = "pieces"
KNOWN_FEATURES = frozenset({DIFFERENCES, PIECES})


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryConfig:
    """What all who open the repository must agree on."""

    repository_id: str  # a UUID
    chunk_size: int  # bytes, a power of two
    pack_size: int  # bytes after which a pack is sealed
    compression_level: int  # of zstd, 1 to 19
    created_at: datetime
    mandatory_features: tuple[str, ...] = ()
    optional_features: tuple[str, ...] = ()


def check_options(*, chunk_size: int, pack_size: int, compression_level: int) -> None:
    """Refuse what no repository can be made with.

    Raises:
        InvalidOption: names the option and its bounds.
    """
    if not CHUNK_SIZE_MIN <= chunk_size <= CHUNK_SIZE_MAX or chunk_size & (chunk_size - 1):
        raise InvalidOption(option="chunk size", reason="a power of two from 16 KiB to 4 MiB")
    if not PACK_SIZE_MIN <= pack_size <= PACK_SIZE_MAX:
        raise InvalidOption(option="pack size", reason="from 1 MiB to 512 MiB")
    if not 1 <= compression_level <= 19:
        raise InvalidOption(option="compression level", reason="from 1 to 19")


def encode_config(config: RepositoryConfig, ids: IdScheme) -> bytes:
    """The object's bytes: the map, its digest as the last key."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "repository_id": config.repository_id,
        "chunk_size": config.chunk_size,
        "pack_size": config.pack_size,
        "compression_level": config.compression_level,
        "created_at": config.created_at.isoformat(),
        "mandatory_features": list(config.mandatory_features),
        "optional_features": list(config.optional_features),
    }
    value["digest"] = ids.digest("config", codec.encode(value))
    return codec.encode(value)


def decode_config(data: Buffer, ids: IdScheme) -> RepositoryConfig:
    """Read a ``config`` object.

    Raises:
        CorruptObject: damaged.
        UnsupportedFormat: of a later version, or with a mandatory feature unknown here.
    """
    try:
        value = codec.decode(data, size_max=CONFIG_SIZE_MAX)
        fields = codec.Fields(value)
        if fields.text("format") != FORMAT:
            raise codec.UndecodableError("of another program")
        version = fields.integer("version")
        if version != VERSION:
            raise UnsupportedFormat(name="config", feature=f"format version {version}")
        digest = fields.raw("digest", size=DIGEST_SIZE)
        body = {key: item for key, item in value.items() if key != "digest"}
        if ids.digest("config", codec.encode(body)) != digest:
            raise codec.UndecodableError("digest does not match")
        # Before all other fields: a feature unknown here may give them other bounds.
        mandatory_features = _features(fields, "mandatory_features")
        for feature in mandatory_features:
            if feature not in KNOWN_FEATURES:
                raise UnsupportedFormat(name="config", feature=f"feature {feature!r}")
        config = RepositoryConfig(
            repository_id=_repository_id(fields),
            chunk_size=fields.integer("chunk_size"),
            pack_size=fields.integer("pack_size"),
            compression_level=fields.integer("compression_level"),
            created_at=fields.moment("created_at"),
            mandatory_features=mandatory_features,
            optional_features=_features(fields, "optional_features"),
        )
        check_options(
            chunk_size=config.chunk_size,
            pack_size=config.pack_size,
            compression_level=config.compression_level,
        )
    except (codec.UndecodableError, InvalidOption, ValueError) as error:
        raise CorruptObject(name=CONFIG_NAME, reason=str(error)) from error
    return config


def _repository_id(fields: codec.Fields) -> str:
    # Checked closely because folders of the host are named by it.
    text = fields.text("repository_id", size_max=36)
    if str(uuid.UUID(text)) != text:
        raise codec.UndecodableError("repository id is no UUID in lower case")
    return text


def _features(fields: codec.Fields, key: str) -> tuple[str, ...]:
    listed = fields.sequence(key, length_max=64)
    if not all(isinstance(feature, str) for feature in listed):
        raise codec.UndecodableError(f"field {key!r} holds other than text")
    return tuple(listed)
