# SPDX-License-Identifier: LGPL-2.1-or-later
"""S11: what was restored from a backup counts for deduplication only, never as evidence."""

from __future__ import annotations

import asyncio

from fence_vmchannel.messages import FenceAction, FenceCode
from tests.fakes.fence_journal import FakeJournal
from tests.fakes.hypervisors import BOOT, FakeHypervisor, HungHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, VM1, VM2, World, now, settled
from vmchannel_host.config.model import Group
from vmchannel_host.journal.restored import Restored
from vmchannel_host.model import BootId, Migration


def restored(journal: FakeJournal, boot_id: BootId = BOOT) -> None:
    journal.restored = Restored(len(journal.records) + 1, now(), boot_id, "records 5 to 9 were lost")


@virtual_time
async def test_s11_an_operation_of_a_restored_journal_is_not_taken_up() -> None:
    world = World(HungHypervisor(now))
    world.vm()
    async with world.running():
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF), ASKER))
        await world.hypervisor.begun("off")
        asking.cancel()
    restored(world.journal)
    able = FakeHypervisor(now)
    able.instances = world.hypervisor.instances
    async with World(able, world.journal).running() as again:
        await asyncio.sleep(60)
        assert able.acts == []
        assert "restored from a backup" in str(again.journal.records[-1].body["reason"])


@virtual_time
async def test_s5_a_request_from_before_the_restore_is_not_carried_out_perhaps_a_second_time() -> None:
    world = World()
    world.vm()
    await settled()
    request = world.request(FenceAction.OFF)
    await asyncio.sleep(1)
    restored(world.journal)
    async with world.running():
        answer = await world.service.answer(request, ASKER)
        assert (answer.ok, answer.code) == (False, FenceCode.STALE)
        assert world.hypervisor.acts == []
        assert (await world.ask(FenceAction.OFF)).ok


@virtual_time
async def test_a_journal_that_was_restored_in_another_boot_of_the_host_refuses_no_request() -> None:
    world = World()
    world.vm()
    restored(world.journal, BootId("boot-0"))
    async with world.running():
        request = world.request(FenceAction.OFF, tick=now() - 1)
        assert (await world.service.answer(request, ASKER)).ok


@virtual_time
async def test_s11_a_vm_that_a_restored_journal_calls_departed_is_not_off_and_the_reason_says_why() -> None:
    world = World()
    identity = world.vm(migration=Migration.OUTGOING)
    await settled()
    async with world.running():
        world.hypervisor.vanish(identity, watched=True)
        await settled()
        restored(world.journal)
        await settled()
        answer = await world.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.MIGRATED_AWAY)
        assert "restored from a backup (records 5 to 9 were lost)" in answer.reason


@virtual_time
async def test_s11_a_vm_that_only_the_lost_records_knew_is_not_off_until_it_is_seen() -> None:
    world = World(groups=(Group("web", (VM1, VM2)),))
    async with world.running():
        assert (await world.ask(FenceAction.OFF, VM2)).ok  # named by the policy, never seen
        restored(world.journal)
        await settled()
        answer = await world.ask(FenceAction.OFF, VM2)
        assert (answer.ok, answer.code) == (False, FenceCode.MIGRATED_AWAY)
        assert "may have known of it" in answer.reason
        world.vm()
        await settled()
        assert (await world.ask(FenceAction.OFF, VM2)).ok
