"""The options of a mount, as a user writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from backupfs.errors import InvalidOption
from backupfs.fuse.options import MountOptions, parse_mount_options


def test_all_options_together() -> None:
    text = (
        "ro,allow_other,umask=027,uid=1000,gid=100,settle=2.5,settle_all,publish=rename,log_file=/l"
    )

    assert parse_mount_options(text) == MountOptions(
        read_only=True,
        allow_other=True,
        umask=0o027,
        uid=1000,
        gid=100,
        settle=2.5,
        settle_all=True,
        publish_on_rename_only=True,
        log_file=Path("/l"),
    )


@pytest.mark.parametrize("text", ["", "rw,defaults,nofail,_netdev,x-systemd.automount", " ,,"])
def test_words_that_say_nothing_to_us_change_nothing(text: str) -> None:
    assert parse_mount_options(text) == MountOptions()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("compress", "not an option"),
        ("compress=zstd", "not an option"),
        ("umask=9", "a number is missing"),
        ("umask=7777", "too large"),
        ("uid=root", "a number is missing"),
        ("gid=4294967295", "too large"),
        ("settle=soon", "a number of seconds"),
        ("settle=-1", "from 0 to 86400 seconds"),
        ("settle=nan", "from 0 to 86400 seconds"),
        ("publish=never", "'rename' or 'close'"),
        ("log_file=backupfs.log", "begins with '/'"),
    ],
)
def test_wrong_word_is_named_with_what_it_should_be(word: str, reason: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_mount_options(f"ro,{word},allow_other")

    assert caught.value.option == word
    assert reason in str(caught.value)
