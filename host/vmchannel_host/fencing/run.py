# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell of one fence operation: feeds its machine and carries out the commands that are for this host.

That it begins is durable before anything acts; the first look runs beside that. What was reported is made
durable beside the next step, and before the outcome is published; a phase before it begins; the outcome
before anybody is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from fence_vmchannel.messages import FenceCode, PowerState
from vmchannel_host.bus import Bus, BusError, Token
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.events import (
    Begun,
    Broken,
    Command,
    Destroy,
    Enter,
    Event,
    Publish,
    Reset,
    StartVm,
    TakeLook,
    TimePassed,
)
from vmchannel_host.fencing.evidence import Rules, cut
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.operation import Operation
from vmchannel_host.fencing.ordered import (
    EndReport,
    FailureReport,
    Intent,
    LookReport,
    Ordered,
    Outcome,
    Part,
    Phase,
    Report,
    ResetReport,
    StartReport,
)
from vmchannel_host.fencing.records import OperationLog
from vmchannel_host.fencing.states import OperationState
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.hypervisors import Hypervisor, HypervisorError
from vmchannel_host.journal.types import JournalError
from vmchannel_host.model import OperationId

Progress = Callable[[OperationId, str, int], None]
"""Called with (operation, a line for people, milliseconds since the intent). Must not block or raise."""

MAX_LOOK_S: Final = 5.0
"""A look that takes longer has failed, and is tried again while there is time."""

