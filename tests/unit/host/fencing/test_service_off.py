# SPDX-License-Identifier: LGPL-2.1-or-later
"""`off`, from request to answer: what is claimed, and by which evidence."""

from __future__ import annotations

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import World, settled


@virtual_time
async def test_off_of_a_running_vm_is_done_with_evidence_from_its_pidfd() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert (answer.ok, answer.code, answer.state) == (True, FenceCode.DONE, PowerState.OFF)
    assert any(
        f"pid {identity.pid} on hv1 gone after 13 ms: pidfd, by quit, I/O drained" in line
        for line in answer.evidence
    )
    assert answer.operation
