# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests that meet a daemon that has just started, and answers that come too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.fence_journal import FakeJournal
from tests.fakes.hypervisors import BOOT, FakeHypervisor, HungHypervisor
from tests.fakes.virtual_time import VirtualTimeLoop, virtual_time
from tests.unit.host.fencing.world import ASKER, OPERATOR, VM1, VM2, World, now, settled
from vmchannel_host.fencing.requester import Requester

TARGET = Requester(VM2, "vm2", None, "guest-boot-2")


@asynccontextmanager
async def starting(world: World) -> AsyncGenerator[World]:
    """The daemon has begun to watch and to serve its ports; it has not resumed yet."""
    await world.instances.restore()
    tasks = [asyncio.create_task(world.tasks.run()), asyncio.create_task(world.instances.run())]
    try:
        await settled()
        yield world
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def killed_in_off(hypervisor: FakeHypervisor) -> FakeJournal:
    """A daemon is killed while VM1 has VM2 fenced off."""
    world = World(hypervisor)
    async with world.running():
        world.vm()
        world.vm(VM1, "vm1")
        await settled()
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF), ASKER))
        await hypervisor.begun("off")
        asking.cancel()
    return world.journal


@virtual_time
async def test_s12_the_target_of_an_off_cannot_act_in_the_moment_of_a_restart() -> None:
    """The ports are served before the journal is gone through: what was ordered first must come first."""
    hypervisor = HungHypervisor(now)
    journal = await killed_in_off(hypervisor)
    hypervisor.hung = {VM1}
    async with starting(World(hypervisor, journal)) as world:
        asking = asyncio.create_task(world.ask(FenceAction.OFF, "vm1", requester=TARGET, within_s=15.0))
        await asyncio.sleep(1.0)
        await world.coordinator.resume()
        answer = await asking
        await asyncio.sleep(1.0)  # the off that was cut off is done again
    assert (answer.ok, answer.code) == (False, FenceCode.VOID)
    assert {one.vm_uuid for one in hypervisor.instances} == {VM1}


@virtual_time
async def test_a_request_that_no_resumption_comes_for_is_answered_in_time_and_not_acted_on() -> None:
    hypervisor = FakeHypervisor(now)
    async with starting(World(hypervisor)) as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF, requester=OPERATOR, within_s=5.0)
        assert (answer.ok, answer.state) == (False, PowerState.UNKNOWN)
        await world.coordinator.resume()
        await asyncio.sleep(60)
    assert hypervisor.acts == []


@virtual_time
async def test_s5_an_id_that_is_repeated_before_the_resumption_gets_the_result() -> None:
    hypervisor = HungHypervisor(now)
    world = World(hypervisor)
    request = None
    async with world.running():
        world.vm()
        world.vm(VM1, "vm1")
        await settled()
        request = world.request(FenceAction.OFF)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await hypervisor.begun("off")
        asking.cancel()
    hypervisor.hung = {VM1}
    async with starting(World(hypervisor, world.journal)) as again:
        asking_again = asyncio.create_task(again.service.answer(request, ASKER))
        await asyncio.sleep(0.5)
        await again.coordinator.resume()
        answer = await asking_again
    assert (answer.ok, answer.state) == (True, PowerState.OFF)


class StoppedJournal(FakeJournal):
    """The daemon is stopped for a minute as soon as an answer is stored."""

    async def remember_answer(self, request_id: bytes, answer: bytes, *, timeout_s: float = 5.0) -> None:
        await super().remember_answer(request_id, answer, timeout_s=timeout_s)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.freeze(60.0)


@virtual_time
async def test_s6_a_daemon_that_was_stopped_tells_no_old_success_when_it_goes_on() -> None:
    async with World(journal=StoppedJournal(now, BOOT)).running() as world:
        world.vm()
        await settled()
        answer = await world.service.answer(world.request(FenceAction.OFF, within_s=20.0), ASKER)
    assert (answer.ok, answer.code) == (False, FenceCode.DEADLINE)
