# SPDX-License-Identifier: LGPL-2.1-or-later
"""A journal that fails: nothing is done without a record, and nothing claimed without one."""

from __future__ import annotations

import pytest

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import VM1, VM2, World, settled
from vmchannel_host.model import RunState


@pytest.mark.parametrize("part", ["request", "remember_request", "fence.intent"])
@virtual_time
async def test_nothing_is_done_when_the_request_or_the_intent_cannot_be_recorded(part: str) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.full = lambda what: what == part
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("part", ["remember_end", "fence.evidence", "fence.outcome", "remember_answer"])
@virtual_time
async def test_what_cannot_be_recorded_afterwards_is_not_claimed(part: str) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.full = lambda what: what == part
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
        assert "no space left" in answer.reason
        assert world.hypervisor.count("off") == 1


@pytest.mark.parametrize("part", ["fence.evidence", "remember_end", "fence.outcome", "remember_answer"])
@virtual_time
async def test_a_journal_that_hangs_fails_the_request_within_its_deadline(part: str) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.hung = lambda what: what == part
        assert not (await world.ask(FenceAction.OFF, within_s=3)).ok


def full_after_the_beginning(world: World) -> None:
    """Only that an operation begins can be recorded, no further phase."""
    world.journal.full = lambda what: what == "fence.phase" and "fence.phase" in world.journal.kinds()


@virtual_time
async def test_a_start_that_cannot_be_recorded_is_not_carried_out() -> None:
    async with World().running() as world:
        world.hypervisor.startable.add(VM2)
        await world.vm_off()
        full_after_the_beginning(world)
        assert not (await world.ask(FenceAction.ON)).ok
        assert world.hypervisor.count("start") == 0


@virtual_time
async def test_a_reset_that_cannot_be_recorded_is_not_carried_out() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        full_after_the_beginning(world)
        assert not (await world.ask(FenceAction.REBOOT)).ok
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("action", [FenceAction.ON, FenceAction.REBOOT])
@virtual_time
async def test_on_a_full_disk_on_and_reboot_are_refused_with_that_reason(action: FenceAction) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.short = "the disk is full"
        answer = await world.ask(action)
        assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)
        assert "the disk is full" in answer.reason
        assert world.hypervisor.acts == []
        assert (world.journal.records, world.journal.requests) == ([], {})  # it takes nothing of the room


@virtual_time
async def test_on_a_full_disk_off_goes_on_and_leaves_everything_that_proves_it() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        world.journal.short = "the disk is full"
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
        assert world.journal.known[identity].end is not None
        assert world.journal.kinds()[-1] == "fence.outcome"
        assert len(world.journal.requests) == 1


@virtual_time
async def test_on_a_full_disk_monitor_says_what_can_be_done() -> None:
    async with World().running() as world:
        world.vm()
        world.journal.short = "the disk is full"
        answer = await world.ask(FenceAction.MONITOR, "")
        assert (answer.ok, answer.code) == (True, FenceCode.DONE)
        assert "only off" in answer.reason


@virtual_time
async def test_an_instance_that_could_not_be_recorded_is_recorded_before_anything_is_proven() -> None:
    async with World().running() as world:
        world.journal.full = lambda what: what == "remember_instance"
        world.vm(run_state=RunState.PAUSED)
        await settled()
        assert not (await world.ask(FenceAction.OFF)).ok
        world.journal.full = lambda _: False
        assert (await world.ask(FenceAction.OFF)).ok
        assert len(world.journal.known) == 1


@pytest.mark.parametrize("action", [FenceAction.OFF, FenceAction.ON, FenceAction.REBOOT, FenceAction.MONITOR])
@virtual_time
async def test_a_journal_that_cannot_be_used_refuses_everything_and_says_why(action: FenceAction) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.problem = "the disk failed"
        answer = await world.ask(action)
        assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)
        assert "the disk failed" in answer.reason
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("action", [FenceAction.STATUS, FenceAction.LIST])
@virtual_time
async def test_without_its_records_no_vm_is_called_off_though_a_look_finds_none(action: FenceAction) -> None:
    async with World().running() as world:
        await world.vm_off()
        world.vm(VM1, "vm1")
        await settled()
        world.journal.full = lambda what: what == "check"
        answer = await world.ask(action, "vm2" if action is FenceAction.STATUS else "")
        states = {one.plug: one.state for one in answer.targets} or {"vm2": answer.state}
        assert states["vm2"] is PowerState.UNKNOWN
        assert states.get("vm1", PowerState.ON) is PowerState.ON
        assert (await world.ask(FenceAction.STATUS, "vm1")).state is PowerState.ON
