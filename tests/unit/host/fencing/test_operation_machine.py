# SPDX-License-Identifier: LGPL-2.1-or-later
"""No sequence of events reaches "off" without every process proven and, later, an empty look of every host.

Hypothesis plays the hosts of two-host operations: proofs, looks, failures, newcomers, takeovers and time in
any order, true and false. Beside the machine a plain log of what was fed is kept, and every claim is checked
against it, by rules written down here a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,  # pyright: ignore[reportUnknownVariableType]  # hypothesis types it in part
)

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from tests.unit.host.fencing.operation_builders import (
    BEGIN,
    END,
    HV1,
    HV2,
    OP,
    OTHER_OP,
    ended,
    instance,
    intent,
    looked,
    process,
    was_reset,
)
from vmchannel_host.fencing.events import (
    Begun,
    Broken,
    Delivered,
    Destroy,
    Event,
    Joined,
    Publish,
    Reset,
    StartVm,
    TakeLook,
    TakenOver,
    TimePassed,
)
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.operation import Operation
from vmchannel_host.fencing.ordered import EndReport, FailureReport, LookReport, Part, Process, StartReport
from vmchannel_host.fencing.states import OperationState
from vmchannel_host.model import EndCause, HostName, IoState, Migration, RunState

HOSTS = (HV1, HV2)
PROCESSES = tuple(process(pid, host) for host in HOSTS for pid in (100, 101))
FRESH = tuple(process(pid, host) for host in HOSTS for pid in (300,))

processes = st.sampled_from(PROCESSES)
hosts = st.sampled_from(HOSTS)
flags = st.booleans()
rarely = st.sampled_from((False,) * 9 + (True,))
run_states = st.sampled_from((RunState.RUNNING, RunState.PAUSED, RunState.UNKNOWN))


@dataclass
class Proof:
    """When a process was proven to have ended, in events."""

    at: int
    departed: bool
    settled: bool  # its I/O


class OperationMachine(RuleBasedStateMachine):
    """One operation of two hosts."""

    @initialize(
        action=st.sampled_from((FenceAction.OFF, FenceAction.REBOOT, FenceAction.ON)),
        named=st.sets(processes, max_size=2),
        recognised=flags,
        pending=rarely,
    )
    def begin(self, action: FenceAction, named: set[Process], recognised: bool, pending: bool) -> None:
        self.action = action
        self.now = BEGIN
        self.clock = 0
        self.round = 0
        self.asked_at: dict[int, int] = {}
        self.seen: set[Process] = set(named)
        self.proofs: dict[Process, Proof] = {}  # those that count
        self.told: dict[Process, Proof] = {}  # all that was ever told of each end
        self.looks: dict[tuple[int, HostName], LookReport] = {}
        self.recognised = recognised
        self.pending = pending
        self.published: Publish | None = None
        self.starts = 0
        self.destroyed: set[Process] = set()
        self.resets: list[Process] = []
        self.operation = Operation(
            intent(action, named=sorted(named), hosts=HOSTS, recognised=recognised),
            Rules(),
            (OTHER_OP,) if pending else (),
        )
        self.feed(Begun())

    def feed(self, event: Event) -> None:
        self.clock += 1
        for command in self.operation.apply(event, self.now):
            match command:
                case TakeLook():
                    self.round = command.round
                    self.asked_at.setdefault(command.round, self.clock)
                case Publish():
                    self.published = command
                    self.check_claim(command)
                case StartVm():
                    self.starts += 1
                    self.check_off()
                case Destroy(one):
                    self.check_doubt()
                    self.destroyed.add(one)
                case Reset(one):
                    self.resets.append(one)
                case _:
                    pass

    # what hosts do

    @rule(one=processes, departed=rarely, unsettled=rarely)
    def prove(self, one: Process, departed: bool, unsettled: bool) -> None:
        io = IoState.UNPROVEN if unsettled else IoState.DRAINED
        end = ended(one, cause=EndCause.KILL, io=io, departed=departed)
        if (
            one in self.seen
            and not self.operation.final
            and self.operation.state is not OperationState.ORDERED
        ):
            self.note_proof(one, departed=departed, settled=not unsettled)
        self.feed(EndReport(OP, end))

    @precondition(lambda self: bool(self.destroyed))
    @rule(data=st.data())
    def prove_what_was_asked(self, data: st.DataObject) -> None:
        self.prove(data.draw(st.sampled_from(sorted(self.destroyed))), False, False)

    @rule(
        host=hosts,
        found=st.sets(processes, max_size=1),
        unproven=st.sets(processes, max_size=1),
        run_state=run_states,
        silent=rarely,
        stale=rarely,
        departed=rarely,
        conflict=rarely,
        old=rarely,
        can_start=flags,
        empty=flags,
        fresh=rarely,
    )
    def look(
        self,
        host: HostName,
        found: set[Process],
        unproven: set[Process],
        run_state: RunState,
        silent: bool,
        stale: bool,
        departed: bool,
        conflict: bool,
        old: bool,
        can_start: bool,
        empty: bool,
        fresh: bool,
    ) -> None:
        here = [one for one in found if one.host == host and not empty]
        here += [one for one in FRESH if one.host == host and fresh]
        recorded = [one for one in unproven if one.host == host and not empty]
        report = looked(
            self.round - 1 if old else self.round,
            *(instance(one, run_state, Migration.NONE) for one in here),
            host=host,
            at=BEGIN if stale else BEGIN + 2,
            asked_at=BEGIN + 1,
            silent="mute" if silent else "",
            departed="left" if departed else "",
            conflict="two names" if conflict else "",
            unproven=recorded,
            can_start=can_start and host == HV1,
        )
        self.take(report, {*here, *recorded})

    @precondition(lambda self: self.round > 0)
    @rule()
    def all_look_and_find_nothing(self) -> None:
        for host in HOSTS:
            self.take(looked(self.round, host=host, can_start=host == HV1), set())

    def take(self, report: LookReport, shown: set[Process]) -> None:
        counts = report.round == self.round and self.operation.state is not OperationState.CONCLUDING
        if counts and not self.operation.final and self.operation.state is not OperationState.STARTING:
            self.looks[report.round, report.look.host] = report
            self.seen |= shown
            for one in shown:
                self.proofs.pop(one, None)
        self.feed(report)

    @rule(one=processes, part=st.sampled_from(Part))
    def fail(self, one: Process, part: Part) -> None:
        self.feed(FailureReport(OP, one.host, part, "no", round=self.round, identity=one.identity))

    @rule(one=processes)
    def reset(self, one: Process) -> None:
        self.feed(was_reset(one))

    @rule(own=flags, error=flags)
    def start_returns(self, own: bool, error: bool) -> None:
        if not own:
            self.pending = False
        self.feed(StartReport(OP if own else OTHER_OP, HV1, "no" if error else ""))

    # what happens otherwise

    @rule()
    def join(self) -> None:
        self.feed(Joined())

    @rule(seconds=st.sampled_from((0.0, 0.1, 1.0, 15.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed(TimePassed())

    @rule(chance=rarely)
    def disturb(self, chance: bool) -> None:
        self.feed(TakenOver(OTHER_OP) if chance else Joined())

    @rule(chance=rarely)
    def break_journal(self, chance: bool) -> None:
        if chance:
            self.feed(Broken(FenceCode.FAILED, "disk full"))

    @precondition(lambda self: self.published is not None)
    @rule(valid=st.sampled_from((True, True, False)))
    def deliver(self, valid: bool) -> None:
        assert self.published is not None
        in_time = self.now < END
        was_final = self.operation.final
        self.feed(Delivered(self.published.outcome, valid))
        if self.operation.state is OperationState.DONE and not was_final:
            assert valid
            assert in_time

    # what must hold

    def note_proof(self, one: Process, *, departed: bool, settled: bool) -> None:
        """A process dies once. That a look names it again voids the proof that it has ended, not what another
        proof saw of its end: a departure stands, and so does that its writes have settled."""
        told = self.told.get(one) or Proof(0, False, False)
        told = Proof(0, told.departed or departed, told.settled or settled)
        self.told[one] = told
        counts = self.proofs.get(one)
        at = self.clock + 1 if counts is None else counts.at
        self.proofs[one] = Proof(at, told.departed, told.settled)

    def check_doubt(self) -> None:
        """S9: nothing is destroyed before every host has looked and none has shown a doubt."""
        if self.destroyed or self.resets:
            return
        reports = [self.looks.get((self.round, host)) for host in HOSTS]
        assert all(report is not None and not report.conflict for report in reports), "destroyed on a doubt"

    def check_claim(self, command: Publish) -> None:
        outcome = command.outcome
        if not outcome.ok:
            assert outcome.state is PowerState.UNKNOWN
            return
        assert self.now < END
        if outcome.state is PowerState.OFF:
            self.check_off()
        if outcome.code is FenceCode.NOT_STARTED:
            assert self.action is FenceAction.REBOOT
            assert self.starts == 1 or self.pending or outcome.state is PowerState.OFF

    def check_off(self) -> None:
        """Every process ever seen is proven; then every host was asked for a look, and it found nothing."""
        missing = self.seen - self.proofs.keys()
        assert not missing, f"claimed off, but not proven: {missing}"
        assert not any(one.departed for one in self.proofs.values()), "claimed off after a departure"
        assert all(one.settled for one in self.proofs.values()), "claimed off with unsettled I/O"
        last = max((one.at for one in self.proofs.values()), default=0)
        reports = [self.looks.get((self.round, host)) for host in HOSTS]
        assert all(report is not None for report in reports), "claimed off without a look of every host"
        assert self.asked_at[self.round] >= last, (
            "claimed off by a look that was asked for before the last proof"
        )
        for report in reports:
            assert report is not None
            assert report.look.at_boottime >= report.asked_at
            assert not report.look.instances
            assert not report.look.silent
            assert (report.unproven, report.departed, report.conflict) == ((), "", "")
        assert not self.pending, "claimed off while a start may still bring an instance"
        assert self.recognised or self.proofs

    @invariant()
    def starts_at_most_once(self) -> None:
        assert getattr(self, "starts", 0) <= 1

    @invariant()
    def resets_at_most_once_and_only_for_a_reboot(self) -> None:
        resets = getattr(self, "resets", [])
        assert len(resets) <= 1
        assert not resets or self.action is FenceAction.REBOOT

    @invariant()
    def on_destroys_nothing(self) -> None:
        if getattr(self, "action", None) is FenceAction.ON:
            assert not self.destroyed


def test_writes_that_were_seen_to_settle_stay_settled_though_a_look_and_a_later_proof_contradict() -> None:
    machine = OperationMachine()
    one, other = PROCESSES[:2]
    machine.begin(FenceAction.OFF, {one, other}, True, False)
    machine.take(looked(machine.round), set())
    machine.take(looked(machine.round, host=HV2), set())
    machine.prove(one, False, False)
    machine.prove(other, False, False)
    machine.take(looked(machine.round, unproven=[one]), {one})
    machine.take(looked(machine.round, host=HV2), set())
    machine.prove(one, False, True)  # a proof that came too late to see how it ended
    machine.all_look_and_find_nothing()
    assert machine.published is not None
    assert machine.published.outcome.ok


def test_no_sequence_of_events_leads_to_a_claim_without_its_evidence() -> None:
    run_state_machine_as_test(
        OperationMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
