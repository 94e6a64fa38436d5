# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine of one operation: which events lead to a claim, and which never do."""

from __future__ import annotations

import pytest

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.unit.host.fencing.operation_builders import (
    BEGIN,
    END,
    HV1,
    HV2,
    OP,
    OTHER_OP,
    Driven,
    ended,
    gone,
    instance,
    intent,
    looked,
    process,
    was_reset,
)
from vmchannel_host.fencing.events import (
    Broken,
    Delivered,
    Destroy,
    Enter,
    Joined,
    Publish,
    Reset,
    StartVm,
    TakeLook,
    TakenOver,
    TimePassed,
)
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.operation import MAX_JOINS, Operation
from vmchannel_host.fencing.ordered import FailureReport, Outcome, Part, Phase, StartReport
from vmchannel_host.fencing.states import FINAL, TRANSITIONS, OperationState, Step
from vmchannel_host.model import EndCause, EndProof, IoState, Migration, RunState

A = process(100)
B = process(101)
FAR = process(200, HV2)


def destroyed(commands: tuple[object, ...]) -> list[int]:
    return [one.process.identity.pid for one in commands if isinstance(one, Destroy)]


# off


def test_s9_off_looks_first_and_destroys_nothing_when_the_look_shows_a_doubt() -> None:
    op = Driven(intent(named=(A, B)), surveyed=False)
    assert [type(one) for one in op.begun] == [TakeLook]
    (command,) = op.apply(
        looked(1, instance(A), unproven=(A, B), conflicts=("pid 7 (name 'vm1') has no -uuid",))
    )
    assert isinstance(command, Publish)
    assert (command.outcome.ok, command.outcome.code) == (False, FenceCode.AMBIGUOUS)


def test_off_destroys_all_that_its_first_look_finds_and_does_not_ask_what_it_does() -> None:
    op = Driven(intent(named=(A,)), surveyed=False)
    (survey,) = op.begun
    assert isinstance(survey, TakeLook)
    assert not survey.monitors
    assert destroyed(op.apply(looked(1, instance(A), instance(B), silent="mute"))) == [100, 101]
    (look,) = [op.apply(gone(one)) for one in (A, B)][-1]
    assert isinstance(look, TakeLook)
    assert look.monitors


def test_a_first_look_that_finds_nothing_does_not_prove_an_off() -> None:
    op = Driven(intent(), surveyed=False)
    (command,) = op.look()
    assert isinstance(command, TakeLook)
    assert command.monitors
    op.look()
    assert op.published is not None
    assert op.published.outcome.code is FenceCode.ALREADY


def test_off_whose_first_look_fails_looks_again_and_at_last_fails_with_nothing_destroyed() -> None:
    op = Driven(intent(named=(A,)), surveyed=False)
    commands = op.begun
    while not op.published:
        assert [type(one) for one in commands] == [TakeLook]
        commands = op.apply(FailureReport(OP, HV1, Part.LOOK, "no /proc", round=op.round))
    assert (op.published.outcome.ok, op.published.outcome.code) == (False, FenceCode.FAILED)


def test_off_destroys_what_it_knows_and_looks_after_the_last_proof() -> None:
    op = Driven(intent(named=(A, B)))
    assert destroyed(op.begun) == [100, 101]
    assert op.apply(gone(A)) == ()
    assert [type(one) for one in op.apply(gone(B))] == [TakeLook]
    op.look()
    op.deliver()
    outcome = op.operation.outcome
    assert outcome is not None
    assert (outcome.ok, outcome.code, outcome.state) == (True, FenceCode.DONE, PowerState.OFF)


def test_s2_every_host_must_look_before_off_is_said() -> None:
    op = Driven(intent(named=(A,), hosts=(HV1, HV2)))
    op.apply(gone(A))
    op.look(host=HV1)
    assert op.published is None
    op.look(host=HV2)
    assert op.published is not None


