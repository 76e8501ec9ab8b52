"""The soak: rounds of real programs on a mounted repository, with kills, compared with a model.

Each round draws an action for some volumes, runs them at once, perhaps beside a gc, perhaps killing
the daemon, gc or a command at a random moment; then starts what is dead, and compares all that is
there with what the actions promised. Draws depend on the seed and the round's number alone; when
exactly a kill hits does not, so a failure may take several runs to show again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import soak_crash
import soak_tests
from command_server import CommandServer
from lifecycle_mount import (
    Site,
    becomes,
    daemons_of,
    descriptors,
    is_alive,
    is_at_rest,
    kill_and_wait,
    memory_peak,
    site_in,
    threads,
)
from load_clients import run_load
from soak_actions import Action, Lane
from soak_model import Broken, Found, Kept, Model

VOLUMES = (
    *(("web01", ".img"), ("db", ".raw"), ("mail", ""), ("pool/disk-0", ".img")),
    *(("pool/disk-1", ".raw"), ("a name with blanks", ".img")),
)
LANES_MAX = 4  # at once
KILL_SECONDS = (0.0005, 0.4)
MOUNT_OPTIONS = ("", "", "umask=077", "settle=1")
CHECK_ROUNDS = 10  # everything is read and verified after so many
PROGRESS_SECONDS = 10.0


class Soak:
    """One repository and the model of it."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._seed = seed
        self._model = Model()
        self._lanes = [Lane(site, volume, suffix) for volume, suffix in VOLUMES]
        self.rounds = 0
        self.counts: Counter[str] = Counter()
        self.memory_peak = 0
        self._plan: list[str] = []
        self._failures: list[str] = []

    def start(self) -> None:
        self._site.init("--chunk-size", "16K")
        self._site.mount()
        (self._site.staging / "pool").mkdir()

    def run_round(self) -> None:
        """One round. Raises: Broken."""
        self.rounds += 1
        rng = random.Random(f"{self._seed}-{self.rounds}")
        actions = self._draw(rng)
        self._plan = [action.promise.what for action in actions]
        number = rng.choices((0, signal.SIGKILL, signal.SIGTERM), (5, 4, 1))[0]
        daemon = self._site.daemon()
        killer = threading.Thread(target=self._kill, args=(daemon, number, moment(rng)))
        threads = [
            threading.Thread(target=action.run, args=(self._site, self._own_kill(rng)))
            for action in actions
        ]
        collects = rng.random() < 0.3
        if collects:
            self._plan.append("gc")
            threads.append(threading.Thread(target=self._gc, args=(self._own_kill(rng),)))
        if rng.random() < 0.15:
            threads.append(threading.Thread(target=self._verify, args=(self._own_kill(rng),)))
        if number:
            threads.append(killer)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
            if thread.is_alive():
                raise Broken(f"something hangs: {self._plan}")
        if self._failures:
            raise Broken("; ".join(self._failures))
        self._start_again(rng, is_killed=bool(number))
        if collects:  # what was to be imported may have been collected before
            for action in actions:
                action.promise.may_fail |= action.promise.imported is not None
        self._settle(actions, is_killed=bool(number))
        if collects:  # now: also of what was deleted beside it
            self._model.gc_ran()
        if self.rounds % CHECK_ROUNDS == 0:
            self.check_all()

    def check_all(self) -> None:
        """Every backup has its content, verify is clean, and nothing is left behind."""
        for backup_id, backup in self._model.backups.items():
            if self._read(backup_id) != backup.content:
                raise Broken(f"backup {backup_id} of {backup.volume} reads other than it was")
        ended = self._site.command("verify", check=False)
        if ended.returncode:
            raise Broken(f"verify: {ended.stdout}{ended.stderr}")
        states = list((self._site.repo / "drafts").glob("*/*.msgpack"))
        if len(states) != len(self._model.heads):
            raise Broken(f"{len(states)} states of {len(self._model.heads)} staged files")
        self.memory_peak = max(self.memory_peak, memory_peak(self._site.daemon()))

    def describe(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.most_common())
        return f"{self.rounds} rounds: {counts}"

    def plan(self) -> str:
        return f"seed {self._seed}, round {self.rounds}: {'; '.join(self._plan)}"

    # -- parts of a round --------------------------------------------------------------------------

    def _draw(self, rng: random.Random) -> list[Action]:
        lanes = rng.sample(self._lanes, rng.randint(1, LANES_MAX))
        return [lane.draw(self._model, rng) for lane in lanes]

    def _own_kill(self, rng: random.Random) -> float | None:
        return moment(rng) if rng.random() < 0.15 else None

    def _kill(self, daemon: int, number: int, seconds: float) -> None:
        time.sleep(seconds)
        kill_and_wait(daemon, number)
        self.counts["daemons killed" if number == signal.SIGKILL else "daemons ended"] += 1

    def _gc(self, kill_after: float | None) -> None:
        command = self._site.begin("gc")
        if kill_after is not None and not command.ended.wait(kill_after):
            command.kill()
            command.wait()  # until it is dead it has the lock
            self.counts["gc killed"] += 1
        elif command.wait() != 0 and "in use by" in command.err():
            self.counts["gc refused beside an import"] += 1
        elif command.wait() != 0:
            self._failures.append(f"gc: {command.err()}")
        else:
            self.counts["gc"] += 1

    def _verify(self, kill_after: float | None) -> None:
        """Beside all else: what is deleted or moved meanwhile is no damage."""
        command = self._site.begin("verify")
        if kill_after is not None and not command.ended.wait(kill_after):
            command.kill()
            command.wait()
            self.counts["verify killed"] += 1
        elif command.wait() != 0:
            self._failures.append(f"verify: {command.out()}{command.err()}")
        else:
            self.counts["verify"] += 1

    def _start_again(self, rng: random.Random, *, is_killed: bool) -> None:
        if not is_killed and rng.random() < 0.05:
            self._site.unmount()
            self.counts["remounts"] += 1
            is_killed = True
        if not is_killed:
            return
        if rng.random() < 0.1:
            shutil.rmtree(self._site.environment["XDG_CACHE_HOME"], ignore_errors=True)
            self.counts["indexes lost"] += 1
        while rng.random() < 0.15:
            self._die_at_start(moment(rng))
        self._site.mount(rng.choice(MOUNT_OPTIONS))

    def _die_at_start(self, seconds: float) -> None:
        """A daemon that is killed while it takes up what the one before it left."""
        command = self._site.begin("mount", self._site.path)
        time.sleep(seconds)
        command.begun.wait()
        children = set()
        with contextlib.suppress(OSError):  # it has ended: then the daemon holds the staged files
            os.kill(command.process_id, signal.SIGSTOP)  # or it would fork the daemon meanwhile
            # The signal is sent, and may not have come yet.
            assert becomes(lambda: is_at_rest(command.process_id), seconds=60)
            place = f"/proc/{command.process_id}/task/{command.process_id}/children"
            children = set(map(int, Path(place).read_text().split()))
        for process_id in children | daemons_of(self._site.repo):
            kill_and_wait(process_id)
        command.kill()
        command.wait()
        self.counts["killed at start"] += 1

    def _settle(self, actions: list[Action], *, is_killed: bool) -> None:
        for action in actions:
            promise = action.promise
            self.counts[promise.what.split(" ")[0]] += 1
            self.counts["cut short"] += not promise.is_done
            self.counts["programs killed"] += action.is_killed
            if not (promise.is_done or is_killed or action.is_killed or promise.may_fail):
                raise Broken(f"failed without a reason: {promise.what}: {action.said}")
            if action.restores is not None and promise.is_done:
                path, expected = action.restores
                if path.read_bytes() != expected:
                    raise Broken(f"{promise.what} gave other bytes")
        for lane in self._lanes:
            lane.tidy()
        self._model.settle([action.promise for action in actions], self._find())
        for action in actions:
            exported = action.promise.exported
            if exported is not None and action.promise.is_done:
                lane = next(lane for lane in self._lanes if lane.volume == action.promise.volume)
                backup = self._model.backups[exported]
                record = lane.exported_record(exported)
                self._model.kept[exported] = Kept(backup.volume, backup.content, record)

    # -- what is there -----------------------------------------------------------------------------

    def _find(self) -> Found:
        os.listdir(self._site.volumes)  # waits for what is being published
        listed = {item["id"]: (item["volume"], item["name"]) for item in self._site.listed("list")}
        shown = {name.partition(".")[0] for name in os.listdir(self._site.backups)}
        if shown != listed.keys():
            # Commands of this round may have done what the mount shows within two seconds.
            time.sleep(2)
            shown = {name.partition(".")[0] for name in os.listdir(self._site.backups)}
        if shown != listed.keys():
            raise Broken(f"the mount shows {shown}, the repository has {listed.keys()}")
        heads = {name: (self._site.staging / name).read_bytes() for name in self._staged_names()}
        held = {name: draft["reason"] for name, draft in self._site.drafts().items()}
        return Found(listed, heads, held, self._read)

    def _staged_names(self) -> Iterator[str]:
        for folder, _, names in os.walk(self._site.staging):
            for name in names:
                yield str((Path(folder) / name).relative_to(self._site.staging))

    def _read(self, backup_id: str) -> bytes:
        try:
            return (self._site.backups / f"{backup_id}.img").read_bytes()
        except OSError as error:
            raise Broken(f"backup {backup_id} cannot be read: {error}") from error


