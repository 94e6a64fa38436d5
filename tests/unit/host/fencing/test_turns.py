# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose request is begun next (S7)."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import VM1, VM2, VM3
from vmchannel_host.fencing.turns import Turns
from vmchannel_host.model import VmUuid


class Queue:
    """Requests that wait for their turn, and who had it in which order."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.begun: list[VmUuid] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, vm: VmUuid, count: int = 1) -> None:
        self.tasks += [asyncio.create_task(self._ask(vm), name=f"ask {vm}") for _ in range(count)]

    async def _ask(self, vm: VmUuid) -> None:
        await self.turns.turn(vm)
        self.begun.append(vm)

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def all(self) -> None:
        await asyncio.gather(*self.tasks)


@virtual_time
async def test_a_vm_that_asks_once_is_next_however_many_requests_of_others_wait() -> None:
    queue = Queue()
    queue.ask(VM1, 100)
    queue.ask(VM2, 100)
    await queue.rounds(20)
    begun = len(queue.begun)
    queue.ask(VM3)
    await queue.all()
    assert queue.begun.index(VM3) <= begun + 2


@virtual_time
async def test_vms_that_all_flood_have_equal_shares() -> None:
    queue = Queue()
    queue.ask(VM1, 300)
    queue.ask(VM2, 100)
    await queue.all()
    assert queue.begun[:200].count(VM2) in (99, 100, 101)


@virtual_time
async def test_an_early_flood_is_not_held_against_a_vm_once_nobody_waits() -> None:
    queue = Queue()
    queue.ask(VM1, 50)
    await queue.all()
    queue.ask(VM2, 10)
    queue.ask(VM1, 1)
    await queue.all()
    assert queue.begun[50:].index(VM1) <= 2


@virtual_time
async def test_a_request_that_is_given_up_costs_no_turn() -> None:
    queue = Queue()
    queue.ask(VM1, 3)
    await queue.rounds(1)
    for task in queue.tasks[1:]:
        task.cancel()
    queue.ask(VM2)
    await asyncio.gather(*queue.tasks, return_exceptions=True)
    assert queue.begun == [VM1, VM2]


@virtual_time
async def test_the_event_loop_runs_between_two_turns() -> None:
    queue = Queue()
    queue.ask(VM1, 10)
    seen: list[int] = []
    while len(queue.begun) < 10:
        await asyncio.sleep(0)
        seen.append(len(queue.begun))
    assert all(later - earlier <= 1 for earlier, later in pairwise(seen))
