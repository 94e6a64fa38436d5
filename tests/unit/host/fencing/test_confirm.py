# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's word that a VM is off: what it ends, what never, and that it outlives the daemon (S1)."""

from __future__ import annotations

import asyncio

import pytest

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.hypervisors import BOOT, EXECUTABLE, HOST, FakeHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import OPERATOR, STRANGER, VM2, VM3, World, now, settled
from vmchannel_host.fencing.confirm import OperatorWord
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.model import (
    EndCause,
    EndProof,
    InstanceEnded,
    IoState,
    Migration,
    ProcessIdentity,
    RunState,
)


def word(world: World) -> OperatorWord:
    """What takes the operator's word in that daemon."""
    return OperatorWord(
        instances=world.instances,
        policy=lambda: world.policy,
        names=world.names,
        rules=lambda: world.coordinator.settings.rules,
        running=world.coordinator.running,
    )


def words(world: World) -> list[str]:
    """Whose words the journal holds, one for each end that is covered."""
    return [one.confirmed_by for one in world.journal.known.values() if one.confirmed_by]


async def left(world: World) -> ProcessIdentity:
    """vm2 was migrated away and its source has ended."""
    identity = world.vm(VM2, "vm2", run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED)
    await settled()
    world.hypervisor.vanish(identity, watched=True)
    await settled()
    return identity


async def state(world: World) -> PowerState:
    return (await world.ask(FenceAction.STATUS, requester=OPERATOR)).state


@virtual_time
async def test_s1_a_departed_vm_is_off_by_the_operators_word_and_the_evidence_says_whose() -> None:
    async with World().running() as world:
        await left(world)
        assert await state(world) is PowerState.UNKNOWN
        told = await word(world).confirm_off("vm2", "alice")
        assert (told.code, told.vm_uuid, len(told.lines)) == (FenceCode.DONE, VM2, 1)
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (True, FenceCode.ALREADY)
        assert any("confirmed off by 'alice'" in line for line in answer.evidence)
        status = await world.ask(FenceAction.STATUS, requester=OPERATOR)
        assert status.state is PowerState.OFF
        assert any("confirmed off by 'alice'" in line for line in status.evidence)


@virtual_time
async def test_s1_a_killed_vm_whose_writes_are_unproven_is_off_by_the_operators_word() -> None:
    async with World(rules=Rules(settle=True)).running() as world:
        world.hypervisor.io, world.hypervisor.cause = IoState.UNPROVEN, EndCause.KILL
        world.vm()
        await settled()
        refused = await world.ask(FenceAction.OFF)
        assert (refused.ok, refused.code) == (False, FenceCode.FAILED)
        assert not (await world.ask(FenceAction.OFF)).ok, "still refused"
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.DONE
        assert (await world.ask(FenceAction.OFF)).code is FenceCode.ALREADY


@virtual_time
async def test_s1_the_operators_word_is_repeated_after_a_restart_but_ends_no_later_departure() -> None:
    hypervisor = FakeHypervisor(now)
    async with World(hypervisor).running() as world:
        journal = world.journal
        await left(world)
        assert (await word(world).confirm_off("vm2", "alice")).ok
    async with World(hypervisor, journal).running() as world:
        assert await state(world) is PowerState.OFF
        await asyncio.sleep(1.0)
        await left(world)
        assert await state(world) is PowerState.UNKNOWN
    async with World(hypervisor, journal).running() as world:
        assert (await world.ask(FenceAction.OFF)).code is FenceCode.MIGRATED_AWAY


@virtual_time
async def test_s1_the_operators_word_never_ends_a_process_that_runs_and_names_it() -> None:
    async with World().running() as world:
        await left(world)
        alive = world.vm(VM2, "vm2", noticed=False)
        told = await word(world).confirm_off("vm2", "alice")
        assert told.code is FenceCode.FAILED
        assert f"pid {alive.pid} " in told.reason
        assert words(world) == []
        assert await state(world) is PowerState.ON


