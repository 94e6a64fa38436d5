# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon is killed in the middle of operations and comes back: nothing is done twice or forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, FenceRequest, PowerState
from tests.fakes.fence_journal import FakeJournal
from tests.fakes.hypervisors import (
    BOOT,
    BarrenHypervisor,
    FakeHypervisor,
    HungHypervisor,
    SlowStartHypervisor,
)
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import ASKER, VM1, VM2, World, now, settled
from vmchannel_host.fencing.coordinator import RESUME_LIMIT
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.hypervisors import BeforeKill, NotProven
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    InstanceEnded,
    IoState,
    OperationId,
    ProcessIdentity,
    RunState,
    VmUuid,
)

OTHER = Requester(VM2, "vm2", None, "guest-boot-2")


class ForgettingHypervisor(FakeHypervisor):
    """Its looks show no processes, though they exist."""

    def absence(self, identity: ProcessIdentity) -> EndProof | None:
        return None


class FadingHypervisor(FakeHypervisor):
    """Its looks show no processes; only those in `gone` do not exist."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.gone: set[ProcessIdentity] = set()

    def absence(self, identity: ProcessIdentity) -> EndProof | None:
        return EndProof.ABSENT if identity in self.gone else None


class SilentKillHypervisor(FakeHypervisor):
    """`off` kills, and nobody hears of the end any more."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.cause, self.io = EndCause.KILL, IoState.UNPROVEN

    def end(self, identity: ProcessIdentity) -> InstanceEnded:
        self.note(f"kill {identity.pid}")
        self.instances.pop(identity)
        raise NotProven("nobody hears of it")


class DetachedStartHypervisor(FakeHypervisor):
    """A start command goes on when the daemon dies, and brings up the VM after `start_s`."""

    start_s = 5.0

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        self.note(f"start {name}")
        asyncio.get_running_loop().call_later(self.start_s, self.add, vm, name)
        await asyncio.sleep(self.start_s)


class HungKillHypervisor(FakeHypervisor):
    """`off` is cut off between the mark and the SIGKILL."""

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        assert before_kill is not None
        await before_kill()
        self.note(f"marked {identity.pid}")
        await asyncio.sleep(timeout_s)
        raise NotProven("cut off")


def stop_at(journal: FakeJournal, *kinds: str) -> asyncio.Event:
    """An event that is set before the first write of one of these kinds."""
    reached = asyncio.Event()

    def hook(kind: str) -> None:
        if kind in kinds:
            reached.set()
            journal.hung = lambda _: True

    journal.hook = hook
    return reached


async def killed_at(world: World, request: FenceRequest, *kinds: str) -> None:
    """Ask, and kill the daemon when it is about to write one of these kinds."""
    async with world.running():
        reached = stop_at(world.journal, *kinds)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await reached.wait()
        asking.cancel()
    world.journal.hung = lambda _: False
    world.journal.hook = lambda _: None


async def answer_after_restart(world: World, request: FenceRequest) -> tuple[World, FenceAnswer]:
    again = World(world.hypervisor, world.journal)
    async with again.running():
        answer = await again.service.answer(request, ASKER)
        await asyncio.sleep(60)
    return again, answer


def unfinished(journal: FakeJournal) -> set[OperationId]:
    begun = {one.operation for one in journal.records if one.kind == "fence.intent"}
    return begun - {one.operation for one in journal.records if one.kind == "fence.outcome"}


@pytest.mark.parametrize("kind", ["fence.evidence", "remember_end", "fence.outcome"])
@virtual_time
async def test_an_off_that_was_cut_off_is_run_again_and_its_request_gets_the_result(kind: str) -> None:
    world = World()
    world.vm()
    await settled()
    request = world.request(FenceAction.OFF)
    await killed_at(world, request, kind)
    again, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.state) == (True, PowerState.OFF)
    assert world.hypervisor.count("off") <= 2
    assert not unfinished(again.journal)


