# SPDX-License-Identifier: LGPL-2.1-or-later
"""S12: one destructive operation per VM: joined, taken over, busy, void."""

from __future__ import annotations

import asyncio

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, PowerState
from tests.fakes.hypervisors import (
    BarrenHypervisor,
    HungHypervisor,
    SlowStartHypervisor,
    UnresettableHypervisor,
)
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, OPERATOR, VM1, VM2, VM3, World, now, settled
from vmchannel_host.config.model import Group
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.model import RunState
from vmchannel_host.policy.policy import Policy

OTHER = Requester(VM3, "vm3", None, "guest-boot-3")


@virtual_time
async def test_s12_the_same_action_joins_and_gets_the_result() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        answers = await asyncio.gather(
            world.ask(FenceAction.OFF), world.ask(FenceAction.OFF, requester=OTHER)
        )
        assert world.hypervisor.count("off") == 1
    assert [(one.ok, one.state) for one in answers] == [(True, PowerState.OFF)] * 2
    assert answers[0].operation != answers[1].operation
    assert answers[0].operation in answers[1].reason


@virtual_time
async def test_s12_two_reboots_reset_once() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        answers = await asyncio.gather(
            world.ask(FenceAction.REBOOT), world.ask(FenceAction.REBOOT, requester=OTHER)
        )
        assert world.hypervisor.count("reset") == 1
    assert all(one.ok for one in answers)


@virtual_time
async def test_one_who_joins_while_the_last_look_is_under_way_gets_a_newer_look() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        first = asyncio.create_task(world.ask(FenceAction.OFF))
        await world.hypervisor.begun("look")
        world.vm()  # after the look began: it proves nothing about this one
        second = await world.ask(FenceAction.OFF, requester=OTHER)
        assert second.ok
        assert not world.hypervisor.instances
        assert (await first).ok


@virtual_time
async def test_s12_another_action_is_busy_and_names_the_operation() -> None:
    async with World(HungHypervisor(now)).running() as world:
        world.vm()
        await settled()
        off = asyncio.create_task(world.ask(FenceAction.OFF, within_s=5))
        await asyncio.sleep(0.1)
        (running,) = world.coordinator.running()
        for action in (FenceAction.ON, FenceAction.REBOOT):
            answer = await world.ask(action, requester=OTHER)
            assert (answer.ok, answer.code) == (False, FenceCode.BUSY)
            assert f"op={running.operation}" in answer.reason
        await off


@virtual_time
async def test_s12_off_takes_over_a_running_reboot_and_nothing_is_started_afterwards() -> None:
    hypervisor = UnresettableHypervisor(now)
    hypervisor.startable.add(VM2)
    async with World(hypervisor).running() as world:
        world.vm()
        await settled()
        reboot = asyncio.create_task(world.ask(FenceAction.REBOOT))
        await asyncio.sleep(1.0)  # in the reset, which takes its time
        off = await world.ask(FenceAction.OFF, requester=OTHER)
        assert (off.ok, off.state) == (True, PowerState.OFF)
        answer = await reboot
        assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
        assert f"op={off.operation}" in answer.reason
        await asyncio.sleep(60)
        assert hypervisor.count("start") == 0
        assert not hypervisor.instances


@virtual_time
async def test_s12_off_waits_for_a_start_that_runs_and_ends_what_it_brings() -> None:
    hypervisor = SlowStartHypervisor(now)
    hypervisor.startable.add(VM2)
    async with World(hypervisor).running() as world:
        await world.vm_off()
        on = asyncio.create_task(world.ask(FenceAction.ON))
        await asyncio.sleep(1.0)
        assert hypervisor.count("start") == 1
        off = await world.ask(FenceAction.OFF, requester=OTHER)
        assert off.ok
        assert not hypervisor.instances
        assert not (await on).ok
        await asyncio.sleep(60)
        assert not hypervisor.instances


@virtual_time
async def test_s12_off_fails_when_a_start_that_runs_does_not_return_in_time() -> None:
    hypervisor = SlowStartHypervisor(now)
    hypervisor.start_s = 30.0
    hypervisor.startable.add(VM2)
    async with World(hypervisor).running() as world:
        await world.vm_off()
        on = asyncio.create_task(world.ask(FenceAction.ON, within_s=3))
        await asyncio.sleep(1.0)
        off = await world.ask(FenceAction.OFF, requester=OTHER, within_s=5)
        assert not off.ok
        await on
        await asyncio.sleep(60)