def moment(rng: random.Random) -> float:
    """Seconds until a kill: as often in the first milliseconds as in the tenths after them."""
    low, high = KILL_SECONDS
    return float(low * (high / low) ** rng.random())


def run(folder: Path, commands: CommandServer, *, seconds: float, seed: int, out: bool) -> Soak:
    """Run for a while. Raises: Broken."""
    with site_in(folder, commands, seconds=seconds + 300) as site:
        site.may_log_errors = True
        soak = Soak(site, seed)
        soak.start()
        deadline = time.monotonic() + seconds
        told_at = time.monotonic()
        try:
            while time.monotonic() < deadline:
                soak.run_round()
                if out and time.monotonic() - told_at > PROGRESS_SECONDS:
                    print(soak.describe(), flush=True)
                    told_at = time.monotonic()
            soak.check_all()
        except BaseException:
            print(f"failed in {soak.plan()}", file=sys.stderr)
            print(site.log_text()[-6000:], file=sys.stderr)
            if out and is_alive(site.daemon()):
                kept = tempfile.mkdtemp(prefix="backupfs-soak-")
                shutil.copytree(site.repo, Path(kept) / "repo")
                print(f"the repository is kept in {kept}", file=sys.stderr)
            raise
        return soak


def load(folder: Path, commands: CommandServer, *, seconds: float) -> int:
    """64 clients for a while; what is wrong ends it with a traceback."""
    with site_in(folder, commands, seconds=seconds + 300) as site:
        site.init()
        site.mount()
        daemon = site.daemon()
        before = descriptors(daemon), threads(daemon)
        measured = run_load(site, seconds=seconds, gc_every=20.0)
        print(measured.describe())
        print(f"descriptors and threads: {before}, then {(descriptors(daemon), threads(daemon))}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument(
        "--what",
        choices=("kills", "load", "crash", *soak_tests.SUITES),
        default="kills",
        help="kills: random use with kills, compared with a model (default); load: 64 clients at "
        "once; crash: power cuts of the engine; inputs: hostile bytes and words; at-once: models of many "
        "processes, and heads that change while they are read",
    )
    parser.add_argument("--work", type=Path, default=None, help="folder for the repository")
    arguments = parser.parse_args()
    seed = (
        arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    )
    print(f"seed {seed}, {arguments.minutes:g} minutes", flush=True)
    if arguments.what in soak_tests.SUITES:
        return soak_tests.run(arguments.what, minutes=arguments.minutes, seed=seed)
    if arguments.what == "crash":
        return soak_crash.run(minutes=arguments.minutes, seed=seed, work=arguments.work)
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="backupfs-soak-", dir=arguments.work))
    commands = CommandServer(folder / "commands")
    try:
        if arguments.what == "load":
            return load(folder / "site", commands, seconds=arguments.minutes * 60)
        soak = run(folder / "site", commands, seconds=arguments.minutes * 60, seed=seed, out=True)
    except Broken as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    finally:
        commands.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(soak.describe())
    print(f"most memory of a daemon: {soak.memory_peak >> 20} MiB; nothing is broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
