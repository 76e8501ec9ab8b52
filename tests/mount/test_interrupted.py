"""Copies that are cut short: the last good backup stays the latest, and nothing is lost.

The kernel says of most programs, when they are killed, that they were, and rsync shows by its last
call that it has written all. Of others (a program that handles its signal and closes in good order;
a server that lives on when its client is gone) only the size can tell, and these tests say so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounted import MIB, Mounted, Word, becomes, needs, patched, random_bytes, run

OLD = random_bytes(8 * MIB)
NEW = patched(random_bytes(8 * MIB, 2), 0, OLD[:MIB])
LARGE_COUNT = 64  # of NEW: takes longer to copy than a busy machine lets a test sleep
HALF = 3 * MIB + 1000
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


@pytest.fixture
def fifo(mounted: Mounted) -> Path:
    """A source that gives as much as the test wants, and then waits."""
    path = mounted.folder / "slow"
    os.mkfifo(path)
    return path


@contextmanager
def half_copied(mounted: Mounted, fifo: Path, *words: Word) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has copied ``HALF`` bytes of ``NEW`` from ``fifo`` and waits for more."""
    process = mounted.start(*words)
    with fifo.open("wb", buffering=0) as source:
        for offset in range(0, HALF, 65536):
            source.write(NEW[offset : min(offset + 65536, HALF)])
        staged = mounted.staging
        assert becomes(
            lambda: any(path.stat().st_size > 2 * MIB for path in staged.iterdir()), seconds=20
        )
        yield process


def kill(process: subprocess.Popen[bytes], number: int) -> None:
    os.killpg(process.pid, number)
    assert process.wait(timeout=20) != 0


PROGRAMS: dict[str, list[str]] = {
    "cp": ["cp", "--copy-contents", "{source}", "{target}"],
    "cat": ["sh", "-c", 'exec cat "{source}" > "{target}"'],
    "cat in a shell": ["bash", "-c", 'cat "{source}" > "{target}"'],
    "dd": ["dd", "if={source}", "of={target}", "bs=64k", "status=none"],
    "tee": ["sh", "-c", 'exec tee "{target}" < "{source}" > /dev/null'],
    "python": [
        sys.executable,
        "-c",
        "import shutil, signal; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "shutil.copyfileobj(open('{source}', 'rb'), open('{target}', 'wb', 0), 65536)",
    ],
    "threads": [
        sys.executable,
        "-c",
        "import os, shutil, signal, threading; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "def open_target(): global target; target = open('{target}', 'wb', 0)\n"
        "opener = threading.Thread(target=open_target); opener.start(); opener.join()\n"
        "shutil.copyfileobj(open('{source}', 'rb'), target, 65536)",
    ],
}


def words_of(program: str, source: Path, target: Path) -> list[str]:
    words = PROGRAMS[program]
    return [
        word.replace("{source}", str(source)).replace("{target}", str(target)) for word in words
    ]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("program", PROGRAMS)
def test_killed_copy_is_held(
    mounted: Mounted, fifo: Path, program: str, number: signal.Signals
) -> None:
    target = mounted.staging / "web01.img"

    with half_copied(mounted, fifo, *words_of(program, fifo, target)) as process:
        kill(process, number)

    if (program, number) == ("dd", signal.SIGINT):
        # dd handles it and closes as usual; it is marked as killed only when it is gone.
        assert becomes(lambda: mounted.drafts() != {} or mounted.names("web01") != [], seconds=20)
    draft = mounted.assert_held("web01.img", "web01")
    assert "killed" in draft["reason"]
    staged = target.read_bytes()
    assert 2 * MIB < len(staged) <= HALF and NEW.startswith(staged)
    assert "held 'web01.img'" in mounted.events()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("program", ["cp", "cat", "dd"])
