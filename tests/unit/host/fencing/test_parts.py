# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small parts of fencing: evidence, merged proofs, the schedule, the local bus, journal bodies."""

from __future__ import annotations

import asyncio
import inspect
import json
from dataclasses import replace

import pytest

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.fakes.virtual_time import virtual_time
from tests.unit.host.fencing.operation_builders import (
    HV1,
    OP,
    OTHER_OP,
    VM,
    ended,
    gone,
    instance,
    intent,
    looked,
    process,
    was_reset,
)
from vmchannel_host.bus import BusError, Delivered, Token
from vmchannel_host.bus.local import MAX_WAITING, LocalBus
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.evidence import (
    MAX_TEXT,
    Claim,
    Rules,
    confirm_doubt,
    cut,
    end_line,
    merge,
    off_doubt,
)
from vmchannel_host.fencing.ordered import FailureReport, Outcome, Part, Phase, Report, StartReport
from vmchannel_host.fencing.schedule import REMEMBERED_S, Begin, Busy, Join, Schedule, TakeOver, Void
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.journal.types import Json
from vmchannel_host.model import EndCause, EndProof, IoState, OperationId, VmUuid

A = process()
ANOTHER_VM = VmUuid("0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")
UNWATCHED = ended(A, proof=EndProof.ABSENT, cause=EndCause.NONE, io=IoState.UNPROVEN)
KILLED = ended(A, cause=EndCause.KILL, io=IoState.UNPROVEN)
PROCESS_BODY = json.loads(json.dumps(codec.intent_body(intent(named=(A,)))))["named"][0]


# evidence


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (ended(A), "pid 100 on hv1 gone after 13 ms: pidfd, by quit, I/O drained"),
        (KILLED, "pid 100 on hv1 gone after 13 ms: pidfd, by SIGKILL, I/O unproven"),
        (UNWATCHED, "pid 100 on hv1 gone before we acted: no such process, I/O unproven"),
        (
            ended(A, departed=True),
            "pid 100 on hv1 gone after 13 ms: pidfd, by quit, I/O drained, in a migration when last watched",
        ),
    ],
)
def test_a_line_of_evidence_says_who_ended_how_and_what_became_of_its_io(end: object, line: str) -> None:
    assert end_line(end) == line  # type: ignore[arg-type]


def test_s1_a_second_proof_never_forgets_a_kill_or_a_departure() -> None:
    assert merge(KILLED, UNWATCHED) == KILLED
    assert merge(UNWATCHED, KILLED) == KILLED
    assert merge(ended(A, departed=True), UNWATCHED).departed
    assert merge(UNWATCHED, ended(A, departed=True)).departed


def test_a_second_proof_may_settle_the_io_but_not_unsettle_it() -> None:
    settled = replace(KILLED, io=IoState.SETTLED)
    assert merge(KILLED, settled).io is IoState.SETTLED
    assert merge(settled, KILLED).io is IoState.SETTLED


def test_proofs_of_different_processes_are_not_merged() -> None:
    other = ended(process(7))
    assert merge(KILLED, other) == other


def test_untrusted_text_is_one_printable_line_of_bounded_length() -> None:
    assert cut("vm\n\x1b[31m1") == "vm??[31m1"
    assert len(cut("x" * 10_000)) == MAX_TEXT


# schedule (S12)


def order(operation: str, action: FenceAction, vm: VmUuid = VM, requester: VmUuid | None = None) -> object:
    one = intent(action)
    return replace(one, operation=OperationId(operation), vm=vm, requester=requester, requested_at=50.0)


def placed(schedule: Schedule, one: object) -> object:
    return schedule.place(one)  # type: ignore[arg-type]


def test_s12_what_becomes_of_a_second_intent() -> None:
    for running, new, placement in (
        (FenceAction.OFF, FenceAction.OFF, Join(OperationId("a"))),
        (FenceAction.ON, FenceAction.OFF, TakeOver(OperationId("a"))),
        (FenceAction.REBOOT, FenceAction.OFF, TakeOver(OperationId("a"))),
        (FenceAction.OFF, FenceAction.ON, Busy(OperationId("a"), FenceAction.OFF)),
        (FenceAction.ON, FenceAction.REBOOT, Busy(OperationId("a"), FenceAction.ON)),
    ):
        schedule = Schedule()
        assert placed(schedule, order("a", running)) == Begin()
        assert placed(schedule, order("b", new)) == placement
        assert placed(schedule, order("c", new, ANOTHER_VM)) == Begin()


