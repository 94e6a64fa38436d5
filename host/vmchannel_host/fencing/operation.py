# SPDX-License-Identifier: LGPL-2.1-or-later
"""One fence operation, from intent to outcome: the machine that every host runs on the same ordered events.

Rules: 1. only `Operation._go` changes the state, by the table in `states.py`; anything else is an error;
2. no event is a claim by itself: a claim is made only where `evidence.off_doubt`, or the check of a reset or
of a start, finds no doubt.

No I/O. Times are CLOCK_BOOTTIME of the coordinator's host, in seconds, and passed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, assert_never

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.events import (
    Begun,
    Broken,
    Command,
    Delivered,
    Destroy,
    Enter,
    Event,
    Joined,
    Publish,
    Reset,
    StartVm,
    TakeLook,
    TakenOver,
    TimePassed,
)
from vmchannel_host.fencing.evidence import Claim, Doubt, Rules
from vmchannel_host.fencing.ordered import (
    EndReport,
    FailureReport,
    Intent,
    LookReport,
    Outcome,
    Part,
    Phase,
    Process,
    ResetReport,
    StartReport,
)
from vmchannel_host.fencing.states import FINAL, TRANSITIONS, OperationState, Step
from vmchannel_host.model import HostName, Instance, InstanceEnded, OperationId, RunState

MAX_FINDS: Final = 12
"""How often a look may find an instance again before the operation gives up; 6 s with the waits between."""

MAX_MUTE_LOOKS: Final = 4
"""How many looks may fail or prove nothing before the operation gives up; 2 s with the waits between."""

MAX_LINES: Final = 64
"""Lines of evidence in an outcome; a record of the journal has a bound too."""

MAX_JOINS: Final = 8
"""How many newcomers may make it look once more: their number must not keep it from its end."""

RESET_SHARE: Final = 0.25
"""Part of the time left that a reset may take, so that `off` and `start` can still follow (S8)."""

MAX_RESET_S: Final = 5.0
"""A QEMU that is well resets in milliseconds."""

MAX_RESERVE_S: Final = 0.25
"""The operation concludes this long before its end, so that its outcome is delivered in time."""

_LOOKING_FOR_ALL: Final = (OperationState.SURVEYING, OperationState.LOOKING)
_REBOOTED: Final = (OperationState.CHECKING, OperationState.STARTING)


class Operation:
    """One operation. Feed it with `apply`, in agreed order; carry out the commands of your host, in order."""

    def __init__(self, intent: Intent, rules: Rules, start_pending: Iterable[OperationId] = ()) -> None:
        """`start_pending`: earlier operations on the VM whose start commands have not returned."""
        self.intent = intent
        self._rules = rules
        self._state = OperationState.ORDERED
        self._phase = intent.resumed or Phase.BEGUN
        self._owed: set[Process] = set(intent.named)  # processes whose end is not proven
        self._attempts: set[Process] = set()  # being destroyed now
        self._ended: dict[Process, InstanceEnded] = {}
        self._starts: set[OperationId] = set(start_pending)
        self._old = {process.identity for process in intent.named}  # not what a start brought
        self._reset: Process | None = None
        self._round = 0  # of the looks that count now
        self._reports: dict[HostName, LookReport] = {}
        self._finds = 0
        self._not_destroyed = ""  # why the last attempt to end an instance failed
        self._mute_looks = 0
        self._polls = 0
        self._unsettled = ""  # why the last poll after a start was no verdict; "" when nothing new was there
        self._joins = 0
        self._lines: list[str] = []
        self._outcome: Outcome | None = None

    @property
    def state(self) -> OperationState:
        """Where the operation is."""
        return self._state

    @property
    def final(self) -> bool:
        """Whether nothing more will come of it."""
        return self._state in FINAL

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before it has."""
        return self._outcome if self.final else None

    @property
    def joinable(self) -> bool:
        """Whether one who asks for the same now may share the outcome.

        What has nearly ended says nothing about what exists only now, nor does a reboot whose reset or off
        lies behind it: ask again after it.
        """
        if self.final or self._state is OperationState.CONCLUDING:
            return False
        if self.intent.action is FenceAction.REBOOT and self._state in _REBOOTED:
            return False
        many = self._state in _LOOKING_FOR_ALL and self._joins >= MAX_JOINS
        return not (many and self.intent.action is not FenceAction.ON)

    @property
    def history(self) -> tuple[str, ...]:
        """Everything that has happened so far, for people; only grows."""
        return tuple(self._lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The last MAX_LINES lines of `history`."""
        return tuple(self._lines[-MAX_LINES:])

    @property
    def _destroys(self) -> bool:
        """Whether nothing but a doubt keeps the survey from destroying: what instances do does not matter."""
        return self.intent.action is FenceAction.OFF or self.intent.resumed is Phase.DESTROYING

    @property
    def conclude_by(self) -> float:
        """When it gives up, seconds: early enough for its outcome to be delivered before its end."""
        span = max(0.0, self.intent.end - self.intent.begun_at)
        return self.intent.end - min(MAX_RESERVE_S, span / 10)

    def next_deadline(self) -> float | None:
        """When to apply `TimePassed`, seconds; None when it has ended."""
        if self.final:
            return None
        return self.intent.end if self._state is OperationState.CONCLUDING else self.conclude_by

    def apply(self, event: Event, now: float) -> tuple[Command, ...]:
        """Take one event; return what to do, in this order. What has ended ignores everything."""
        if self.final:
            return ()
        if self._state is OperationState.CONCLUDING:
            return self._concluding(event, now)
        match event:
            case TakenOver(by):
                return self._end(Step.TAKE_OVER, FenceCode.FAILED, f"taken over by off op={by}")
            case Broken(code, reason):
                return self._conclude(False, code, reason)
            case Delivered(outcome):
                return self._foreign_outcome(outcome)
            case _ if now >= self.conclude_by:
                return self._time_over(now)  # what comes too late is not acted on (S6)
            case _:
                return self._active(event, now)

    def _active(self, event: Event, now: float) -> tuple[Command, ...]:
        match event:
            case Begun():
                return self._begin()
            case EndReport(evidence=end):
                return self._process_ended(end)
            case ResetReport():
                return self._was_reset(event)
            case LookReport():
                return self._looked(event, now)
            case StartReport():
                return self._start_returned(event)
            case FailureReport():
                return self._part_failed(event)
            case Joined():
                return self._joined()
            case TimePassed() | Delivered() | TakenOver() | Broken():
                return ()
            case _:
                assert_never(event)

    def _joined(self) -> tuple[Command, ...]:
        if self.intent.action is FenceAction.ON or self._state not in _LOOKING_FOR_ALL:
            return ()
        if self._state is OperationState.SURVEYING and self._destroys:
            return ()  # another look follows, and that one decides
        # The look under way was asked for before the newcomer asked: it proves nothing for it.
        self._joins += 1
        return self._look(0.0)

    # begin and survey

    def _begin(self) -> tuple[Command, ...]:
        if self._state is not OperationState.ORDERED:
            return ()
        match self.intent.resumed:
            case Phase.STARTING:
                self._lines.append("the host daemon was restarted after the start began")
                self._go(Step.START)
                return self._look(0.0)
            case Phase.RESETTING:
                reason = "the host daemon was restarted during the reset: whether it took effect is unknown"
                return self._conclude(False, FenceCode.FAILED, reason)
            case Phase.DESTROYING | Phase.BEGUN | None:
                self._go(Step.SURVEY)
                return self._look(0.0)
            case _:
                assert_never(self.intent.resumed)

    def _surveyed(self, now: float) -> tuple[Command, ...]:
        """What there is decides the way; on a doubt about whose it is, nothing is destroyed (S9)."""
        doubt = self._conflict()
        if doubt is not None:
            return self._fail(doubt)
        found = self._found()
        alive = self._alive()
        if self._destroys:
            return self._destroy(alive)
        if not alive and self.intent.action is FenceAction.REBOOT and self._silence():
            return self._destroy(alive)  # S0: the look after it removes saved memory first
        if not alive:
            return self._off_or_doubt()
        if self.intent.action is FenceAction.ON:
            return self._on_or_doubt(found, alive)
        target = None if self._silence() else evidence.may_reset(found, alive)
        if target is None:
            return self._destroy(alive)
        self._owed |= alive
        self._reset = target
        self._go(Step.RESET)
        until = now + min(MAX_RESET_S, (self.conclude_by - now) * RESET_SHARE)
        return (*self._enter(Phase.RESETTING), Reset(target, until))

    def _on_or_doubt(self, found: dict[Process, Instance], alive: set[Process]) -> tuple[Command, ...]:
        running = [process for process, instance in found.items() if instance.run_state is RunState.RUNNING]
        self._note_looks()
        if running:
            return self._conclude(True, FenceCode.ALREADY, f"already on: {running[0]}", PowerState.ON)
        states = [
            f"{one} is {found[one].run_state.value if one in found else 'not proven to have ended'}"
            for one in sorted(alive)
        ]
        reason = f"neither running nor off: {', '.join(states)}; fence it off first"
        return self._conclude(False, FenceCode.FAILED, reason)

    # reset (S8)

    def _was_reset(self, report: ResetReport) -> tuple[Command, ...]:
        process = Process(report.evidence.host, report.evidence.identity)
        if self._state is not OperationState.RESETTING or process != self._reset:
            return ()
        self._lines.append(evidence.reset_line(report.evidence))
        self._go(Step.CHECK)
        return self._look(0.0)

    def _checked(self) -> tuple[Command, ...]:
        """S8: the VM still runs without migration; S2: and nothing else of it exists."""
        doubt = self._conflict()
        if doubt is not None:
            return self._fail(doubt)
        reset = self._reset
        if reset is None or self._silence() or not evidence.still_runs(self._found(), self._alive(), reset):
            return self._destroy(self._alive())
        self._note_looks()
        return self._conclude(True, FenceCode.DONE, f"reset: {reset}", PowerState.ON)

    # destroy and look again (S2)

    def _destroy(self, processes: Iterable[Process]) -> tuple[Command, ...]:
        """Destroy these. Without any, and without a start that could still bring one, look at once."""
        self._attempts = set(processes)
        self._owed |= self._attempts
        if not self._attempts and not self._starts:
            self._go(Step.LOOK)
            return self._look(0.0)
        self._go(Step.DESTROY)
        until = self.conclude_by
        return (*self._enter(Phase.DESTROYING), *(Destroy(one, until) for one in sorted(self._attempts)))

    def _process_ended(self, end: InstanceEnded) -> tuple[Command, ...]:
        process = Process(end.host, end.identity)
        if process in self._ended and process not in self._owed:
            self._prove(process, end)  # a second proof may know of a departure
        if process not in self._owed or end.identity.vm_uuid != self.intent.vm:
            return ()
        self._prove(process, end)
        if self._state in (OperationState.SURVEYING, OperationState.CHECKING, OperationState.LOOKING):
            return self._look(0.0)  # S2: the look that counts is asked for after the last proof
        return self._attempted(process)

    def _attempted(self, process: Process) -> tuple[Command, ...]:
        self._attempts.discard(process)
        return self._look_when_all_done()

    def _look_when_all_done(self) -> tuple[Command, ...]:
        if self._state is not OperationState.ACTING or self._attempts or self._starts:
            return ()
        self._go(Step.LOOK)
        return self._look(_backoff(self._finds))

    def _looked_again(self) -> tuple[Command, ...]:
        """Every host has looked after the last proof: a find starts again."""
        alive = self._alive()
        if not alive:
            return self._off_or_doubt()
        doubt = self._conflict()
        if doubt is not None:
            return self._fail(doubt)
        self._finds += 1
        if self._finds > MAX_FINDS:
            why = f"; {self._not_destroyed}" if self._not_destroyed else ""
            reason = f"found again {MAX_FINDS} times: {_list(alive)}{why}"
            return self._conclude(False, FenceCode.FAILED, reason)
        return self._destroy(alive)

    def _off_or_doubt(self) -> tuple[Command, ...]:
        """Nothing was found: is that enough to say off?"""
        if self._silence() and self._mute_looks < MAX_MUTE_LOOKS:
            return self._look_once_more()
        doubt = evidence.off_doubt(self._claim(), self._rules)
        if doubt is not None:
            return self._fail(doubt)
        self._note_looks()
        if self.intent.action is not FenceAction.OFF:
            return self._start()
        acted = any(not evidence.unwatched(end) for end in self._ended.values())
        if acted:
            return self._conclude(True, FenceCode.DONE, "off", PowerState.OFF)
        return self._conclude(True, FenceCode.ALREADY, "already off", PowerState.OFF)

    # start (S12)

    def _start(self) -> tuple[Command, ...]:
        if self._starts:
            return self._not_started("an earlier start command has not returned", PowerState.UNKNOWN)
        able = sorted(host for host, report in self._reports.items() if report.can_start)
        if not able:
            return self._not_started(
                "no host has a way to start it: configure `start` for it", PowerState.OFF
            )
        if len(able) > 1:
            return self._not_started(f"several hosts could start it: {', '.join(able)}", PowerState.OFF)
        self._old |= {process.identity for process in self._ended}
        self._go(Step.START)
        return (
            *self._enter(Phase.STARTING),
            StartVm(able[0], self.conclude_by),
            *self._look(_backoff(1)),
        )

    def _start_returned(self, report: StartReport) -> tuple[Command, ...]:
        if report.operation != self.intent.operation:
            self._starts.discard(report.operation)
            return self._look_when_all_done()
        if self._state is not OperationState.STARTING or not report.error:
            return ()
        reason = f"the start failed on {report.host}: {evidence.cut(report.error)}"
        return self._not_started(reason, PowerState.UNKNOWN)

    def _polled(self) -> tuple[Command, ...]:
        found = self._found()
        new = [
            process
            for process, instance in found.items()
            if instance.run_state is RunState.RUNNING and process.identity not in self._old
        ]
        if len(found) > 1:
            # A QEMU that daemonizes itself is two processes for a moment: no verdict while there is time.
            return self._poll(f"more than one instance: {_list(found)}")
        if not new:
            return self._poll("")
        doubt = self._conflict()
        if self._silence() or doubt is not None:
            return self._poll(self._silence() or (doubt.reason if doubt is not None else ""))
        self._note_looks()
        return self._conclude(True, FenceCode.DONE, f"on: {new[0]}", PowerState.ON)

    def _poll(self, unsettled: str) -> tuple[Command, ...]:
        self._unsettled = unsettled
        self._polls += 1
        return self._look(_backoff(self._polls))

    def _not_started(self, reason: str, state: PowerState) -> tuple[Command, ...]:
        """A reboot has done its part with the proven off (S8); an `on` has failed."""
        if self.intent.action is FenceAction.REBOOT:
            reason = f"off is proven, but it was not started: {reason}"
            return self._conclude(True, FenceCode.NOT_STARTED, reason, state)
        return self._conclude(False, FenceCode.NOT_STARTED, reason)

    # looks and failures

    def _look(self, delay_s: float) -> tuple[Command, ...]:
        """Ask every host for a new look; answers to earlier rounds no longer count."""
        self._round += 1
        self._reports = {}
        monitors = not (self._state is OperationState.SURVEYING and self._destroys)
        discard = self._state is OperationState.LOOKING and self.intent.action is not FenceAction.ON
        return tuple(
            TakeLook(host, self._round, delay_s, self.conclude_by, monitors, discard)
            for host in self.intent.hosts
        )

    def _look_once_more(self) -> tuple[Command, ...]:
        self._mute_looks += 1
        return self._look(_backoff(self._mute_looks + 3))

    def _looked(self, report: LookReport, now: float) -> tuple[Command, ...]:
        if report.round != self._round or report.look.host not in self.intent.hosts:
            return ()
        self._reports[report.look.host] = report
        self._lines += [f"{line} on {report.look.host}" for line in report.removed]
        if self._state is not OperationState.STARTING:
            # Once seen it is owed a proof, even if the next look does not show it.
            self._owed |= evidence.instances_of((report,), self.intent.vm).keys()
            self._owed |= evidence.unproven_of((report,))
        if set(self._reports) != set(self.intent.hosts):
            return ()
        if self._take_recorded_ends() and self._state is not OperationState.STARTING:
            return self._look(0.0)  # S2: the look that counts is asked for after the last proof
        match self._state:
            case OperationState.SURVEYING:
                return self._surveyed(now)
            case OperationState.CHECKING:
                return self._checked()
            case OperationState.LOOKING:
                return self._looked_again()
            case OperationState.STARTING:
                return self._polled()
            case _:
                return ()

    def _take_recorded_ends(self) -> bool:
        """The hosts' records may prove what was owed, or know more. Returns whether any was owed."""
        owed = len(self._owed)
        shown = self._found().keys() | evidence.unproven_of(self._reports.values())
        for report in self._reports.values():
            for end in report.ends:
                process = Process(report.look.host, end.identity)
                if process in shown:
                    continue  # the look contradicts the record
                if process in self._owed or process in self._ended:
                    self._prove(process, end)
        return len(self._owed) < owed

    def _part_failed(self, report: FailureReport) -> tuple[Command, ...]:
        line = f"{report.part.value} on {report.host} failed: {evidence.cut(report.reason)}"
        match report.part:
            case Part.LOOK:
                return self._look_failed(line) if report.round == self._round else ()
            case Part.DESTROY:
                self._lines.append(line)
                self._not_destroyed = line
                return self._attempted(Process(report.host, report.identity)) if report.identity else ()
            case Part.RESET:
                if self._state is not OperationState.RESETTING:
                    return ()
                self._lines.append(line)
                return self._destroy(self._owed)
            case Part.RECORD:
                return self._conclude(False, FenceCode.FAILED, f"not recorded, so not claimed: {line}")
            case _:
                assert_never(report.part)

    def _look_failed(self, line: str) -> tuple[Command, ...]:
        if self._state is OperationState.STARTING:
            return self._poll(line)
        if self._mute_looks >= MAX_MUTE_LOOKS:
            return self._conclude(False, FenceCode.FAILED, line)
        return self._look_once_more()

    # the end

    def _time_over(self, now: float) -> tuple[Command, ...]:
        if self._state is OperationState.STARTING and now < self.intent.end:
            reason = "no new instance was seen running in time"
            return self._not_started(self._unsettled or reason, PowerState.UNKNOWN)
        owed = f"; not proven to have ended: {_list(self._owed)}" if self._owed else ""
        reason = f"time is over while {self._state.value}{owed}; the outcome is unknown"
        return self._conclude(False, FenceCode.DEADLINE, reason)

    def _fail(self, doubt: Doubt) -> tuple[Command, ...]:
        self._note_looks()
        return self._conclude(False, doubt.code, doubt.reason)

    def _conclude(
        self, ok: bool, code: FenceCode, reason: str, state: PowerState = PowerState.UNKNOWN
    ) -> tuple[Command, ...]:
        self._outcome = Outcome(self.intent.operation, ok, code, state, reason, self.lines)
        self._go(Step.CONCLUDE)
        return (Publish(self._outcome),)

    def _concluding(self, event: Event, now: float) -> tuple[Command, ...]:
        """S2: a success counts only if it is delivered in a valid view before the intent's end."""
        match event:
            case TakenOver(by):
                return self._end(Step.TAKE_OVER, FenceCode.FAILED, f"taken over by off op={by}")
            case Broken(code, reason):
                return self._end(Step.FAIL, code, reason)
            case Delivered(outcome, valid) if outcome == self._outcome:
                if not outcome.ok:
                    self._go(Step.FAIL)
                elif valid and now < self.intent.end:
                    self._go(Step.COUNT)
                else:
                    reason = "the outcome was delivered too late, or without quorum"
                    return self._end(Step.FAIL, FenceCode.DEADLINE, reason)
            case _ if now >= self.intent.end:
                reason = "time was over before the outcome was delivered"
                return self._end(Step.FAIL, FenceCode.DEADLINE, reason)
            case _:
                pass
        return ()

    def _foreign_outcome(self, outcome: Outcome) -> tuple[Command, ...]:
        """Another host coordinates and has given up; its success would count only with our own reports."""
        if outcome.operation != self.intent.operation or outcome.ok:
            return ()
        self._outcome = outcome
        self._go(Step.GIVE_UP)
        return ()

    def _end(self, step: Step, code: FenceCode, reason: str) -> tuple[Command, ...]:
        self._outcome = Outcome(self.intent.operation, False, code, PowerState.UNKNOWN, reason, self.lines)
        self._go(step)
        return ()

    # what is known now

    def _found(self) -> dict[Process, Instance]:
        return evidence.instances_of(self._reports.values(), self.intent.vm)

    def _alive(self) -> set[Process]:
        """Everything that is not proven to have ended: found, recorded, or named."""
        return self._found().keys() | evidence.unproven_of(self._reports.values()) | self._owed

    def _conflict(self) -> Doubt | None:
        return evidence.conflict(self._reports.values(), self.intent.vm, self.intent.name)

    def _silence(self) -> str:
        return evidence.silence(self._reports.values(), self.intent.vm)

    def _claim(self) -> Claim:
        return Claim(
            vm=self.intent.vm,
            name=self.intent.name,
            recognised=self.intent.recognised,
            ended=tuple(self._ended.values()),
            owed=frozenset(self._owed),
            reports=tuple(self._reports.values()),
        )

    def _prove(self, process: Process, end: InstanceEnded) -> None:
        first = process not in self._ended
        self._ended[process] = evidence.merge(self._ended.get(process), end)
        self._owed.discard(process)
        if first:
            self._lines.append(evidence.end_line(end))

    def _note_looks(self) -> None:
        for report in self._reports.values():
            ends = [end for end in report.ends if Process(end.host, end.identity) not in self._ended]
            self._lines += [evidence.end_line(end) for end in ends]
            self._lines += evidence.confirmed_lines(report)
            self._lines.append(evidence.look_line(report, self.intent.vm))

    def _enter(self, phase: Phase) -> tuple[Command, ...]:
        """A restart takes up a reboot or `on` by its phase; an `off` is simply run again."""
        if phase is self._phase or self.intent.action is FenceAction.OFF:
            return ()
        self._phase = phase
        return (Enter(phase),)

    def _go(self, step: Step) -> None:
        self._state = TRANSITIONS[self._state, step]


def _backoff(tries: int) -> float:
    """The wait before a look that repeats, seconds: none at first, then from 20 ms doubled up to 1 s."""
    return 0.0 if tries <= 0 else min(1.0, 0.01 * 2.0 ** min(tries, 10))


def _list(processes: Iterable[Process]) -> str:
    return ", ".join(map(str, sorted(processes)))