def test_killed_copy_over_a_head_leaves_the_latest_backup(
    mounted: Mounted, fifo: Path, program: str, number: signal.Signals
) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)

    with half_copied(mounted, fifo, *words_of(program, fifo, target)) as process:
        kill(process, number)

    mounted.assert_held("web01.img", "web01", OLD)
    mounted.remount()
    mounted.assert_held("web01.img", "web01", OLD)
    run("cp", mounted.image(NEW), target)
    mounted.assert_backups("web01", OLD, NEW)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_killed_patch_of_a_head_is_held(
    mounted: Mounted, fifo: Path, number: signal.Signals
) -> None:
    """The size is that of the latest backup here: all that speaks against it is the signal."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    words = ["dd", f"if={fifo}", f"of={target}", "bs=64k", "conv=notrunc", "status=none"]

    with half_copied(mounted, fifo, *words) as process:
        assert becomes(lambda: target.read_bytes()[2 * MIB :][:9] == NEW[2 * MIB :][:9], seconds=9)
        kill(process, number)

    mounted.assert_held("web01.img", "web01", OLD)
    mounted.command("publish", "web01.img")
    assert len(mounted.names("web01")) == 2
    assert mounted.drafts() == {}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_killed_mv_keeps_its_source_and_the_backups(
    mounted: Mounted, number: signal.Signals
) -> None:
    """mv removes what it replaces before it copies: the head goes, its backups do not."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    large = mounted.folder / "large.img"
    with large.open("wb") as file:
        for _ in range(LARGE_COUNT):
            file.write(NEW)
    process = mounted.start("mv", large, target)
    assert becomes(lambda: target.exists() and target.stat().st_size > 2 * len(OLD), seconds=20)
    kill(process, number)

    assert large.stat().st_size == len(NEW) * LARGE_COUNT
    draft = mounted.assert_held("web01.img", "web01", OLD)
    assert draft["size"] <= large.stat().st_size  # it may be killed in its close


def test_held_draft_is_resumed_by_appending(mounted: Mounted, fifo: Path) -> None:
    """What was copied is there; who appends the rest says by 'publish' that this was all."""
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cat", fifo, target)) as process:
        kill(process, signal.SIGKILL)
    size = target.stat().st_size

    run(
        *("dd", f"if={mounted.image(NEW)}", f"of={target}", "bs=1M", "conv=notrunc"),
        *("iflag=skip_bytes", "oflag=seek_bytes", f"skip={size}", f"seek={size}"),
    )

    mounted.assert_held("web01.img", "web01")
    mounted.command("publish", "web01.img")
    mounted.assert_backups("web01", NEW)


@pytest.mark.tools
@needs("rsync")
def test_held_draft_is_completed_by_rsync_in_place(mounted: Mounted, fifo: Path) -> None:
    """Setting the size is the last thing it does: only a transfer that was complete does."""
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cat", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    run("rsync", "--inplace", "--no-whole-file", mounted.image(NEW), target)

    mounted.assert_backups("web01", NEW)


def test_held_draft_that_is_only_resized_stays_held(mounted: Mounted, fifo: Path) -> None:
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cat", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    run("truncate", "-s", "8M", target)

    mounted.assert_held("web01.img", "web01")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["truncate", "-s", "{size}", "{target}"], id="the size it has"),
        pytest.param(["truncate", "-s", "1M", "{target}"], id="a smaller size"),
        pytest.param(
            ["dd", "if=/dev/null", "of={target}", "bs=1M", "seek=2", "count=0"], id="dd of nothing"
        ),
    ],
)
def test_held_draft_whose_size_is_set_and_set_again_stays_held(
    mounted: Mounted, fifo: Path, words: list[str]
) -> None:
    """Who sets the size has not copied anything."""
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cat", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    for _ in range(2):
        size = target.stat().st_size
        run(*(word.format(target=target, size=size) for word in words))

        mounted.assert_held("web01.img", "web01")


def test_resuming_from_a_source_that_cannot_be_read_publishes_nothing(
    mounted: Mounted, fifo: Path
) -> None:
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cat", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    run("dd", f"if={mounted.folder}", f"of={target}", "bs=1M", "seek=2", check=False)

    mounted.assert_held("web01.img", "web01")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["dd", "if={source}", "of={target}", "bs=1M", "conv=notrunc"], id="dd"),
        pytest.param(
            ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "{source}", "{target}"],
            id="qemu-img",
            marks=[pytest.mark.tools, needs("qemu-img")],
        ),
    ],
)
def test_held_draft_is_completed_by_a_copy_over_all_of_it(
    mounted: Mounted, words: list[str]
) -> None:
    """As backups of a head go on after one of them was cut short."""
    target, source = mounted.staging / "web01.img", mounted.image(NEW)
    run("cp", mounted.image(OLD, "old.img"), target)
    script = f"import os, time; f = os.open('{target}', os.O_WRONLY); os.pwrite(f, b'x' * 9, 9000)"
    patching = mounted.start(sys.executable, "-c", f"{script}; time.sleep(100)")
    assert becomes(lambda: "web01.img" in mounted.drafts(), seconds=20)
    kill(patching, signal.SIGKILL)
    mounted.assert_held("web01.img", "web01", OLD)

    run("dd", f"if={source}", f"of={target}", "bs=1M", "count=3", "conv=notrunc")
    mounted.assert_held("web01.img", "web01", OLD)
    run(*(word.format(source=source, target=target) for word in words))

    mounted.assert_backups("web01", OLD, NEW)