def test_s12_the_end_of_an_operation_that_was_taken_over_leaves_the_new_one_running() -> None:
    schedule = Schedule()
    placed(schedule, order("a", FenceAction.ON))
    placed(schedule, order("b", FenceAction.OFF))
    schedule.end(OperationId("a"), VM, 60.0)
    running = schedule.running(VM)
    assert running is not None
    assert running.operation == "b"
    schedule.end(OperationId("b"), VM, 61.0)
    assert schedule.running(VM) is None


def test_s12_the_end_of_an_operation_is_forgotten_when_no_request_can_be_older() -> None:
    schedule = Schedule()
    schedule.end(OperationId("a"), VM, 60.0)
    assert placed(schedule, order("b", FenceAction.OFF, ANOTHER_VM, VM)) == Void(OperationId("a"))
    schedule.end(OperationId("c"), ANOTHER_VM, 60.0 + REMEMBERED_S)
    assert placed(schedule, order("d", FenceAction.OFF, ANOTHER_VM, VM)) == Begin()


# the local bus


def test_the_local_bus_delivers_in_order_also_what_a_handler_publishes() -> None:
    bus: LocalBus[str] = LocalBus(HV1)
    seen: list[tuple[str, Token]] = []

    def first(delivered: Delivered[str]) -> None:
        seen.append((delivered.message, delivered.token))
        if delivered.message == "a":
            bus.publish("c")

    seen_by_second: list[str] = []
    bus.subscribe(first)
    bus.subscribe(lambda delivered: seen_by_second.append(delivered.message))
    bus.publish("a")
    bus.publish("b")
    assert [message for message, _ in seen] == seen_by_second == ["a", "c", "b"]
    assert sorted(token for _, token in seen) == [token for _, token in seen]
    assert all(bus.current(token) for _, token in seen)
    assert bus.hosts() == {HV1}


def test_a_handler_that_fails_keeps_no_message_from_the_others() -> None:
    bus: LocalBus[str] = LocalBus(HV1)
    seen: list[str] = []

    def fail(delivered: Delivered[str]) -> None:
        raise ValueError(delivered.message)

    bus.subscribe(fail)
    bus.subscribe(lambda delivered: seen.append(delivered.message))
    bus.publish("a")
    assert seen == ["a"]


def test_a_bus_that_loops_refuses_instead_of_growing() -> None:
    bus: LocalBus[str] = LocalBus(HV1)
    refused: list[BusError] = []

    def flood(delivered: Delivered[str]) -> None:
        if refused:
            return
        try:
            for _ in range(2 * MAX_WAITING):
                bus.publish(delivered.message)
        except BusError as error:
            refused.append(error)

    bus.subscribe(flood)
    bus.publish("a")
    assert len(refused) == 1


def test_a_token_of_another_view_is_not_current() -> None:
    bus: LocalBus[str] = LocalBus(HV1)
    bus.publish("a")
    assert bus.current(Token(1, 1))
    assert not bus.current(Token(2, 1))
    assert not bus.current(Token(1, 2))


# journal bodies


def test_an_intent_is_read_back_from_its_record() -> None:
    one = replace(
        intent(FenceAction.REBOOT, named=(A, process(7))), requester=ANOTHER_VM, request_id=b"\1" * 16
    )
    body = json.loads(json.dumps(codec.intent_body(one)))
    assert codec.read_intent(OP, body, Phase.DESTROYING) == replace(one, resumed=Phase.DESTROYING)


def test_an_outcome_is_read_back_from_its_record() -> None:
    one = Outcome(OP, True, FenceCode.DONE, PowerState.OFF, "off", ("a line", "another"))
    body = json.loads(json.dumps(codec.outcome_body(one, intent(), 13)))
    assert codec.read_outcome(OP, body) == one


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("request_id", "0g"),
        ("request_id", "abc"),
        ("action", "explode"),
        ("end", float("nan")),
        ("end", float("inf")),
        ("begun_at", 10**400),
        ("named", [{**PROCESS_BODY, "pid": float("inf")}]),
        ("named", [{**PROCESS_BODY, "start_time": 1.5}]),
        ("named", ["a process"]),
    ],
)
def test_a_record_that_holds_something_else_is_unreadable(key: str, value: Json) -> None:
    body = {**codec.intent_body(intent(named=(A,))), key: value}
    with pytest.raises(codec.Unreadable):
        codec.read_intent(OP, body, Phase.BEGUN)