@virtual_time
async def test_s5_a_request_that_was_cut_off_before_its_intent_is_not_carried_out_later() -> None:
    world = World()
    world.vm()
    await settled()
    request = world.request(FenceAction.OFF)
    world.journal.slow = lambda what: 1.0 if what == "fence.intent" else 0.001
    async with world.running():
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await asyncio.sleep(0.5)
        asking.cancel()
    assert request.request_id in world.journal.requests
    assert world.journal.kinds() == []
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
    assert world.hypervisor.acts == []


@virtual_time
async def test_an_answer_that_was_cut_off_is_made_again_from_the_journal() -> None:
    world = World()
    world.vm()
    await settled()
    request = world.request(FenceAction.OFF)
    await killed_at(world, request, "remember_answer")
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.state, answer.vm_uuid) == (True, PowerState.OFF, VM2)
    assert world.hypervisor.count("off") == 1


@virtual_time
async def test_an_off_whose_time_is_over_at_the_restart_has_failed_and_is_not_run() -> None:
    world = World()
    world.vm()
    await settled()
    request = world.request(FenceAction.OFF, within_s=5)
    await killed_at(world, request, "fence.evidence")
    acts = list(world.hypervisor.acts)
    await asyncio.sleep(10)
    async with World(world.hypervisor, world.journal).running() as again:
        await asyncio.sleep(5)
        assert world.hypervisor.acts == acts
        assert not unfinished(again.journal)
        assert again.journal.records[-1].body["ok"] is False


@virtual_time
async def test_an_intent_of_another_boot_of_the_host_has_failed() -> None:
    world = World(HungHypervisor(now))
    world.vm()
    await settled()
    async with world.running():
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF), ASKER))
        await asyncio.sleep(1)
        asking.cancel()
    for index, record in enumerate(world.journal.records):
        body = dict(record.body) | {"boot_id": "boot-0"}
        world.journal.records[index] = type(record)(
            record.seq, record.at, record.boottime, BootId("boot-0"), record.kind, record.operation, body
        )
    hypervisor = FakeHypervisor(now)
    async with World(hypervisor, world.journal).running() as again:
        await asyncio.sleep(5)
        assert hypervisor.acts == []
        assert not unfinished(again.journal)


@virtual_time
async def test_s5_a_reset_is_never_sent_a_second_time_by_a_restart() -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.delay_s = 1.0
    world = World(hypervisor)
    world.vm()
    request = world.request(FenceAction.REBOOT)
    async with world.running():
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await hypervisor.begun("reset")
        asking.cancel()
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
    assert "restarted" in answer.reason
    assert hypervisor.count("reset") == 1


@virtual_time
async def test_a_reboot_that_was_cut_off_while_destroying_is_finished_with_a_start() -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.startable.add(VM2)
    hypervisor.delay_s = 1.0
    world = World(hypervisor)
    world.vm(run_state=RunState.PAUSED)
    request = world.request(FenceAction.REBOOT)
    async with world.running():
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await hypervisor.begun("off")
        asking.cancel()
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.state) == (True, PowerState.ON)
    assert hypervisor.count("start") == 1


@virtual_time
async def test_s12_an_on_that_was_cut_off_after_its_start_is_finished_and_starts_nothing_more() -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.startable.add(VM2)
    hypervisor.boot_s = 3.0
    world = World(hypervisor)
    async with world.running():
        await world.vm_off()
        request = world.request(FenceAction.ON)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await hypervisor.begun("start")
        await asyncio.sleep(1)
        asking.cancel()
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.state) == (True, PowerState.ON)
    assert hypervisor.count("start") == 1


@virtual_time
async def test_an_on_whose_start_brought_nothing_has_failed_after_the_restart() -> None:
    hypervisor = BarrenHypervisor(now)
    hypervisor.startable.add(VM2)
    world = World(hypervisor)
    async with world.running():
        await world.vm_off()
        request = world.request(FenceAction.ON, within_s=10)
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await asyncio.sleep(1)
        asking.cancel()
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.code) == (False, FenceCode.NOT_STARTED)
    assert hypervisor.count("start") == 1