def test_s2_instances_on_every_host_are_destroyed() -> None:
    op = Driven(intent(named=(A, FAR), hosts=(HV1, HV2)))
    op.apply(gone(A))
    assert op.operation.state is OperationState.ACTING
    op.apply(gone(FAR))
    op.look(host=HV1)
    found = process(201, HV2)
    assert destroyed(op.look(instance(found), host=HV2)) == [201]


def test_s2_a_look_that_was_asked_for_before_the_last_proof_does_not_count() -> None:
    op = Driven(intent(named=(A,)))
    op.apply(FailureReport(OP, HV1, Part.DESTROY, "no proof", identity=A.identity))
    early = op.round
    op.apply(gone(A))  # the proof comes while the host looks
    op.apply(looked(early))
    assert op.published is None
    op.look()
    assert op.published is not None


def test_s2_an_end_that_the_records_prove_asks_for_another_look() -> None:
    op = Driven(intent(named=(A,)))
    op.apply(FailureReport(OP, HV1, Part.DESTROY, "no proof", identity=A.identity))
    op.look(ends=(ended(A),))
    assert op.published is None
    op.look(ends=(ended(A),))
    assert op.published is not None


def test_a_process_once_seen_is_owed_a_proof_even_if_the_next_look_does_not_show_it() -> None:
    op = Driven(intent(hosts=(HV1, HV2)))
    op.look(instance(A), host=HV1)
    op.apply(Joined())  # a new round, before the other host has looked
    op.look(host=HV1)
    assert destroyed(op.look(host=HV2)) == [100]


def test_the_proof_of_another_process_or_vm_proves_nothing() -> None:
    op = Driven(intent(named=(A,)))
    assert op.apply(gone(B)) == ()
    assert op.operation.state is OperationState.ACTING


def test_an_answer_to_an_earlier_look_is_ignored() -> None:
    op = Driven(intent())
    op.apply(Joined())
    op.apply(looked(op.round - 1))
    assert op.published is None


def test_the_look_of_a_host_that_is_not_asked_is_ignored() -> None:
    op = Driven(intent())
    op.look(host=HV2)
    assert op.published is None


def test_already_off_is_told_apart_from_off() -> None:
    op = Driven(intent())
    op.look(ends=(ended(A, proof=EndProof.ABSENT, cause=EndCause.NONE),))
    assert op.published is not None
    assert op.published.outcome.code is FenceCode.ALREADY
    assert any("pid 100" in line for line in op.published.outcome.evidence)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"departed": "it left"}, FenceCode.MIGRATED_AWAY),
        ({"conflict": "one UUID, two names"}, FenceCode.AMBIGUOUS),
        ({"conflicts": ("vm1 is doubtful",)}, FenceCode.AMBIGUOUS),
        ({"objections": ("something",)}, FenceCode.FAILED),
        ({"ends": (ended(A, departed=True),)}, FenceCode.MIGRATED_AWAY),
        ({"ends": (ended(A, cause=EndCause.KILL, io=IoState.UNPROVEN),)}, FenceCode.FAILED),
    ],
)
def test_a_doubt_is_a_failure(how: dict[str, object], code: FenceCode) -> None:
    op = Driven(intent())
    op.look(**how)
    assert op.published is not None
    assert (op.published.outcome.ok, op.published.outcome.code) == (False, code)


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (EndCause.NONE, FenceCode.ALREADY),
        (EndCause.QUIT, FenceCode.FAILED),
        (EndCause.KILL, FenceCode.FAILED),
    ],
)
def test_unproven_io_is_a_doubt_only_after_our_own_act(cause: EndCause, code: FenceCode) -> None:
    op = Driven(intent())
    op.look(ends=(ended(A, cause=cause, io=IoState.UNPROVEN),))
    assert op.published is not None
    assert op.published.outcome.code is code


def test_an_unwatched_end_is_a_departure_unless_standalone() -> None:
    end = ended(A, proof=EndProof.ABSENT, cause=EndCause.NONE, io=IoState.UNPROVEN)
    for standalone, code in ((True, FenceCode.ALREADY), (False, FenceCode.MIGRATED_AWAY)):
        op = Driven(intent(), Rules(standalone=standalone))
        op.look(ends=(end,))
        assert op.published is not None
        assert op.published.outcome.code is code


