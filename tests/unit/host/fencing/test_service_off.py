# SPDX-License-Identifier: LGPL-2.1-or-later
"""`off`, from request to answer: what is claimed, and by which evidence (S0, S1, S2, S9)."""

from __future__ import annotations

import asyncio

import pytest

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, PowerState
from tests.fakes.hypervisors import (
    BlindHypervisor,
    FailingHypervisor,
    FakeHypervisor,
    ForgetfulHypervisor,
    ForkingHypervisor,
    HungHypervisor,
    LateHypervisor,
    LyingHypervisor,
    MigratingHypervisor,
    MixedUpHypervisor,
    RevivingHypervisor,
)
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.world import OPERATOR, STRANGER, VM2, VM3, World, now, settled
from vmchannel_host.config.model import Group
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.model import NIL_UUID, EndCause, IoState, Migration, RunState, UnknownProcess


def assert_off(answer: FenceAnswer, code: FenceCode = FenceCode.DONE) -> None:
    assert (answer.ok, answer.code, answer.state) == (True, code, PowerState.OFF), answer


def assert_not_claimed(answer: FenceAnswer, code: FenceCode = FenceCode.FAILED) -> None:
    assert (answer.ok, answer.code, answer.state) == (False, code, PowerState.UNKNOWN), answer


@virtual_time
async def test_off_of_a_running_vm_is_done_with_evidence_from_its_pidfd() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_off(answer)
    assert f"pid {identity.pid} on hv1 gone after 13 ms: pidfd, by quit, I/O drained" in answer.evidence
    assert any(line.startswith("look by hv1: no instance") for line in answer.evidence)
    assert (answer.vm_uuid, answer.vm_name, answer.host) == (VM2, "vm2", "hv1")


@virtual_time
async def test_the_intent_is_durable_before_anything_acts_and_the_outcome_before_the_answer() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        acts_at: list[tuple[str, int]] = []
        world.journal.hook = lambda kind: acts_at.append((kind, world.hypervisor.count("off")))
        answer = await world.ask(FenceAction.OFF)
        kinds = world.journal.kinds()
    assert_off(answer)
    assert ("fence.intent", 0) in acts_at
    assert ("remember_request", 0) in acts_at
    assert kinds[0] == "fence.intent"
    assert kinds[-1] == "fence.outcome"
    assert kinds.count("fence.evidence") == 3  # the first look, the end, the last look
    assert acts_at[-1][0] == "remember_answer"


@pytest.mark.parametrize(
    ("run_state", "migration"),
    [
        (RunState.PAUSED, Migration.NONE),
        (RunState.UNKNOWN, Migration.UNKNOWN),
        (RunState.INMIGRATE, Migration.INCOMING),
        (RunState.GUEST_PANICKED, Migration.NONE),
        (RunState.PRELAUNCH, Migration.NONE),
        (RunState.SHUTDOWN, Migration.NONE),
    ],
)
@virtual_time
async def test_an_instance_in_any_run_state_is_destroyed_and_proven(
    run_state: RunState, migration: Migration
) -> None:
    async with World().running() as world:
        world.vm(run_state=run_state, migration=migration)
        await settled()
        assert_off(await world.ask(FenceAction.OFF))
        assert world.hypervisor.count("off") == 1


@virtual_time
async def test_s2_all_instances_are_destroyed() -> None:
    async with World().running() as world:
        world.vm()
        world.vm(run_state=RunState.PAUSED)
        await settled()
        assert_off(await world.ask(FenceAction.OFF))
        assert not world.hypervisor.instances


@virtual_time
async def test_s2_an_instance_that_the_registry_did_not_know_is_found_by_the_look_and_destroyed() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        asking = asyncio.create_task(world.ask(FenceAction.OFF))
        await world.hypervisor.begun("off")
        late = world.vm()  # while the first is being destroyed
        answer = await asking
        assert_off(answer)
        assert world.hypervisor.acts == [f"off {identity.pid}", f"off {late.pid}"]


@virtual_time
async def test_s2_off_starts_again_when_the_vm_comes_back_after_its_proof() -> None:
    async with World(RevivingHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert_off(await world.ask(FenceAction.OFF))
        assert world.hypervisor.count("off") == 3


@virtual_time
async def test_a_vm_that_comes_back_for_ever_is_never_off() -> None:
    hypervisor = RevivingHypervisor(now)
    hypervisor.lives = 1000
    async with World(hypervisor).running() as world:
        world.vm()
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF))
        assert hypervisor.count("off") < 20


