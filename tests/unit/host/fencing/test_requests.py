# SPDX-License-Identifier: LGPL-2.1-or-later
"""Once (S5) and in time (S6): which requests become intents, and who gets their results."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fence_vmchannel.messages import Announce, FenceAction, FenceCode, PowerState
from tests.fakes.hypervisors import HungHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, OPERATOR, VM1, VM2, VM3, World, new_id, now, settled
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.service import MAX_FLIGHTS
from vmchannel_host.model import BootId, ProcessIdentity

OTHER = Requester(VM3, "vm3", None, "guest-boot-3")


# once (S5)


@virtual_time
async def test_s5_the_same_request_gets_its_stored_answer_and_never_acts_again() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        first = await world.service.answer(request, ASKER)
        world.vm()  # the VM runs again
        await settled()
        second = await world.service.answer(request, ASKER)
        assert first.ok
        assert (second.operation, second.code, second.evidence) == (
            first.operation,
            first.code,
            first.evidence,
        )
        assert world.hypervisor.count("off") == 1


@virtual_time
async def test_s5_the_same_request_joins_itself_while_it_runs() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        answers = await asyncio.gather(*(world.service.answer(request, ASKER) for _ in range(5)))
        assert len({one.operation for one in answers}) == 1
        assert world.journal.kinds().count("fence.intent") == 1


@virtual_time
async def test_s5_a_retransmission_with_a_newer_tick_is_the_same_request() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        first = await world.service.answer(request, ASKER)
        await asyncio.sleep(1)
        again = world.request(FenceAction.OFF, request_id=request.request_id)
        assert (await world.service.answer(again, ASKER)).operation == first.operation


@pytest.mark.parametrize(
    "other",
    [
        replace(ASKER, guest_boot_id="guest-boot-2"),
        replace(ASKER, process=ProcessIdentity(7, 70, "/usr/bin/qemu", VM1, BootId("boot-1"))),
        OTHER,
        OPERATOR,
    ],
)
@virtual_time
async def test_s5_a_stored_result_goes_to_no_other_incarnation_of_the_requester(other: Requester) -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        await world.service.answer(request, ASKER)
        answer = await world.service.answer(request, other)
        assert (answer.ok, answer.code) == (False, FenceCode.BAD_REQUEST)


async def asking(world: World) -> Requester:
    """A requester that runs in a process of its own."""
    requester = replace(ASKER, process=world.vm(VM1, "vm1"))
    await settled()
    return requester


def interrupt(world: World, requester: Requester) -> None:
    """The requester's guest is reset, or restored."""
    assert requester.process is not None
    instance = world.hypervisor.instances[requester.process]
    world.hypervisor.change(replace(instance, interruptions=instance.interruptions + 1))


@virtual_time
async def test_s5_a_stored_result_goes_to_no_guest_that_was_reset_or_restored_since() -> None:
    async with World().running() as world:
        world.vm()
        asker = await asking(world)
        request = world.request(FenceAction.OFF)
        first = await world.service.answer(request, asker)
        assert (await world.service.answer(request, asker)).operation == first.operation
        interrupt(world, asker)
        answer = await world.service.answer(request, asker)
        assert (answer.ok, answer.code) == (False, FenceCode.BAD_REQUEST)
        assert (await world.ask(FenceAction.OFF, requester=asker)).ok, "a new id is another request"


@virtual_time
async def test_s5_a_requester_whose_monitor_is_mute_fences_but_gets_no_stored_result() -> None:
    async with World().running() as world:
        world.vm()
        asker = await asking(world)
        assert asker.process is not None
        world.hypervisor.mute.add(asker.process)
        request = world.request(FenceAction.OFF)
        assert (await world.service.answer(request, asker)).ok
        answer = await world.service.answer(request, asker)
        assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)


@virtual_time
async def test_s5_an_operation_that_runs_is_not_joined_by_a_guest_that_was_restored_since() -> None:
    async with World(HungHypervisor(now)).running() as world:
        world.vm()
        asker = await asking(world)
        request = world.request(FenceAction.OFF, within_s=5)
        running = asyncio.create_task(world.service.answer(request, asker))
        await asyncio.sleep(0.1)
        interrupt(world, asker)
        assert (await world.service.answer(request, asker)).code is FenceCode.BAD_REQUEST
        await running


