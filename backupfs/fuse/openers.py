"""What procfs knows of the program that opened a file: its name, was it killed, has it the file still.

The kernel notes a kill in the flags of the program's tasks: proc(5), /proc/PID/stat, field 9; the
flag is PF_SIGNALED of include/linux/sched.h. A process of another namespace, or one that is gone,
is unknown, which is no evidence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PF_SIGNALED = 0x400
_FLAGS_AFTER_NAME = 6  # field 9, counted from the state, field 3


@dataclass(frozen=True, slots=True)
class Opener:
    """The program that opened a file."""

    process_id: int  # 0 where it is of another namespace
    name: bytes  # as the kernel has it, at most 15 bytes; empty where it is unknown


def opener_of(task_id: int) -> Opener:
    """The program of a task: requests name the thread, which may end before its process does."""
    if task_id <= 0:
        return Opener(0, b"")
    try:
        fields = _fields(Path(f"/proc/{task_id}/status"))
    except OSError:
        return Opener(task_id, b"")
    group = fields.get(b"Tgid", b"")
    return Opener(int(group) if group.isdigit() else task_id, fields.get(b"Name", b""))


def was_killed(process_id: int) -> bool:
    """Whether a process is ending because of a signal. Quick: reads some lines of procfs."""
    if process_id <= 0:
        return False
    try:
        tasks = os.listdir(f"/proc/{process_id}/task")
    except OSError:
        return False
    flags = [_flags(Path(f"/proc/{process_id}/task/{task}/stat")) for task in tasks]
    known = [found for found in flags if found is not None]
    # All of them: a program that ends by itself kills its other threads, but not the one that ends.
    return bool(known) and all(found & PF_SIGNALED for found in known)


def holds_for_writing(process_id: int, inode: int) -> bool:
    """Whether a process has a file of this inode number open for writing, as far as we may look.

    By what it says of its descriptors (proc(5), /proc/PID/fdinfo; the inode since Linux 5.14):
    following one would ask the mount itself, which is waiting for the answer.
    """
    folder = f"/proc/{process_id}/fdinfo"
    try:
        descriptors = os.listdir(folder) if process_id > 0 else []
    except OSError:
        return False
    return any(_is_open_for_writing(Path(folder, number), inode) for number in descriptors)


def _is_open_for_writing(path: Path, inode: int) -> bool:
    try:
        fields = _fields(path)
    except OSError:
        return False  # closed meanwhile
    if fields.get(b"ino") != b"%d" % inode:
        return False
    return int(fields.get(b"flags", b"0"), 8) & os.O_ACCMODE != os.O_RDONLY


def _fields(path: Path) -> dict[bytes, bytes]:
    """A file of lines "name: value". Raises: OSError."""
    lines = (line.partition(b":") for line in path.read_bytes().split(b"\n"))
    return {name: value.strip() for name, _, value in lines}


def _flags(path: Path) -> int | None:
    """A task's flags; None where it is gone."""
    try:
        line = path.read_bytes()
    except OSError:
        return None
    # The name, field 2, may hold anything, parentheses too: the last one ends it.
    fields = line.rpartition(b")")[2].split()
    try:
        return int(fields[_FLAGS_AFTER_NAME])
    except (IndexError, ValueError):
        return None
