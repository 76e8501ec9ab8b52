"""What the soak does to a repository: each action is the real program a user would run.

An action knows what it promises (see ``soak_model``) and runs without a shell of its own. Which one
comes when is drawn by ``draw`` from the round's random numbers.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lifecycle_mount import KIB, Site, becomes
from soak_model import Model, Promise

IMAGE_SIZE_MAX = 1536 * KIB
PATCH_SIZE_MAX = 100 * KIB
SECTOR_SIZE = 512
TOOL_SECONDS = 60.0
KILLED = -signal.SIGKILL
COUNT_MAX = 5  # backups of a volume; then one is deleted


@dataclass(slots=True)
class Action:
    """One thing that a user does."""

    promise: Promise
    commands: list[list[str | Path]] = field(default_factory=list)  # one after the other
    command: tuple[str | Path, ...] = ()  # or one of ours
    restores: tuple[Path, bytes] | None = None  # a file, and what it must hold afterwards
    is_killed: bool = False  # by a kill of its own
    said: str = ""  # of what went wrong

    def run(self, site: Site, kill_after: float | None) -> None:
        """Run it to its end, however that is; its program may be killed after some seconds."""
        if self.command:
            self._run_ours(site, kill_after)
            return
        codes = []
        for words in self.commands:
            code, said = run_tool(words, kill_after)
            codes.append(code)
            self.said += said
        self.promise.is_done = not any(codes)
        self.is_killed = KILLED in codes

    def _run_ours(self, site: Site, kill_after: float | None) -> None:
        name, *words = self.command
        command = site.begin(str(name), *words)
        if kill_after is not None and not command.ended.wait(kill_after):
            command.kill()
            self.is_killed = True
        self.promise.is_done = command.wait() == 0
        self.said = command.err()


def run_tool(words: list[str | Path], kill_after: float | None) -> tuple[int, str]:
    """The exit code of a program, ``KILLED`` where it was killed with all of its processes; and what
    it said of errors."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [os.fspath(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(TOOL_SECONDS if kill_after is None else kill_after)
            errors.seek(0)
            return code, errors.read(1000).decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            assert kill_after is not None, f"{words} does not end"
            process.wait(TOOL_SECONDS)
            # rsync is several processes, and the one that writes may live a moment longer.
            assert becomes(lambda: not is_group_alive(process.pid), seconds=TOOL_SECONDS)
            return KILLED, ""


