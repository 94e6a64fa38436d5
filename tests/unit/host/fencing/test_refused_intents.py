# SPDX-License-Identifier: LGPL-2.1-or-later
"""An intent that was refused is never acted on, though its refusal was lost and the daemon restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, FenceRequest, PowerState
from tests.fakes.hypervisors import FakeHypervisor, HungHypervisor, SlowStartHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, VM1, VM2, World, now, settled
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.model import RunState

OTHER = Requester(VM2, "vm2", None, "guest-boot-2")


def lose_outcomes(world: World) -> None:
    """The journal takes everything but outcomes."""
    world.journal.full = lambda what: what == "fence.outcome"


async def restarted_for_a_minute(world: World, hypervisor: FakeHypervisor | None = None) -> World:
    world.journal.full = lambda _: False
    async with World(hypervisor or world.hypervisor, world.journal).running() as again:
        await asyncio.sleep(60)
    return again


def outcomes(world: World, operation: str) -> list[object]:
    records = world.journal.records
    return [one.body["code"] for one in records if (one.kind, one.operation) == ("fence.outcome", operation)]


Refusal = Callable[[World, FenceRequest], object]

REFUSALS: dict[str, Refusal] = {
    "cancelled": lambda world, request: world.service.cancel(request.request_id, ASKER),
    "interrupted": lambda world, _: world.service.requester_interrupted(VM1),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("action", [FenceAction.OFF, FenceAction.REBOOT])
@virtual_time
async def test_a_request_that_was_dropped_before_it_began_is_not_acted_on_after_a_restart(
    refusal: str, action: FenceAction
) -> None:
    world = World()
    world.vm()
    request = world.request(action)

    def drop(what: str) -> None:
        if what == "fence.intent":
            REFUSALS[refusal](world, request)

    world.journal.hook = drop
    lose_outcomes(world)
    async with world.running():
        answer = await world.service.answer(request, ASKER)
    assert (answer.ok, answer.code) == (False, FenceCode.STALE)
    again = await restarted_for_a_minute(world)
    assert again.hypervisor.acts == []
    assert outcomes(again, answer.operation) == ["unavailable"]


@virtual_time
async def test_a_request_that_was_refused_as_busy_is_not_carried_out_after_a_restart() -> None:
    world = World(SlowStartHypervisor(now))
    world.hypervisor.startable.add(VM2)
    async with world.running():
        await world.vm_off()
        starting = asyncio.create_task(world.ask(FenceAction.ON))
        await world.hypervisor.begun("start")
        lose_outcomes(world)
        answer = await world.ask(FenceAction.REBOOT)
        assert answer.code is FenceCode.BUSY
        world.journal.full = lambda _: False
        await starting
    again = await restarted_for_a_minute(world)
    assert again.hypervisor.count("start") == 1
    assert again.hypervisor.count("off") + again.hypervisor.count("reset") == 0
    assert outcomes(again, answer.operation) == ["unavailable"]


@virtual_time
async def test_an_intent_that_the_journal_took_after_all_is_not_acted_on_after_a_restart() -> None:
    world = World()
    world.vm()
    await settled()
    async with world.running():
        world.journal.late = lambda what: what == "fence.intent"
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)
    assert world.journal.kinds() == ["fence.intent"]
    world.journal.late = lambda _: False
    again = await restarted_for_a_minute(world)
    assert again.hypervisor.acts == []


@virtual_time
async def test_a_reboot_that_an_off_took_over_starts_nothing_after_a_restart() -> None:
    """Its own end is lost, that of the `off` is not."""
    world = World(HungHypervisor(now))
    world.vm(run_state=RunState.PAUSED)
    async with world.running():
        lose_outcomes(world)
        rebooting = asyncio.create_task(world.ask(FenceAction.REBOOT))
        await world.hypervisor.begun("off")
        stopping = asyncio.create_task(world.ask(FenceAction.OFF, within_s=5))
        rebooted = await rebooting
        assert "taken over" in rebooted.reason
        world.journal.full = lambda _: False
        stopped = await stopping
    able = FakeHypervisor(now)
    able.instances = world.hypervisor.instances
    able.startable.add(VM2)
    again = await restarted_for_a_minute(world, able)
    assert able.acts == []
    assert outcomes(again, rebooted.operation) == ["failed"]
    assert outcomes(again, stopped.operation) == ["deadline"]


@virtual_time
async def test_nothing_is_destroyed_before_it_is_recorded_that_the_off_has_begun() -> None:
    world = World()
    world.vm()
    await settled()
    world.journal.full = lambda what: what == "fence.phase"
    async with world.running():
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
        assert world.hypervisor.acts == []


@virtual_time
async def test_an_off_that_has_begun_is_taken_up_though_nothing_else_of_it_is_recorded() -> None:
    world = World(HungHypervisor(now))
    world.vm()
    request = world.request(FenceAction.OFF)
    async with world.running():
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await world.hypervisor.begun("off")
        asking.cancel()
    assert world.journal.kinds() == ["fence.intent", "fence.phase"]
    able = FakeHypervisor(now)
    able.instances = world.hypervisor.instances
    async with World(able, world.journal).running() as again:
        answer: FenceAnswer = await again.service.answer(request, ASKER)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
    assert able.count("off") == 1


@virtual_time
async def test_s12_a_refused_operation_voids_nothing_after_a_restart() -> None:
    world = World()
    world.vm(VM1, "vm1")
    world.vm()
    async with world.running():
        request = world.request(FenceAction.OFF, "vm2")
        early = world.request(FenceAction.OFF, "vm1")

        def drop(what: str) -> None:
            if what == "fence.intent":
                world.service.cancel(early.request_id, OTHER)

        world.journal.hook = drop
        assert (await world.service.answer(early, OTHER)).code is FenceCode.STALE
        world.journal.hook = lambda _: None
    async with World(world.hypervisor, world.journal).running() as again:
        assert (await again.service.answer(request, ASKER)).ok