def test_held_draft_is_dropped_by_rm(mounted: Mounted, fifo: Path) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    with half_copied(mounted, fifo, *words_of("cp", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    run("rm", target)

    assert os.listdir(mounted.staging) == []
    mounted.assert_backups("web01", OLD)
    mounted.remount()
    mounted.assert_backups("web01", OLD)


def test_held_draft_is_published_under_its_name_only(mounted: Mounted, fifo: Path) -> None:
    """A rename does not make a copy complete."""
    target = mounted.staging / "web01.img"
    with half_copied(mounted, fifo, *words_of("cp", fifo, target)) as process:
        kill(process, signal.SIGKILL)

    target.rename(mounted.staging / "web02.img")

    mounted.assert_held("web02.img", "web02")
    run("mv", "-f", mounted.staging / "web02.img", mounted.staging / "web01.img")
    mounted.assert_held("web01.img", "web01")
    content = target.read_bytes()
    mounted.command("publish", "web01.img")
    mounted.assert_backups("web01", content)


def test_copy_that_goes_on_after_a_program_of_its_group_was_killed(
    mounted: Mounted, fifo: Path
) -> None:
    """The shell opened the file, and the shell lives on: no evidence but the size."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    script = f'(cat "{fifo}"; true) > "{target}"'

    with half_copied(mounted, fifo, "bash", "-c", script) as process:
        (cat,) = run("pgrep", "-P", str(_child_of(process.pid)), "-x", "cat").stdout.split()
        os.kill(int(cat), signal.SIGKILL)
        assert process.wait(timeout=20) == 0

    draft = mounted.assert_held("web01.img", "web01", OLD)
    assert "smaller" in draft["reason"]


def _child_of(process_id: int) -> int:
    """The subshell, where bash made one; else the shell itself."""
    children = run("pgrep", "-P", str(process_id), "-x", "bash", check=False).stdout.split()
    return int(children[0]) if children else process_id


@pytest.mark.parametrize("opener", ["main", "ended", "living"])
def test_program_that_ends_by_itself_with_threads_running_was_not_killed(
    mounted: Mounted, opener: str
) -> None:
    """Its end kills the other threads, one of which may be the one that opened the file."""
    script = """
import os, sys, threading, time
target, opener = sys.argv[1:]
def copy(then_sleep):
    global file
    file = os.open(target, os.O_CREAT | os.O_WRONLY)
    os.write(file, b"x" * 3000000)
    done.set()
    if then_sleep:
        time.sleep(100)
done = threading.Event()
for _ in range(10):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
if opener == "main":
    copy(False)
else:
    threading.Thread(target=copy, args=(opener == "living",), daemon=True).start()
done.wait()
time.sleep(0.05)
os._exit(0)
"""

    for number in range(8):
        run(sys.executable, "-c", script, mounted.staging / f"web{number}.img", opener)
        mounted.assert_backups(f"web{number}", b"x" * 3_000_000)


# -- programs that close in good order ---------------------------------------------------------


def test_python_that_handles_its_interrupt_is_told_by_the_size_alone(
    mounted: Mounted, fifo: Path
) -> None:
    """An exception unwinds and closes as usual: for a first copy there is no evidence at all."""
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    script = f"import shutil; shutil.copyfileobj(open('{fifo}', 'rb'), open('{target}', 'wb', 0))"

    with half_copied(mounted, fifo, sys.executable, "-c", script) as process:
        kill(process, signal.SIGINT)

    mounted.assert_kept("web01", OLD)
    assert mounted.drafts()["web01.img"]["state"] == "held"


class SlowRsync:
    """An rsync of a large file that is slowed down, so that it can be killed half-way."""

    SIZE = 48 * MIB  # 12 seconds of it

    def __init__(self, mounted: Mounted, *words: str) -> None:
        self.mounted = mounted
        self.content = random_bytes(self.SIZE, 3)
        self.source = mounted.image(self.content, "large.img")
        os.utime(self.source, (1_600_000_000, 1_600_000_000))
        self.words = words

    def start(
        self, target: Path, *, is_under_way: Callable[[], bool] | None = None
    ) -> subprocess.Popen[bytes]:
        """Returns when there is something of it: a new file of some size, unless told otherwise."""
        before = {path.name for path in self.mounted.staging.iterdir()}
        process = self.mounted.start("rsync", "--bwlimit=4M", *self.words, self.source, target)

        def is_growing() -> bool:
            return any(
                path.stat().st_size > 2 * MIB
                for path in self.mounted.staging.iterdir()
                if path.name not in before
            )

        assert becomes(is_under_way or is_growing, seconds=20)
        return process


@pytest.mark.tools
@needs("rsync")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("words", [[], ["-t"]])
def test_killed_rsync_leaves_nothing(
    mounted: Mounted, words: list[str], number: signal.Signals
) -> None:
    target = mounted.staging / "web01.img"
    run("cp", mounted.image(OLD), target)
    process = SlowRsync(mounted, *words).start(target)

    # Not its group: the receiver lives on and tidies up, also when its parent was killed.
    process.send_signal(number)
    process.wait(timeout=20)

    assert becomes(lambda: os.listdir(mounted.staging) == ["web01.img"], seconds=10)
    mounted.assert_backups("web01", OLD)


@pytest.mark.tools
@needs("rsync")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_partial_file_of_a_killed_rsync_is_held(mounted: Mounted, number: signal.Signals) -> None:
    """rsync --partial renames what it has to the final name, with the time 0 as its mark."""
    target = mounted.staging / "web01.img"
    slow = SlowRsync(mounted, "-t", "--partial")
    process = slow.start(target)

    process.send_signal(number)
    process.wait(timeout=20)

    assert becomes(target.exists, seconds=10)
    draft = mounted.assert_held("web01.img", "web01")
    assert "rsync" in draft["reason"]
    assert slow.content.startswith(target.read_bytes())
    run("rsync", "-t", "--partial", slow.source, target)
    mounted.assert_backups("web01", slow.content)


@pytest.mark.tools
@needs("rsync")
def test_partial_file_without_times_is_told_by_the_size_alone(mounted: Mounted) -> None:
    """Without -t rsync sets no time, so of a first copy there is no evidence at all."""
    target = mounted.staging / "web01.img"
    slow = SlowRsync(mounted, "--partial")
    run("cp", slow.source, target)
    process = slow.start(target)

    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)

    assert becomes(lambda: target.stat().st_size < slow.SIZE, seconds=10)
    draft = mounted.assert_held("web01.img", "web01", slow.content)
    assert "smaller" in draft["reason"]


@pytest.mark.tools
@needs("rsync")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_killed_first_rsync_in_place_is_held(mounted: Mounted, number: signal.Signals) -> None:
    """Its receiver is another process that closes in good order, but does not set the size."""
    target = mounted.staging / "web01.img"
    slow = SlowRsync(mounted, "-t", "--inplace")
    process = slow.start(target)

    process.send_signal(number)
    process.wait(timeout=20)

    draft = mounted.assert_held("web01.img", "web01")
    assert "rsync" in draft["reason"]
    assert slow.content.startswith(target.read_bytes())
    run("rsync", "-It", "--inplace", "--no-whole-file", slow.source, target)
    mounted.assert_backups("web01", slow.content)


@pytest.mark.tools
@needs("rsync")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_head_that_a_killed_rsync_patched_in_part_is_held(
    mounted: Mounted, number: signal.Signals
) -> None:
    """A mix of two images of one size: published, it would be restored as if it were whole."""
    target = mounted.staging / "web01.img"
    slow = SlowRsync(mounted, "--inplace", "--whole-file")
    old = random_bytes(SlowRsync.SIZE, 5)
    run("cp", mounted.image(old), target)
    process = slow.start(
        target, is_under_way=lambda: target.read_bytes()[: 2 * MIB] != old[: 2 * MIB]
    )

    process.send_signal(number)
    process.wait(timeout=20)

    draft = mounted.assert_held("web01.img", "web01", old)
    assert draft["size"] == len(old) and "rsync" in draft["reason"]
    run("rsync", "-S", "--inplace", "--no-whole-file", slow.source, target)
    mounted.assert_backups("web01", old, slow.content)


@pytest.mark.tools
@needs("qemu-img")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_killed_qemu_img_is_held_though_the_size_is_full(
    mounted: Mounted, number: signal.Signals
) -> None:
    target = mounted.staging / "web01.img"
    size = 48 * MIB
    source = mounted.image(random_bytes(size, 4))
    words = ["convert", "-r", "8M", "-f", "raw", "-O", "raw", source, target]
    process = mounted.start("qemu-img", *words)
    assert becomes(
        lambda: target.exists() and any(target.read_bytes()[5 * MIB : 6 * MIB]), seconds=20
    )

    kill(process, number)

    draft = mounted.assert_held("web01.img", "web01")
    assert draft["size"] == size
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, target)
    mounted.assert_backups("web01", source.read_bytes())