def test_s1_a_vm_that_was_never_seen_here_is_off_only_where_no_other_host_could_run_it() -> None:
    for standalone, code in ((True, FenceCode.ALREADY), (False, FenceCode.MIGRATED_AWAY)):
        op = Driven(intent(), Rules(standalone=standalone))
        op.look()
        assert op.published is not None
        assert op.published.outcome.code is code


def test_a_vm_that_was_never_seen_and_is_not_named_is_unknown() -> None:
    op = Driven(intent(recognised=False))
    op.look()
    assert op.published is not None
    assert op.published.outcome.code is FenceCode.UNKNOWN_PLUG


def test_silence_is_looked_at_again_and_then_a_failure() -> None:
    op = Driven(intent())
    looks = 0
    while op.published is None:
        op.look(silent="mute")
        looks += 1
    assert looks == 5
    assert not op.published.outcome.ok


# delivery and time (S2, S6)


def proven() -> Driven:
    op = Driven(intent(named=(A,)))
    op.apply(gone(A))
    op.look()
    assert op.operation.state is OperationState.CONCLUDING
    return op


def test_s2_a_success_counts_only_when_it_is_delivered() -> None:
    op = proven()
    assert op.operation.outcome is None
    op.deliver()
    assert op.operation.state is OperationState.DONE


def test_s2_a_success_that_is_delivered_without_quorum_does_not_count() -> None:
    op = proven()
    op.deliver(valid=False)
    assert op.operation.outcome is not None
    assert not op.operation.outcome.ok


def test_s2_a_success_that_is_delivered_at_the_intents_end_does_not_count() -> None:
    op = proven()
    op.deliver(now=END)
    assert op.operation.outcome is not None
    assert (op.operation.outcome.ok, op.operation.outcome.code) == (False, FenceCode.DEADLINE)


def test_s2_a_coordinator_that_wakes_after_the_end_claims_nothing() -> None:
    op = Driven(intent(named=(A,)))
    op.apply(gone(A), END - 10)
    op.apply(looked(op.round), END + 3600)
    assert op.published is not None
    assert not op.published.outcome.ok
    op.deliver()
    assert op.operation.state is OperationState.FAILED


def test_another_success_than_its_own_is_not_taken_over() -> None:
    op = Driven(intent(named=(A,)))
    foreign = Outcome(OP, True, FenceCode.DONE, PowerState.OFF, "off")
    op.apply(Delivered(foreign, True))
    assert op.operation.outcome is None
    op.apply(gone(A))
    op.look()
    op.apply(Delivered(foreign, True))
    assert op.operation.outcome is None


def test_the_failure_of_the_coordinator_ends_it_everywhere() -> None:
    op = Driven(intent(named=(A,)))
    op.apply(Delivered(Outcome(OP, False, FenceCode.DEADLINE, PowerState.UNKNOWN, "late"), True))
    assert op.operation.state is OperationState.FAILED


def test_it_concludes_before_its_end_so_that_the_outcome_can_be_delivered() -> None:
    op = Driven(intent(named=(A,)))
    deadline = op.operation.next_deadline()
    assert deadline is not None
    assert END - 1 < deadline < END
    op.apply(TimePassed(), deadline)
    op.deliver()
    assert op.operation.outcome is not None
    assert "pid 100" in op.operation.outcome.reason
    assert op.operation.next_deadline() is None


def test_nothing_happens_before_the_deadline_because_time_passes() -> None:
    op = Driven(intent(named=(A,)))
    assert op.apply(TimePassed(), BEGIN + 5) == ()


def test_a_failure_to_record_is_a_failure_also_after_the_proof() -> None:
    op = proven()
    op.apply(Broken(FenceCode.FAILED, "disk full"))
    assert op.operation.outcome is not None
    assert not op.operation.outcome.ok
    op = Driven(intent(named=(A,)))
    op.apply(FailureReport(OP, HV1, Part.RECORD, "disk full"))
    assert op.published is not None
    assert not op.published.outcome.ok


