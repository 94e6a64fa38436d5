# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's orders to attach and detach: which VM, whether now, and what is recorded."""

from __future__ import annotations

import asyncio

import pytest

from fence_vmchannel.messages import FenceAction
from tests.fakes.hypervisors import HungHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import OPERATOR, VM2, VM3, World, now, settled
from vmchannel_host.hot_plug import HotPlug, PlugOrder, PlugOutcome
from vmchannel_host.hypervisors import Definitions, PlugError, PlugProblem

PORT = "org.vmchannel.0"


def hot_plug(world: World) -> HotPlug:
    """What takes the orders in that daemon."""
    return HotPlug(
        plugs=world.hypervisor,
        directory=world.registry.directory,
        policy=lambda: world.policy,
        names=world.names,
        running=world.coordinator.running,
        log=world.journal,
        prefix="org.vmchannel.",
    )


def attach(vm: str = "vm2", port: str = PORT) -> PlugOrder:
    return PlugOrder(True, vm, port, 20.0, operator="alice")


def detach(vm: str = "vm2", port: str = PORT) -> PlugOrder:
    return PlugOrder(False, vm, port, 20.0, operator="alice")


@virtual_time
async def test_what_was_done_is_told_and_recorded_with_who_ordered_it() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        plug = hot_plug(world)
        told = await plug.carry_out(attach())
        assert (told.ok, told.code, told.vm_uuid, told.vm_name) == (True, "done", VM2, "vm2")
        assert told.advice == ("it is there until the VM ends",)
        again = await plug.carry_out(attach())
        assert (again.code, again.reason) == ("already", f"port {PORT} is there already")
        gone = await plug.carry_out(detach(port=""))
        assert (gone.code, gone.ports) == ("done", (PORT,))
        assert (await plug.carry_out(detach())).reason == f"there is no port {PORT}"
        recorded = [(one.kind, one.body) for one in world.journal.records if one.kind.startswith("port.")]
        body = {"vm_uuid": VM2, "ports": [PORT], "by": "alice"}
        assert recorded == [("port.attached", body), ("port.detached", body)]


@virtual_time
async def test_s12_nothing_is_plugged_while_the_vm_is_fenced_and_the_operation_is_named() -> None:
    hypervisor = HungHypervisor(now)
    async with World(hypervisor).running() as world:
        world.vm()
        world.vm(VM3, "vm3")
        await settled()
        hypervisor.hung.add(VM2)
        fence = asyncio.create_task(world.ask(FenceAction.OFF))
        await hypervisor.begun("off")
        [running] = world.coordinator.running()
        for order in (attach(), detach()):
            told = await hot_plug(world).carry_out(order)
            assert (told.code, told.reason) == (
                "busy",
                f"busy op={running.operation}: the VM is being fenced",
            )
        assert (await hot_plug(world).carry_out(attach("vm3"))).ok, "another VM"
        await fence
        assert (await hot_plug(world).carry_out(attach())).code != "busy"


@virtual_time
async def test_a_fence_waits_for_no_plugging() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.delay_s = 5.0
        plugging = asyncio.create_task(hot_plug(world).carry_out(attach()))
        await world.hypervisor.begun("attach")
        world.hypervisor.delay_s = 0.01
        answer = await world.ask(FenceAction.OFF, requester=OPERATOR, within_s=4.0)
        assert answer.ok
        assert (await plugging).code == "not_running"


@virtual_time
async def test_one_plugging_of_a_vm_at_a_time() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        plug = hot_plug(world)
        told = await asyncio.gather(plug.carry_out(attach()), plug.carry_out(detach()))
        assert [one.code for one in told] == ["done", "busy"]
        assert (await plug.carry_out(detach())).code == "done"


@virtual_time
async def test_a_port_that_would_not_be_served_is_refused_and_may_be_taken_away() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        told = await hot_plug(world).carry_out(attach(port="org.example.0"))
        assert (told.code, world.hypervisor.acts) == ("bad_request", [])
        assert "ports.prefix" in told.remedy
        assert (await hot_plug(world).carry_out(detach(port="org.example.0"))).code == "already"


@virtual_time
async def test_a_vm_that_nobody_knows_is_an_error_that_says_so() -> None:
    async with World().running() as world:
        told = await hot_plug(world).carry_out(attach("nobody"))
        assert (told.ok, told.code, told.vm_uuid) == (False, "unknown_plug", "")


@virtual_time
async def test_a_vm_that_never_ran_here_is_found_by_its_definition() -> None:
    async with World().running() as world:
        world.hypervisor.defined = Definitions({VM3: "defined"}, ("qemu:///session is not connected",))
        told = await hot_plug(world).carry_out(attach("defined"))
        assert (told.code, told.vm_uuid, told.vm_name) == ("done", VM3, "defined")
        assert (await hot_plug(world).carry_out(detach(VM3))).code == "done"
        told = await hot_plug(world).carry_out(attach("nobody"))
        assert (told.code, "qemu:///session is not connected" in told.reason) == ("unknown_plug", True)


@virtual_time
async def test_a_name_that_a_definition_and_another_vm_bear_is_no_name() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.defined = Definitions({VM3: "vm2"})
        told = await hot_plug(world).carry_out(attach("vm2"))
        assert told.code == "ambiguous"
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("problem", list(PlugProblem))
@virtual_time
async def test_why_it_failed_is_told_with_its_remedy_and_recorded_nowhere(problem: PlugProblem) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.plug_fails = PlugError(problem, "because", "do this")
        told = await hot_plug(world).carry_out(attach())
        assert told == PlugOutcome(problem.value, "because", "do this", VM2, "vm2")
        assert not [one for one in world.journal.records if one.kind.startswith("port.")]


@virtual_time
async def test_a_journal_that_takes_no_record_undoes_nothing_and_is_told() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.short = "the disk is full"
        told = await hot_plug(world).carry_out(attach())
        assert told.code == "done"
        assert "not in the journal" in told.advice[-1]
