# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pace of each asker: a burst, then so many a second; nobody waits for another."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.pace import Pace
from tests.fakes.virtual_time import virtual_time


@given(st.lists(st.floats(0, 3), max_size=100), st.sampled_from([0.5, 10.0]), st.sampled_from([0.0, 2.0]))
def test_nobody_goes_on_faster_than_his_pace_but_for_the_burst(
    pauses: list[float], per_s: float, burst_s: float
) -> None:
    now = 100.0
    pace = Pace(per_s, lambda: now, burst_s=burst_s)
    went_on: list[float] = []
    for pause in pauses:
        now += pause
        went_on.append(now + pace.wait_s("vm1"))
    for first in range(len(went_on)):
        for last in range(first, len(went_on)):
            most = (went_on[last] - went_on[first] + burst_s) * per_s + 1
            assert last - first + 1 <= most + 1e-6


@given(st.integers(1, 200))
def test_who_keeps_his_pace_never_waits(count: int) -> None:
    now = 0.0
    pace = Pace(10, lambda: now, burst_s=1)
    for _ in range(count):
        now += 0.1001
        assert pace.wait_s("vm1") == 0


@virtual_time
async def test_one_who_waits_holds_nobody_else_up() -> None:
    clock = asyncio.get_running_loop().time
    pace = Pace(10, clock, burst_s=1)
    began = clock()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(100):
            tasks.create_task(pace.turn("vm1"))
        await asyncio.sleep(0)
        await pace.turn("vm2")
        assert clock() == began
    assert clock() - began > 8


def test_askers_that_are_quiet_are_forgotten() -> None:
    now = 0.0
    pace = Pace(10, lambda: now)
    for number in range(3_000):
        now += 1.0
        pace.wait_s(number)
    assert pace.known < 2_000


def test_what_is_not_taken_is_not_counted() -> None:
    now = 0.0
    pace = Pace(1, lambda: now, burst_s=3)
    assert [pace.take("vm1") for _ in range(5)] == [0, 0, 0, 1, 1]
    now = 1.0
    assert [pace.take("vm1") for _ in range(2)] == [0, 1]


@virtual_time
async def test_who_gives_up_waiting_is_not_counted() -> None:
    clock = asyncio.get_running_loop().time
    began, pace = clock(), Pace(1, clock, burst_s=1)
    waiting = [asyncio.create_task(pace.turn("vm1")) for _ in range(100)]
    await asyncio.sleep(0)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await pace.turn("vm1")
    assert clock() - began <= 2
