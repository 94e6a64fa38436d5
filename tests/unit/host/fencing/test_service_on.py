# SPDX-License-Identifier: LGPL-2.1-or-later
"""`on` and `reboot`, from request to answer (S8, S12)."""

from __future__ import annotations

import asyncio

import pytest

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, PowerState
from tests.fakes.hypervisors import (
    BarrenHypervisor,
    BreakingStartHypervisor,
    FakeHypervisor,
    HungHypervisor,
    MigratingHypervisor,
    SecondCopyHypervisor,
    UnresettableHypervisor,
)
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import VM2, World, now, settled
from vmchannel_host.model import Migration, RunState


def assert_on(answer: FenceAnswer, code: FenceCode = FenceCode.DONE) -> None:
    assert (answer.ok, answer.code, answer.state) == (True, code, PowerState.ON), answer


def startable(hypervisor: FakeHypervisor | None = None) -> World:
    world = World(hypervisor)
    world.hypervisor.startable.add(VM2)
    return world


# on


@virtual_time
async def test_on_is_done_when_a_new_instance_is_seen_running() -> None:
    async with startable().running() as world:
        await world.vm_off()
        begun = now()
        assert_on(await world.ask(FenceAction.ON))
        assert now() - begun >= world.hypervisor.boot_s
        assert world.hypervisor.acts == ["start vm2"]


@virtual_time
async def test_on_of_a_running_vm_is_already_on_and_starts_nothing() -> None:
    async with startable().running() as world:
        world.vm()
        await settled()
        assert_on(await world.ask(FenceAction.ON), FenceCode.ALREADY)
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("run_state", [RunState.PAUSED, RunState.UNKNOWN, RunState.INMIGRATE])
@virtual_time
async def test_s12_on_needs_offs_evidence_and_never_starts_beside_another_instance(
    run_state: RunState,
) -> None:
    async with startable().running() as world:
        world.vm(run_state=run_state)
        await settled()
        answer = await world.ask(FenceAction.ON)
        assert not answer.ok
        assert run_state.value in answer.reason
        assert world.hypervisor.acts == []


