# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who joins a reboot gets no result that is older than its own request (S8, S12)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fence_vmchannel.messages import FenceAction
from tests.fakes.hypervisors import FakeHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.operation_builders import (
    Driven,
    gone,
    instance,
    intent,
    process,
    was_reset,
)
from tests.unit.host.fencing.world import VM1, VM2, VM3, World, now, settled
from vmchannel_host.fencing.events import Destroy, Joined, StartVm, TakeLook
from vmchannel_host.fencing.operation import MAX_JOINS
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.states import OperationState
from vmchannel_host.model import Look, RunState, VmUuid

A = process(100)
B = process(200)
OTHER = Requester(VM3, "vm3", None, "guest-boot-3")


def test_a_newcomer_makes_the_survey_of_a_reboot_look_again_but_not_for_ever() -> None:
    op = Driven(intent(FenceAction.REBOOT))
    for _ in range(MAX_JOINS):
        assert op.operation.joinable
        before = op.round
        op.apply(Joined())
        assert op.round == before + 1
    assert not op.operation.joinable


def test_an_instance_that_only_the_newcomer_could_see_is_ended_by_the_reboot_that_it_joined() -> None:
    op = Driven(intent(FenceAction.REBOOT, named=(A,)))
    op.look(instance(A, resettable=False))
    assert [type(one) for one in op.apply(gone(A))] == [TakeLook]
    assert op.operation.state is OperationState.LOOKING
    old = op.round
    assert op.operation.joinable
    op.apply(Joined())
    assert op.round > old
    assert any(isinstance(one, Destroy) for one in op.look(instance(B, resettable=False)))


def test_a_reboot_that_has_reset_is_not_joined() -> None:
    op = Driven(intent(FenceAction.REBOOT, named=(A,)))
    op.look(instance(A))
    assert op.operation.state is OperationState.RESETTING
    assert op.operation.joinable
    op.apply(was_reset(A))
    assert op.operation.state.value == "checking"
    assert not op.operation.joinable


def test_a_reboot_that_starts_is_not_joined() -> None:
    op = Driven(intent(FenceAction.REBOOT))
    assert any(isinstance(one, StartVm) for one in op.look(can_start=True))
    assert not op.operation.joinable


def test_an_on_that_starts_is_joined() -> None:
    op = Driven(intent(FenceAction.ON))
    assert any(isinstance(one, StartVm) for one in op.look(can_start=True))
    assert op.operation.joinable


class HazyHypervisor(FakeHypervisor):
    """After the start its monitors are mute for a while: what runs cannot be told."""

    hazy_until = 0.0

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.hazy_until = self.clock() + 8.0
        await super().start(vm, name, timeout_s=timeout_s)

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        look = await super().look(timeout_s=timeout_s, vm=vm, monitors=monitors)
        if self.clock() >= self.hazy_until:
            return look
        hazy = tuple(replace(one, run_state=RunState.UNKNOWN) for one in look.instances)
        return replace(look, instances=hazy)


@virtual_time
async def test_s12_a_vm_that_came_up_and_hung_again_is_rebooted_for_the_newcomer() -> None:
    hypervisor = HazyHypervisor(now)
    hypervisor.startable = {VM2}
    async with World(hypervisor).running() as world:
        world.vm(resettable=False)
        world.vm(VM1, "vm1")
        world.vm(VM3, "vm3")
        await settled()
        first = asyncio.create_task(world.ask(FenceAction.REBOOT))
        await hypervisor.begun("start")
        await asyncio.sleep(5.0)  # the new guest is up, has joined its cluster, and hangs
        second = await world.ask(FenceAction.REBOOT, requester=OTHER, within_s=30.0)
        assert (await first).ok
        assert second.ok
    assert hypervisor.count("off") + hypervisor.count("reset") == 2