def test_a_phase_of_another_version_is_unreadable() -> None:
    assert codec.read_phase(Phase.STARTING.value) is Phase.STARTING
    with pytest.raises(codec.Unreadable):
        codec.read_phase("dreaming")


@pytest.mark.parametrize("key", ["action", "vm", "end", "named", "boot_id", "hosts", "request_id"])
def test_a_record_that_lacks_something_is_unreadable(key: str) -> None:
    body = dict(codec.intent_body(intent()))
    del body[key]
    with pytest.raises(codec.Unreadable):
        codec.read_intent(OP, body, Phase.BEGUN)


@pytest.mark.parametrize(
    "report",
    [
        gone(A),
        was_reset(A),
        looked(1, instance(A), silent="mute", unproven=(A,)),
        StartReport(OTHER_OP, HV1, "no such disk"),
        FailureReport(OP, HV1, Part.DESTROY, "no proof", identity=A.identity),
    ],
)
def test_every_report_has_a_body_with_a_line_for_people(report: Report) -> None:
    body = json.loads(json.dumps(codec.report_body(report, VM)))
    assert body["text"]
    assert body["kind"]


# tasks


@virtual_time
async def test_a_task_that_fails_does_not_end_the_others() -> None:
    tasks = Tasks()
    running = asyncio.create_task(tasks.run())
    await tasks.opened()
    done = asyncio.Event()

    async def fail() -> None:
        raise ValueError("a mistake")

    async def work() -> None:
        await asyncio.sleep(1)
        done.set()

    tasks.spawn(fail(), "fail")
    tasks.spawn(work(), "work")
    await done.wait()
    running.cancel()
    await asyncio.wait((running,))


@virtual_time
async def test_nothing_is_begun_when_the_daemon_does_not_run() -> None:
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    with pytest.raises(RuntimeError, match="not running"):
        Tasks().spawn(work(), "work")
    assert begun == []


@virtual_time
async def test_a_task_that_is_cancelled_before_it_begins_leaves_nothing_behind() -> None:
    """Else Python warns of a coroutine that was never awaited."""
    tasks = Tasks()
    running = asyncio.create_task(tasks.run())
    await tasks.opened()
    work = asyncio.sleep(1)
    tasks.spawn(work, "work").cancel()
    running.cancel()
    await asyncio.wait((running,))
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


# what off needs


def claim(**how: object) -> Claim:
    one = Claim(VM, "vm1", recognised=True, ended=(), owed=frozenset(), reports=(looked(1),))
    return replace(one, **how)  # type: ignore[arg-type]


def test_s0_off_has_no_doubt_only_when_nothing_is_left() -> None:
    assert off_doubt(claim(), Rules()) is None


@pytest.mark.parametrize(
    "how",
    [
        {"owed": frozenset({A})},
        {"reports": (looked(1, instance(A)),)},
        {"reports": (looked(1, unproven=(A,)),)},
        {"reports": (looked(1, silent="mute"),)},
        {"reports": (looked(1, at=1.0, asked_at=2.0),)},
        {"reports": (looked(1, departed="it left"),)},
        {"reports": (looked(1, conflict="two names"),)},
        {"reports": (looked(1, objections=("an objection",)),)},
        {"reports": ()},
        {"recognised": False},
        {"ended": (KILLED,)},
        {"ended": (ended(A, departed=True),)},
    ],
)
def test_s1_each_unknown_alone_is_a_doubt(how: dict[str, object]) -> None:
    assert off_doubt(claim(**how), Rules()) is not None


@pytest.mark.parametrize(
    "how",
    [
        {"owed": frozenset({A})},
        {"reports": (looked(1, instance(A)),)},
        {"reports": (looked(1, unproven=(A,)),)},
        {"reports": (looked(1, silent="mute"),)},
        {"reports": (looked(1, at=1.0, asked_at=2.0),)},
        {"reports": (looked(1, conflict="two names"),)},
        {"reports": ()},
        {"recognised": False},
    ],
)
def test_s1_an_operators_word_replaces_no_proof_and_no_look(how: dict[str, object]) -> None:
    assert confirm_doubt(claim(**how)) is not None


@pytest.mark.parametrize("how", [{"reports": (looked(1, departed="it left"),)}, {}])
def test_s1_an_operators_word_is_taken_for_what_has_ended(how: dict[str, object]) -> None:
    assert confirm_doubt(claim(**how)) is None