@virtual_time
async def test_s1_a_proof_that_the_next_look_contradicts_is_no_off() -> None:
    async with World(LyingHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF))


@virtual_time
async def test_s1_a_look_from_memory_proves_nothing() -> None:
    async with World(ForgetfulHypervisor(now)).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_not_claimed(answer)
    assert "from memory" in answer.reason


@virtual_time
async def test_s9_a_proof_of_another_process_is_no_proof() -> None:
    async with World(MixedUpHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF))


@virtual_time
async def test_s1_a_hypervisor_that_never_answers_is_a_failure_within_the_deadline() -> None:
    async with World(HungHypervisor(now)).running() as world:
        identity = world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF, within_s=5)
    assert_not_claimed(answer, FenceCode.DEADLINE)
    assert str(identity.pid) in answer.reason


@virtual_time
async def test_s6_a_proof_that_comes_after_the_deadline_is_not_claimed() -> None:
    async with World(LateHypervisor(now)).running() as world:
        world.vm()
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF, within_s=5), FenceCode.DEADLINE)
        await asyncio.sleep(70)
        assert all(record.body.get("ok") is not True for record in world.journal.records)


@virtual_time
async def test_an_end_that_cannot_be_proven_is_tried_again_and_then_failed_with_its_reason() -> None:
    async with World(FailingHypervisor(now)).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
        assert world.hypervisor.count("off") > 1
    assert_not_claimed(answer)
    assert any("the process does not end" in line for line in answer.evidence)


@virtual_time
async def test_s1_a_look_that_is_silent_about_the_vm_proves_nothing() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.silent = ((VM2, "monitor mute"),)
        answer = await world.ask(FenceAction.OFF)
    assert_not_claimed(answer)
    assert "monitor mute" in answer.reason


@virtual_time
async def test_s7_a_look_that_is_silent_about_another_vm_does_not_matter() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.silent = ((VM3, "monitor mute"),)
        assert_off(await world.ask(FenceAction.OFF))


@virtual_time
async def test_s1_a_process_that_may_be_the_vms_is_no_proof_of_off() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.unknown = (UnknownProcess("pid 7 cannot be identified", frozenset({VM3})),)
        answer = await world.ask(FenceAction.OFF)
    assert_not_claimed(answer)
    assert "pid 7 cannot be identified" in answer.reason


@virtual_time
async def test_s7_an_unidentified_process_that_is_certainly_not_the_vms_does_not_matter() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.unknown = (UnknownProcess("pid 7 cannot be identified", frozenset({VM2})),)
        assert_off(await world.ask(FenceAction.OFF))


@virtual_time
async def test_a_silence_that_passes_is_waited_for() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.silent = ((VM2, "a process that just begins"),)

        def speak() -> None:
            world.hypervisor.silent = ()

        asyncio.get_running_loop().call_later(0.3, speak)
        assert_off(await world.ask(FenceAction.OFF))


@virtual_time
async def test_a_host_that_cannot_look_proves_nothing() -> None:
    async with World(BlindHypervisor(now)).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_not_claimed(answer)
    assert "/proc cannot be read" in answer.reason


@virtual_time
async def test_s7_a_hung_qemu_does_not_delay_the_fencing_of_another_vm() -> None:
    hypervisor = HungHypervisor(now)
    hypervisor.hung = {VM3}
    async with World(hypervisor).running() as world:
        world.vm()
        world.vm(VM3, "vm3")
        await settled()
        hanging = asyncio.create_task(world.ask(FenceAction.OFF, "vm3"))
        await asyncio.sleep(0.1)
        begun = now()
        assert_off(await world.ask(FenceAction.OFF))
        assert now() - begun < 0.5
        assert_not_claimed(await hanging, FenceCode.DEADLINE)


# already off (S1)


@virtual_time
async def test_a_vm_whose_process_ended_by_itself_is_already_off() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        world.hypervisor.vanish(identity, watched=True)
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_off(answer, FenceCode.ALREADY)
    assert world.hypervisor.acts == []


