"""Programs for ``crash_check``: acts in an order, by hand or at random."""

from __future__ import annotations

import random
from collections.abc import Callable

from support.crash_world import World, overlaid
from support.images import CHUNK_SIZE, noise

from backupfs.errors import MissingData
from backupfs.format.names import volume_of
from backupfs.staging.lifecycle import is_temporary

NAMES = ("vm.img", "db.raw", "pool/disk", "new.img")
TEMPORARY_NAMES = (".vm.img.x7Qz11", "db.part", "pool/disk.tmp")
VOLUMES = ("vm", "db", "cli")
BLOCKS = [noise(CHUNK_SIZE, seed=seed) for seed in range(12)]
BACKUPS_MAX = 6

Program = Callable[[World], None]


def image(rng: random.Random) -> bytes:
    """A few chunks, each one of a few, so that images share them; the last one short at times."""
    size = rng.randint(1, 5) * CHUNK_SIZE - rng.choice((0, 0, 700))
    data = b"".join(rng.choice(BLOCKS) for _ in range(5))
    # No two are equal, or a copy would make no new backup.
    return overlaid(data[:size], [(0, rng.randbytes(16))])


def piece(rng: random.Random) -> tuple[int, bytes]:
    return rng.randrange(4 * CHUNK_SIZE), rng.randbytes(rng.choice((100, 5000, CHUNK_SIZE)))


def staged_life(world: World) -> None:
    """What clients of a mount do."""
    chunk = CHUNK_SIZE
    world.write("vm.img", (0, noise(3 * chunk - 700, seed=1)))
    world.write("vm.img", (chunk, noise(2 * chunk, seed=2)))
    world.write(
        "db.img", (0, noise(2 * chunk, seed=3)), (2 * chunk, noise(chunk, seed=4)), synced=1
    )
    world.write("x.part", (0, noise(4 * chunk, seed=5)))
    world.rename("x.part", "x.img")
    world.write(".vm.tmp", (0, noise(4 * chunk, seed=6)))
    world.rename(".vm.tmp", "vm.img")
    world.rename("db.img", "db2.img")
    world.make_folder("pool")
    world.write("pool/a.img", (0, noise(2 * chunk, seed=7)), killed=True)
    world.publish("pool/a.img")
    world.begin("b.img", (0, noise(2 * chunk, seed=8)))
    world.sync()
    world.beside(chunk, noise(chunk, seed=9))
    world.unlink("x.img")
    world.gc()
    world.finish((3 * chunk, noise(100, seed=10)))
    world.truncate("vm.img", 5 * chunk)
    world.truncate("vm.img", 2 * chunk)
    world.gc()


def life_by_commands(world: World) -> None:
    """What commands do, without a copy into the mount."""
    first = world.back_up("vm", noise(3 * CHUNK_SIZE, seed=1))
    world.back_up("vm", overlaid(noise(3 * CHUNK_SIZE, seed=1), [(CHUNK_SIZE, b"x" * 20_000)]))
    world.back_up("vm", noise(4 * CHUNK_SIZE, seed=3))
    world.put_metadata("vm", {"number": 1})
    world.put_metadata("vm", {"number": 2})
    world.delete(first)
    world.import_back(first)
    world.delete(first)
    world.gc()
    world.back_up("db", noise(2 * CHUNK_SIZE, seed=4))
    world.back_up("db", noise(3 * CHUNK_SIZE, seed=5))
    world.prune("db")
    world.gc()
    world.put_metadata("vm", {"number": 3})


