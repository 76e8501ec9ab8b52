"""Ids and digests: known answers, and no two domains that agree."""

from __future__ import annotations

import itertools

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.format.ids import PLAIN_KEY, IdScheme

LEVELS = range(8)
OBJECT_DOMAINS = ("record", "pack", "config", "state")


def everything_hashed(ids: IdScheme, data: bytes) -> list[bytes]:
    by_level = [ids.blob_id(data, level=level) for level in LEVELS]
    return by_level + [ids.digest(domain, data) for domain in OBJECT_DOMAINS]


def test_plain_key_and_ids_have_known_values():
    """Fixed for ever: they are the names of what is stored."""
    ids = IdScheme()

    assert PLAIN_KEY.hex() == "4f4c26601f39b63d51d3031f85fcfd5c829707c8104f63b2d35bb884a9f5d2c3"
    assert (
        ids.chunk_id(b"").hex()
        == "0092f0c95950def898c6ea2b257ef5cd7b3d6adb3ac94580db4eda0491c7fa7b"
    )
    assert (
        ids.chunk_id(b"abc").hex()
        == "368eb4e4e01e67afb699755eaaea1096e77da22d70c83afe220510f8828b8b52"
    )
    assert (
        ids.node_id(b"abc", level=1).hex()
        == "d2486b96bc4a8a5c50178dbe7c4f457403af24f421572d524be3a5dd07fc09fd"
    )
    assert (
        ids.digest("record", b"abc").hex()
        == "4b6a9b90b42de47aa0070e0974ed4a057aa0725c186ef404ba2e64d4c981176b"
    )


def test_ids_are_keyed_blake3_under_the_documented_contexts():
    ids = IdScheme(bytes(range(32)))

    def documented(domain: str) -> bytes:
        context = f"backupfs 2026-11 format 1 {domain}"
        key = blake3(bytes(range(32)), derive_key_context=context).digest()
        return blake3(b"content", key=key).digest()

    assert ids.chunk_id(b"content") == documented("data chunk")
    assert ids.node_id(b"content", level=7) == documented("node level 7")
    for domain in OBJECT_DOMAINS:
        assert ids.digest(domain, b"content") == documented(domain)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_no_two_domains_give_the_same_bytes_one_id(data):
    hashed = everything_hashed(IdScheme(), data)

    assert len(set(hashed)) == len(hashed)
    assert all(len(digest) == 32 and any(digest) for digest in hashed)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_another_key_gives_other_ids_in_every_domain(data):
    plain, secret = (
        everything_hashed(IdScheme(), data),
        everything_hashed(IdScheme(b"k" * 32), data),
    )

    assert not set(plain) & set(secret)


def test_two_schemes_of_one_key_agree():
    assert everything_hashed(IdScheme(), b"x") == everything_hashed(IdScheme(PLAIN_KEY), b"x")


def test_level_zero_is_the_chunk():
    ids = IdScheme()

    assert ids.blob_id(b"x", level=0) == ids.chunk_id(b"x")
    for low, high in itertools.combinations(LEVELS, 2):
        assert ids.blob_id(b"x", level=low) != ids.blob_id(b"x", level=high)
