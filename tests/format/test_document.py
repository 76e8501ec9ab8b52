"""docs/format.md says what is so: its dumps, keys, constants and bounds are compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden_values import GOLDEN

from backupfs.format import blob, codec, config, names, pack, record, tree
from backupfs.format.ids import PLAIN_KEY, IdScheme

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT, flags=re.M | re.S)
    assert found is not None, title
    return found[1]


def first_column(text: str) -> list[str]:
    """The keys listed by the tables of a section; a row may list several."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, flags=re.M)
    return [key for row in rows for key in re.findall(r"\w+", row)]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("A pack, byte by byte", "pack"),
        ("A difference, byte by byte", "pack-with-pieces"),
    ],
)
def test_the_dumps_are_those_of_the_golden_packs(title, name):
    data = (GOLDEN / name).read_bytes()
    text = section(title)
    lines = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} ?)+)$", text, flags=re.M)

    assert len(lines) > 15
    for offset, text in lines:
        expected = bytes.fromhex(text)
        start = int(offset, 16)
        assert data[start : start + len(expected)] == expected, offset


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Config", "config"),
        ("Draft state", "draft-state.msgpack"),
        ("Metadata", "metadata.msgpack"),
        ("Record", "record-full.msgpack"),
    ],
)
def test_the_keys_are_listed_in_their_order(title, name):
    value = codec.decode((GOLDEN / name).read_bytes(), size_max=1 << 20)

    assert first_column(section(title)) == list(value)


def test_the_domains_and_the_published_key_are_given():
    text = section("Ids and digests")

    assert PLAIN_KEY.hex() in text
    assert '"backupfs 2026-11 format 1 DOMAIN"' in text
    for domain in IdScheme()._object_keys:
        assert f"| `{domain}` |" in text
    assert "| `data chunk` |" in text and "| `node level N` |" in text


@pytest.mark.parametrize(
    ("title", "fact"),
    [
        ("Blob", f"`{blob.MAGIC.decode()}`"),
        ("Blob", f"1 to {blob.LEVEL_MAX}"),
        ("Pack", f"`{pack.MAGIC.decode()}`"),
        ("Pack", f"at most {pack.ENTRY_COUNT_MAX:,}"),
        ("Pack", f"{blob.HEADER.size} to {pack.BLOB_SIZE_MAX:,}"),
        ("Pack", f"last {pack.TAIL_SIZE} bytes"),
        ("Tree and nodes", f"{tree.NODE_SIZE:,} bytes: {tree.FANOUT} ids"),
        ("Tree and nodes", f"| 5 | {tree.span(5):,} |"),
        ("Config", f"at most {config.CONFIG_SIZE_MAX >> 10} KiB"),
        ("Record", f"at most {record.RECORD_SIZE_MAX >> 20} MiB"),
        ("Record", f"at most {record.METADATA_SIZE_MAX >> 10} KiB"),
        ("Record", f"at most {record.DESCRIPTION_SIZE_MAX:,} bytes"),
        ("Record", f"1 to {names.VOLUME_SIZE_MAX:,} bytes"),
        ("Canonical msgpack", f"more than {codec.CONTAINER_COUNT_FREE} maps and lists"),
        ("Canonical msgpack", f"one for each {codec.CONTAINER_SIZE_MIN} bytes"),
    ],
)
def test_constants_are_as_documented(title, fact):
    assert fact in section(title)