@virtual_time
async def test_s12_off_takes_over_a_resumed_reboot_too() -> None:
    hypervisor = SlowStartHypervisor(now)
    hypervisor.startable.add(VM2)
    world = World(hypervisor)
    world.vm(run_state=RunState.PAUSED)
    request = world.request(FenceAction.REBOOT, within_s=10)
    async with world.running():
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        await hypervisor.begun("start")
        asking.cancel()
    async with World(hypervisor, world.journal).running() as again:
        assert (await again.ask(FenceAction.OFF)).ok
        await asyncio.sleep(60)
        assert hypervisor.count("start") == 1
        assert not unfinished(again.journal)


async def died_while_starting(hypervisor: FakeHypervisor, *, within_s: float) -> World:
    """The daemon dies 1 s after an `on` has begun its start command."""
    hypervisor.startable.add(VM2)
    world = World(hypervisor)
    async with world.running():
        await world.vm_off()
        asking = asyncio.create_task(
            world.service.answer(world.request(FenceAction.ON, within_s=within_s), ASKER)
        )
        await hypervisor.begun("start")
        await asyncio.sleep(1)
        asking.cancel()
    return world


@pytest.mark.parametrize("operations", [1, 2])
@virtual_time
async def test_s12_off_waits_for_a_start_that_was_in_flight_at_the_restart(operations: int) -> None:
    hypervisor = DetachedStartHypervisor(now)
    world = await died_while_starting(hypervisor, within_s=20)
    begun = now()
    async with World(hypervisor, world.journal).running() as again:
        for _ in range(operations):
            answer = await again.ask(FenceAction.OFF)
            assert (answer.ok, answer.state) == (True, PowerState.OFF)
            assert not hypervisor.instances
        assert 3.5 < now() - begun < 6
        await asyncio.sleep(60)
    assert (hypervisor.count("start"), hypervisor.count("off")) == (1, 1)
    assert not hypervisor.instances
    assert not unfinished(again.journal)


@virtual_time
async def test_s12_a_start_in_flight_is_not_forgotten_because_of_what_others_asked_since() -> None:
    hypervisor = DetachedStartHypervisor(now)
    world = await died_while_starting(hypervisor, within_s=20)
    for number in range(3 * RESUME_LIMIT):
        await world.journal.append("fence.refused", OperationId(f"flood-{number}"), {})
    async with World(hypervisor, world.journal).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
        await asyncio.sleep(60)
    assert (hypervisor.count("start"), hypervisor.count("off")) == (1, 1)
    assert not hypervisor.instances


@virtual_time
async def test_s12_an_off_that_had_taken_over_a_start_waits_for_it_after_the_restart_too() -> None:
    hypervisor = DetachedStartHypervisor(now)
    hypervisor.startable.add(VM2)
    world = World(hypervisor)
    request = world.request(FenceAction.OFF)
    async with world.running():
        await world.vm_off()
        starting = asyncio.create_task(world.ask(FenceAction.ON))
        await hypervisor.begun("start")
        asking = asyncio.create_task(world.service.answer(request, ASKER))
        assert not (await starting).ok  # taken over
        await asyncio.sleep(1)
        asking.cancel()
    _, answer = await answer_after_restart(world, request)
    assert (answer.ok, answer.state) == (True, PowerState.OFF)
    assert hypervisor.count("off") == 1
    assert not hypervisor.instances


@virtual_time
async def test_s12_a_start_from_before_the_restart_that_brings_nothing_is_waited_for_until_its_end() -> None:
    hypervisor = DetachedStartHypervisor(now)
    hypervisor.start_s = 1000.0
    world = await died_while_starting(hypervisor, within_s=10)
    (end,) = (one.body["end"] for one in world.journal.records if one.kind == "fence.intent")
    assert isinstance(end, float)
    async with World(hypervisor, world.journal).running() as again:
        early = await again.ask(FenceAction.OFF, within_s=4)
        assert (early.ok, early.code) == (False, FenceCode.DEADLINE)
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
        assert end <= now() < end + 0.5


