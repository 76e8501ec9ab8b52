"""How the loop waits for requests: what is there comes at once, and no watch is for ever."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from backupfs.fuse.next_request import (
    PASS_SECONDS,
    WATCH_SECONDS,
    WORTH_MAX,
    LastFirstLock,
    NextRequest,
)


class Clock:
    """Goes on by a step with each look."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step = 0.0
        self.looks = 0
        self.at_look: Callable[[int], object] = lambda _look: None

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.step
        self.at_look(self.looks)
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """Of a pipe: where requests are read, and where they come from."""
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def test_what_is_there_is_taken_at_once_with_a_pass_of_the_loop_now_and_then(clock, ends):
    waiting = NextRequest(clock)
    os.write(ends[1], b"x")

    async def main() -> None:
        with assert_checkpoints():
            await waiting.wait_readable(ends[0])
        with assert_no_checkpoints():
            await waiting.wait_readable(ends[0])
        clock.now += PASS_SECONDS
        with assert_checkpoints():
            await waiting.wait_readable(ends[0])

    trio.run(main)


@pytest.mark.parametrize("how", ["a request", "the mount has gone"])
def test_a_wait_ends_when_there_is_something_to_be_told(clock, how):
    waiting = NextRequest(clock)
    read_end, write_end = os.pipe()

    async def main() -> None:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(waiting.wait_readable, read_end)
                await trio.testing.wait_all_tasks_blocked()
                if how == "a request":
                    os.write(write_end, b"x")
                os.close(write_end)

    trio.run(main)
    assert os.read(read_end, 1) == (b"x" if how == "a request" else b"")
    os.close(read_end)


def passed(waiting: NextRequest, ends: tuple[int, int]) -> None:
    """The loop has had its turn, and no request is there."""

    async def main() -> None:
        os.write(ends[1], b"x")
        await waiting.wait_readable(ends[0])
        os.read(ends[0], 1)

    trio.run(main)


def test_a_request_that_comes_while_it_is_watched_for_needs_no_pass(clock, ends):
    waiting = NextRequest(clock)
    passed(waiting, ends)
    clock.step = WATCH_SECONDS / 10
    comes_at = clock.looks + 4
    clock.at_look = lambda look: look == comes_at and os.write(ends[1], b"x")
    waiting.watch()

    async def main() -> None:
        with assert_no_checkpoints():
            await waiting.wait_readable(ends[0])

    trio.run(main)


def test_watching_ends_soon_and_is_given_up_where_nothing_comes(clock, ends):
    waiting = NextRequest(clock)

    async def looks_of_one_wait() -> int:
        before = clock.looks
        waiting.watch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting.wait_readable, ends[0])
            await trio.testing.wait_all_tasks_blocked()
            seen = clock.looks - before
            os.write(ends[1], b"x")
        os.read(ends[0], 1)
        return seen

    async def main() -> list[int]:
        return [await looks_of_one_wait() for _ in range(WORTH_MAX + 4)]

    passed(waiting, ends)
    clock.step = WATCH_SECONDS / 10
    looks = trio.run(main)

    assert all(10 <= count <= 15 for count in looks[:WORTH_MAX]), looks
    assert looks[-3:] == [1, 1, 1], "not worth it: none watches any more"


def test_who_came_last_has_the_lock_next_and_who_gave_up_never():
    lock = LastFirstLock()
    had: list[str] = []

    async def take(name: str) -> None:
        async with lock:
            had.append(name)
            await trio.lowlevel.checkpoint()
            assert had[-1] == name, "nobody else has it meanwhile"

    async def give_up(scope: trio.CancelScope) -> None:
        with scope:
            await take("gave up")

    async def main() -> None:
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery, lock:
            for start in (take, "first"), (take, "last"), (give_up, scope):
                nursery.start_soon(*start)
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        with assert_no_checkpoints():
            async with lock:
                had.append("free")

    trio.run(main)

    assert had == ["last", "first", "free"]
