"""The relay's time slice: asked for with what the kernel reports back."""

from __future__ import annotations

import ctypes
import os
import platform
import threading

import pytest

from vfsmount.client.relay import time_slice

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275, "riscv64": 275}


def own_slice() -> tuple[int, int]:
    """Nice value and slice of this thread, in nanoseconds; a slice of 0 where it is not told."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(48)
    number = SCHED_GETATTR[platform.machine()]
    assert libc.syscall(number, 0, buffer, len(buffer), 0) == 0
    attr = time_slice._ATTR.unpack(buffer.raw)
    return attr[3], attr[5]


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="number of the call unknown")
def test_it_is_the_threads_own_and_nothing_else_changes() -> None:
    before = own_slice()
    found: list[tuple[int, int]] = []

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, before[0] + 3)
        assert time_slice.lengthen_slice()
        found.append(own_slice())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    ((nice, slice_ns),) = found
    assert nice == before[0] + 3
    if before[1]:  # Linux 6.12 tells
        assert slice_ns == time_slice.SLICE_NS > before[1]
    assert own_slice() == before


def test_a_policy_of_somebody_elses_choice_stays() -> None:
    found: list[bool] = []

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        found.append(time_slice.lengthen_slice())
        found.append(os.sched_getscheduler(0) == os.SCHED_BATCH)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, True]