@virtual_time
async def test_on_of_a_vm_that_departed_starts_no_second_copy() -> None:
    async with startable(MigratingHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert (await world.ask(FenceAction.OFF)).code is FenceCode.MIGRATED_AWAY
        answer = await world.ask(FenceAction.ON)
        assert (answer.ok, answer.code) == (False, FenceCode.MIGRATED_AWAY)
        assert world.hypervisor.count("start") == 0


@virtual_time
async def test_on_of_a_vm_that_the_look_is_silent_about_starts_nothing() -> None:
    async with startable().running() as world:
        await world.vm_off()
        world.hypervisor.silent = ((VM2, "a process that cannot be read"),)
        assert not (await world.ask(FenceAction.ON)).ok
        assert world.hypervisor.count("start") == 0


@virtual_time
async def test_on_without_a_way_to_start_fails() -> None:
    async with World().running() as world:
        await world.vm_off()
        answer = await world.ask(FenceAction.ON)
    assert (answer.ok, answer.code) == (False, FenceCode.NOT_STARTED)
    assert "start" in answer.reason


@virtual_time
async def test_a_start_command_that_fails_fails_the_on_with_its_words() -> None:
    async with startable(BreakingStartHypervisor(now)).running() as world:
        await world.vm_off()
        answer = await world.ask(FenceAction.ON)
    assert (answer.ok, answer.code) == (False, FenceCode.NOT_STARTED)
    assert "no such disk" in answer.reason


@virtual_time
async def test_a_start_command_that_says_it_worked_is_no_proof() -> None:
    async with startable(BarrenHypervisor(now)).running() as world:
        await world.vm_off()
        answer = await world.ask(FenceAction.ON, within_s=5)
    assert (answer.ok, answer.code) == (False, FenceCode.NOT_STARTED)


@virtual_time
async def test_the_start_is_durable_before_it_is_carried_out() -> None:
    async with startable().running() as world:
        await world.vm_off()
        seen: list[tuple[str, int]] = []
        world.journal.hook = lambda kind: seen.append((kind, world.hypervisor.count("start")))
        assert_on(await world.ask(FenceAction.ON))
    assert ("fence.phase", 0) in seen


# reboot (S8)


@virtual_time
async def test_reboot_resets_the_one_running_instance() -> None:
    async with startable().running() as world:
        identity = world.vm()
        await settled()
        answer = await world.ask(FenceAction.REBOOT)
        assert_on(answer)
        assert world.hypervisor.acts == [f"reset {identity.pid}"]
        assert any("RESET event" in line for line in answer.evidence)


@pytest.mark.parametrize(
    ("run_state", "migration", "resettable"),
    [
        (RunState.PAUSED, Migration.NONE, True),
        (RunState.UNKNOWN, Migration.UNKNOWN, True),
        (RunState.INMIGRATE, Migration.INCOMING, True),
        (RunState.RUNNING, Migration.UNKNOWN, True),
        (RunState.RUNNING, Migration.NONE, False),
    ],
)
@virtual_time
async def test_s8_an_instance_in_another_state_is_never_reset_but_ended_and_started_again(
    run_state: RunState, migration: Migration, resettable: bool
) -> None:
    async with startable().running() as world:
        identity = world.vm(run_state=run_state, migration=migration, resettable=resettable)
        await settled()
        assert_on(await world.ask(FenceAction.REBOOT))
        assert world.hypervisor.acts == [f"off {identity.pid}", "start vm2"]


@pytest.mark.parametrize("migration", [Migration.OUTGOING, Migration.COMPLETED])
@virtual_time
async def test_s8_a_vm_in_a_migration_is_never_reset(migration: Migration) -> None:
    async with startable().running() as world:
        world.vm(migration=migration)
        await settled()
        answer = await world.ask(FenceAction.REBOOT)
        assert (answer.ok, answer.code) == (False, FenceCode.MIGRATED_AWAY)
        assert world.hypervisor.count("reset") == world.hypervisor.count("start") == 0


@virtual_time
async def test_s8_two_instances_are_never_reset() -> None:
    async with startable().running() as world:
        world.vm()
        world.vm()
        await settled()
        assert_on(await world.ask(FenceAction.REBOOT))
        assert world.hypervisor.count("reset") == 0
        assert world.hypervisor.count("off") == 2


@virtual_time
async def test_s8_a_second_copy_that_appears_during_the_reset_is_found_and_both_are_ended() -> None:
    async with startable(SecondCopyHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert_on(await world.ask(FenceAction.REBOOT))
        assert world.hypervisor.count("off") == 2
        assert world.hypervisor.count("start") == 1


@virtual_time
async def test_a_reset_without_its_event_goes_on_with_off_and_start() -> None:
    async with startable(UnresettableHypervisor(now)).running() as world:
        identity = world.vm()
        await settled()
        assert_on(await world.ask(FenceAction.REBOOT))
        assert world.hypervisor.acts == [f"reset {identity.pid}", f"off {identity.pid}", "start vm2"]


@virtual_time
async def test_s8_a_reboot_whose_start_fails_after_a_proven_off_is_a_success_and_says_so() -> None:
    async with startable(BreakingStartHypervisor(now)).running() as world:
        world.vm(run_state=RunState.PAUSED)
        await settled()
        answer = await world.ask(FenceAction.REBOOT)
    assert (answer.ok, answer.code) == (True, FenceCode.NOT_STARTED)
    assert "no such disk" in answer.reason


@virtual_time
async def test_a_reboot_that_cannot_start_the_vm_is_a_success_once_off_is_proven() -> None:
    async with World().running() as world:
        world.vm(run_state=RunState.PAUSED)
        await settled()
        answer = await world.ask(FenceAction.REBOOT)
    assert (answer.ok, answer.code, answer.state) == (True, FenceCode.NOT_STARTED, PowerState.OFF)


@virtual_time
async def test_a_reboot_whose_start_brings_nothing_is_answered_in_time() -> None:
    async with startable(BarrenHypervisor(now)).running() as world:
        world.vm(run_state=RunState.PAUSED)
        await settled()
        answer = await world.ask(FenceAction.REBOOT, within_s=6)
    assert (answer.ok, answer.code, answer.state) == (True, FenceCode.NOT_STARTED, PowerState.UNKNOWN)


@virtual_time
async def test_a_reboot_without_a_proven_off_is_a_failure_and_starts_nothing() -> None:
    async with startable(HungHypervisor(now)).running() as world:
        world.vm(run_state=RunState.PAUSED)
        await settled()
        answer = await world.ask(FenceAction.REBOOT, within_s=5)
        assert (answer.ok, answer.code) == (False, FenceCode.DEADLINE)
        assert world.hypervisor.count("start") == 0


@virtual_time
async def test_a_reboot_of_a_vm_that_is_off_starts_it() -> None:
    async with startable().running() as world:
        identity = world.vm()
        await settled()
        world.hypervisor.vanish(identity, watched=True)
        await settled()
        assert_on(await world.ask(FenceAction.REBOOT))
        assert world.hypervisor.acts == ["start vm2"]


@virtual_time
async def test_a_process_that_exits_instead_of_resetting_is_ended_with_proof_and_started_again() -> None:
    async with startable().running() as world:
        identity = world.vm()
        await settled()
        asking = asyncio.create_task(world.ask(FenceAction.REBOOT))
        await world.hypervisor.begun("reset")
        world.hypervisor.vanish(identity, watched=True)
        assert_on(await asking)
        assert world.hypervisor.count("start") == 1
