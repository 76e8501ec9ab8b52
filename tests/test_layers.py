"""Reads the imports of the package and holds the layers and the doors of foreign libraries.

A rule that is broken for a reason gets its exception here, beside the reason. Imports inside
functions and under ``TYPE_CHECKING`` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "backupfs"

# Rooms from the ground up. A module imports from lower levels and from its own room; the rooms of
# one level do not know each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "ambient"),
    ("format", "storage"),
    ("repository", "reports", "retention", "openvolume"),
    ("catalogue", "image"),
    ("staging", "selecting"),
    ("copying", "deleting", "importing", "repairing", "verifying"),
    ("service",),
    ("driver", "fuse", "hostsources", "hosttargets"),
    ("worker",),
    ("daemon", "cinder", "cinder_url"),
    ("cli",),
)

# Foreign library -> the modules that may import it (a folder means all in it).
DOORS: dict[str, tuple[str, ...]] = {
    "pyfuse3": ("fuse", "daemon"),
    "trio": ("fuse", "daemon"),
    "lmdb": ("repository.index", "repository.index_file"),
    "msgpack": ("format.codec",),
    "blake3": ("format.ids",),
    "zstandard": ("format.blob",),
    "obstore": ("storage.objectstore",),
    "cinder": ("cinder",),
    "oslo_config": ("cinder",),
    "oslo_log": ("cinder",),
    "oslo_utils": ("cinder",),
    "click": ("cli",),
    "rich": ("cli",),
}

# Names that bring the clock or randomness in; "random.*" means everything of that module.
AMBIENT_NAMES = (
    "time.time",
    "time.time_ns",
    "time.gmtime",
    "time.localtime",
    "time.clock_gettime",
    "time.clock_gettime_ns",
    "time.monotonic",
    "time.monotonic_ns",
    "time.perf_counter",
    "time.perf_counter_ns",
    "time.sleep",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "datetime.datetime.today",
    "datetime.date.today",
    "os.urandom",
    "os.getrandom",
    "random.*",
    "secrets.*",
    "uuid.uuid1",
    "uuid.uuid4",
)
AMBIENT_DOOR = ("ambient",)

# (module, name) -> why it may reach past ``ambient``. None does.
AMBIENT_EXCEPTIONS: dict[tuple[str, str], str] = {}

ASYNC_DOOR = ("fuse", "daemon")

# What importing the engine must not bring in: none of them is there, or works, inside Cinder.
KEPT_OUT = ("trio", "pyfuse3", "obstore", "cinder")

VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Module:
    """A source file of the package; ``name`` is relative to it: "fuse.mount", "" for the package."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_modules(package: Path) -> list[Module]:
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, is_package, ast.parse(path.read_text(), str(path))))
    return modules


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything the module imports, relative imports resolved."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = import_origin(module, node)
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def import_origin(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = ["backupfs", *module.name.split(".")] if module.name else ["backupfs"]
    up = node.level - 1 if module.is_package else node.level
    parts = parts[: len(parts) - up]
    return ".".join([*parts, node.module] if node.module else parts)


def is_within(name: str, doors: tuple[str, ...]) -> bool:
    return any(name == door or name.startswith(door + ".") for door in doors)


# -- the rules: each yields one line for every breach --------------------------------------------


def level_of(room: str) -> int | None:
    return next((level for level, rooms in enumerate(LEVELS) if room in rooms), None)


def layer_breaches(modules: list[Module]) -> Iterator[str]:
    rooms = {module.room for module in modules if module.room}
    for room in sorted(rooms):
        if level_of(room) is None:
            yield f"{room}: belongs to no level"
    for module in modules:
        for line, name in imported_names(module):
            target = name.split(".")[1] if name.startswith("backupfs.") else None
            if target in rooms and not may_import(module.room, target):
                yield f"{module.name or 'backupfs'}:{line}: imports {target} from above or beside"


def may_import(room: str, target: str) -> bool:
    if not room:  # the package itself: whatever it imported, every importer would get
        return False
    level, target_level = level_of(room), level_of(target)
    if level is None or target_level is None:
        return True  # reported as belonging to no level
    return room == target or target_level < level


def door_breaches(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for line, name in imported_names(module):
            library = name.partition(".")[0]
            if library in DOORS and not is_within(module.name, DOORS[library]):
                yield f"{module.name}:{line}: {library} has its door in {', '.join(DOORS[library])}"


def ambient_breaches(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if is_within(module.name, AMBIENT_DOOR):
            continue
        for line, name in used_names(module):
            if is_ambient(name) and (module.name, name) not in AMBIENT_EXCEPTIONS:
                yield f"{module.name}:{line}: {name} has its door in ambient"


def is_ambient(name: str) -> bool:
    return name in AMBIENT_NAMES or f"{name.partition('.')[0]}.*" in AMBIENT_NAMES


def used_names(module: Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of what is imported or reached through an import."""
    origins = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                origins[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = f"{import_origin(module, node)}.{alias.name}"
                origins[alias.asname or alias.name] = origin
                yield node.lineno, origin
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            first, *rest = dotted(node)
            if first in origins:
                yield node.lineno, ".".join([origins[first], *rest])


def dotted(node: ast.expr) -> list[str]:
    """The names of ``a.b.c``; a first name of "" where the chain begins with something else."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def async_breaches(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if is_within(module.name, ASYNC_DOOR):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await):
                yield f"{module.name}:{node.lineno}: only fuse and daemon are async"


def name_breaches(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if VAGUE_NAMES & set(module.name.split(".")):
            yield f"{module.name}: a name that says nothing; find the room its content belongs to"


RULES = (layer_breaches, door_breaches, ambient_breaches, async_breaches, name_breaches)


# -- the package ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    modules = read_modules(PACKAGE)

    assert len(modules) > 10
    assert list(rule(modules)) == []


def test_every_exception_is_still_needed():
    used = {
        (module.name, name) for module in read_modules(PACKAGE) for _, name in used_names(module)
    }

    assert set(AMBIENT_EXCEPTIONS) <= used


@pytest.mark.parametrize("name", ["backupfs", "backupfs.service", "backupfs.driver"])
def test_import_stays_free_of_async_and_remote_libraries(name):
    script = f"import sys, {name}; print(*sorted(set(sys.modules) & set(sys.argv[1:])))"
    command = [sys.executable, "-W", "error", "-c", script, *KEPT_OUT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


# -- the test itself: a made-up package for each rule --------------------------------------------

BREACHES = [
    ("errors.py", "from backupfs.types import Buffer", "errors:1: imports types"),
    ("format/ids.py", "import backupfs.repository.index", "format.ids:1: imports repository"),
    ("format/ids.py", "from backupfs import service", "format.ids:1: imports service"),
    ("format/ids.py", "from ..storage import base", "format.ids:1: imports storage"),
    ("format/ids.py", "from .. import catalogue", "format.ids:1: imports catalogue"),
    ("driver.py", "def run():\n    from backupfs.fuse import mount", "driver:2: imports fuse"),
    (
        "service.py",
        "if TYPE_CHECKING:\n    from backupfs.cli import main",
        "service:2: imports cli",
    ),
    ("__init__.py", "from backupfs.service import Service", "backupfs:1: imports service"),
    ("attic.py", "", "attic: belongs to no level"),
    ("service.py", "import trio.lowlevel", "service:1: trio has its door"),
    ("repository/packer.py", "from lmdb import open", "repository.packer:1: lmdb has its door"),
    ("fuse/mount.py", "import click", "fuse.mount:1: click has its door"),
    ("service.py", "import time\nNOW = time.time()", "service:2: time.time has its door"),
    ("service.py", "from time import time", "service:1: time.time has its door"),
    (
        "service.py",
        "from datetime import datetime as moment\nNOW = moment.now()",
        "service:2: datetime.datetime.now has its door",
    ),
    ("service.py", "import os\nSALT = os.urandom(8)", "service:2: os.urandom has its door"),
    ("service.py", "import uuid as ids\nID = ids.uuid4()", "service:2: uuid.uuid4 has its door"),
    ("service.py", "from random import Random", "service:1: random.Random has its door"),
    ("service.py", "async def run(): ...", "service:1: only fuse and daemon are async"),
    ("storage/utils.py", "", "storage.utils: a name that says nothing"),
]


@pytest.mark.parametrize(("path", "source", "expected"), BREACHES)
def test_breach_in_a_made_up_package_is_found(tmp_path, path, source, expected):
    package = make_package(tmp_path, {path: source})

    found = [line for rule in RULES for line in rule(read_modules(package))]

    assert [line for line in found if line.startswith(expected)], found


def test_blameless_package_passes(tmp_path):
    package = make_package(
        tmp_path,
        {
            "ambient.py": "import time, uuid, random\nNOW = time.time()",
            "format/codec.py": "import msgpack\nfrom datetime import UTC, datetime\nimport uuid\n"
            "MOMENT = datetime.fromtimestamp(0, UTC)\nID = uuid.UUID(int=0)",
            "fuse/mount.py": "import trio\nfrom . import layout\nfrom ..service import Service\n"
            "async def run(): ...",
            "fuse/layout.py": "from backupfs.types import Buffer\nfrom backupfs import __version__",
        },
    )

    found = [line for rule in RULES for line in rule(read_modules(package))]

    assert found == []


def make_package(folder: Path, sources: dict[str, str]) -> Path:
    """A package with an empty module in every room, and ``sources`` in place of theirs."""
    package = folder / "backupfs"
    for room in (room for rooms in LEVELS for room in rooms):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    for path, source in sources.items():
        target = package / path
        if (package / target.stem).is_dir() and target.parent == package:
            target = package / target.stem / "__init__.py"  # the room, whichever form it has
        target.write_text(source)
    return package
