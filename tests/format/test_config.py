"""The ``config`` object: what it says, and what must be refused before anything is done."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.errors import CorruptObject, InvalidOption, UnsupportedFormat
from backupfs.format import codec
from backupfs.format.config import (
    CONFIG_SIZE_MAX,
    RepositoryConfig,
    check_options,
    decode_config,
    encode_config,
)
from backupfs.format.ids import IdScheme

IDS = IdScheme()
CONFIG = RepositoryConfig(
    repository_id="6e0f3d4a-5b1c-4c7e-9a52-0d1f2e3c4b5a",
    chunk_size=64 << 10,
    pack_size=64 << 20,
    compression_level=1,
    created_at=datetime(2026, 11, 22, 14, 0, 0, 5, tzinfo=UTC),
)

configs = st.builds(
    RepositoryConfig,
    repository_id=st.uuids().map(str),
    chunk_size=st.integers(14, 22).map(lambda power: 1 << power),
    pack_size=st.integers(1 << 20, 512 << 20),
    compression_level=st.integers(1, 19),
    created_at=st.datetimes(timezones=st.just(UTC)),
    optional_features=st.lists(st.text(max_size=30), max_size=64).map(tuple),
)


def sealed(**changed: Any) -> bytes:
    """CONFIG with fields changed, added or (None) taken away, and a digest that is right."""
    value = codec.decode(encode_config(CONFIG, IDS), size_max=CONFIG_SIZE_MAX)
    del value["digest"]
    value.update(changed)
    value = {key: item for key, item in value.items() if item is not None}
    value["digest"] = IDS.digest("config", codec.encode(value))
    return codec.encode(value)


@given(configs)
@settings(max_examples=100, deadline=None)
def test_a_config_comes_back_as_it_was(config):
    assert decode_config(encode_config(config, IDS), IDS) == config


def test_an_unknown_mandatory_feature_is_refused_by_name():
    data = encode_config(dataclasses.replace(CONFIG, mandatory_features=("sealed-packs",)), IDS)

    with pytest.raises(UnsupportedFormat, match="'sealed-packs'"):
        decode_config(data, IDS)


def test_an_unknown_mandatory_feature_is_named_even_where_it_changes_other_bounds():
    data = sealed(mandatory_features=["huge-chunks"], chunk_size=1 << 30, pack_size=None)

    with pytest.raises(UnsupportedFormat, match="'huge-chunks'"):
        decode_config(data, IDS)


def test_unknown_optional_features_and_their_fields_are_ignored():
    data = sealed(optional_features=["colours"], colour="blue")

    assert decode_config(data, IDS).optional_features == ("colours",)


@pytest.mark.parametrize("version", [0, 2, 1 << 40])
def test_another_version_is_refused_by_number(version):
    with pytest.raises(UnsupportedFormat, match=f"format version {version},"):
        decode_config(sealed(version=version), IDS)


def test_a_later_version_is_named_before_its_digest_is_checked():
    """A later version may compute it otherwise."""
    value = codec.decode(sealed(version=2), size_max=CONFIG_SIZE_MAX)
    value["digest"] = "of another kind"

    with pytest.raises(UnsupportedFormat, match="version 2"):
        decode_config(codec.encode(value), IDS)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "borg"},
        {"format": None},
        {"version": None},
        {"version": "1"},
        {"chunk_size": 8 << 10},
        {"chunk_size": 8 << 20},
        {"chunk_size": 3 << 14},
        {"chunk_size": 0},
        {"chunk_size": None},
        {"pack_size": (1 << 20) - 1},
        {"pack_size": (512 << 20) + 1},
        {"compression_level": 0},
        {"compression_level": 20},
        {"compression_level": True},
        {"repository_id": ""},
        {"repository_id": "../../../../etc"},
        {"repository_id": "6E0F3D4A-5B1C-4C7E-9A52-0D1F2E3C4B5A"},
        {"repository_id": "6e0f3d4a5b1c4c7e9a520d1f2e3c4b5a"},
        {"repository_id": "6e0f3d4a-5b1c-4c7e-9a52-0d1f2e3c4b5a\n"},
        {"created_at": "yesterday"},
        {"created_at": "2026-11-22T14:00:00"},
        {"created_at": 5},
        {"mandatory_features": "none"},
        {"mandatory_features": [5]},
        {"mandatory_features": None},
        {"optional_features": ["x"] * 65},
        {"optional_features": [b"x"]},
    ],
)
def test_what_cannot_be_is_refused(changed):
    with pytest.raises(CorruptObject, match="'config' is damaged"):
        decode_config(sealed(**changed), IDS)


def test_every_flipped_bit_is_refused():
    data = bytearray(encode_config(CONFIG, IDS))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises((CorruptObject, UnsupportedFormat)):
                decode_config(data, IDS)
            data[position] ^= 1 << bit


def test_a_config_cut_anywhere_or_followed_by_more_is_refused():
    data = encode_config(CONFIG, IDS)
    for cut in [data[:size] for size in range(len(data))] + [data + b"\0"]:
        with pytest.raises(CorruptObject):
            decode_config(cut, IDS)


def test_a_config_too_large_is_refused():
    with pytest.raises(CorruptObject, match="more than"):
        decode_config(sealed(filler=bytes(CONFIG_SIZE_MAX)), IDS)


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_garbage_is_no_config(data):
    with pytest.raises(CorruptObject):
        decode_config(data, IDS)


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"chunk_size": 1000}, "chunk size"),
        ({"chunk_size": (64 << 10) + 1}, "chunk size"),
        ({"chunk_size": -65536}, "chunk size"),
        ({"pack_size": 0}, "pack size"),
        ({"compression_level": 99}, "compression level"),
    ],
)
def test_options_out_of_bounds_are_refused_by_name(changed, option):
    options = {"chunk_size": 64 << 10, "pack_size": 64 << 20, "compression_level": 1}
    check_options(**options)

    with pytest.raises(InvalidOption, match=option):
        check_options(**(options | changed))
