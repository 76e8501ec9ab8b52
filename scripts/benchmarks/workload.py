"""The images that are backed up: made from a seed and the files of the machine.

``base`` is an ext4 image, about two thirds full with files from /usr. A generation is the image
before it with some of its 4 KiB blocks rewritten, known as a list of extents, so that it can be
copied whole or written in place. The same seed on the same machine gives the same files at the same
places; only time stamps in the file system's inodes differ.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE = 4096
FILL = 0.66  # part of the image that files take
FILE_SIZE_MAX = 16 << 20
RANDOM_PIECE = 1 << 20
# The second only where the first has too little: much of it is compressed already.
SOURCES = (("/usr",), ("/opt", "/var/lib"))

HOT_REGION_COUNT = 24
HOT_REGION_BLOCKS = 512  # 2 MiB
HOT_SHARE = 0.7
RUN_BLOCKS_MAX = 16
PHRASE = b"a line of a log that says much the same as the line before it\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A changed image, whole and as the changes that lead to it from the one before."""

    name: str
    image: Path
    extents: Sequence[tuple[int, int]]  # (offset, size) of what differs, ascending, apart

    @property
    def changed_size(self) -> int:
        return sum(size for _, size in self.extents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    base: Path
    generations: Sequence[Generation]
    extremes: Sequence[Path]  # images that are backed up once, each in a repository of its own


def make_workload(
    folder: Path, *, size: int, seed: int, names: Sequence[str], extremes: Sequence[str] = ()
) -> Workload:
    """The images below ``folder``; what an earlier call left there is taken if it is the same."""
    settings = {"size": size, "seed": seed, "version": 4}
    folder.mkdir(parents=True, exist_ok=True)
    base, known = folder / "base.img", folder / "workload.json"
    if not known.exists() or json.loads(known.read_text()) != settings:
        for stale in [*folder.glob("*.img"), *folder.glob("*.json")]:
            stale.unlink()
        make_base(base, folder / "tree", size=size, rng=random.Random(seed))
        os.sync()  # before that its holes are not what they will be
        known.write_text(json.dumps(settings))
    generations: list[Generation] = []
    before = base
    for name in names:
        generations.append(make_generation(folder, before, name, seed))
        before = generations[-1].image
    made = [make_extreme(folder, name, size=size, seed=seed) for name in extremes]
    return Workload(base=base, generations=generations, extremes=made)


# -- the base ------------------------------------------------------------------------------------


def make_base(image: Path, tree: Path, *, size: int, rng: random.Random) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    try:
        fill_tree(tree, size=int(size * FILL), rng=rng)
        make_file_system(image, tree, size=size)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def fill_tree(tree: Path, *, size: int, rng: random.Random) -> None:
    """Copy a choice of the machine's folders, ``size`` bytes of blocks together, into ``tree``."""
    folders = []
    for tops in SOURCES:
        found = sorted(folder for top in tops for folder, _, _ in os.walk(top))
        folders += rng.sample(found, len(found))
    left = size
    for folder in folders:
        left -= copy_files(Path(folder), tree / folder.lstrip("/"), size_max=left)
        if left < size // 1000:
            break


def copy_files(folder: Path, target: Path, *, size_max: int) -> int:
    """Copy the regular files right in ``folder``; the bytes of the blocks they take."""
    copied_size = 0
    for source in sorted(folder.iterdir()) if os.access(folder, os.R_OK) else []:
        status = source.lstat()
        room = ceil_to_block(status.st_size)
        too_large = status.st_size > FILE_SIZE_MAX or copied_size + room + BLOCK_SIZE > size_max
        if not stat.S_ISREG(status.st_mode) or too_large:
            continue
        if copied_size == 0:
            target.mkdir(parents=True, exist_ok=True)
            copied_size = BLOCK_SIZE  # of the folder itself
        # What went away meanwhile, or is not for us to read, is left out.
        with contextlib.suppress(OSError):
            shutil.copy2(source, target)
            copied_size += room
    return copied_size


def ceil_to_block(size: int) -> int:
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


def make_file_system(image: Path, tree: Path, *, size: int) -> None:
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_SIZE), "-m", "0"]
    # Nothing random: the same tree gives the same image.
    command += ["-U", "6261636b-7570-4673-8000-62656e636821", "-L", "bench"]
    command += ["-E", "hash_seed=6261636b-7570-4673-8000-62656e636822,root_owner=0:0"]
    command += ["-d", str(tree), str(image), f"{size // 1024}k"]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=1800)


# -- extremes ------------------------------------------------------------------------------------


