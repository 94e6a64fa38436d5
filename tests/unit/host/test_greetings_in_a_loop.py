# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that greet in a loop must not keep the journal busy (S7)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fence_vmchannel.hub.events import HubEvent, HubStatus, PeerConnected, PeerStatus
from fence_vmchannel.hub.watch import WatchList
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.test_returned_memory import PORT, VM, FakeJournal, World, operation
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.journal.types import OperationRows
from vmchannel_host.returned_memory import BETWEEN_S, ReturnedMemory


@dataclass
class CountingJournal(FakeJournal):
    """Counts how often its past is read."""

    reads: int = 0

    async def operations(self, limit: int = 1000) -> Sequence[OperationRows]:
        self.reads += 1
        await asyncio.sleep(0.07)
        return await super().operations(limit)


@dataclass
class ChangingWorld(World):
    """The peer's session is the one that greeted last."""

    async def greet_often(self, times: int, every_s: float) -> None:
        watches = WatchList(_no_events)
        tasks = Tasks()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(tasks.run())
            await tasks.opened()
            memory = ReturnedMemory(self.journal, self.status, self.destroy, tasks)
            follow = group.create_task(memory.follow(watches.add()))
            for number in range(times):
                self.session = f"s{number}"
                watches.publish(PeerConnected("vm1", PORT, self.session, False, "", VM))
                await asyncio.sleep(every_s)
            await asyncio.sleep(5.0)
            for task in (follow, running):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _no_events() -> list[HubEvent]:
    return []


@virtual_time
async def test_s7_a_guest_that_greets_in_a_loop_costs_the_journal_two_readings_a_second() -> None:
    journal = CountingJournal([operation(20)])  # its boot is new: it is not declared off
    world = ChangingWorld(journal)
    await world.greet_often(400, 0.025)
    assert 1 <= journal.reads <= 10 / BETWEEN_S + 2
    assert world.destroyed == []


@virtual_time
async def test_the_last_greeting_of_many_is_judged() -> None:
    journal = CountingJournal([operation(20)], {(VM, "boot-1"): 10})
    world = ChangingWorld(journal, boot_id="boot-2")
    greeting = asyncio.create_task(world.greet_often(40, 0.025))
    await asyncio.sleep(0.97)
    world.boot_id = "boot-1"  # memory comes back
    await greeting
    assert VM in world.destroyed


@virtual_time
async def test_guests_that_greet_together_are_judged_by_one_reading() -> None:
    journal = CountingJournal([operation(20)])
    world = World(journal)
    peers = tuple(
        PeerStatus(f"vm{n}", PORT, "vm", True, True, "s", "", 0, 0, 0, key=f"u{n}", boot_id=f"b{n}")
        for n in range(50)
    )
    events: list[HubEvent] = [PeerConnected(peer.key, PORT, "s", False, "", peer.key) for peer in peers]
    tasks = Tasks()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tasks.run())
        await tasks.opened()
        memory = ReturnedMemory(journal, lambda: HubStatus("", "", peers), world.destroy, tasks)
        follow = group.create_task(memory.follow(WatchList(lambda: events).add()))
        await asyncio.sleep(3.0)
        for task in (follow, running):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    assert len(journal.seen) == 50
    assert journal.reads <= 2