@virtual_time
async def test_s1_the_operators_word_needs_a_look_that_counts() -> None:
    async with World().running() as world:
        await left(world)
        world.hypervisor.silent = ((VM2, "its monitor hangs"),)
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.FAILED
        world.hypervisor.silent, world.hypervisor.delay_s = (), 60.0
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.UNAVAILABLE
        world.hypervisor.delay_s = 0.01
        assert await state(world) is PowerState.UNKNOWN


@virtual_time
@pytest.mark.parametrize("fault", ["full", "hung"])
async def test_s1_a_word_that_the_journal_did_not_take_counts_for_nothing(fault: str) -> None:
    async with World().running() as world:
        await left(world)
        setattr(world.journal, fault, "remember_confirmed".__eq__)
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.UNAVAILABLE
        assert await state(world) is PowerState.UNKNOWN


@virtual_time
async def test_s1_an_end_that_comes_while_the_word_is_taken_is_not_covered() -> None:
    async with World().running() as world:
        await left(world)
        world.hypervisor.delay_s = 1.0
        asked = asyncio.create_task(word(world).confirm_off("vm2", "alice"))
        await asyncio.sleep(0.5)
        await left(world)  # it came and went while the look was under way
        told = await asked
        assert told.code is FenceCode.FAILED
        assert "ended while this host looked" in told.reason
        world.hypervisor.delay_s = 0.01
        assert await state(world) is PowerState.UNKNOWN


@virtual_time
async def test_s1_an_end_that_comes_while_the_word_is_written_is_not_covered() -> None:
    async with World().running() as world:
        await left(world)
        world.journal.slow = lambda what: 1.0 if what == "remember_confirmed" else 0.001
        asked = asyncio.create_task(word(world).confirm_off("vm2", "alice"))
        await asyncio.sleep(0.5)
        other = ProcessIdentity(999, 9990, EXECUTABLE, VM2, BOOT)
        world.instances.ended(
            InstanceEnded(
                HOST, other, EndProof.PIDFD, EndCause.QUIT, IoState.DRAINED, departed=True, elapsed_ms=1
            )
        )
        assert (await asked).code is FenceCode.DONE
        assert await state(world) is PowerState.UNKNOWN


@virtual_time
async def test_the_same_word_again_changes_nothing() -> None:
    async with World().running() as world:
        await left(world)
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.DONE
        again = await word(world).confirm_off("vm2", "bob")
        assert again.code is FenceCode.ALREADY
        assert any("'alice'" in line for line in again.lines)
        assert words(world) == ["alice"]


@virtual_time
async def test_a_vm_that_is_proven_off_needs_no_word() -> None:
    async with World().running() as world:
        await world.vm_off()
        assert (await word(world).confirm_off("vm2", "alice")).code is FenceCode.ALREADY
        assert words(world) == []


@virtual_time
async def test_the_word_is_not_taken_for_an_unknown_or_ambiguous_vm() -> None:
    async with World(groups=(), aliases={"ghost": STRANGER}).running() as world:
        await left(world)
        await world.vm_off(VM3, "vm2")
        for plug, code in (
            ("nobody", FenceCode.UNKNOWN_PLUG),
            (
                "ghost",
                FenceCode.UNKNOWN_PLUG,
            ),  # its UUID is configured, no process was ever seen
            ("vm2", FenceCode.AMBIGUOUS),
        ):
            assert (await word(world).confirm_off(plug, "alice")).code is code, plug
        assert (await word(world).confirm_off(VM2, "alice")).code is FenceCode.DONE
        assert world.registry.departed(VM2) is None


@virtual_time
async def test_the_word_is_not_taken_while_an_operation_runs_on_the_vm() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.delay_s = 1.0
        off = asyncio.create_task(world.ask(FenceAction.OFF))
        await world.hypervisor.begun("off")
        told = await word(world).confirm_off("vm2", "alice")
        assert told.code is FenceCode.BUSY
        assert (await off).ok