@virtual_time
async def test_off_does_not_wait_for_a_start_that_had_returned_before_the_restart() -> None:
    world = await died_while_starting(BarrenHypervisor(now), within_s=20)
    begun = now()
    async with World(world.hypervisor, world.journal).running() as again:
        assert (await again.ask(FenceAction.OFF)).ok
        assert now() - begun < 1


@virtual_time
async def test_off_does_not_wait_for_a_start_whose_vm_was_seen_running_after_the_restart() -> None:
    hypervisor = DetachedStartHypervisor(now)
    world = await died_while_starting(hypervisor, within_s=40)
    async with World(hypervisor, world.journal).running() as again:
        await asyncio.sleep(8)
        assert not unfinished(again.journal)
        begun = now()
        assert (await again.ask(FenceAction.OFF)).ok
        assert now() - begun < 1


@virtual_time
async def test_s12_what_a_fenced_vm_asked_before_is_void_after_a_restart_too() -> None:
    world = World()
    world.vm(VM1, "vm1")
    world.vm()
    async with world.running():
        request = world.request(FenceAction.OFF, "vm2")
        assert (await world.ask(FenceAction.OFF, "vm1", requester=OTHER)).ok
    async with World(world.hypervisor, world.journal).running() as again:
        assert (await again.service.answer(request, ASKER)).code is FenceCode.VOID


@virtual_time
async def test_s1_a_process_recorded_before_the_restart_stays_an_instance_until_its_end_is_proven() -> None:
    world = World()
    identity = world.vm()
    async with world.running():
        await settled()
    hypervisor = ForgettingHypervisor(now)
    async with World(hypervisor, world.journal).running() as again:
        answer = await again.ask(FenceAction.STATUS)
        assert (answer.ok, answer.state) == (False, PowerState.UNKNOWN)
        assert str(identity.pid) in answer.reason
        assert not (await again.ask(FenceAction.ON)).ok


@virtual_time
async def test_already_off_after_a_crash_of_qemu_while_the_daemon_was_down() -> None:
    world = World()
    identity = world.vm()
    async with world.running():
        await settled()
    world.hypervisor.vanish(identity, watched=False)
    async with World(world.hypervisor, world.journal).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.code, answer.state) == (True, FenceCode.ALREADY, PowerState.OFF)
        assert again.hypervisor.acts == []


async def killed_after_its_kill(io: IoState) -> World:
    """The daemon dies after its SIGKILL of a VM, before the end is recorded."""
    hypervisor = SilentKillHypervisor(now)
    hypervisor.io = io
    world = World(hypervisor)
    world.vm()
    await settled()
    async with world.running():
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF, within_s=5), ASKER))
        await hypervisor.begun("kill")
        asking.cancel()
    assert not hypervisor.instances
    await asyncio.sleep(10)  # nothing is left to take up
    return world


@virtual_time
async def test_s1_the_writes_of_a_process_that_we_killed_before_the_restart_are_not_forgotten() -> None:
    world = await killed_after_its_kill(IoState.UNPROVEN)
    for _ in range(2):  # what the first restart learnt holds after the second
        async with World(FakeHypervisor(now), world.journal).running() as again:
            answer = await again.ask(FenceAction.OFF)
            assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
            assert "fencing.after_kill: accept" in answer.reason
    async with World(FakeHypervisor(now), world.journal, rules=Rules(settle=False)).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)
        assert any("killed before a restart of the daemon" in line for line in answer.evidence)


@virtual_time
async def test_nobody_watched_the_end_of_what_we_killed_before_the_restart_so_it_may_have_departed() -> None:
    world = await killed_after_its_kill(IoState.UNPROVEN)
    rules = Rules(settle=False, standalone=False)
    async with World(FakeHypervisor(now), world.journal, rules=rules).running() as again:
        assert (await again.ask(FenceAction.OFF)).code is FenceCode.MIGRATED_AWAY


@virtual_time
async def test_a_process_without_open_files_that_we_killed_before_the_restart_is_already_off() -> None:
    world = await killed_after_its_kill(IoState.NONE)
    async with World(FakeHypervisor(now), world.journal).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (True, FenceCode.ALREADY)


