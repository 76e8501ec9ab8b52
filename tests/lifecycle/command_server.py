"""Runs commands of ours in forks of one warm process, for tests that run thousands of them.

The commands are the real ones and every daemon is a real process; only the interpreter's start is
spared. Run as a program this is the server: it reads one job a line from stdin, and writes a line
when a job has begun and one when it has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS_MAX = 120.0
DESCRIPTORS_MAX = 256
OUTPUTS_MAX = 1000  # kept of those that ended, for whoever still wants to read them
WARM = ("mounting", "staging", "backups", "records", "repository")


class Command:
    """One command that was started."""

    def __init__(self, words: Sequence[str], output: Path) -> None:
        self.words = words
        self.process_id = 0
        self.code = -1
        self._output = output
        self.begun = threading.Event()
        self.ended = threading.Event()

    def wait(self, seconds: float = SECONDS_MAX) -> int:
        """Its exit code; minus the number of the signal that killed it."""
        assert self.ended.wait(seconds), f"{self.words} does not end"
        return self.code

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self.begun.wait(SECONDS_MAX)
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)

    def out(self) -> str:
        """What it wrote to stdout."""
        return self._output.with_suffix(".out").read_text()

    def err(self) -> str:
        """What it wrote to stderr; nothing where it was killed before it had one."""
        with contextlib.suppress(FileNotFoundError):
            return self._output.with_suffix(".err").read_text()
        return ""


class CommandServer:
    """The server's process, as its user sees it. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self._commands: dict[int, Command] = {}
        self._count = 0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self, *words: str | Path, environment: dict[str, str]) -> Command:
        """Start a command with some variables of its environment changed."""
        with self._lock:
            self._count += 1
            number = self._count
            output = self._folder / f"output-{number % OUTPUTS_MAX}"
            command = Command([str(word) for word in words], output)
            self._commands[number] = command
            job = {
                "number": number,
                "words": command.words,
                "output": str(output),
                "environment": environment,
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return command

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._thread.join(30)
        self._process.wait(30)
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            command = self._commands[news["number"]]
            if "process_id" in news:
                command.process_id = news["process_id"]
                command.begun.set()
            else:
                command.code = news["code"]
                command.ended.set()
                del self._commands[news["number"]]
        for command in self._commands.values():  # the server died: nobody else will say so
            command.begun.set()
            command.ended.set()


# -- in the server's process -------------------------------------------------------------------


def serve() -> None:
    from backupfs.cli.main import main

    for module in WARM:
        importlib.import_module(f"backupfs.cli.{module}")
    importlib.import_module("backupfs.daemon")
    waking, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    unread = b""
    while True:
        ready = select.select([0, waking], [], [])[0]
        if waking in ready:
            os.read(waking, 4096)
            _reap(running)
        if 0 in ready:
            part = os.read(0, 1 << 16)
            if not part:
                return
            *lines, unread = (unread + part).split(b"\n")
            for line in lines:
                _begin(json.loads(line), running, main)


def _begin(job: dict[str, Any], running: dict[int, int], main: Any) -> None:
    child = os.fork()
    if not child:
        _be(job, main)
    running[child] = job["number"]
    _tell(number=job["number"], process_id=child)


def _be(job: dict[str, Any], main: Any) -> None:
    """The life of a command: never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = [os.open(f"{job['output']}{end}", flags, 0o600) for end in (".out", ".err")]
        for stream, file in enumerate((null, *files)):
            os.dup2(file, stream)
        os.environ.update(job["environment"])
        os.closerange(3, DESCRIPTORS_MAX)
        code = main(job["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _reap(running: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            process_id, status = os.waitpid(-1, os.WNOHANG)
            if not process_id:
                return
            _tell(number=running.pop(process_id), code=os.waitstatus_to_exitcode(status))


def _tell(**news: int) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


if __name__ == "__main__":
    serve()
