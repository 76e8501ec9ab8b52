"""A draft's durable state: what a daemon that starts again must know of a staged file (pure).

Host-local; layout in docs/format.md, "Draft state". gc reads it too: a draft's root is live. The
folders that were made below ``staging/`` are kept beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from backupfs.errors import CorruptObject
from backupfs.format import codec, tree
from backupfs.format.ids import DIGEST_SIZE, IdScheme
from backupfs.format.names import check_path
from backupfs.format.record import is_backup_id
from backupfs.types import BLOB_ID_SIZE, IMAGE_SIZE_MAX, BlobId, Buffer

VERSION = 1
STATE_SIZE_MAX = 64 << 10
NAME_SIZE_MAX = 8192  # twice a volume's: a file moved aside gets a longer name
HELD_SIZE_MAX = 4096
FOLDERS_SIZE_MAX = 16 << 20
FOLDERS_COUNT_MAX = 1 << 20

_DRAFT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftState:
    """One staged file at its last checkpoint."""

    draft_id: str  # 32 hexadecimal digits
    name: str  # path below staging/
    size: int  # bytes
    root: BlobId
    height: int
    data_count: int  # chunks that are no holes
    mode: int  # permission bits
    uid: int
    gid: int
    mtime_ns: int
    written: bool  # some byte was written since it was last empty of content
    changed: bool  # it differs from ``published_id``, or was never published
    interrupted: bool  # not complete: its last writer was killed, or a write was lost
    held: str  # why it must not publish by itself; empty: it may
    stored_bytes: int  # added to the repository since it was last published
    next_id: str  # id of the backup it will become, fixed before its record is written
    published_id: str | None  # the backup it was last published as
    changed_at: datetime
    sequence: int  # of the last flush by a writer; an older marker of writing is void


def encode_draft_state(state: DraftState, ids: IdScheme) -> bytes:
    """The state's bytes, its digest as the last key."""
    value: dict[str, Any] = {
        "version": VERSION,
        "id": state.draft_id,
        "name": state.name,
        "size": state.size,
        "root": state.root,
        "height": state.height,
        "data_count": state.data_count,
        "mode": state.mode,
        "uid": state.uid,
        "gid": state.gid,
        "mtime_ns": state.mtime_ns,
        "written": state.written,
        "changed": state.changed,
        "interrupted": state.interrupted,
        "held": state.held,
        "stored_bytes": state.stored_bytes,
        "next_id": state.next_id,
        "published_id": state.published_id,
        "changed_at": state.changed_at.isoformat(),
        "sequence": state.sequence,
    }
    value["digest"] = ids.digest("state", codec.encode(value))
    return codec.encode(value)


def decode_draft_state(data: Buffer, name: str, ids: IdScheme, *, chunk_size: int) -> DraftState:
    """Read the state in the object ``name``. Raises: CorruptObject."""
    try:
        value = codec.decode(data, size_max=STATE_SIZE_MAX)
        fields = codec.Fields(value)
        if fields.integer("version") != VERSION:
            raise codec.UndecodableError("its version is unknown")
        digest = fields.raw("digest", size=DIGEST_SIZE)
        body = {key: item for key, item in value.items() if key != "digest"}
        if ids.digest("state", codec.encode(body)) != digest:
            raise codec.UndecodableError("its digest does not match")
        size = fields.integer("size", high=IMAGE_SIZE_MAX)
        height = fields.integer("height", low=1, high=16)
        if height != tree.height(size, chunk_size=chunk_size):
            raise codec.UndecodableError("its tree does not fit its size")
        draft_id = fields.text("id", size_max=32)
        if not _DRAFT_ID.fullmatch(draft_id):
            raise codec.UndecodableError("its id is not one of a draft")
        state = DraftState(
            draft_id=draft_id,
            name=_name(fields),
            size=size,
            root=BlobId(fields.raw("root", size=BLOB_ID_SIZE)),
            height=height,
            data_count=fields.integer("data_count"),
            mode=fields.integer("mode", high=0o7777),
            uid=fields.integer("uid", high=(1 << 32) - 1),
            gid=fields.integer("gid", high=(1 << 32) - 1),
            mtime_ns=fields.integer("mtime_ns", low=-(1 << 63)),
            written=fields.flag("written"),
            changed=fields.flag("changed"),
            interrupted=fields.flag("interrupted"),
            held=fields.text("held", size_max=HELD_SIZE_MAX),
            stored_bytes=fields.integer("stored_bytes"),
            next_id=_backup_id(fields.text("next_id", size_max=36)),
            published_id=_backup_id(fields.optional_text("published_id", size_max=36)),
            changed_at=fields.moment("changed_at"),
            sequence=fields.integer("sequence"),
        )
        if encode_draft_state(state, ids) != bytes(data):
            raise codec.UndecodableError("it has fields that do not belong there")
        return state
    except (codec.UndecodableError, ValueError) as error:
        raise CorruptObject(name=name, reason=str(error)) from error


def encode_folders(folders: set[str]) -> bytes:
    """The list of the folders below ``staging/``."""
    return codec.encode({"version": VERSION, "folders": sorted(folders)})


def decode_folders(data: Buffer) -> set[str]:
    """Raises: UndecodableError."""
    fields = codec.Fields(codec.decode(data, size_max=FOLDERS_SIZE_MAX))
    if fields.integer("version") != VERSION:
        raise codec.UndecodableError("its version is unknown")
    listed = fields.sequence("folders", length_max=FOLDERS_COUNT_MAX)
    for path in listed:
        problem = check_path(path) if isinstance(path, str) else "it is no text"
        if problem:
            raise codec.UndecodableError(f"a folder's name: {problem}")
    return set(listed)


def _name(fields: codec.Fields) -> str:
    name = fields.text("name", size_max=NAME_SIZE_MAX)
    problem = check_path(name)
    if problem:
        raise codec.UndecodableError(f"its name: {problem}")
    return name


BackupId = TypeVar("BackupId", str, str | None)


def _backup_id(text: BackupId) -> BackupId:
    # Objects are named by it.
    if text is not None and not is_backup_id(text):
        raise codec.UndecodableError("an id in it is no UUID")
    return text