@virtual_time
async def test_s1_what_dies_of_our_kill_only_after_the_restart_is_not_taken_for_a_crash() -> None:
    hypervisor = HungKillHypervisor(now)
    world = World(hypervisor)
    identity = world.vm()
    await settled()
    async with world.running():
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF, within_s=5), ASKER))
        await hypervisor.begun("marked")
        asking.cancel()
    await asyncio.sleep(10)  # nothing is left to take up
    dying = FakeHypervisor(now)
    dying.instances = hypervisor.instances
    async with World(dying, world.journal).running() as again:
        dying.vanish(identity, watched=True, io=IoState.UNPROVEN)
        await settled()
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (False, FenceCode.FAILED)
        assert "fencing.after_kill: accept" in answer.reason


@pytest.mark.parametrize("fault", ["full", "hung"])
@virtual_time
async def test_s1_a_kill_that_the_journal_cannot_take_is_not_sent(fault: str) -> None:
    hypervisor = SilentKillHypervisor(now)
    world = World(hypervisor)
    identity = world.vm()
    await settled()

    def is_mark(what: str) -> bool:
        return what == "remember_kill"

    setattr(world.journal, fault, is_mark)
    async with world.running():
        answer = await world.ask(FenceAction.OFF)
        assert not answer.ok
        assert any("was not killed" in line for line in answer.evidence)
    assert identity in hypervisor.instances
    assert hypervisor.count("kill") == 0


@virtual_time
async def test_a_process_that_was_to_be_killed_before_the_restart_and_quits_after_it_is_off() -> None:
    hypervisor = HungKillHypervisor(now)
    world = World(hypervisor)
    identity = world.vm()
    await settled()
    async with world.running():
        asking = asyncio.create_task(world.service.answer(world.request(FenceAction.OFF, within_s=5), ASKER))
        await hypervisor.begun("marked")
        asking.cancel()
    assert world.journal.known[identity].killed
    quits = FakeHypervisor(now)
    quits.instances = hypervisor.instances
    async with World(quits, world.journal).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.state) == (True, PowerState.OFF)


@pytest.mark.parametrize("action", [FenceAction.STATUS, FenceAction.LIST])
@virtual_time
async def test_a_process_that_ends_unwatched_after_the_restart_is_looked_for_when_somebody_asks(
    action: FenceAction,
) -> None:
    world = World()
    identity = world.vm()
    async with world.running():
        await settled()
    hypervisor = FadingHypervisor(now)
    async with World(hypervisor, world.journal).running() as again:
        assert again.registry.unproven(VM2)
        hypervisor.gone.add(identity)
        answer = await again.ask(action, "vm2" if action is FenceAction.STATUS else "")
        states = {one.plug: one.state for one in answer.targets} | {"": answer.state}
        assert states["vm2" if action is FenceAction.LIST else ""] is PowerState.OFF


@virtual_time
async def test_already_off_after_a_boot_of_the_host() -> None:
    world = World()
    world.vm()
    async with world.running():
        await settled()
    known = next(iter(world.journal.known.values()))
    old = type(known.identity)(
        known.identity.pid, known.identity.start_time, known.identity.executable, VM2, BootId("boot-0")
    )
    world.journal.known = {old: type(known)(known.host, old, "vm2", known.migration, 0.0, None, None)}
    assert old.boot_id != BOOT
    async with World(FakeHypervisor(now), world.journal).running() as again:
        answer = await again.ask(FenceAction.OFF)
        assert (answer.ok, answer.code) == (True, FenceCode.ALREADY)
        assert any("another boot of the host" in line for line in answer.evidence)


@virtual_time
async def test_an_unreadable_intent_is_closed_as_failed() -> None:
    world = World()
    async with world.running():
        await world.journal.append("fence.intent", OperationId("op-1"), {"vm": 7})
    async with World(world.hypervisor, world.journal).running() as again:
        assert not unfinished(again.journal)