@virtual_time
async def test_s5_an_interruption_is_remembered_across_a_restart() -> None:
    async with World().running() as world:
        world.vm()
        asker = await asking(world)
        kept, lost = world.request(FenceAction.OFF), world.request(FenceAction.OFF)
        await world.service.answer(lost, asker)
        world.service.requester_interrupted(VM1)
        await settled()
        first = await world.service.answer(kept, asker)
    async with World(world.hypervisor, world.journal).running() as world:
        assert (await world.service.answer(lost, asker)).code is FenceCode.BAD_REQUEST
        assert (await world.service.answer(kept, asker)).operation == first.operation


@virtual_time
async def test_s5_a_guest_that_is_interrupted_in_a_loop_costs_the_journal_one_write_at_a_time() -> None:
    async with World().running() as world:
        asker = await asking(world)
        writes: list[str] = []
        world.journal.hook = writes.append
        world.journal.slow = lambda _: 1.0
        for _ in range(100):
            interrupt(world, asker)
            world.service.requester_interrupted(VM1)
            await asyncio.sleep(0.01)
        await asyncio.sleep(5)
        assert writes.count("interrupt_requests") <= 3


@virtual_time
async def test_s5_an_id_that_runs_for_another_requester_is_refused() -> None:
    async with World(HungHypervisor(now)).running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF, within_s=5)
        running = asyncio.create_task(world.service.answer(request, ASKER))
        await asyncio.sleep(0.1)
        assert (await world.service.answer(request, OTHER)).code is FenceCode.BAD_REQUEST
        await running


@virtual_time
async def test_s5_the_same_id_for_another_action_or_plug_is_refused() -> None:
    async with World().running() as world:
        world.vm()
        world.vm(VM3, "vm3")
        await settled()
        request = world.request(FenceAction.OFF)
        assert (await world.service.answer(request, ASKER)).ok
        for other in (replace(request, action=FenceAction.REBOOT), replace(request, plug="vm3")):
            assert (await world.service.answer(other, ASKER)).code is FenceCode.BAD_REQUEST
        assert world.hypervisor.count("off") == 1


@virtual_time
async def test_s5_a_stored_result_is_given_before_its_first_deadline_only() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF, within_s=5)
        assert (await world.service.answer(request, ASKER)).ok
        await asyncio.sleep(6)
        again = world.request(FenceAction.OFF, request_id=request.request_id)
        answer = await world.service.answer(again, ASKER)
        assert (answer.ok, answer.code) == (False, FenceCode.STALE)
        assert world.hypervisor.count("off") == 1


# in time (S6)


@virtual_time
async def test_s6_a_request_of_another_boot_is_stale_and_nothing_is_done() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF, boot_id=BootId("boot-0"))
        assert (await world.service.answer(request, ASKER)).code is FenceCode.STALE
        assert world.hypervisor.acts == []


@pytest.mark.parametrize("age_s", [20.0, 20.1, 3600.0])
@virtual_time
async def test_s6_a_request_whose_deadline_is_past_is_stale_and_nothing_is_done(age_s: float) -> None:
    async with World().running() as world:
        await asyncio.sleep(3600)
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF, within_s=20, tick=now() - age_s)
        assert (await world.service.answer(request, ASKER)).code is FenceCode.STALE
        assert world.hypervisor.acts == []
        assert world.journal.kinds() == []


@virtual_time
async def test_s6_a_tick_that_lies_ahead_is_stale() -> None:
    async with World().running() as world:
        request = world.request(FenceAction.OFF, tick=now() + 3)
        assert (await world.service.answer(request, ASKER)).code is FenceCode.STALE


@virtual_time
async def test_s6_an_operation_ends_with_its_deadline_however_long_the_host_would_wait() -> None:
    async with World(HungHypervisor(now)).running() as world:
        world.vm()
        await settled()
        begun = now()
        answer = await world.ask(FenceAction.OFF, within_s=3)
        assert not answer.ok
        assert 2.0 < now() - begun < 3.0
        assert world.coordinator.running() == ()