def is_group_alive(group: int) -> bool:
    """Whether a process of a group runs; those that only wait to be reaped do not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_bytes().rpartition(b")")[2].split()
            if int(fields[2]) == group and fields[0] not in (b"Z", b"X"):
                return True
    return False


class Lane:
    """One volume, what is done to it, and the files for that."""

    def __init__(self, site: Site, volume: str, suffix: str) -> None:
        self.site = site
        self.volume = volume
        self.name = f"{volume}{suffix}"
        self._files = site.folder / "lanes" / volume.replace("/", "_")
        self._files.mkdir(parents=True)

    @property
    def staged(self) -> Path:
        return self.site.staging / self.name

    def draw(self, model: Model, rng: random.Random) -> Action:
        """The next thing to do."""
        backups = model.of_volume(self.volume)
        if len(backups) >= COUNT_MAX:
            return self.delete(model, rng)
        choices: list[tuple[int, Callable[[Model, random.Random], Action]]] = [
            (6, self.copy),
            (3, self.move),
            (3, self.rsync),
            (2, self.rename_in),
            (2, self.back_up),
        ]
        head = model.heads.get(self.name)
        if head is not None:
            choices += [(4, self.rsync_inplace), (1, self.forget)]
            if head.content:  # there is nothing to patch or publish in an empty one
                choices += [(6, self.patch), (1, self.resize)]
                choices += [(4, self.publish)] if head.is_held else []
        if backups:
            choices += [(2, self.delete), (3, self.export), (4, self.read), (1, self.restore)]
        if model.lost(self.volume):
            choices += [(6, self.import_back)]
        weights = [weight for weight, _ in choices]
        return rng.choices(choices, weights)[0][1](model, rng)

    # -- whole images ------------------------------------------------------------------------------

    def copy(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng)
        return self._whole("cp", model, data, [["cp", source, self.staged]])

    def move(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng)
        action = self._whole("mv", model, data, [["mv", source, self.staged]])
        action.promise.may_lose_head = True  # mv removes what is there, then copies
        return action

    def rsync(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng)
        words = ["rsync", "--ignore-times", source, self.staged]
        return self._whole("rsync", model, data, [words])

    def rename_in(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng)
        part = self.staged.with_name(f"{self.staged.name}.part")
        commands: list[list[str | Path]] = [["cp", source, part], ["mv", part, self.staged]]
        return self._whole("cp and rename", model, data, commands)

    def _whole(
        self, what: str, model: Model, data: bytes, commands: list[list[str | Path]]
    ) -> Action:
        promise = Promise(self.volume, self.name, f"{what} of {len(data)} bytes to {self.name}")
        if len(data) < self._latest_size(model):
            promise.held = data
        else:
            promise.published = promise.head = data
        return Action(promise, commands)

    # -- parts of images ---------------------------------------------------------------------------

    def patch(self, model: Model, rng: random.Random) -> Action:
        head = model.heads[self.name]
        offset = rng.randrange(len(head.content) // SECTOR_SIZE) * SECTOR_SIZE
        part = rng.randbytes(rng.randint(1, PATCH_SIZE_MAX))
        data = head.content[:offset] + part + head.content[offset + len(part) :]
        source = self._file("patch", part)
        words: list[str | Path] = [
            *("dd", f"if={source}", f"of={self.staged}", "conv=notrunc", "status=none"),
            *(f"bs={rng.choice((512, 4096, 65536, 1 << 20))}", "oflag=seek_bytes"),
            f"seek={offset}",
        ]
        promise = Promise(
            self.volume, self.name, f"dd of {len(part)} bytes at {offset} to {self.name}"
        )
        self._promise_change(promise, model, data, completes=False)
        return Action(promise, [words])

    def rsync_inplace(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng, similar=True)
        words = ["rsync", "--inplace", "--no-whole-file", "--ignore-times", source, self.staged]
        promise = Promise(self.volume, self.name, f"rsync --inplace to {self.name}")
        self._promise_change(promise, model, data, completes=True)
        return Action(promise, [words])

    def resize(self, model: Model, rng: random.Random) -> Action:
        head = model.heads[self.name]
        size = rng.choice((1, -1)) * rng.randint(1, PATCH_SIZE_MAX) + len(head.content)
        data = head.content[: max(1, size)].ljust(size, b"\0")
        words: list[str | Path] = ["truncate", f"--size={len(data)}", self.staged]
        promise = Promise(self.volume, self.name, f"truncate {self.name} to {len(data)} bytes")
        self._promise_change(promise, model, data, completes=False)
        return Action(promise, [words])

    def _promise_change(
        self, promise: Promise, model: Model, data: bytes, *, completes: bool
    ) -> None:
        """``completes``: what was held for want of the rest is complete afterwards."""
        head = model.heads[self.name]
        latest_size = self._latest_size(model)
        if (head.is_partial and not completes) or len(data) < latest_size:
            promise.held = data
        else:
            promise.head = data
            if data != head.content or head.is_held:
                promise.published = data

    # -- the rest ----------------------------------------------------------------------------------

    def publish(self, model: Model, rng: random.Random) -> Action:
        data = model.heads[self.name].content
        promise = Promise(self.volume, self.name, f"publish {self.name}", data, head=data)
        return Action(promise, command=("publish", self.name))

    def forget(self, model: Model, rng: random.Random) -> Action:
        promise = Promise(self.volume, self.name, f"rm {self.name}", forgets_head=True)
        return Action(promise, [["rm", self.staged]])

    def back_up(self, model: Model, rng: random.Random) -> Action:
        source, data = self._image(model, rng)
        promise = Promise(self.volume, self.name, f"backup of {self.volume}", data)
        # Smaller than the backup before, or empty, as it may be.
        words = ("backup", source, "--volume", self.volume, "--allow-smaller")
        return Action(promise, command=words)

    def delete(self, model: Model, rng: random.Random) -> Action:
        backups = model.of_volume(self.volume)
        if len(backups) > 1 and rng.random() < 0.2:
            promise = Promise(self.volume, self.name, "delete by prune", deleted=backups[0])
            kept = str(len(backups) - 1)
            return Action(promise, command=("prune", "--volume", self.volume, "--keep-last", kept))
        backup_id = rng.choice(backups)
        promise = Promise(self.volume, self.name, f"delete {backup_id}", deleted=backup_id)
        if rng.random() < 0.3:
            return Action(promise, command=("delete", backup_id))
        # Not "rm -f": that is content where the daemon has ended and nothing is mounted.
        return Action(promise, [["unlink", self.site.backups / f"{backup_id}.img"]])

    def export(self, model: Model, rng: random.Random) -> Action:
        backup_id = rng.choice(model.of_volume(self.volume))
        promise = Promise(self.volume, self.name, f"export {backup_id}", exported=backup_id)
        record = self.site.backups / f"{backup_id}.msgpack"
        return Action(promise, [["cp", record, self._files / f"{backup_id}.msgpack"]])

    def import_back(self, model: Model, rng: random.Random) -> Action:
        backup_id = rng.choice(model.lost(self.volume))
        promise = Promise(self.volume, self.name, f"import {backup_id}", imported=backup_id)
        promise.may_fail = not model.kept[backup_id].is_certain
        source = self._file(f"{backup_id}.msgpack", model.kept[backup_id].record)
        if rng.random() < 0.3:
            return Action(promise, command=("import", source))
        # The whole name: without a mount there would be no folder, and cp would make a file.
        return Action(promise, [["cp", source, self.site.backups / f"{backup_id}.msgpack"]])

    def read(self, model: Model, rng: random.Random) -> Action:
        backup_id = rng.choice(model.of_volume(self.volume))
        expected = self._file("expected", model.backups[backup_id].content)
        promise = Promise(self.volume, self.name, f"read {backup_id}")
        return Action(promise, [["cmp", expected, self.site.backups / f"{backup_id}.img"]])

    def restore(self, model: Model, rng: random.Random) -> Action:
        backup_id = rng.choice(model.of_volume(self.volume))
        promise = Promise(self.volume, self.name, f"restore {backup_id}")
        target = self._files / "restored"
        expected = model.backups[backup_id].content
        command = ("restore", backup_id, target, "--force")
        return Action(promise, command=command, restores=(target, expected))

    def exported_record(self, backup_id: str) -> bytes:
        return (self._files / f"{backup_id}.msgpack").read_bytes()

    def tidy(self) -> None:
        """Remove what cut-short copies left under temporary names."""
        folder = self.staged.parent
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name.startswith(".") or path.name.endswith(".part"):
                    path.unlink()
        with contextlib.suppress(FileNotFoundError):
            (self._files / "restored").unlink()

    def _latest_size(self, model: Model) -> int:
        backups = model.of_volume(self.volume)
        return len(model.backups[backups[-1]].content) if backups else 0

    def _image(
        self, model: Model, rng: random.Random, *, similar: bool = False
    ) -> tuple[Path, bytes]:
        """A new image: mostly one of before with a few changes, as volumes are."""
        known = [model.backups[i].content for i in model.of_volume(self.volume)]
        head = model.heads.get(self.name)
        if head is not None:
            known.append(head.content)
        known = [data for data in known if data]
        if known and (similar or rng.random() < 0.7):
            data = bytearray(rng.choice(known))
            for _ in range(rng.randint(1, 4)):
                part = rng.randbytes(rng.randint(1, PATCH_SIZE_MAX))
                offset = rng.randrange(len(data))
                data[offset : offset + len(part)] = part
            image = bytes(data)
            if rng.random() < 0.05:
                image = image[: max(1, len(image) - rng.randint(1, PATCH_SIZE_MAX))]
        else:
            image = _new_image(rng, size_min=self._latest_size(model))
        return self._file("source", image), image

    def _file(self, name: str, data: bytes) -> Path:
        path = self._files / name
        path.write_bytes(data)
        return path


def _new_image(rng: random.Random, *, size_min: int) -> bytes:
    """Random bytes with holes."""
    size = max(size_min, rng.randint(KIB, IMAGE_SIZE_MAX))
    data = bytearray(rng.randbytes(size))
    if rng.random() < 0.4:
        start = rng.randrange(size)
        length = min(size - start, rng.randint(1, IMAGE_SIZE_MAX // 2))
        data[start : start + length] = bytes(length)
    data[0] = 1  # one of zeros alone would wait for its data
    return bytes(data)
