"""Several services on one repository, as different processes and hosts have them: whatever they do, one
after the other and at once, each backup that one of them reported restores by all of them.

``BACKUPFS_MODEL_STEPS`` and ``BACKUPFS_MODEL_EXAMPLES`` make the runs longer, each time with other draws.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.images import CHUNK_SIZE, PACK_SIZE, BytesSource, alike, restored

from backupfs.errors import BackupExists, BackupNotFound, Busy, DamageError, MissingData
from backupfs.service import Policy, Record, Service, StagingArea, init
from backupfs.staging.write_handle import WriteHandle

EXAMPLES = int(os.environ.get("BACKUPFS_MODEL_EXAMPLES", "0"))
STEPS = int(os.environ.get("BACKUPFS_MODEL_STEPS", "25"))
HOSTS = 2  # each with an index of its own
SERVICES_MAX = 3
VOLUMES = ("a", "b/c", "d")
FAMILIES, MEMBERS = 5, 5
services = st.integers(0, SERVICES_MAX - 1)
seeds = st.integers(0, 1 << 30)
# Drawn without a look at what there is: that depends on the clock, and draws must not.
picks = st.integers(0, 1 << 16)
STAGED_NAMES = ("s1.img", "s2.img")
KINDS = ("back up", "back up", "delete", "import", "gc", "read", "verify", "write")


def picked(choices: Iterable[str], pick: int) -> str:
    ordered = sorted(choices)
    return ordered[pick % len(ordered)]


POOL = [[alike(family, number) for number in range(MEMBERS)] for family in range(FAMILIES)]


def image_of(seed: int) -> bytes:
    """Of few chunks: what one deletes another is about to rely on; many are differences to others."""
    choice = random.Random(seed)
    families = range(choice.randrange(2), choice.randrange(1, 30))
    chunks = [choice.choice(POOL[place % FAMILIES]) for place in families] or [POOL[0][0]]
    return b"".join(chunks)[: -choice.randrange(1, CHUNK_SIZE)]


@dataclass
class Copied:
    """A record that was copied out; ``is_certain``: no gc has run since its backup was deleted."""

    record: Record
    data: bytes
    content: bytes
    is_certain: bool = True


@dataclass
class Staged:
    """A file in the one staging area that is open, and what it holds."""

    area: StagingArea
    owner: int
    contents: dict[str, bytearray] = field(default_factory=dict)
    handles: dict[str, WriteHandle] = field(default_factory=dict)


class Together:
    """Acts that run at once; what they did is told to the model when all have ended."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.lock = threading.Lock()

    def run(self, acts: list[Callable[[], None]]) -> None:
        barrier = threading.Barrier(len(acts))

        def one(act: Callable[[], None]) -> None:
            try:
                barrier.wait(30)
                act()
            except BaseException:
                with self.lock:
                    self.problems.append(traceback.format_exc())

        threads = [threading.Thread(target=one, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "something hangs"
        assert not self.problems, "\n".join(self.problems)


class Model(RuleBasedStateMachine):
    """The repository as it must be, beside the one there is."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="backupfs-model-", dir=_memory_disk()))
        self.cache_before = os.environ.get("XDG_CACHE_HOME")
        self.location = str(self.folder / "repo")
        self.opened: dict[int, Service] = {}
        self.contents: dict[str, tuple[Record, bytes]] = {}  # by id
        self.deleted: set[str] = set()
        self.copied: dict[str, Copied] = {}
        self.importing: list[Copied] = []  # now or before
        self.staged: Staged | None = None
        self.lock = threading.Lock()

    @initialize()
    def make(self) -> None:
        self._be_host(0)
        init(self.location, chunk_size=CHUNK_SIZE, pack_size=PACK_SIZE)

    def teardown(self) -> None:
        try:
            self._end_staging()
            for service in self.opened.values():
                service.close()
            if self.location and (self.folder / "repo" / "config").exists():
                self._check_with_new_index()
        finally:
            if self.cache_before is None:
                os.environ.pop("XDG_CACHE_HOME", None)
            else:
                os.environ["XDG_CACHE_HOME"] = self.cache_before
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check_with_new_index(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "new cache")
        with Service.open(self.location) as service:
            self._check(service)
            service.gc()
            assert service.gc().packs_deleted == 0
            assert service.verify().damage == []
            self._check(service)
        assert not [p for p in (self.folder / "repo/sessions").rglob("*") if p.is_file()]

    def _be_host(self, number: int) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self.folder / f"cache-{number % HOSTS}")

    def _service(self, number: int) -> Service:
        if number not in self.opened:
            self._be_host(number)
            self.opened[number] = Service.open(self.location)
        return self.opened[number]

    # -- acts; each may run in a thread of its own ---------------------------------------------------

    def _back_up(self, number: int, volume: str, seed: int) -> Callable[[], None]:
        service, content = self._service(number), image_of(seed)

        def act() -> None:
            record = service.backup(BytesSource(content, piece_size=7000), volume=volume)
            with self.lock:
                self.contents[record.backup_id] = record, content

        return act

    def _delete(self, number: int, backup_id: str, *, copy: bool) -> Callable[[], None]:
        service = self._service(number)
        record, content = self.contents.pop(backup_id)
        if copy:
            self.copied[backup_id] = Copied(record, service.export_record(record), content)

        def act() -> None:
            service.delete(record)
            with self.lock:
                self.deleted.add(backup_id)

        return act

    def _import(self, number: int, backup_id: str) -> Callable[[], None]:
        service, copied = self._service(number), self.copied.pop(backup_id)
        self.importing.append(copied)

        def act() -> None:
            try:
                service.import_record(copied.data)
            except MissingData:
                assert not copied.is_certain, "nothing has collected it"
            except BackupExists:
                pass  # another backup of that second has its name
            else:
                with self.lock:
                    self.deleted.discard(backup_id)
                    self.contents[backup_id] = copied.record, copied.content

        return act

    def _gc(self, number: int) -> Callable[[], None]:
        service = self._service(number)

        def act() -> None:
            for copied in (*self.copied.values(), *self.importing):
                copied.is_certain = False
            with contextlib.suppress(Busy):  # another one runs
                service.gc()

        return act

    def _read(self, number: int, backup_id: str) -> Callable[[], None]:
        service = self._service(number)
        record, content = self.contents[backup_id]

        def act() -> None:
            try:
                assert restored(service, record) == content
            except DamageError:
                assert not service.repository.records.exists(backup_id), "it is not deleted"

        return act

    def _verify(self, number: int) -> Callable[[], None]:
        service = self._service(number)

        def act() -> None:
            report = service.verify()
            assert report.damage == [], report.damage

        return act

    def _write(self, name: str, seed: int) -> Callable[[], None]:
        """Into a staged file, to its close; its backup is the new content."""
        assert self.staged is not None
        staged, choice = self.staged, random.Random(seed)
        content = staged.contents.setdefault(name, bytearray())
        pieces = [
            (
                choice.randrange(30) * CHUNK_SIZE // 2,
                choice.choice(choice.choice(POOL))[: choice.randrange(1, CHUNK_SIZE)],
            )
            for _ in range(choice.randrange(1, 8))
        ]

        def act() -> None:
            area = staged.area
            found = area.find(name)
            if found is None:
                handle = area.create(name, mode=0o644, uid=0, gid=0)
            else:
                handle = area.open_write(found, truncate=False)
            for offset, data in pieces:
                if handle.staged.wants_mark:
                    area.begin_writing(handle)
                area.note_write(handle)
                handle.staged.draft.write(offset, data)
                content[len(content) :] = bytes(max(0, offset + len(data) - len(content)))
                content[offset : offset + len(data)] = data
            area.flush(handle, interrupted=False)
            area.release(handle, interrupted=False)
            assert handle.staged.draft.read(0, handle.staged.size) == content
            if handle.staged.changed:  # after a forgotten head of more bytes
                assert "smaller" in handle.staged.reason
                area.publish_now(name)
            assert not handle.staged.changed
            volume = name.removesuffix(".img")
            record = self._service(staged.owner).resolve(f"{volume}@latest")
            assert record.backup_id == handle.staged.published_id
            with self.lock:
                self.contents[record.backup_id] = record, bytes(content)

        return act

    # -- rules -------------------------------------------------------------------------------------

    @rule(number=services, volume=st.sampled_from(VOLUMES), seed=seeds)
    def back_up(self, number: int, volume: str, seed: int) -> None:
        self._back_up(number, volume, seed)()

    @rule(number=services, pick=picks, copy=st.booleans())
    def delete(self, number: int, pick: int, copy: bool) -> None:
        if self.contents:
            self._service(number).refresh()
            self._delete(number, picked(self.contents, pick), copy=copy)()

    @rule(number=services, pick=picks)
    def import_back(self, number: int, pick: int) -> None:
        if self.copied:
            self._import(number, picked(self.copied, pick))()

    @rule(number=services)
    def collect(self, number: int) -> None:
        self._gc(number)()

    @rule(number=services)
    def verify(self, number: int) -> None:
        self._verify(number)()

    @rule(number=services)
    def leave(self, number: int) -> None:
        if self.staged is not None and self.staged.owner == number:
            self._end_staging()
        service = self.opened.pop(number, None)
        if service is not None:
            service.close()

    @rule(number=services)
    def stage(self, number: int) -> None:
        if self.staged is None:
            service = self._service(number)
            service.refresh()
            area = service.open_staging(Policy(settle_seconds=0), mountpoint=None)
            self.staged = Staged(area, number)
            for found in area.files():
                content = found.draft.read(0, found.size)
                self.staged.contents[found.name] = bytearray(content)

    def _end_staging(self) -> None:
        if self.staged is not None:
            self.staged.area.close()
            self.staged = None

    @rule(name=st.sampled_from(STAGED_NAMES), seed=seeds)
    def write(self, name: str, seed: int) -> None:
        if self.staged is not None:
            self._write(name, seed)()

    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        if self.staged is not None and self.staged.contents:
            name = picked(self.staged.contents, pick)
            self.staged.area.unlink(name)
            del self.staged.contents[name]

    @rule()
    def take_staging_anew(self) -> None:
        if self.staged is not None:
            owner, contents = self.staged.owner, self.staged.contents
            self._end_staging()
            self.stage(owner)
            assert self.staged is not None and self.staged.contents == contents

    @rule(plans=st.lists(st.tuples(st.sampled_from(KINDS), services, picks, seeds), max_size=5))
    def several_at_once(self, plans: list[tuple[str, int, int, int]]) -> None:
        """Each on another backup or staged file, so that what must come of it is certain."""
        acts: list[Callable[[], None]] = []
        for service in self.opened.values():
            service.refresh()
        writes = False
        read: set[str] = set()
        for what, number, pick, seed in plans:
            self._service(number).refresh()
            if what == "back up":
                acts.append(self._back_up(number, VOLUMES[pick % len(VOLUMES)], seed))
            elif what == "delete" and self.contents.keys() - read:
                backup_id = picked(self.contents.keys() - read, pick)
                acts.append(self._delete(number, backup_id, copy=False))
            elif what == "import" and self.copied:
                acts.append(self._import(number, picked(self.copied, pick)))
            elif what == "gc":
                acts.append(self._gc(number))
            elif what == "read" and self.contents:
                backup_id = picked(self.contents, pick)
                read.add(backup_id)
                acts.append(self._read(number, backup_id))
            elif what == "verify":
                acts.append(self._verify(number))
            elif what == "write" and self.staged is not None and not writes:
                writes = True
                acts.append(self._write(STAGED_NAMES[pick % len(STAGED_NAMES)], seed))
        if acts:
            Together().run(acts)

    # -- what must always be so --------------------------------------------------------------------

    @invariant()
    def every_backup_restores_by_every_service(self) -> None:
        for service in self.opened.values():
            service.refresh()
            self._check(service)

    def _check(self, service: Service) -> None:
        there = {record.backup_id: record for record in service.backups()}
        assert there.keys() == self.contents.keys()
        for backup_id, (record, content) in self.contents.items():
            assert there[backup_id] == record
            assert restored(service, record) == content
        for backup_id in self.deleted - self.contents.keys():
            with pytest.raises(BackupNotFound):
                service.resolve(backup_id)


def _memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.mark.timeout(3600 if EXAMPLES else 300)
def test_whatever_several_services_do_each_backup_restores():
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=EXAMPLES or 25,
            stateful_step_count=STEPS,
            derandomize=not EXAMPLES,
            database=None,
            phases=(Phase.generate,),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