# reboot and on (S8, S12)


def test_s8_reset_is_checked_by_a_look_afterwards() -> None:
    op = Driven(intent(FenceAction.REBOOT))
    phase, reset = op.look(instance(A))
    assert phase == Enter(Phase.RESETTING)
    assert isinstance(reset, Reset)
    assert reset.until < (BEGIN + END) / 2  # leaves time for off and start
    op.apply(was_reset(A))
    assert op.published is None
    op.look(instance(A))
    assert op.published is not None
    assert (op.published.outcome.ok, op.published.outcome.state) == (True, PowerState.ON)


@pytest.mark.parametrize(
    "after",
    [
        instance(A, RunState.PAUSED),
        instance(A, RunState.RUNNING, Migration.OUTGOING),
        instance(B),
    ],
)
def test_s8_a_reset_after_which_the_vm_does_not_run_as_before_is_no_proof(after: object) -> None:
    op = Driven(intent(FenceAction.REBOOT))
    op.look(instance(A))
    op.apply(was_reset(A))
    commands = op.look(after)  # type: ignore[arg-type]
    assert op.published is None
    assert 100 in destroyed(commands)


def test_s8_the_reset_of_another_process_proves_nothing() -> None:
    op = Driven(intent(FenceAction.REBOOT))
    op.look(instance(A))
    assert op.apply(was_reset(B)) == ()
    assert op.operation.state is OperationState.RESETTING


def test_s8_a_silent_host_means_no_reset() -> None:
    op = Driven(intent(FenceAction.REBOOT))
    assert destroyed(op.look(instance(A), silent="who knows")) == [100]


def test_s12_a_start_goes_to_exactly_one_host() -> None:
    op = Driven(intent(FenceAction.ON, hosts=(HV1, HV2)))
    op.look(can_start=True)
    commands = op.look(host=HV2)
    assert [one.host for one in commands if isinstance(one, StartVm)] == [HV1]
    op = Driven(intent(FenceAction.ON, hosts=(HV1, HV2)))
    op.look(can_start=True)
    op.look(host=HV2, can_start=True)
    assert op.published is not None
    assert "hv1, hv2" in op.published.outcome.reason


def test_s12_only_a_new_instance_that_runs_ends_the_on() -> None:
    op = Driven(intent(FenceAction.ON, resumed=Phase.STARTING, named=(A,)))
    op.look(instance(A))  # the old one
    assert op.published is None
    op.look(instance(B, RunState.PRELAUNCH))
    assert op.published is None
    op.look(instance(B), silent="who knows")
    assert op.published is None
    op.look(instance(B))
    assert op.published is not None
    assert op.published.outcome.ok


def test_s12_two_instances_after_a_start_are_no_success_of_an_on() -> None:
    op = Driven(intent(FenceAction.ON))
    op.look(can_start=True)
    op.look(instance(A), instance(B))
    assert op.published is None  # a daemonizing QEMU is two processes for a moment
    deadline = op.operation.next_deadline()
    assert deadline is not None
    op.apply(TimePassed(), deadline)
    assert op.published is not None
    assert (op.published.outcome.ok, op.published.outcome.code) == (False, FenceCode.NOT_STARTED)
    assert "more than one instance: pid 100" in op.published.outcome.reason
    assert "pid 101" in op.published.outcome.reason


def test_s12_the_on_is_done_when_only_one_of_several_new_instances_is_left() -> None:
    op = Driven(intent(FenceAction.ON))
    op.look(can_start=True)
    (again,) = op.look(instance(A, RunState.UNKNOWN), instance(B, RunState.UNKNOWN))
    assert isinstance(again, TakeLook)
    op.apply(StartReport(OP, HV1))
    op.look(instance(A, RunState.UNKNOWN), instance(B))
    assert op.published is None
    op.look(instance(B))
    assert op.published is not None
    assert (op.published.outcome.ok, op.published.outcome.state) == (True, PowerState.ON)


