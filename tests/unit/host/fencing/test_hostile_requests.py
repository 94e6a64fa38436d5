# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that asks, announces and repeats itself without end (S7): what it costs the host is bounded."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.messages import (
    MAX_SOURCE,
    Announce,
    FenceAction,
    FenceAnswer,
    FenceCode,
    FenceProgress,
    decode_message,
    encode_message,
)
from fence_vmchannel.tlv import encode
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, OPERATOR, VM2, VM3, World, now, settled
from vmchannel_host.fencing.service import ANNOUNCE_BURST, ANNOUNCE_PERIOD_S, FENCE_BURST, FENCE_PERIOD_S


@virtual_time
async def test_names_announced_in_a_loop_reach_the_journal_at_a_bounded_rate_and_in_order() -> None:
    async with World().running() as world:
        begun = now()
        names = [f"node{number}" for number in range(ANNOUNCE_BURST + 5)]
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(world.service.announce(Announce(name, "corosync"), ASKER))
        assert 5 * ANNOUNCE_PERIOD_S <= now() - begun <= 5 * ANNOUNCE_PERIOD_S + 1
        assert [one.node_name for one in world.journal.stored_aliases][-1] == names[-1]


@virtual_time
async def test_a_guest_that_announces_in_a_loop_does_not_delay_anothers_name() -> None:
    async with World().running() as world:
        async with asyncio.TaskGroup() as tasks:
            flood = [
                tasks.create_task(world.service.announce(Announce(f"node{number}", "corosync"), ASKER))
                for number in range(1_000)
            ]
            await settled()
            begun = now()
            said = await world.service.announce(Announce("other", "corosync"), replace(ASKER, vm=VM2))
            assert said.accepted
            assert now() - begun < 1
            for one in flood:
                one.cancel()
        begun = now()
        assert (await world.service.announce(Announce("last", "corosync"), ASKER)).accepted
        assert now() - begun <= ANNOUNCE_PERIOD_S


def test_the_source_of_a_name_is_short() -> None:
    assert decode_message(encode_message(Announce("n", "x" * MAX_SOURCE)))
    forged = b"\0\5" + encode(Announce("n", ""))[:-6] + b"\0\2\0\0\0\x21" + b"x" * (MAX_SOURCE + 1)
    with pytest.raises(RemoteProtocolError, match="source"):
        decode_message(forged)


@pytest.mark.parametrize("action", [FenceAction.STATUS, FenceAction.LIST, FenceAction.MONITOR])
@virtual_time
async def test_any_number_of_questions_at_once_takes_a_few_looks(action: FenceAction) -> None:
    async with World().running() as world:
        await world.vm_off()
        world.hypervisor.delay_s = 0.5
        answers: list[asyncio.Task[FenceAnswer]] = []
        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                answers += [tasks.create_task(world.ask(action)) for _ in range(20)]
                await asyncio.sleep(0.1)
        assert {answer.result().code for answer in answers} <= {FenceCode.DONE}
        assert world.hypervisor.looks <= 12


@virtual_time
async def test_an_answer_rests_on_a_look_that_began_after_the_question() -> None:
    """The VM is started, unnoticed, while a look for somebody else runs: the next asker must not miss it."""
    async with World().running() as world:
        await world.vm_off()
        world.hypervisor.delay_s = 1.0
        first = asyncio.create_task(world.ask(FenceAction.STATUS))
        await asyncio.sleep(0.5)
        world.vm(noticed=False)
        second = await world.ask(FenceAction.STATUS)
        assert second.state.name == "ON"
        await first
        assert world.hypervisor.looks == 2


@virtual_time
async def test_askers_with_short_deadlines_do_not_end_the_look_of_others() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.delay_s = 0.5
        async with asyncio.TaskGroup() as tasks:
            for _ in range(100):
                tasks.create_task(world.ask(FenceAction.MONITOR, within_s=0.02))
            await asyncio.sleep(0)
            begun = now()
            assert (await world.ask(FenceAction.MONITOR)).ok
            assert now() - begun < 1.5


@virtual_time
async def test_asking_again_and_leaving_leaves_nothing_behind() -> None:
    heard: list[FenceProgress] = []
    late: list[FenceProgress] = []
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.delay_s = 2.0
        request = world.request(FenceAction.OFF)
        first = asyncio.create_task(world.service.answer(request, ASKER, heard.append))
        await asyncio.sleep(0.5)
        for _ in range(10):
            again = asyncio.create_task(world.service.answer(request, ASKER, late.append))
            await asyncio.sleep(0)
            again.cancel()
            await asyncio.wait((again,))
        assert (await first).ok
        assert heard
        assert late == []


@virtual_time
async def test_refusals_in_a_loop_are_logged_at_a_bounded_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with World().running() as world:
        for _ in range(1_000):
            stale = world.request(FenceAction.OFF, tick=0.0, within_s=0.001)
            answer = await world.service.answer(stale, ASKER)
            assert answer.code is FenceCode.STALE
            strange = await world.service.answer(world.request(FenceAction.OFF, "\n\x1b[2J"), ASKER)
            assert strange.code is FenceCode.UNKNOWN_PLUG
    assert 2 <= len(caplog.records) < 40


@virtual_time
async def test_operations_asked_for_in_a_loop_reach_the_journal_at_a_bounded_rate() -> None:
    async with World().running() as world:
        await world.vm_off()
        codes = [(await world.ask(FenceAction.OFF)).code for _ in range(2 * FENCE_BURST)]
        assert codes[:FENCE_BURST] == FENCE_BURST * [FenceCode.ALREADY]
        assert codes.count(FenceCode.UNAVAILABLE) > FENCE_BURST // 2
        asked = {one.operation for one in world.journal.records if one.operation}
        assert len(asked) < FENCE_BURST + now() / FENCE_PERIOD_S + 1
        assert (await world.ask(FenceAction.OFF, requester=replace(ASKER, vm=VM3))).ok
        assert (await world.ask(FenceAction.OFF, requester=OPERATOR)).ok
        await asyncio.sleep(FENCE_PERIOD_S)
        assert (await world.ask(FenceAction.OFF)).ok