class RandomProgram:
    """``count`` acts drawn by ``rng``."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self._rng = rng
        self._count = count

    def __call__(self, world: World) -> None:
        if not world.run.area.is_folder("pool"):
            world.make_folder("pool")
        for _ in range(self._count):
            self._step(world)
        if world.open_name is not None:
            world.finish()

    def _step(self, world: World) -> None:
        rng = self._rng
        acts: dict[Callable[[World], None], int] = {
            self._copy: 6,
            self._patch: 4,
            self._rename: 4,
            self._command: 5,
            self._delete: 3,
            self._tidy: 2,
            self._small: 3,
            self._open: 5,
        }
        rng.choices(list(acts), list(acts.values()))[0](world)

    def _free(self, world: World, names: tuple[str, ...] | list[str]) -> list[str]:
        """Names that may be staged: no other is staged for the same volume, or being written."""
        taken = {volume_of(name): name for name in world.staged}
        if world.open_name is not None:
            taken[volume_of(world.open_name)] = "."
        return [name for name in names if taken.get(volume_of(name), name) == name]

    def _staged(self, world: World) -> list[str]:
        return [name for name in world.staged if name != world.open_name]

    def _copy(self, world: World) -> None:
        rng = self._rng
        names = self._free(world, NAMES + TEMPORARY_NAMES)
        if names:
            data = image(rng)
            cut = rng.randrange(len(data))
            world.write(
                rng.choice(names),
                (0, data[:cut]),
                (cut, data[cut:]),
                truncate=True,
                synced=rng.choice((None, None, 1)),
                killed=rng.random() < 0.15,
            )

    def _patch(self, world: World) -> None:
        rng = self._rng
        names = self._staged(world)
        if names:
            pieces = [piece(rng) for _ in range(rng.randint(1, 3))]
            synced = rng.choice((None, None, 1)) if len(pieces) > 1 else None
            world.write(rng.choice(names), *pieces, synced=synced)

    def _rename(self, world: World) -> None:
        rng = self._rng
        names = self._staged(world)
        if names:
            old = rng.choice(names)
            new = [
                name
                for name in NAMES + TEMPORARY_NAMES
                if name != old
                and name != world.open_name
                and all(
                    other in (old, name) or volume_of(other) != volume_of(name)
                    for other in [*world.staged, world.open_name or old]
                )
            ]
            if new:
                world.rename(old, rng.choice(new))

    def _command(self, world: World) -> None:
        if len(world.backups) < BACKUPS_MAX:
            world.back_up(self._rng.choice(VOLUMES), image(self._rng))

    def _delete(self, world: World) -> None:
        rng = self._rng
        if world.deleted and rng.random() < 0.4:
            try:
                world.import_back(rng.choice(list(world.deleted)))
            except MissingData:
                raise AssertionError("gone without a gc") from None
        elif world.backups:
            if rng.random() < 0.3:
                world.prune(rng.choice([volume for volume, _ in world.backups.values()]))
            else:
                world.delete(rng.choice(list(world.backups)))

    def _tidy(self, world: World) -> None:
        world.gc()

    def _small(self, world: World) -> None:
        rng = self._rng
        names = self._staged(world)
        what = rng.randrange(5)
        if what == 0:
            world.put_metadata(rng.choice(VOLUMES), {"number": rng.randrange(1 << 30)})
        elif what == 1:
            world.make_folder(f"folder-{rng.randrange(3)}")
        elif what == 2 and names:
            world.unlink(rng.choice(names))
        elif what == 3 and names:
            held = [name for name in names if world.is_held(name) and world.staged[name]]
            plain = [name for name in held if not is_temporary(name.rpartition("/")[2])]
            if plain:
                world.publish(plain[0])
        elif names:
            name = rng.choice(names)
            size = rng.choice((len(world.staged[name]) // 2, len(world.staged[name]) + 3000))
            if size:
                world.truncate(name, size)

    def _open(self, world: World) -> None:
        rng = self._rng
        if world.open_name is None:
            names = self._free(world, NAMES)
            if names:
                world.begin(rng.choice(names), piece(rng), truncate=rng.random() < 0.5)
            return
        what = rng.randrange(4)
        if what == 0:
            world.sync()
        elif what == 1:
            world.beside(*piece(rng))
        else:
            world.finish(*[piece(rng) for _ in range(rng.randrange(3))])
