"""Reads in threads: long ones apart from small ones."""

import threading

import pytest
import trio
import trio.testing

from backupfs.fuse.threads import LONG_READ_SIZE, LONG_READERS, READERS, Threads

SECONDS = 15


def test_a_small_read_does_not_wait_for_long_ones():
    release = threading.Event()

    def slow(_offset: int, size: int) -> bytes:
        assert release.wait(SECONDS)
        return bytes(size)

    async def main() -> bytes:
        threads = Threads()
        try:
            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    for _ in range(READERS + LONG_READERS):
                        nursery.start_soon(threads.read, slow, 0, LONG_READ_SIZE)
                    await trio.testing.wait_all_tasks_blocked()
                    small = await threads.read(lambda _offset, size: bytes(size), 0, 4096)
                    release.set()
            return small
        finally:
            release.set()
            threads.close()

    assert trio.run(main) == bytes(4096)


@pytest.mark.parametrize("size", [4096, LONG_READ_SIZE])
def test_what_a_read_raises_is_raised_to_who_waits_for_it(size):
    def fail(offset: int, size: int) -> bytes:
        raise OSError(f"{offset} {size}")

    async def main() -> None:
        threads = Threads()
        try:
            with trio.fail_after(SECONDS), pytest.raises(OSError, match=f"^8192 {size}$"):
                await threads.read(fail, 8192, size)
        finally:
            threads.close()

    trio.run(main)
