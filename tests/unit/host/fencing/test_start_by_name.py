# SPDX-License-Identifier: LGPL-2.1-or-later
"""`on` starts the VM that is meant, though its start command goes by a name (S9)."""

from __future__ import annotations

from fence_vmchannel.messages import FenceAction, FenceCode
from tests.fakes.hypervisors import FakeHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import OPERATOR, VM2, VM3, World, now, settled
from vmchannel_host.model import VmUuid


class NamedHypervisor(FakeHypervisor):
    """The configuration knows how to start "vm2", which is the VM of that name that was made last."""

    made_last = VM2

    def can_start(self, vm: VmUuid, name: str) -> bool:
        return name == "vm2"

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.startable = {vm, self.made_last}
        await super().start(self.made_last, name, timeout_s=timeout_s)


@virtual_time
async def test_s9_on_does_not_start_another_vm_that_bears_the_same_name() -> None:
    hypervisor = NamedHypervisor(now)
    async with World(hypervisor).running() as world:
        await world.vm_off(VM2, "vm2")
        hypervisor.made_last = VM3
        await world.vm_off(VM3, "vm2")  # made anew, with another UUID
        answer = await world.ask(FenceAction.ON, VM2, requester=OPERATOR)
    assert (answer.ok, answer.code) == (False, FenceCode.NOT_STARTED)
    assert hypervisor.count("start") == 0


@virtual_time
async def test_on_by_a_command_that_goes_by_the_only_bearer_of_the_name() -> None:
    hypervisor = NamedHypervisor(now)
    async with World(hypervisor).running() as world:
        await world.vm_off(VM2, "vm2")
        answer = await world.ask(FenceAction.ON, VM2, requester=OPERATOR)
        await settled()
    assert answer.ok, answer
    assert hypervisor.count("start") == 1