@virtual_time
async def test_a_process_that_nobody_watched_ending_counts_on_a_standalone_host() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        world.hypervisor.vanish(identity, watched=False)
        answer = await world.ask(FenceAction.OFF)
    assert_off(answer, FenceCode.ALREADY)
    assert any("gone before we acted: no such process" in line for line in answer.evidence)


@virtual_time
async def test_s1_an_end_that_nobody_watched_is_a_departure_when_another_host_could_run_the_vm() -> None:
    async with World(rules=Rules(standalone=False)).running() as world:
        identity = world.vm()
        await settled()
        world.hypervisor.vanish(identity, watched=False)
        assert_not_claimed(await world.ask(FenceAction.OFF), FenceCode.MIGRATED_AWAY)


@virtual_time
async def test_a_second_off_is_already_off() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        assert_off(await world.ask(FenceAction.OFF))
        assert_off(await world.ask(FenceAction.OFF), FenceCode.ALREADY)


@virtual_time
async def test_a_vm_never_seen_is_off_only_if_the_policy_names_its_uuid() -> None:
    async with World().running() as world:
        answer = await world.ask(FenceAction.OFF, VM2, requester=OPERATOR)
        assert_off(answer, FenceCode.ALREADY)
        answer = await world.ask(FenceAction.OFF, STRANGER, requester=OPERATOR)
        assert not answer.ok
        assert answer.code is FenceCode.UNKNOWN_PLUG


@virtual_time
async def test_a_vm_that_a_group_knows_by_name_only_and_that_was_never_seen_is_not_off() -> None:
    async with World(groups=(Group("web", ("vm1", "vm2")),)).running() as world:
        answer = await world.ask(FenceAction.OFF, "vm2", requester=OPERATOR)
    assert_not_claimed(answer, FenceCode.UNKNOWN_PLUG)


@virtual_time
async def test_a_process_that_the_hypervisor_watches_is_never_told_as_ended_unwatched() -> None:
    async with World().running() as world:
        identity = world.vm()
        await settled()
        world.hypervisor.vanish(identity, watched=False)  # its event is still under way
        world.instances.prove_absent(VM2)
        assert [one.identity for one in world.registry.unproven(VM2)] == [identity]


# departures (S1)


@virtual_time
async def test_s1_a_vm_that_migrates_between_request_and_action_has_migrated_away() -> None:
    async with World(MigratingHypervisor(now)).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_not_claimed(answer, FenceCode.MIGRATED_AWAY)


@pytest.mark.parametrize(
    ("run_state", "migration"),
    [(RunState.POSTMIGRATE, Migration.COMPLETED), (RunState.RUNNING, Migration.OUTGOING)],
)
@virtual_time
async def test_s1_the_end_of_a_migration_source_is_a_departure(
    run_state: RunState, migration: Migration
) -> None:
    async with World().running() as world:
        world.vm(run_state=run_state, migration=migration)
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF), FenceCode.MIGRATED_AWAY)
        assert not world.hypervisor.instances, "the source is destroyed all the same"
        again = await world.ask(FenceAction.OFF)
        assert_not_claimed(again, FenceCode.MIGRATED_AWAY)


@virtual_time
async def test_a_vm_that_is_seen_again_after_its_departure_can_be_fenced() -> None:
    async with World().running() as world:
        world.vm(run_state=RunState.POSTMIGRATE, migration=Migration.COMPLETED)
        await settled()
        assert_not_claimed(await world.ask(FenceAction.OFF), FenceCode.MIGRATED_AWAY)
        world.vm()
        await settled()
        assert_off(await world.ask(FenceAction.OFF))


# gone is not written (S1)


@virtual_time
async def test_s1_unsettled_io_after_a_kill_is_a_failure_that_names_the_remedy() -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.cause, hypervisor.io = EndCause.KILL, IoState.UNPROVEN
    async with World(hypervisor).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
        assert_not_claimed(answer)
        assert "after_kill: accept" in answer.reason
        assert_not_claimed(await world.ask(FenceAction.OFF))  # nor by asking twice


@virtual_time
async def test_unsettled_io_is_accepted_where_the_site_says_so() -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.cause, hypervisor.io = EndCause.KILL, IoState.UNPROVEN
    async with World(hypervisor, rules=Rules(settle=False)).running() as world:
        world.vm()
        await settled()
        answer = await world.ask(FenceAction.OFF)
    assert_off(answer)
    assert any("I/O unproven" in line for line in answer.evidence)