MAX_SLEEP_S: Final = 1.0
"""Timers look at CLOCK_BOOTTIME at least this often: the loop's clock stands still while a host sleeps."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FenceSettings:
    """The parts of host.yaml that a fence operation needs."""

    rules: Rules = field(default_factory=Rules)
    quit_timeout_s: float = 1.0
    timeout_s: float = 40.0  # no operation lasts longer


@dataclass(frozen=True, slots=True)
class Shell:
    """What all operations of a host share."""

    bus: Bus[Ordered]
    hypervisor: Hypervisor
    instances: Instances
    journal: OperationLog
    clock: Callable[[], float]  # CLOCK_BOOTTIME, seconds
    tasks: Tasks


class Run:
    """One operation on this host, from its intent until its outcome is durable."""

    def __init__(
        self,
        shell: Shell,
        intent: Intent,
        *,
        on_start: Callable[[Run], None],
        on_end: Callable[[Run], None],
    ) -> None:
        """Make one that waits for its turn.

        Args:
            on_start: called when a start command is about to run; its `StartReport` follows.
            on_end: called when the operation has ended, before its outcome is durable.
        """
        self.intent = intent
        self.token = Token(0, 0)
        self.machine: Operation | None = None  # None before its turn, and for one that joined another
        self.done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.listeners: list[Progress] = []
        self._shell = shell
        self._on_start = on_start
        self._on_end = on_end
        self._quit_timeout_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._records: set[asyncio.Task[None]] = set()
        self._unrecorded = ""  # why something could not be made durable
        self._begun = asyncio.Event()  # durably: nothing acts before
        self._stir = asyncio.Event()
        self._told = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the operation has ended; `done` follows when that is durable."""
        return self._ended

    @property
    def phase(self) -> str:
        """Where it is, for people."""
        return self.machine.state.value if self.machine is not None else "waiting"

    def begin(self, settings: FenceSettings, start_pending: tuple[OperationId, ...]) -> None:
        """It is its VM's operation now."""
        self.machine = Operation(self.intent, settings.rules, start_pending)
        self._quit_timeout_s = settings.quit_timeout_s
        self.spawn(self._watch_time(self.machine), "time")
        if self.intent.resumed is None:
            self.spawn(self._begin(), "begin")
        else:
            self._begun.set()
        self.apply(Begun())

    def apply(self, event: Event) -> None:
        """Feed the machine; carry out what it says."""
        machine = self.machine
        if machine is None or self._ended:
            return
        commands = machine.apply(event, self._shell.clock())
        self._tell(machine)
        if machine.outcome is not None:
            self.end(machine.outcome)
        else:
            self._carry_out(machine, commands)

    def take(self, report: Report) -> None:
        """A host's report was delivered."""
        machine = self.machine
        if machine is None or self._ended:
            return
        polling = isinstance(report, LookReport) and machine.state is OperationState.STARTING
        if not polling:
            body = codec.report_body(report, self.intent.vm)
            self._keep(self._append(codec.EVIDENCE, body))
        self.apply(report)

    def stir(self) -> None:
        """There is news of the VM: a look that waits is taken now."""
        self._stir.set()

    def end(self, outcome: Outcome) -> None:
        """The operation has ended so; make that durable, then resolve `done`."""
        if self._ended:
            return
        self._ended = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._on_end(self)
        self._shell.tasks.spawn(self._close(outcome), f"fence {self.intent.operation} close")

    def spawn(self, work: Coroutine[object, object, None], what: str) -> None:
        """Start a task that ends with the operation."""
        task = self._shell.tasks.spawn(work, f"fence {self.intent.operation} {what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def publish(self, message: Ordered) -> None:
        """Publish for this operation; a bus that does not take it ends the operation."""
        try:
            self._shell.bus.publish(message)
        except BusError as error:
            reason = f"the bus does not take messages: {error}"
            if self.machine is None:
                self.end(failed(self.intent.operation, FenceCode.UNAVAILABLE, reason))
            else:
                self.apply(Broken(FenceCode.UNAVAILABLE, reason))

    # commands

    def _carry_out(self, machine: Operation, commands: Sequence[Command]) -> None:
        for index, command in enumerate(commands):
            match command:
                case Enter(phase):
                    self.spawn(self._enter(machine, phase, commands[index + 1 :]), "enter")
                    return
                case Destroy() | Reset():
                    if command.process.host == self._shell.bus.host:
                        self.spawn(self._perform(command), "act")
                case TakeLook():
                    if command.host == self._shell.bus.host:
                        self.spawn(self._perform(command), "look")
                case StartVm():
                    self._on_start(self)
                    if command.host == self._shell.bus.host:
                        # Not one of the operation's own tasks: its end must not cut off a start.
                        name = f"fence {self.intent.operation} start"
                        self._shell.tasks.spawn(self._start(command), name)
                case Publish(outcome):
                    if self.intent.coordinator == self._shell.bus.host:
                        self.spawn(self._conclude(outcome), "conclude")
                case _:
                    assert_never(command)

    async def _begin(self) -> None:
        """That it begins is durable before it acts: a restart takes up what has begun, no more.

        The survey runs beside it: a look changes nothing.
        """
        try:
            await self._append(codec.PHASE, {"phase": Phase.BEGUN.value})
        except JournalError as error:
            self.apply(Broken(FenceCode.FAILED, f"the journal cannot take its beginning: {error}"))
        else:
            self._begun.set()

    async def _enter(self, machine: Operation, phase: Phase, rest: Sequence[Command]) -> None:
        state = machine.state
        await self._begun.wait()
        try:
            await self._shell.journal.append(
                codec.PHASE, self.intent.operation, {"phase": phase.value, "state": state.value}
            )
        except JournalError as error:
            self.apply(Broken(FenceCode.FAILED, f"the journal cannot take the next phase: {error}"))
            return
        if machine.state is state:  # neither taken over nor out of time
            self._carry_out(machine, rest)

    async def _perform(self, command: Destroy | Reset | TakeLook) -> None:
        report: Report
        try:
            match command:
                case Destroy():
                    report = await self._destroy(command)
                case Reset():
                    report = await self._reset(command)
                case TakeLook():
                    report = await self._look(command)
                case _:
                    assert_never(command)
        except (HypervisorError, JournalError, TimeoutError, OSError) as error:
            report = self._failure(command, str(error) or "no answer in time")
        self.publish(report)

    async def _destroy(self, command: Destroy) -> Report:
        shell, process = self._shell, command.process
        await self._begun.wait()
        left = self._may_act(command.until)
        quit_s = min(self._quit_timeout_s, left / 2)
        async with asyncio.timeout(left):
            end = await shell.hypervisor.off(
                process.identity,
                quit_timeout_s=quit_s,
                timeout_s=left,
                before_kill=lambda: shell.instances.remember_kill(process.identity),
            )
        if end.identity != process.identity or end.host != process.host:
            raise HypervisorError(f"the proof is of {end.identity} on {end.host}, not of {process}")
        end = shell.instances.ended(end)
        self._keep(shell.instances.save())
        return EndReport(self.intent.operation, end)

    async def _reset(self, command: Reset) -> Report:
        left = self._may_act(command.until)
        async with asyncio.timeout(left):
            reset = await self._shell.hypervisor.reset(command.process.identity, timeout_s=left)
        return ResetReport(self.intent.operation, reset)

    async def _look(self, command: TakeLook) -> Report:
        if command.delay_s > 0:
            await self._wait_for_news(command.delay_s)
        left = max(0.0, min(MAX_LOOK_S, command.until - self._shell.clock()))
        intent = self.intent
        removed: tuple[str, ...] = ()
        if command.discard:
            removed = await self._shell.hypervisor.discard_memory(intent.vm, timeout_s=left / 2)
            left = max(0.0, min(MAX_LOOK_S, command.until - self._shell.clock()))
        report = await self._shell.instances.report(
            intent.vm,
            intent.name,
            timeout_s=left,
            operation=intent.operation,
            number=command.round,
            monitors=command.monitors,
        )
        return replace(report, removed=removed)

    async def _wait_for_news(self, delay_s: float) -> None:
        self._stir.clear()
        try:
            async with asyncio.timeout(delay_s):
                await self._stir.wait()
        except TimeoutError:
            return

    async def _start(self, command: StartVm) -> None:
        intent = self.intent
        error = ""
        try:
            if self._ended:
                raise HypervisorError("the operation ended before the start")
            left = self._may_act(command.until)
            await self._shell.hypervisor.start(intent.vm, intent.name, timeout_s=left)
        except Exception as problem:  # noqa: BLE001 - whatever it raised, it has returned
            error = str(problem) or type(problem).__name__
            _log.warning("op=%s vm=%s: start: %s", intent.operation, intent.vm, cut(error))
        self.publish(StartReport(intent.operation, self._shell.bus.host, error))

    async def _conclude(self, outcome: Outcome) -> None:
        """The evidence is durable before the outcome is published."""
        if self._records:
            left = max(0.0, self.intent.end - self._shell.clock())
            await asyncio.wait(tuple(self._records), timeout=left)
        if self._records and not self._unrecorded:
            self._unrecorded = "the journal did not answer in time"
        if self._unrecorded and outcome.ok:
            self.apply(Broken(FenceCode.FAILED, f"done, but not recorded: {self._unrecorded}"))
        else:
            self.publish(outcome)

    # small things

    def _may_act(self, until: float) -> float:
        """Seconds left to act; asked just before acting (S6, S11)."""
        left = until - self._shell.clock()
        if left <= 0:
            raise HypervisorError("time is over")
        if not self._shell.bus.current(self.token):
            raise HypervisorError("the view in which this was ordered is over")
        return left

    def _failure(self, command: Destroy | Reset | TakeLook, reason: str) -> FailureReport:
        operation, host = self.intent.operation, self._shell.bus.host
        match command:
            case Destroy(process):
                return FailureReport(operation, host, Part.DESTROY, reason, identity=process.identity)
            case Reset(process):
                return FailureReport(operation, host, Part.RESET, reason, identity=process.identity)
            case TakeLook():
                return FailureReport(operation, host, Part.LOOK, reason, round=command.round)
            case _:
                assert_never(command)

    def _tell(self, machine: Operation) -> None:
        lines = machine.history
        new, self._told = lines[self._told :], len(lines)
        elapsed_ms = self._elapsed_ms()
        for line in new:
            _log.info("op=%s vm=%s: %s", self.intent.operation, self.intent.vm, line)
            for listener in self.listeners:
                listener(self.intent.operation, line, elapsed_ms)

    def _elapsed_ms(self) -> int:
        return max(0, int((self._shell.clock() - self.intent.begun_at) * 1000))

    def _keep(self, work: Coroutine[object, object, object]) -> None:
        """Make something durable beside the next step; `_conclude` waits for it."""
        name = f"fence {self.intent.operation} record"
        task = self._shell.tasks.spawn(self._recorded(work), name)
        task.add_done_callback(lambda _: work.close())
        self._records.add(task)
        task.add_done_callback(self._records.discard)

    async def _recorded(self, work: Coroutine[object, object, object]) -> None:
        try:
            await work
        except JournalError as error:
            self._unrecorded = str(error)
            _log.error("op=%s: not recorded: %s", self.intent.operation, error)

    async def _append(self, kind: str, body: codec.Body) -> None:
        await self._shell.journal.append(kind, self.intent.operation, body)

    async def _close(self, outcome: Outcome) -> None:
        elapsed_ms = self._elapsed_ms()
        try:
            await self._append(codec.OUTCOME, codec.outcome_body(outcome, self.intent, elapsed_ms))
        except JournalError as error:
            _log.error("op=%s: outcome not recorded: %s", self.intent.operation, error)
            reason = f"{outcome.reason}; but the journal cannot take the outcome: {error}"
            if outcome.ok:
                outcome = failed(self.intent.operation, FenceCode.FAILED, reason, outcome.evidence)
        _log.info(
            "op=%s vm=%s: %s %s in %d ms: %s",
            self.intent.operation,
            self.intent.vm,
            "ok" if outcome.ok else "failed",
            outcome.code.name.lower(),
            elapsed_ms,
            outcome.reason,
        )
        if not self.done.done():
            self.done.set_result(outcome)

    async def _watch_time(self, machine: Operation) -> None:
        while (deadline := machine.next_deadline()) is not None:
            left = deadline - self._shell.clock()
            if left > 0:
                await asyncio.sleep(min(MAX_SLEEP_S, left))
            else:
                self.apply(TimePassed())
                await asyncio.sleep(0.01)


def failed(operation: OperationId, code: FenceCode, reason: str, evidence: tuple[str, ...] = ()) -> Outcome:
    """A failure: nothing is claimed."""
    return Outcome(operation, False, code, PowerState.UNKNOWN, reason, evidence)
