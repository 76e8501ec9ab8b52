"""Images read from end to end: by the decoding processes, and without them as well."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest
from mounted import CHUNK_SIZE, MIB, Mounted, becomes, needs, patched, random_bytes, run

# Chunks of every kind, and an end that is neither a chunk's nor a page's.
CONTENT = b"".join(
    random_bytes(256 << 10, seed) + bytes(MIB + CHUNK_SIZE) + bytes([seed]) * (448 << 10)
    for seed in range(16)
)[:-777]


def decoders_of(mounted: Mounted) -> list[int]:
    words = Path(f"/proc/{mounted.process_id}/task/{mounted.process_id}/children").read_text()
    return list(map(int, words.split()))


def bytes_read_by(process_ids: list[int]) -> int:
    """What they have asked of any file or socket."""
    texts = [Path(f"/proc/{process_id}/io").read_text() for process_id in process_ids]
    return sum(int(text.split()[1]) for text in texts)


def forget(path: Path) -> None:
    """Have the kernel drop the pages it has of a file."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@pytest.fixture
def latest(mounted: Mounted) -> Path:
    run("cp", mounted.image(CONTENT), mounted.staging / "vm.img")
    mounted.remount()
    return mounted.latest("vm")


def test_long_reads_are_done_by_decoding_processes(mounted: Mounted, latest: Path) -> None:
    decoders = decoders_of(mounted)
    assert len(decoders) >= 2
    before = bytes_read_by(decoders)

    assert latest.read_bytes() == CONTENT

    assert bytes_read_by(decoders) - before > 2 * MIB


@needs("cmp", "dd")
@pytest.mark.parametrize("block_size", ["4k", "100k", "1M", "3M"])
def test_programs_get_the_right_bytes_whatever_they_ask_for(
    mounted: Mounted, latest: Path, block_size: str
) -> None:
    run("dd", f"if={latest}", f"of={mounted.folder / 'copy'}", f"bs={block_size}", "status=none")

    run("cmp", mounted.image(CONTENT), mounted.folder / "copy")


def test_a_head_with_differences_is_read(mounted: Mounted, latest: Path) -> None:
    content = CONTENT
    for place in range(0, len(CONTENT), 300_000):
        content = patched(content, place, b"changed")
    run("cp", mounted.image(content), mounted.staging / "vm.img")
    mounted.remount()
    before = bytes_read_by(decoders_of(mounted))

    assert mounted.latest("vm").read_bytes() == content
    assert bytes_read_by(decoders_of(mounted)) - before > 2 * MIB


def test_readers_at_once_get_the_right_bytes(mounted: Mounted, latest: Path) -> None:
    image = mounted.image(CONTENT)
    programs = [mounted.start("cmp", image, latest) for _ in range(6)]

    assert [program.wait(60) for program in programs] == [0] * 6


def test_without_decoding_processes_the_daemon_reads(mounted: Mounted, latest: Path) -> None:
    assert latest.read_bytes() == CONTENT
    for process_id in decoders_of(mounted):
        os.kill(process_id, signal.SIGKILL)
    forget(latest)

    assert latest.read_bytes() == CONTENT


def test_damage_is_an_error_there_alone(mounted: Mounted, latest: Path) -> None:
    mounted.expects_errors = True
    packs = sorted((mounted.repo / "packs").glob("*/*"), key=lambda path: path.stat().st_size)
    with packs[-1].open("r+b") as file:
        file.seek(packs[-1].stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))

    good = bad = 0
    with latest.open("rb", buffering=0) as reader:
        for offset in range(0, len(CONTENT), CHUNK_SIZE):
            try:
                piece = os.pread(reader.fileno(), CHUNK_SIZE, offset)
                assert piece == CONTENT[offset : offset + CHUNK_SIZE]
                good += 1
            except OSError:
                bad += 1
    assert (good, bad) == (-(-len(CONTENT) // CHUNK_SIZE) - 1, 1)


@pytest.mark.parametrize("how", ["unmounted", "killed"])
def test_decoding_processes_end_with_the_daemon(mounted: Mounted, latest: Path, how: str) -> None:
    assert latest.read_bytes() == CONTENT
    descriptors = [os.pidfd_open(process_id) for process_id in decoders_of(mounted)]
    assert len(descriptors) >= 2

    mounted.unmount() if how == "unmounted" else mounted.kill_daemon()

    try:
        assert becomes(lambda: ended(descriptors) == descriptors, seconds=10)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if how == "unmounted":
        mounted.mount()


def ended(descriptors: list[int]) -> list[int]:
    return select.select(descriptors, [], [], 0)[0]