@pytest.mark.parametrize("io", [IoState.DRAINED, IoState.NONE, IoState.SETTLED])
@virtual_time
async def test_settled_io_is_enough(io: IoState) -> None:
    hypervisor = FakeHypervisor(now)
    hypervisor.cause, hypervisor.io = EndCause.KILL, io
    async with World(hypervisor).running() as world:
        world.vm()
        await settled()
        assert_off(await world.ask(FenceAction.OFF))


@virtual_time
async def test_s2_a_look_that_an_end_overtook_does_not_count_it_may_have_missed_what_was_forked() -> None:
    hypervisor = ForkingHypervisor(now)
    async with World(hypervisor).running() as world:
        await world.vm_off()
        hypervisor.vm, hypervisor.forks = VM2, "vm2"
        assert_off(await world.ask(FenceAction.OFF))
        assert hypervisor.instances == {}
        hypervisor.forks = "vm2"
        status = await world.ask(FenceAction.STATUS)
    assert (status.ok, status.state) == (True, PowerState.ON)


# identity (S9)


@virtual_time
async def test_s9_one_uuid_with_two_names_is_refused_and_nothing_is_destroyed() -> None:
    async with World().running() as world:
        world.vm(VM2, "vm2")
        world.vm(VM2, "other")
        await settled()
        answer = await world.ask(FenceAction.OFF, VM2)
        assert_not_claimed(answer, FenceCode.AMBIGUOUS)
        assert "vm2" in answer.reason
        assert "other" in answer.reason
        assert world.hypervisor.acts == []


@virtual_time
async def test_s9_nothing_is_destroyed_on_a_doubt_that_nobody_has_seen_before() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        world.hypervisor.add(NIL_UUID, "vm2", noticed=False)
        assert_not_claimed(await world.ask(FenceAction.OFF), FenceCode.AMBIGUOUS)
        assert world.hypervisor.acts == []
        world.vm(VM3, "vm3")
        await settled()
        world.hypervisor.conflicts = ("pid 7 (name 'vm3') has no -uuid",)
        assert_not_claimed(await world.ask(FenceAction.OFF, "vm3"), FenceCode.AMBIGUOUS)
        assert world.hypervisor.acts == []


@virtual_time
async def test_s9_a_doubt_that_is_over_stops_no_off_and_neither_does_one_about_another_vm() -> None:
    async with World().running() as world:
        world.vm()
        world.vm(VM3, "vm3")
        nameless = world.hypervisor.add(NIL_UUID, "vm2")
        await settled()
        assert_off(await world.ask(FenceAction.OFF, "vm3"))
        world.hypervisor.vanish(nameless, watched=False)  # nobody has heard of that yet
        assert_off(await world.ask(FenceAction.OFF))


@virtual_time
async def test_s9_a_conflict_that_the_look_tells_of_the_vm_is_a_doubt_and_of_another_is_not() -> None:
    async with World().running() as world:
        world.vm()
        world.vm(VM3, "vm3")
        await settled()
        world.hypervisor.conflicts = ("pid 7 (name 'vm2') has no -uuid",)
        assert_not_claimed(await world.ask(FenceAction.OFF, "vm2"), FenceCode.AMBIGUOUS)
        assert_off(await world.ask(FenceAction.OFF, "vm3"))


@virtual_time
async def test_a_plug_that_the_policy_does_not_allow_is_refused_and_recorded_at_a_bounded_rate() -> None:
    async with World().running() as world:
        world.vm(STRANGER, "stranger")
        await settled()
        for _ in range(100):
            answer = await world.ask(FenceAction.OFF, "stranger")
            assert not answer.ok
            assert answer.code in (FenceCode.REFUSED, FenceCode.UNKNOWN_PLUG)
        assert world.hypervisor.acts == []
        assert world.journal.kinds().count("fence.refused") == 10
        await asyncio.sleep(30)
        await world.ask(FenceAction.OFF, "stranger")
        assert world.journal.records[-1].body["left_out"] == 90


@virtual_time
async def test_progress_tells_what_happened() -> None:
    async with World().running() as world:
        world.vm()
        await settled()
        lines: list[str] = []
        answer = await world.ask(FenceAction.OFF, progress=lambda one: lines.append(one.text))
    assert_off(answer)
    assert any("gone after 13 ms" in line for line in lines)
