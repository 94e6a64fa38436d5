# SPDX-License-Identifier: LGPL-2.1-or-later
"""status, list and monitor: a cache may answer ON only, OFF needs the evidence of an off (S0)."""

from __future__ import annotations

import pytest

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.hypervisors import BlindHypervisor, ForgetfulHypervisor
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, OPERATOR, STRANGER, VM1, VM2, VM3, WEB, World, now, settled
from vmchannel_host.config.model import Group
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.hypervisors import Definitions
from vmchannel_host.model import Migration, RunState, VmUuid


@pytest.mark.parametrize(
    ("run_state", "migration"),
    [
        (RunState.RUNNING, Migration.NONE),
        (RunState.PAUSED, Migration.NONE),
        (RunState.UNKNOWN, Migration.UNKNOWN),
        (RunState.INMIGRATE, Migration.INCOMING),
        (RunState.GUEST_PANICKED, Migration.NONE),
        (RunState.RUNNING, Migration.OUTGOING),
    ],
)
@virtual_time
async def test_any_process_of_a_vm_is_on_without_a_look(run_state: RunState, migration: Migration) -> None:
    async with World().running() as world:
        world.vm(run_state=run_state, migration=migration)
        await settled()
        answer = await world.ask(FenceAction.STATUS)
        assert (answer.ok, answer.state) == (True, PowerState.ON)
        assert world.hypervisor.looks == 0


@virtual_time
async def test_s0_off_is_told_after_a_fresh_look_only() -> None:
    async with World().running() as world:
        await world.vm_off()
        answer = await world.ask(FenceAction.STATUS)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
        assert world.hypervisor.looks == 1
        assert answer.evidence


@virtual_time
async def test_s0_a_vm_that_was_started_unnoticed_is_on() -> None:
    async with World().running() as world:
        await world.vm_off()
        identity = world.vm(noticed=False)
        answer = await world.ask(FenceAction.STATUS)
        assert (answer.ok, answer.state) == (True, PowerState.ON)
        assert str(identity.pid) in answer.evidence[0]


@virtual_time
async def test_s0_status_of_a_vm_that_the_look_is_silent_about_is_unknown() -> None:
    async with World().running() as world:
        await world.vm_off()
        world.hypervisor.silent = ((VM2, "monitor mute"),)
        answer = await world.ask(FenceAction.STATUS)
    assert (answer.ok, answer.state) == (False, PowerState.UNKNOWN)


@pytest.mark.parametrize("kind", [BlindHypervisor, ForgetfulHypervisor])
@virtual_time
async def test_s0_status_is_unknown_when_the_look_fails_or_comes_from_memory(
    kind: type[BlindHypervisor] | type[ForgetfulHypervisor],
) -> None:
    async with World(kind(now)).running() as world:
        await world.vm_off()
        answer = await world.ask(FenceAction.STATUS)
    assert (answer.ok, answer.state) == (False, PowerState.UNKNOWN)


@virtual_time
async def test_status_of_a_migration_source_is_migrated_away() -> None:
    async with World().running() as world:
        world.vm(run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED)
        await settled()
        answer = await world.ask(FenceAction.STATUS)
    assert (answer.ok, answer.code, answer.state) == (False, FenceCode.MIGRATED_AWAY, PowerState.UNKNOWN)


@virtual_time
async def test_status_after_a_departure_is_not_off() -> None:
    async with World().running() as world:
        identity = world.vm(run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED)
        await settled()
        world.hypervisor.vanish(identity, watched=True)
        await settled()
        answer = await world.ask(FenceAction.STATUS)
    assert (answer.ok, answer.code) == (False, FenceCode.MIGRATED_AWAY)


@virtual_time
async def test_an_end_that_nobody_watched_is_not_off_unless_the_host_is_standalone() -> None:
    for standalone, state in ((True, PowerState.OFF), (False, PowerState.UNKNOWN)):
        async with World(rules=Rules(standalone=standalone)).running() as world:
            identity = world.vm()
            await settled()
            world.hypervisor.vanish(identity, watched=False)
            first = await world.ask(FenceAction.STATUS)
            assert first.state is PowerState.ON, "the daemon holds its pidfd: until it speaks, it is on"
        async with World(
            world.hypervisor, world.journal, rules=Rules(standalone=standalone)
        ).running() as again:
            answer = await again.ask(FenceAction.STATUS)
            assert answer.state is state