@virtual_time
async def test_s6_no_operation_lasts_longer_than_the_configured_timeout() -> None:
    async with World(HungHypervisor(now), timeout_s=2).running() as world:
        world.vm()
        await settled()
        begun = now()
        assert (await world.ask(FenceAction.OFF, within_s=60)).code is FenceCode.DEADLINE
        assert now() - begun < 3


@virtual_time
async def test_s6_a_pause_or_restore_of_the_requester_ends_its_requests_that_are_no_intents_yet() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.hook = lambda kind: (
            world.service.requester_interrupted(VM1) if kind == "fence.intent" else None
        )
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.STALE)
        assert world.hypervisor.acts == []


@virtual_time
async def test_an_interruption_after_the_intent_changes_nothing() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        asking = asyncio.create_task(world.ask(FenceAction.OFF))
        await world.hypervisor.begun("off")
        world.service.requester_interrupted(VM1)
        assert (await asking).ok


@virtual_time
async def test_an_interruption_of_another_vm_changes_nothing() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.journal.hook = lambda kind: (
            world.service.requester_interrupted(VM3) if kind == "fence.intent" else None
        )
        assert (await world.ask(FenceAction.OFF)).ok


@virtual_time
async def test_a_request_is_cancelled_before_it_is_an_intent_and_not_after() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        told: list[bool] = []

        def cancel(kind: str) -> None:
            if kind == "remember_request":
                told.append(world.service.cancel(request.request_id, OTHER))  # not theirs
                told.append(world.service.cancel(request.request_id, ASKER))

        world.journal.hook = cancel
        assert (await world.service.answer(request, ASKER)).code is FenceCode.STALE
        assert told == [False, True]
        assert world.hypervisor.acts == []
        world.journal.hook = lambda _: None
        request = world.request(FenceAction.OFF)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await world.hypervisor.begun("off")
        assert not world.service.cancel(request.request_id, ASKER)
        assert (await asking).ok


@virtual_time
async def test_s5_an_asker_that_goes_away_does_not_stop_the_intent() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.request(FenceAction.OFF)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await world.hypervisor.begun("off")
        asking.cancel()
        await asyncio.sleep(1)
        assert not world.hypervisor.instances
        assert (await world.service.answer(request, ASKER)).ok


@virtual_time
async def test_s7_one_requester_cannot_have_more_than_its_share_under_way() -> None:
    async with World(HungHypervisor(now)).running() as world:
        world.vm()
        await settled()
        asking = [asyncio.create_task(world.ask(FenceAction.OFF, within_s=5)) for _ in range(MAX_FLIGHTS)]
        await asyncio.sleep(0.1)
        assert (await world.ask(FenceAction.OFF)).code is FenceCode.UNAVAILABLE
        await asyncio.gather(*asking)


@virtual_time
async def test_an_answer_names_the_requester_and_the_host() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert (answer.requester, answer.host) == (VM1, "hv1")
    assert answer.elapsed_ms > 0


@virtual_time
async def test_the_operators_request_is_a_request_like_any_other() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        request = world.service.operator_request(new_id(), FenceAction.OFF, "vm2", 20)
        answer = await world.service.answer(request, OPERATOR)
    assert (answer.ok, answer.state, answer.requester) == (True, PowerState.OFF, "")


@virtual_time
async def test_the_greeting_gives_the_tick_that_requests_are_stated_against() -> None:
    async with World().running() as world:
        greeting = world.service.greeting(ASKER)
    assert (greeting.host, greeting.boot_id, greeting.vm_uuid) == ("hv1", "boot-1", VM1)
    assert abs(greeting.tick_ms - now() * 1000) <= 1


@virtual_time
async def test_an_announced_name_is_durable_and_names_its_vm() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        said = await world.service.announce(Announce("node2", "corosync"), replace(ASKER, vm=VM2))
        assert said.accepted
        assert [one.node_name for one in world.journal.stored_aliases] == ["node2"]
        assert (await world.ask(FenceAction.OFF, "node2")).ok


@virtual_time
async def test_a_name_that_cannot_be_recorded_is_not_accepted() -> None:
    async with World().running() as world:
        world.journal.full = lambda _: True
        said = await world.service.announce(Announce("node1", "corosync"), ASKER)
        assert not said.accepted
