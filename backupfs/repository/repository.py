"""One repository, opened: owns its parts and knows in which order they start and end.

Reading needs only the parts made at once; the parts that write (session, packer, workers) start
with the first caller of ``writer``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path

from backupfs.ambient import Ambient
from backupfs.errors import (
    CorruptObject,
    ObjectNotFound,
    RepositoryExists,
    RepositoryNotFound,
    StorageUnavailable,
)
from backupfs.format.config import (
    CONFIG_NAME,
    CONFIG_SIZE_MAX,
    DIFFERENCES,
    PIECES,
    RepositoryConfig,
    check_options,
    decode_config,
    encode_config,
)
from backupfs.format.ids import IdScheme
from backupfs.repository.avoided import Avoided
from backupfs.repository.blobs import BlobReader
from backupfs.repository.chunks import ChunkStore
from backupfs.repository.index import Index
from backupfs.repository.metadata import MetadataStore
from backupfs.repository.packer import Packer
from backupfs.repository.quick_reads import QuickReads
from backupfs.repository.rebuild import refresh_index
from backupfs.repository.record_cache import RecordCache
from backupfs.repository.records import RecordLoader, RecordStore
from backupfs.repository.sessions import Session
from backupfs.repository.workers import Credit, Share, Workers
from backupfs.storage.local import LocalStorage, make_folders, sync_folder
from backupfs.storage.locate import local_folder, open_storage
from backupfs.storage.oserrors import translated
from backupfs.storage.ownership import give_folder

# How long to wait for another process that publishes, or whose gc is in the way.
LOCK_SECONDS_MAX = 60.0
WORKERS_MAX = 4
# Accepted from writers and not stored yet; more only keeps memory busy.
CREDIT_SIZE = 24 << 20
# Chunks written in part that wait for their rest, of all drafts together.
OPEN_SIZE_MAX = 16 << 20
# A reader that meets a blob it cannot find asks for a refresh; of known damage, not each time.
REFRESH_SECONDS = 1.0
# For who reads, all packs are gone through again only after so many times as long as it took, where
# it took longer than this.
REST_FACTOR = 20
QUICK_SECONDS = 0.2
# Kept so that gc can write its plan on a disk that is full.
RESERVE_NAME = "reserve"
RESERVE_SIZE = 1 << 20


def init_repository(
    location: str,
    *,
    chunk_size: int,
    pack_size: int,
    compression_level: int,
    ambient: Ambient,
) -> RepositoryConfig:
    """Make a repository in a folder that is absent or empty; durable on return.

    One that was absent is its owner's alone: it will hold whole disks, secrets included. One that
    was there keeps its mode.

    Raises:
        InvalidOption, RepositoryExists, StorageError: nothing was made.
    """
    check_options(chunk_size=chunk_size, pack_size=pack_size, compression_level=compression_level)
    folder = local_folder(location)
    with translated():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RepositoryExists(location=location)
        make_folders(folder, mode=0o700, is_private=True)
        for name in ("packs", "records", "metadata", "sessions", "plans", "drafts", "spool"):
            (folder / name).mkdir()
        with (folder / "spool" / RESERVE_NAME).open("wb") as file:
            file.write(ambient.random_bytes(RESERVE_SIZE))
        sync_folder(folder)
    config = RepositoryConfig(
        repository_id=ambient.new_uuid(),
        chunk_size=chunk_size,
        pack_size=pack_size,
        compression_level=compression_level,
        created_at=ambient.now().replace(microsecond=0),
        mandatory_features=(DIFFERENCES, PIECES),
    )
    # Last: a folder without it is no repository.
    open_storage(location, ambient).put_new(CONFIG_NAME, encode_config(config, IdScheme()))
    return config


class Writer:
    """The parts of an opened repository that write. One per process and repository."""

    def __init__(self, repository: Repository) -> None:
        config, ambient = repository.config, repository.ambient
        self.session = Session(
            folder=repository.folder,
            storage=repository.storage,
            ambient=ambient,
            avoided=repository.avoided,
            refresh=repository.refresh_index,
        )
        self._spool = repository.folder / "spool" / self.session.session_id
        try:
            with translated():
                self._spool.mkdir(parents=True)
                give_folder(self._spool)
        except BaseException:  # whatever it was, nobody else will end the session
            self.session.close()  # or gc would wait for a writer that never was
            raise
        self.packer = Packer(
            storage=repository.storage,
            ids=repository.ids,
            index=repository.index,
            pack_size=config.pack_size,
            spool=self._spool,
            ambient=ambient,
        )
        self.store = ChunkStore(
            ids=repository.ids,
            index=repository.index,
            packer=self.packer,
            chunk_size=config.chunk_size,
            compression_level=config.compression_level,
            avoided=repository.avoided,
            reader=repository.reader,
            with_differences={DIFFERENCES, PIECES} <= set(config.mandatory_features),
        )
        self.workers = Workers(min(os.cpu_count() or 1, WORKERS_MAX))
        self.credit = Credit(CREDIT_SIZE)
        self.open_share = Share(OPEN_SIZE_MAX // config.chunk_size)
        repository.reader.attach(self.packer)
        self.session.settle = self._settle_packs

    def _settle_packs(self) -> None:
        """For gc: every pack it can have seen is in the index, where a condemned one is avoided."""
        self.packer.seal(since=self.packer.failures)

    def close(self) -> None:
        """Make what was stored durable, then leave the session."""
        self.session.stop_watching()  # its checkpoints need the threads that end now
        self.workers.close()
        self.packer.close()
        self.session.close()
        with contextlib.suppress(OSError):
            self._spool.rmdir()


class Repository:
    """An opened repository: its parts, for those who know what to do with them."""

    def __init__(
        self,
        storage: LocalStorage,
        ambient: Ambient,
        *,
        compression_level: int | None = None,
        lock_seconds_max: float | None = None,
    ) -> None:
        self.storage = storage
        self.folder = storage.folder
        self.location = storage.location
        self.ambient = ambient
        self.ids = IdScheme()
        self.config = _read_config(storage, self.ids)
        if compression_level is not None:
            self.config = replace(self.config, compression_level=compression_level)
            check_options(
                chunk_size=self.config.chunk_size,
                pack_size=self.config.pack_size,
                compression_level=compression_level,
            )
        self.lock_seconds_max = LOCK_SECONDS_MAX if lock_seconds_max is None else lock_seconds_max
        cache = cache_folder(_cache_name(self.config, self.folder))
        self.index = Index.open(cache)
        self.avoided = Avoided()
        self.records = RecordStore(storage, self.ids, self.config)
        self.loader = RecordLoader(self.records, storage, RecordCache(cache, self.ids))
        self.metadata = MetadataStore(storage, self.ids)
        self.reader = BlobReader(
            storage=storage,
            ids=self.ids,
            index=self.index,
            chunk_size=self.config.chunk_size,
            avoided=self.avoided,
            refresh=self._refresh_for_reader,
        )
        self.quick_reads = QuickReads(
            storage=storage, ids=self.ids, index=self.index, reader=self.reader
        )
        self._writer: Writer | None = None
        self._is_closed = False
        self._writer_lock = threading.Lock()
        self._refreshed_at = self._fills_gaps_at = float("-inf")
        self._refresh_lock = threading.Lock()
        try:
            self.refresh_index()
        except BaseException:  # the caller gets no repository that it could close
            self.index.close()
            raise

    @classmethod
    def open(
        cls,
        location: str,
        ambient: Ambient,
        *,
        compression_level: int | None = None,
        lock_seconds_max: float | None = None,
    ) -> Repository:
        """``None`` stands for the repository's own level, and for ``LOCK_SECONDS_MAX``.

        Raises: RepositoryNotFound, InvalidOption, CorruptObject, UnsupportedFormat, StorageError.
        """
        return cls(
            open_storage(location, ambient),
            ambient,
            compression_level=compression_level,
            lock_seconds_max=lock_seconds_max,
        )

    def close(self) -> None:
        """End all parts; what was stored is durable when this returns."""
        with self._writer_lock:
            if self._is_closed:
                return
            self._is_closed = True
            writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        finally:
            self.index.close()
            self.storage.close()

    def writer(self) -> Writer:
        """The writing parts, started if need be. Raises: StorageError."""
        with self._writer_lock:
            if self._is_closed:
                raise StorageUnavailable(reason="the repository was closed")
            if self._writer is None:
                self._writer = Writer(self)
            return self._writer

    def refresh_index(self, *, fills_gaps: bool = True) -> list[CorruptObject]:
        """Bring the index in line with the packs that exist; see ``rebuild``."""
        with self._refresh_lock:
            began = self.ambient.monotonic()
            damage = refresh_index(
                self.storage,
                self.ids,
                self.index,
                make_lasting=self.storage.make_lasting,
                fills_gaps=fills_gaps,
            )
            self.avoided.blobs = self.index.damaged()
            self.storage.close_deleted()
            self._refreshed_at = self.ambient.monotonic()
            if fills_gaps:
                slow_seconds = max(0.0, self._refreshed_at - began - QUICK_SECONDS)
                self._fills_gaps_at = self._refreshed_at + REST_FACTOR * slow_seconds
            return damage

    def renew_index(self) -> list[CorruptObject]:
        """Forget the index and make it again from the packs; see ``rebuild``."""
        with self._refresh_lock:
            self.index.clear()
        return self.refresh_index()

    def check_packs_stay(self) -> None:
        """For who deletes a copy, or takes one for all that is needed. Raises: StorageUnavailable."""
        if self.index.fleeting():
            raise StorageUnavailable(
                reason="the disk does not say that all packs are there to stay"
            )

    def _refresh_for_reader(self, *, is_known: bool) -> None:
        is_recent = self.ambient.monotonic() - self._refreshed_at <= REFRESH_SECONDS
        if not (is_known and is_recent):
            # One read after the other may come upon damage: not each goes through all packs.
            self.refresh_index(fills_gaps=self.ambient.monotonic() >= self._fills_gaps_at)


def cache_folder(name: str) -> Path:
    """Where this host keeps what can be made anew; never inside a repository.

    Raises: StorageUnavailable (nothing says where, as for a user that is a number only).
    """
    cache_home = os.environ.get("XDG_CACHE_HOME")
    if cache_home and Path(cache_home).is_absolute():
        return Path(cache_home) / "backupfs" / name
    if os.geteuid() == 0:
        return Path("/var/cache/backupfs") / name
    try:
        return Path.home() / ".cache" / "backupfs" / name
    except RuntimeError as error:
        reason = "there is no home to keep its index in: set XDG_CACHE_HOME to a folder"
        raise StorageUnavailable(reason=reason) from error


def _cache_name(config: RepositoryConfig, folder: Path) -> str:
    """A name for the index of the repository in ``folder``."""
    # By place too: a copy of a repository has the same id, and soon other packs.
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return f"{config.repository_id}-{place}"


def _read_config(storage: LocalStorage, ids: IdScheme) -> RepositoryConfig:
    try:
        return decode_config(storage.get(CONFIG_NAME, size_max=CONFIG_SIZE_MAX), ids)
    except ObjectNotFound as error:
        raise RepositoryNotFound(location=storage.location) from error
    except StorageUnavailable as error:
        if not storage.folder.is_dir():
            raise RepositoryNotFound(location=storage.location) from error
        raise