def make_extreme(folder: Path, name: str, *, size: int, seed: int) -> Path:
    image = folder / f"{name}.img"
    if not image.exists():
        EXTREMES[name](image, size, random.Random(f"{seed} {name}"))
    return image


def make_zeros(image: Path, size: int, _rng: random.Random) -> None:
    """Five times ``size`` of nothing: one hole."""
    with image.open("wb") as file:
        file.truncate(5 * size)


def make_random(image: Path, size: int, rng: random.Random) -> None:
    """Half of ``size`` that neither compresses nor repeats itself."""
    with image.open("wb") as file:
        for _ in range(size // 2 // RANDOM_PIECE):
            file.write(rng.randbytes(RANDOM_PIECE))


EXTREMES: dict[str, Callable[[Path, int, random.Random], None]] = {
    "zeros": make_zeros,
    "random": make_random,
}


# -- generations ---------------------------------------------------------------------------------


def make_generation(folder: Path, before: Path, name: str, seed: int) -> Generation:
    image, known = folder / f"{name}.img", folder / f"{name}.json"
    made = json.loads(known.read_text()) if known.exists() else {}
    if made.get("before") != before.name:
        rng = random.Random(f"{seed} {name}")
        extents = GENERATIONS[name](rng, data_blocks(before), before.stat().st_size)
        rewrite(before, image, extents, rng)
        # Kept, not made again: file systems may later tell other holes of the same file.
        made = {"before": before.name, "extents": extents}
        known.write_text(json.dumps(made))
    extents = [(offset, size) for offset, size in made["extents"]]
    return Generation(name=name, image=image, extents=extents)


def rewrite(
    before: Path, image: Path, extents: Sequence[tuple[int, int]], rng: random.Random
) -> None:
    """Make ``image``: a copy of ``before``, holes included, with new contents in ``extents``."""
    subprocess.run(["cp", "--sparse=auto", before, image], check=True, timeout=1800)
    with image.open("r+b") as file:
        for offset, size in extents:
            file.seek(offset)
            file.write(contents(rng, size))


def contents(rng: random.Random, size: int) -> bytes:
    """Bytes that compress to about half."""
    half = BLOCK_SIZE // 2
    text = (PHRASE * (half // len(PHRASE) + 1))[:half]
    return b"".join(rng.randbytes(half) + text for _ in range(size // BLOCK_SIZE))


def data_blocks(image: Path) -> list[int]:
    """Numbers of the 4 KiB blocks of a sparse file that hold data, ascending."""
    return [
        number
        for start, end in data_ranges(image)
        for number in range(start // BLOCK_SIZE, ceil_to_block(end) // BLOCK_SIZE)
    ]


def data_ranges(image: Path) -> Iterator[tuple[int, int]]:
    """(start, end) of the data between the holes of a file."""
    with image.open("rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def small_rewrites(
    rng: random.Random, blocks: Sequence[int], image_size: int
) -> list[tuple[int, int]]:
    """One block in a hundred: 70 % in runs of 1 to 16 within a few hot regions, 30 % scattered."""
    wanted = max(1, image_size // BLOCK_SIZE // 100)
    block_set = set(blocks)
    regions = [rng.choice(blocks) for _ in range(HOT_REGION_COUNT)]
    changed: set[int] = set()
    while len(changed) < wanted * HOT_SHARE:
        first = rng.choice(regions) + rng.randrange(HOT_REGION_BLOCKS)
        run = range(first, first + rng.randint(1, RUN_BLOCKS_MAX))
        changed.update(block_set.intersection(run))
    while len(changed) < wanted:
        changed.add(rng.choice(blocks))
    return merged(changed)


def replaced_region(
    rng: random.Random, blocks: Sequence[int], image_size: int
) -> list[tuple[int, int]]:
    """A tenth of the image in one piece, as when a machine is cloned and given new software."""
    wanted = min(len(blocks), image_size // BLOCK_SIZE // 10)
    first = rng.randrange(len(blocks) - wanted + 1)
    return merged(set(blocks[first : first + wanted]))


def merged(blocks: set[int]) -> list[tuple[int, int]]:
    """Block numbers as (offset, size) of the runs they make."""
    extents: list[tuple[int, int]] = []
    for number in sorted(blocks):
        offset = number * BLOCK_SIZE
        if extents and sum(extents[-1]) == offset:
            extents[-1] = (extents[-1][0], extents[-1][1] + BLOCK_SIZE)
        else:
            extents.append((offset, BLOCK_SIZE))
    return extents


# Name -> the extents that it rewrites. New generations are added here.
GENERATIONS: dict[str, Callable[[random.Random, Sequence[int], int], list[tuple[int, int]]]] = {
    "gen1": small_rewrites,
    "clone": replaced_region,
}
