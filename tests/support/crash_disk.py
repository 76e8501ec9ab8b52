"""A folder on a disk whose power may be cut: what of it is durable, and what may be left of it.

Made from the calls that changed the folder. POSIX promises little: the bytes of a file last when it
was synced, a name when its folder was. All else may be lost or kept, in any order: each name stands
as it was at the last sync or at any time since, and each sector of a file as it was then, is now, or
was never written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.os_calls import Call

SECTOR_SIZE = 512

# A folder's content: a file's bytes by path, None for a folder.
Image = dict[str, bytes | None]


@dataclass(slots=True, eq=False)
class File:
    live: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    size_min: int = 0  # the least it had since the last sync

    def write(self, offset: int, data: bytes) -> None:
        if len(self.live) < offset:
            self.live.extend(bytes(offset - len(self.live)))
        self.live[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        del self.live[size:]
        self.live.extend(bytes(size - len(self.live)))
        self.size_min = min(self.size_min, size)

    def sync(self) -> None:
        self.durable = bytes(self.live)
        self.size_min = len(self.live)


@dataclass(slots=True, eq=False)
class Folder:
    live: dict[str, Node] = field(default_factory=dict)
    # What each name stood for at the last sync, then at any time since; only where it changed.
    past: dict[str, list[Node | None]] = field(default_factory=dict)

    def put(self, name: str, node: Node | None) -> None:
        self.past.setdefault(name, [self.live.get(name)]).append(node)
        if node is None:
            del self.live[name]
        else:
            self.live[name] = node

    def sync(self) -> None:
        self.past.clear()


Node = File | Folder


class Disk:
    """The folder as the calls so far have made it."""

    def __init__(self, image: Image) -> None:
        """As ``image`` has it, all of it durable."""
        self.root = Folder()
        self._opened: dict[int, Node] = {}
        for name in sorted(image):
            parent, last = self._place(name)
            data = image[name]
            parent.live[last] = Folder() if data is None else File(bytearray(data), data, len(data))

    def apply(self, call: Call) -> None:
        """Do what ``call`` did."""
        match call.kind:
            case "open":
                self._opened[call.opened] = self._open(call)
            case "write":
                self._file(call).write(call.offset, call.data)
            case "truncate":
                self._file(call).truncate(call.size)
            case "sync":
                self._opened[call.opened].sync()
            case "link":
                self._put(call.target, self._find(call.path))
            case "rename":
                node = self._find(call.path)
                self._put(call.target, node)
                self._put(call.path, None)
            case "unlink" | "rmdir":
                self._put(call.path, None)
            case "mkdir":
                self._put(call.path, Folder())
            case _:
                raise AssertionError(f"{call.kind} is not understood")

    def image(self, pick: Pick) -> Image:
        """What a power cut may leave, as ``pick`` has it."""
        image: Image = {}
        stack: list[tuple[str, Folder]] = [("", self.root)]
        while stack:
            prefix, folder = stack.pop()
            for name in sorted(folder.live.keys() | folder.past.keys()):
                options = folder.past.get(name) or [folder.live[name]]
                node = pick.name(options) if len(options) > 1 else options[0]
                if isinstance(node, Folder):
                    image[f"{prefix}{name}"] = None
                    stack.append((f"{prefix}{name}/", node))
                elif node is not None:
                    image[f"{prefix}{name}"] = pick.content(node)
        return image

    def _open(self, call: Call) -> Node:
        parent, name = self._place(call.path) if call.path else (None, "")
        if parent is None:
            return self.root
        node = parent.live.get(name)
        if node is None:
            node = File()
            parent.put(name, node)
        if call.cuts and isinstance(node, File):
            node.truncate(0)
        return node

    def _file(self, call: Call) -> File:
        node = self._opened[call.opened]
        assert isinstance(node, File)
        return node

    def _find(self, path: str) -> Node:
        parent, name = self._place(path)
        return parent.live[name]

    def _put(self, path: str, node: Node | None) -> None:
        parent, name = self._place(path)
        parent.put(name, node)

    def _place(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split("/")
        parent = self.root
        for part in folders:
            node = parent.live[part]
            assert isinstance(node, Folder)
            parent = node
        return parent, name


def read_image(folder: Path) -> Image:
    """What is in ``folder``."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def write_image(image: Image, folder: Path) -> None:
    """Make ``folder`` hold just ``image``."""
    folder.mkdir()
    for name in sorted(image):
        data = image[name]
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


@dataclass(frozen=True, slots=True)
class Pick:
    """What is left of a name, of all it stood for (the first is durable, the last is now), and of
    a file's bytes."""

    what: str
    name: Callable[[list[Node | None]], Node | None]
    content: Callable[[File], bytes]


def picks(rng: random.Random, *, random_count: int) -> Iterator[Pick]:
    """The extremes, then some at random."""

    def kept(options: list[Node | None]) -> Node | None:
        return next((node for node in reversed(options) if node is not None), None)

    def lost(options: list[Node | None]) -> Node | None:
        return None if None in options else options[0]

    yield Pick("nothing unsynced is kept", lambda options: options[0], lambda file: file.durable)
    yield Pick("all is kept", lambda options: options[-1], lambda file: bytes(file.live))
    yield Pick("names are kept, bytes are not", lambda options: options[-1], _zeros)
    yield Pick("bytes are kept, names are not", lambda options: options[0], lambda f: bytes(f.live))
    yield Pick("new names are kept, removals are not", kept, lambda file: file.durable)
    yield Pick("removals are kept, new names are not", lost, lambda file: file.durable)
    for _ in range(random_count):
        share = rng.choice((0.1, 0.5, 0.9))
        yield Pick(
            f"at random, {share:.0%} of it",
            lambda options, share=share: _some_name(rng, options, share),
            lambda file, share=share: _some_bytes(rng, file, share),
        )


def _some_name(rng: random.Random, options: list[Node | None], share: float) -> Node | None:
    if rng.random() < share:
        return options[-1]
    return rng.choice(options[:-1])


def _zeros(file: File) -> bytes:
    """As large as it was made, its new sectors never written."""
    return _mixed(file, len(file.live), lambda: "zeros")


def _some_bytes(rng: random.Random, file: File, share: float) -> bytes:
    if file.live == file.durable and file.size_min == len(file.live):
        return file.durable
    sizes = [len(file.live), len(file.durable), file.size_min]
    size = sizes[0] if rng.random() < share else rng.choice([*sizes, rng.randint(0, max(sizes))])
    others = ("durable", "zeros")
    return _mixed(file, size, lambda: "live" if rng.random() < share else rng.choice(others))


def _mixed(file: File, size: int, choose: Callable[[], str]) -> bytes:
    """Each sector as it is now, as it was, or zeros where it was written to beyond that."""
    found = bytearray(size)
    for start in range(0, size, SECTOR_SIZE):
        end = min(start + SECTOR_SIZE, size)
        durable, live = file.durable[start:end], bytes(file.live[start:end])
        was_cut = file.size_min < min(end, len(file.durable))
        if durable == live and not was_cut:
            piece = live
        else:
            piece = {"live": live, "durable": durable, "zeros": b"" if was_cut else durable}[
                choose()
            ]
        found[start : start + len(piece)] = piece
    return bytes(found)
