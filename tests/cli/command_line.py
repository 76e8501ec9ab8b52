"""Ways to run command lines, as a shell and a terminal would."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from backupfs.cli.main import main

MIB = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a command line ended."""

    code: int
    output: bytes
    err: str

    @property
    def out(self) -> str:
        return self.output.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.output)

    @property
    def error_line(self) -> str:
        """The only line on stderr, which says what went wrong."""
        assert self.err.startswith("backupfs: "), self.err
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err.removeprefix("backupfs: ").rstrip("\n")


class Run(Protocol):
    def __call__(self, *words: str | Path, stdin: bytes = b"") -> Outcome: ...


def run_command_line(*words: str | Path, stdin: bytes = b"") -> Outcome:
    """Run a command line in this process, with pipes for its streams."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in words])
    finally:
        sys.stdin = before
    err.flush()
    return Outcome(code, out.buffer.getvalue(), err.buffer.getvalue().decode())


def on_terminal(command: Sequence[str | Path], *, columns: int = 100) -> tuple[int, str]:
    """Exit code of a process, and what it writes to a terminal that is its stdout and stderr."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while part := os.read(ours, 65536):
                shown += part
        os.close(ours)
    return process.returncode, shown.decode()


def damage_data(repo: Path) -> None:
    """Flip a bit in the largest pack, in the middle of what it stores."""
    pack = max((repo / "packs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