@virtual_time
async def test_s12_no_second_start_while_an_earlier_one_has_not_returned() -> None:
    hypervisor = SlowStartHypervisor(now)
    hypervisor.start_s = 30.0
    hypervisor.startable.add(VM2)
    async with World(hypervisor).running() as world:
        await world.vm_off()
        assert not (await world.ask(FenceAction.ON, within_s=3)).ok
        again = await world.ask(FenceAction.ON, within_s=5)
        assert not again.ok
        assert hypervisor.count("start") == 1
        await asyncio.sleep(60)


@virtual_time
async def test_s12_a_request_of_a_vm_that_is_being_fenced_is_void() -> None:
    hypervisor = HungHypervisor(now)
    hypervisor.hung = {VM1}
    async with World(hypervisor).running() as world:
        world.vm(VM1, "vm1")
        world.vm()
        await settled()
        fencing = asyncio.create_task(world.ask(FenceAction.OFF, "vm1", requester=OTHER, within_s=5))
        await asyncio.sleep(0.1)
        answer = await world.ask(FenceAction.OFF, "vm2", requester=ASKER)
        assert (answer.ok, answer.code) == (False, FenceCode.VOID)
        assert hypervisor.count("off") == 1
        await fencing


@virtual_time
async def test_s12_of_two_vms_that_fence_each_other_one_wins() -> None:
    async with World().running() as world:
        world.vm(VM1, "vm1")
        world.vm(VM3, "vm3")
        await settled()
        answers = await asyncio.gather(
            world.ask(FenceAction.OFF, "vm3", requester=ASKER),
            world.ask(FenceAction.OFF, "vm1", requester=OTHER),
        )
    assert [one.code for one in answers] == [FenceCode.DONE, FenceCode.VOID]


@virtual_time
async def test_s12_a_request_older_than_the_fence_of_its_requester_is_void_also_afterwards() -> None:
    async with World().running() as world:
        world.vm(VM1, "vm1")
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF, "vm2")
        assert (await world.ask(FenceAction.OFF, "vm1", requester=OTHER)).ok
        assert (await world.service.answer(request, ASKER)).code is FenceCode.VOID
        world.vm(VM1, "vm1")  # it is back, and asks anew
        await settled()
        assert (await world.ask(FenceAction.OFF, "vm2", requester=ASKER)).ok


@virtual_time
async def test_the_operator_is_no_vm_and_is_never_void() -> None:
    async with World().running() as world:
        world.vm(VM1, "vm1")
        await settled()
        assert (await world.ask(FenceAction.OFF, "vm1", requester=OPERATOR)).ok
        assert (await world.ask(FenceAction.OFF, "vm1", requester=OPERATOR)).ok


@virtual_time
async def test_different_vms_are_fenced_at_the_same_time() -> None:
    async with World().running() as world:
        world.hypervisor.delay_s = 1.0
        world.vm()
        world.vm(VM3, "vm3")
        await settled()
        begun = now()
        answers = await asyncio.gather(world.ask(FenceAction.OFF, "vm2"), world.ask(FenceAction.OFF, "vm3"))
        assert all(one.ok for one in answers)
        assert now() - begun < 3.5  # two looks and an end


@virtual_time
async def test_a_reboot_whose_start_still_runs_when_time_is_over_is_told_as_not_started() -> None:
    hypervisor = BarrenHypervisor(now)
    hypervisor.startable.add(VM2)
    async with World(hypervisor).running() as world:
        world.vm(run_state=RunState.PAUSED)
        await settled()
        reboot = await world.ask(FenceAction.REBOOT, within_s=4)
        assert reboot.code is FenceCode.NOT_STARTED
        assert (await world.ask(FenceAction.OFF)).ok


@virtual_time
async def test_s12_off_that_takes_over_while_the_start_is_being_recorded_stops_the_start() -> None:
    async with World().running() as world:
        world.hypervisor.startable.add(VM2)
        await world.vm_off()
        off: list[asyncio.Task[FenceAnswer]] = []

        def take_over(kind: str) -> None:
            if kind == "fence.phase" and not off:
                off.append(asyncio.create_task(world.ask(FenceAction.OFF, requester=OTHER)))

        world.journal.hook = take_over
        world.journal.slow = lambda kind: 1.0 if kind == "fence.phase" else 0.0
        assert not (await world.ask(FenceAction.ON)).ok
        assert (await off[0]).ok
        assert world.hypervisor.count("start") == 0


@virtual_time
async def test_s10_the_policy_in_force_decides_and_the_intent_names_its_requester() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.policy = Policy((Group("web", (VM1, VM2), frozenset({FenceAction.STATUS})),), {})
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.REFUSED)
        assert world.hypervisor.acts == []
        world.policy = Policy((Group("web", (VM1, VM2)),), {})
        assert (await world.ask(FenceAction.OFF)).ok
        (intent,) = (one for one in world.journal.records if one.kind == "fence.intent")
        assert intent.body["requester"] == VM1