def test_an_on_that_no_look_could_confirm_says_why() -> None:
    op = Driven(intent(FenceAction.ON))
    op.look(can_start=True)
    op.look(instance(A), silent="a process that cannot be read")
    deadline = op.operation.next_deadline()
    assert deadline is not None
    op.apply(TimePassed(), deadline)
    assert op.published is not None
    assert "a process that cannot be read" in op.published.outcome.reason


def test_s12_off_that_takes_over_starts_nothing_and_waits_for_the_start_that_runs() -> None:
    op = Driven(intent(FenceAction.ON))
    assert any(isinstance(one, StartVm) for one in op.look(can_start=True))
    assert op.apply(TakenOver(OTHER_OP)) == ()
    assert op.operation.state is OperationState.FAILED
    off = Driven(intent(), start_pending=(OTHER_OP,))
    assert off.begun == ()
    assert off.operation.state is OperationState.ACTING
    assert [type(one) for one in off.apply(StartReport(OTHER_OP, HV1))] == [TakeLook]


def test_s12_off_with_instances_also_waits_for_the_start_that_runs() -> None:
    off = Driven(intent(named=(A,)), start_pending=(OTHER_OP,))
    assert off.apply(gone(A)) == ()
    assert [type(one) for one in off.apply(StartReport(OTHER_OP, HV1))] == [TakeLook]


def test_taken_over_also_when_its_success_is_under_way() -> None:
    op = proven()
    op.apply(TakenOver(OTHER_OP))
    op.deliver()
    assert op.operation.outcome is not None
    assert not op.operation.outcome.ok


def test_a_newcomer_makes_an_off_look_again_but_not_for_ever() -> None:
    op = Driven(intent())
    for _ in range(MAX_JOINS):
        assert op.operation.joinable
        before = op.round
        op.apply(Joined())
        assert op.round == before + 1
    assert not op.operation.joinable


def test_one_that_concludes_is_not_joined() -> None:
    assert not proven().operation.joinable


# resumption


def test_a_resumed_off_is_run_again() -> None:
    assert destroyed(Driven(intent(named=(A,), resumed=Phase.BEGUN)).begun) == [100]


def test_a_resumed_start_is_looked_at_and_never_repeated() -> None:
    op = Driven(intent(FenceAction.ON, resumed=Phase.STARTING))
    assert [type(one) for one in op.begun] == [TakeLook]


def test_a_resumed_reset_has_failed() -> None:
    (command,) = Driven(intent(FenceAction.REBOOT, resumed=Phase.RESETTING)).begun
    assert isinstance(command, Publish)
    assert not command.outcome.ok


# the table


def test_every_state_but_the_first_can_be_reached_and_every_state_but_the_last_left() -> None:
    targets = set(TRANSITIONS.values())
    sources = {state for state, _ in TRANSITIONS}
    assert targets == set(OperationState) - {OperationState.ORDERED}
    assert sources == set(OperationState) - FINAL


def test_done_is_reached_by_the_delivery_of_a_success_only() -> None:
    ways = [(state, step) for (state, step), target in TRANSITIONS.items() if target is OperationState.DONE]
    assert ways == [(OperationState.CONCLUDING, Step.COUNT)]


def test_every_step_is_used() -> None:
    assert {step for _, step in TRANSITIONS} == set(Step)


def test_an_operation_that_has_ended_ignores_everything() -> None:
    op = proven()
    op.deliver()
    outcome = op.operation.outcome
    for event in (gone(B), looked(99), TimePassed(), TakenOver(OTHER_OP), Joined()):
        assert op.apply(event, END + 1) == ()
    assert op.operation.outcome is outcome


def test_an_operation_does_nothing_before_its_intent_is_delivered() -> None:
    op = Operation(intent(named=(A,)), Rules())
    assert op.apply(looked(0), BEGIN) == ()
    assert op.state is OperationState.ORDERED