@virtual_time
async def test_an_unknown_vm_has_no_state() -> None:
    async with World().running() as world:
        answer = await world.ask(FenceAction.STATUS, "vm9")
    assert (answer.ok, answer.code, answer.state) == (False, FenceCode.UNKNOWN_PLUG, PowerState.UNKNOWN)


@virtual_time
async def test_s9_status_of_an_ambiguous_vm_is_refused() -> None:
    async with World().running() as world:
        world.vm(VM2, "vm2")
        world.vm(VM2, "other")
        await settled()
        answer = await world.ask(FenceAction.STATUS, VM2)
    assert (answer.ok, answer.code) == (False, FenceCode.AMBIGUOUS)


@virtual_time
async def test_list_tells_the_permitted_plugs_with_proven_states() -> None:
    async with World().running() as world:
        world.vm(VM1, "vm1")
        await world.vm_off(VM2, "vm2")
        world.vm(STRANGER, "stranger")
        await settled()
        answer = await world.ask(FenceAction.LIST, "")
        states = {one.plug: one.state for one in answer.targets}
        assert answer.ok
        assert states["vm2"] is PowerState.OFF
        assert states[VM3] is PowerState.OFF  # named by its UUID, never seen, looked for
        assert "stranger" not in states
        assert world.hypervisor.looks == 1


@virtual_time
async def test_a_vm_that_is_only_defined_is_known_by_its_name_and_off_where_its_uuid_is_named() -> None:
    by_name = VmUuid("99999999-9999-4999-8999-999999999999")
    async with World(groups=(WEB, Group("names", (VM1, "named")))).running() as world:
        world.hypervisor.defined = Definitions({VM3: "vm3", by_name: "named"})
        listed = {one.plug: one for one in (await world.ask(FenceAction.LIST, "")).targets}
        assert (listed["vm3"].vm_uuid, listed["vm3"].state) == (VM3, PowerState.OFF)
        assert (listed["named"].vm_uuid, listed["named"].state) == (by_name, PowerState.UNKNOWN)
        assert (await world.ask(FenceAction.STATUS, "vm3")).state is PowerState.OFF
        refused = await world.ask(FenceAction.OFF, "named")
    assert not refused.ok
    assert "never seen here: name its UUID in a policy group" in refused.reason


@virtual_time
async def test_list_tells_unknown_when_the_host_cannot_look() -> None:
    async with World(BlindHypervisor(now)).running() as world:
        await world.vm_off(VM2, "vm2")
        world.vm(VM3, "vm3")
        await settled()
        answer = await world.ask(FenceAction.LIST, "")
    states = {one.plug: one.state for one in answer.targets}
    assert (answer.ok, states["vm2"], states["vm3"]) == (True, PowerState.UNKNOWN, PowerState.ON)


@virtual_time
async def test_monitor_succeeds_when_fencing_would_work() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        for _ in range(5):
            assert (await world.ask(FenceAction.MONITOR, "")).ok
        assert world.journal.kinds() == ["fence.check"]


@virtual_time
async def test_monitor_fails_without_a_permitted_plug() -> None:
    async with World().running() as world:
        answer = await world.ask(FenceAction.MONITOR, "", requester=Requester(STRANGER, "stranger"))
    assert (answer.ok, answer.code) == (False, FenceCode.REFUSED)


@virtual_time
async def test_monitor_fails_when_the_journal_cannot_be_written() -> None:
    async with World().running() as world:
        world.journal.full = lambda _: True
        answer = await world.ask(FenceAction.MONITOR, "")
    assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)
    assert "journal" in answer.reason


@virtual_time
async def test_monitor_fails_when_the_host_cannot_look() -> None:
    async with World(BlindHypervisor(now)).running() as world:
        answer = await world.ask(FenceAction.MONITOR, "")
    assert (answer.ok, answer.code) == (False, FenceCode.UNAVAILABLE)


@virtual_time
async def test_questions_change_nothing() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        for requester in (ASKER, OPERATOR):
            await world.ask(FenceAction.STATUS, requester=requester)
            await world.ask(FenceAction.LIST, "", requester=requester)
            await world.ask(FenceAction.MONITOR, "", requester=requester)
        assert world.hypervisor.acts == []
        assert world.journal.requests == {}
