"""Whether the program that opened a file was killed: the kernel notes it in its task's flags.

proc(5), /proc/PID/stat, field 9; the flag is PF_SIGNALED of include/linux/sched.h. A process of
another namespace, or one that is gone, is unknown, which is no evidence.
"""

from __future__ import annotations

from pathlib import Path

PF_SIGNALED = 0x400
_FLAGS_AFTER_NAME = 6  # field 9, counted from the state, field 3


def was_killed(process_id: int) -> bool:
    """Whether a process is ending because of a signal. Quick: reads one line of procfs."""
    if process_id <= 0:
        return False
    try:
        line = Path(f"/proc/{process_id}/stat").read_bytes()
    except OSError:
        return False
    # The name, field 2, may hold anything, parentheses too: the last one ends it.
    fields = line.rpartition(b")")[2].split()
    try:
        return bool(int(fields[_FLAGS_AFTER_NAME]) & PF_SIGNALED)
    except (IndexError, ValueError):
        return False
