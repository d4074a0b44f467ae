"""Waiting for the device without sleeping, and the lock that goes with it."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from vfsmount.client.pyfuse.eager import EagerLock, eager_trio


@pytest.fixture
def pipe() -> object:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


async def test_a_request_that_is_there_costs_no_checkpoint(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    stand_in = eager_trio(read_end, 1000)
    os.write(write_end, b"x")
    with assert_no_checkpoints():
        await stand_in.lowlevel.wait_readable(read_end)


async def test_one_in_64_takes_a_checkpoint(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    stand_in = eager_trio(read_end, 1000)
    os.write(write_end, b"x")
    for _ in range(63):
        with assert_no_checkpoints():
            await stand_in.lowlevel.wait_readable(read_end)
    with assert_checkpoints():
        await stand_in.lowlevel.wait_readable(read_end)


async def test_without_a_budget_it_always_sleeps(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    stand_in = eager_trio(read_end, 0)
    os.write(write_end, b"x")
    with assert_checkpoints():
        await stand_in.lowlevel.wait_readable(read_end)


async def test_nothing_there_sleeps_until_there_is(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    stand_in = eager_trio(read_end, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stand_in.lowlevel.wait_readable, read_end)
        await wait_all_tasks_blocked()
        os.write(write_end, b"x")


async def test_looking_comes_back_after_many_misses(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = pipe
    slept = []

    async def wait_readable(fd: int) -> None:
        slept.append(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    stand_in = eager_trio(read_end, 50)
    for _ in range(200):  # idle: the budget shrinks to nothing on the way
        await stand_in.lowlevel.wait_readable(read_end)
    assert len(slept) == 200
    os.write(write_end, b"x")
    for _ in range(200):
        await stand_in.lowlevel.wait_readable(read_end)
    assert len(slept) < 200 + 70  # 64 until it looks again, and then one in 64


async def test_lock_excludes_and_is_not_handed_over() -> None:
    lock = EagerLock()
    order = []

    async def worker(name: str) -> None:
        async with lock:
            order.append(name)

    async with trio.open_nursery() as nursery:
        with assert_no_checkpoints():
            await lock.__aenter__()
        nursery.start_soon(worker, "waiting")
        await wait_all_tasks_blocked()
        assert order == []
        await lock.__aexit__()
        # Woken, but we are faster.
        with assert_no_checkpoints():
            await lock.__aenter__()
        await wait_all_tasks_blocked()
        assert order == []
        await lock.__aexit__()
    assert order == ["waiting"]


async def test_a_cancelled_waiter_leaves_the_lock_usable() -> None:
    lock = EagerLock()
    async with lock:
        with trio.move_on_after(0):
            await lock.__aenter__()
    with assert_no_checkpoints():
        await lock.__aenter__()
