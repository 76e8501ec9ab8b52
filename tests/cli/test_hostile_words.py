"""Words from outside: options, selectors, names, JSON. Each is understood or refused in one line.

``BACKUPFS_FUZZ_EXAMPLES`` makes the runs longer, each time with other draws (scripts/fuzz).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile import TRAPS
from support.images import BytesSource, back_up, noise

from backupfs.driver import BackupDriver
from backupfs.errors import (
    AmbiguousBackup,
    BackupfsError,
    BackupNotFound,
    InvalidMetadata,
    InvalidName,
    InvalidOption,
    InvalidRecord,
    VolumeNamed,
)
from backupfs.format.names import check_volume_name
from backupfs.fuse.options import SETTLE_SECONDS_MAX, parse_mount_options
from backupfs.service import Record, Service, init

LONG = int(os.environ.get("BACKUPFS_FUZZ_EXAMPLES", "0"))
# What a command line can be given: any bytes without zeros, those that are no UTF-8 as surrogates.
arguments = st.sampled_from([word for word in TRAPS if "\0" not in word]) | (
    st.binary(max_size=30).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
)
texts = st.sampled_from(TRAPS) | st.text(max_size=30) | arguments


def many(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# -- options of a mount ----------------------------------------------------------------------------

option_names = st.sampled_from(
    [
        *("ro", "rw", "allow_other", "settle_all", "umask", "uid", "gid", "settle", "publish"),
        *("log_file", "x-systemd.automount", "comment", "fsname", "nofail", "_netdev", "UID", ""),
    ]
)
option_values = texts | st.sampled_from(
    [
        *(
            "0",
            "022",
            "0777",
            "1000",
            "8",
            "-1",
            "+1",
            "1_0",
            " 1",
            "٣",
            "²",
            "9" * 5000,
            "4294967295",
        ),
        *(
            "nan",
            "inf",
            "-inf",
            "1e3",
            "1e999",
            "0x10",
            "5",
            "86401",
            "rename",
            "close",
            "/",
            "//x",
        ),
    ]
)
option_words = st.builds("{}={}".format, option_names, option_values) | option_names | texts


@given(st.lists(option_words, max_size=5).map(",".join))
@many(300)
def test_any_options_are_understood_or_refused(text):
    try:
        options = parse_mount_options(text)
    except InvalidOption as error:
        assert str(error)
        return
    assert 0 <= options.settle <= SETTLE_SECONDS_MAX
    assert 0 <= options.umask <= 0o777
    for number in (options.uid, options.gid):
        assert number is None or 0 <= number < (1 << 32) - 1
    assert options.log_file is None or options.log_file.is_absolute()


# -- selectors -------------------------------------------------------------------------------------

VOLUMES = ("vm", "a@b", "@", "latest", "a@latest", "vm@latest", "e\u0301", "é", "x\ny", "0b0e4f2c")


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("words")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def opened(module_folder: Path) -> Iterator[Service]:
    location = str(module_folder / "repo")
    init(location)
    with Service.open(location) as service:
        for volume in VOLUMES:
            back_up(service, noise(1000, seed=1), volume=volume)
            back_up(service, noise(1000, seed=2), volume=volume)
        yield service


@st.composite
def selectors(draw: st.DrawFn, records: list[Record]) -> str:
    record = draw(st.sampled_from(records))
    stamp = record.name.removesuffix(".img")
    left = draw(st.sampled_from([record.volume, record.backup_id, ""]) | texts)
    right = draw(
        st.sampled_from(["latest", "latest.img", stamp, record.name, record.created_at.isoformat()])
        | texts
    )
    word = draw(st.sampled_from([left, f"{left}@{right}", f"@{right}", f"{left}@"]))
    cut = draw(st.integers(0, 60) | st.just(10_000))
    return draw(st.sampled_from([word[:cut], word.upper(), word, word]))


def test_any_selector_stands_for_one_backup_or_says_why_not(opened):
    records = opened.backups()

    @given(selectors(records))
    @many(300)
    def check(selector):
        try:
            found = opened.resolve(selector)
        except (BackupNotFound, AmbiguousBackup) as error:
            assert str(error)
            return
        except VolumeNamed:
            assert selector in {record.volume for record in records}
            return
        volume, _, moment = selector.rpartition("@")
        assert found.backup_id.startswith(selector.lower()) or (
            found.volume == volume and moment is not None
        )

    check()
    for record in records:
        assert opened.resolve(record.backup_id) == record
        assert opened.resolve(f"{record.volume}@latest").volume == record.volume


# -- names -----------------------------------------------------------------------------------------


def test_any_name_of_a_volume_is_kept_as_it_is_or_refused(opened):
    @given(texts)
    @many(80)
    def check(name):
        problem = check_volume_name(name)
        try:
            record = opened.backup(BytesSource(b"x"), volume=name)
        except InvalidName:
            assert problem
            return
        assert not problem
        assert opened.repository.records.get(record.backup_id).volume == name
        assert opened.backups(name)[-1] == record
        opened.delete(record)

    check()


# -- JSON ------------------------------------------------------------------------------------------

json_texts = (
    texts
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=10,
    ).map(json.dumps)
    | st.binary(max_size=50)
)


def test_any_text_is_metadata_or_refused(opened):
    driver = BackupDriver.__new__(BackupDriver)
    driver.service = opened

    @given(json_texts)
    @many(120)
    def check(text):
        before = driver.get_metadata("vm")
        try:
            driver.put_metadata("vm", text)
        except InvalidMetadata as error:
            assert str(error)
            assert driver.get_metadata("vm") == before
            return
        assert json.loads(driver.get_metadata("vm")) == {**json.loads(text), "version": 2}

    check()


def test_any_driver_info_is_a_record_or_refused(opened):
    driver = BackupDriver.__new__(BackupDriver)
    driver.service = opened
    record = opened.backups()[0]
    backup = {"id": record.backup_id}
    exported = driver.export_record(backup)

    @given(
        st.dictionaries(
            st.sampled_from(["record", "id", "size", "x"]), st.none() | st.integers() | texts
        )
        | st.none()
        | st.lists(st.integers())
        | texts
    )
    @many(120)
    def check(changes):
        info = {**exported, **changes} if isinstance(changes, dict) else changes
        try:
            driver.import_record(backup, info)
        except InvalidRecord as error:
            assert str(error)
        else:
            assert info["record"] == exported["record"]

    check()
    assert record in opened.backups()


# -- command lines ---------------------------------------------------------------------------------

FORMS: tuple[tuple[str, ...], ...] = (
    ("show", "REPO", "WORD"),
    ("list", "REPO", "--volume", "WORD"),
    ("export", "REPO", "WORD"),
    ("delete", "REPO", "WORD"),
    ("publish", "REPO", "WORD"),
    ("metadata", "REPO", "WORD"),
    ("verify", "REPO", "WORD", "--quick"),
    ("restore", "REPO", "WORD", "/dev/null"),
    ("backup", "REPO", "WORD"),
    ("backup", "REPO", "/dev/null", "--volume", "WORD"),
    ("import", "REPO", "WORD"),
    ("prune", "REPO", "--keep-last", "WORD"),
    ("prune", "REPO", "--keep-last", "1", "--dry-run", "--volume", "WORD"),
    ("init", "REPO/WORD", "--chunk-size", "WORD"),
    ("stats", "WORD"),
    ("mount", "REPO", "MISSING", "-o", "WORD"),
    ("unmount", "WORD"),
    ("WORD", "REPO"),
    ("list", "REPO", "WORD"),
)


def test_any_word_on_a_command_line_ends_in_one_line_and_a_code(
    opened, module_folder, monkeypatch, run
):
    places = {"REPO": opened.location, "MISSING": str(module_folder / "missing")}
    monkeypatch.chdir(module_folder)

    @given(st.sampled_from(FORMS), arguments)
    @many(150)
    def check(form, word):
        words = [word if part == "WORD" else places.get(part, part) for part in form]
        outcome = run(*words)
        assert outcome.code in (0, 1, 2), (words, outcome)
        assert "internal error" not in outcome.err, (words, outcome.err)
        for line in outcome.err.splitlines():
            assert line.isprintable(), (words, line)
        if outcome.code:
            assert outcome.err.splitlines()[-1].startswith("backupfs: "), (words, outcome.err)

    check()


def test_backupfs_errors_print_in_one_line_whatever_they_hold():
    for word in TRAPS:
        for error in (
            InvalidName(name=word, reason=word),
            BackupNotFound(selector=word),
            InvalidOption(option=word, reason=word),
        ):
            assert isinstance(error, BackupfsError)
            assert "\n" not in str(error) and "\r" not in str(error)
