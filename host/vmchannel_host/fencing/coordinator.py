# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence operations of this host: intents into the agreed order, one operation per VM (S12), resumption.

Each operation runs in a `Run` of its own; what one waits for holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, assert_never

from fence_vmchannel.messages import FenceAction, FenceCode
from vmchannel_host.bus import Delivered as BusDelivered
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.events import Delivered, Joined, TakenOver
from vmchannel_host.fencing.ordered import Intent, Ordered, Outcome, Phase, Process, StartReport
from vmchannel_host.fencing.past import PastOperation
from vmchannel_host.fencing.run import MAX_SLEEP_S, FenceSettings, Progress, Run, Shell, failed
from vmchannel_host.fencing.schedule import Begin, Busy, Join, Schedule, TakeOver, Void
from vmchannel_host.hypervisors import Ended, HypervisorEvent, Seen
from vmchannel_host.journal.types import OperationRows, Record
from vmchannel_host.model import BootId, OperationId, RunState, VmUuid

RESUME_LIMIT: Final = 1000
"""How many of the latest operations a start looks through for unfinished ones, at the least."""

RESUME_MOST: Final = 64_000
"""And at the most: what VMs could make in the time that an operation may take is far less."""

START_POLL_S: Final = 0.25
"""How often it is asked whether a start that was in flight at a restart has brought up its VM, seconds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What the service asks for: a destructive action on a VM that the policy has resolved."""

    action: FenceAction  # OFF, ON or REBOOT
    vm: VmUuid
    name: str  # for people and for start commands; untrusted text
    named: bool  # the policy names this UUID: a VM never seen may be proven off by fresh looks (S1)
    requester: VmUuid | None  # None: the operator
    requested_at: float  # CLOCK_BOOTTIME of the request's tick, seconds
    end: float  # CLOCK_BOOTTIME, seconds: nothing is done and no outcome counts after it
    request_id: bytes


@dataclass(frozen=True, slots=True)
class RunningOperation:
    """An operation that has not ended, for the admin API."""

    operation: OperationId
    action: FenceAction
    vm: VmUuid
    name: str
    requester: VmUuid | None
    phase: str  # the machine's state; "waiting" when it has joined another
    begun_at: float  # CLOCK_BOOTTIME, seconds
    end: float
    lines: tuple[str, ...]


class Coordinator:
    """Runs fence operations. Nothing new is begun before `resume`; the tasks must run."""

    def __init__(self, shell: Shell, settings: FenceSettings, boot_id: BootId) -> None:
        self._shell = shell
        self._settings = settings
        self._boot_id = boot_id
        self._schedule = Schedule()
        self._runs: dict[OperationId, Run] = {}
        self._starting: dict[OperationId, VmUuid] = {}  # start commands that have not returned
        self._resumed = asyncio.Event()
        shell.bus.subscribe(self._deliver)
        shell.instances.subscribe(self._news)

    @property
    def settings(self) -> FenceSettings:
        """The settings in force."""
        return self._settings

    def set_settings(self, settings: FenceSettings) -> None:
        """Take a reloaded configuration; operations that run keep their rules."""
        self._settings = settings

    def running(self) -> tuple[RunningOperation, ...]:
        """All operations that have not ended."""
        return tuple(_view(run) for run in self._runs.values())

    async def execute(
        self,
        order: Order,
        operation: OperationId,
        progress: Progress,
        may_begin: Callable[[], str],
        remember: Coroutine[object, object, None],
    ) -> Outcome:
        """Carry out an order, or join the same action on the same VM.

        Waits until `order.end` at the longest (and for the journal, which has its own time-out); never raises
        for failure. Cancelling it means that nobody waits any more; the intent goes on.

        Args:
            may_begin: asked once, when the intent is durable and not yet published: why it must not be
                published any more, or "".
            remember: makes the request durable; runs beside the record of the intent, ahead of it.
        """
        intent = self._intent(order, operation)
        body = codec.intent_body(intent)
        # One commit of the journal takes both; the request first: an intent without it could be asked again.
        # On a full disk what room is left is kept for `off`.
        if_room = order.action is not FenceAction.OFF
        record = self._shell.journal.append(codec.INTENT, operation, body, if_room=if_room)
        problems = [
            one
            for one in await asyncio.gather(remember, record, return_exceptions=True)
            if isinstance(one, BaseException)
        ]
        if problems:
            # Should the intent be stored all the same, it says nothing: only what has begun is ever taken up.
            reason = f"the journal cannot take the request, so nothing is done: {problems[0]}"
            return failed(operation, FenceCode.UNAVAILABLE, reason)
        run = self._new_run(intent)
        run.listeners.append(progress)
        reason = may_begin()
        if reason:
            run.end(failed(operation, FenceCode.STALE, reason))
        elif self._shell.clock() >= order.end:
            run.end(failed(operation, FenceCode.STALE, "time was over before anything was done"))
        else:
            run.publish(intent)
        return await self._wait(run, order.end)

    async def wait(self, operation: OperationId, until: float) -> Outcome | None:
        """The outcome of an operation that runs, or a failure at `until` (CLOCK_BOOTTIME, seconds).

        None when no such operation runs.
        """
        run = self._runs.get(operation)
        return None if run is None else await self._wait(run, until)

    async def past_outcome(self, operation: OperationId) -> Outcome | None:
        """The outcome that the journal holds; None when it holds none.

        Raises:
            JournalError: it cannot be read.
        """
        for record in await self._shell.journal.operation(operation):
            if record.kind == codec.OUTCOME:
                try:
                    return codec.read_outcome(operation, record.body)
                except codec.Unreadable as error:
                    _log.error("op=%s: unreadable outcome: %s", operation, error)
        return None

    async def resume(self) -> None:
        """Take up what had begun and has no outcome in the journal, after a restart.

        An intent says only that somebody asked: it may have been refused since, and that be lost. What is not
        recorded as begun has done nothing, and never will (S6). Of each VM the last that began is taken up:
        an earlier one had ended, since there is one at a time (S12), and may have been taken over.

        An `off` is run again until its end, and so is a reboot or `on` that had not acted, or had begun to
        destroy; one whose start may have run is only looked at; a reset that may have run has failed. A start
        that had not returned holds up every `off` of its VM (S12). Returns when each is taken up, not when it
        is finished.

        Raises:
            JournalError: the journal cannot be read or written; serve no requests.
        """
        await self._shell.tasks.opened()
        past: list[PastOperation] = []
        for row in await self._recent():
            if row.first.kind == codec.INTENT:
                records = await self._shell.journal.operation(row.operation)
                past.append(PastOperation.read(row.operation, records))
                self._expect_start(row.operation, records)
        last = {one.vm: one for one in sorted(past, key=PastOperation.order) if one.phases}
        for one in sorted(
            past, key=PastOperation.order
        ):  # after all starts: an `off` may wait for a later one
            if one.outcome is None:
                await self._take_up(one, last.get(one.vm))
            elif one.phases and one.outcome.boot_id == self._boot_id:
                self._schedule.end(one.operation, one.vm, one.outcome.boottime)
        self._resumed.set()

    async def _recent(self) -> list[OperationRows]:
        """The latest operations: all that may still be under way, however many others came since. Else VMs
        that ask all the time could have one forgotten (S12).
        """
        limit = RESUME_LIMIT
        began = self._shell.clock() - 2 * self._settings.timeout_s
        while True:
            rows = await self._shell.journal.operations(limit)
            if len(rows) < limit or limit >= RESUME_MOST:
                return rows
            oldest = rows[-1].last
            if oldest.boot_id != self._boot_id or oldest.boottime < began:
                return rows
            limit *= 4

    async def resumed(self, until: float) -> bool:
        """Wait for `resume`; False when it has not ended at `until` (CLOCK_BOOTTIME, seconds).

        What was ordered before the restart comes first: else a VM could act on the one that was fencing it.
        """
        clock = self._shell.clock
        while not self._resumed.is_set() and (left := until - clock()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(MAX_SLEEP_S, left)):
                    await self._resumed.wait()
        return self._resumed.is_set()

    # intents

    def _intent(self, order: Order, operation: OperationId) -> Intent:
        registry, now = self._shell.instances.registry, self._shell.clock()
        known = {Process(one.host, one.identity) for one in registry.unproven(order.vm)}
        return Intent(
            operation=operation,
            action=order.action,
            vm=order.vm,
            name=order.name,
            requester=order.requester,
            requested_at=order.requested_at,
            coordinator=self._shell.bus.host,
            boot_id=self._boot_id,
            begun_at=now,
            end=min(order.end, now + self._settings.timeout_s),
            hosts=tuple(sorted(self._shell.bus.hosts())),
            named=tuple(sorted(known)),
            recognised=order.named or registry.knows(order.vm),
            request_id=order.request_id,
        )

    def _expect_start(self, operation: OperationId, records: Sequence[Record]) -> None:
        """A start may have been in flight at the restart, that of an operation since taken over too (S12).

        It counts as pending until its VM is seen running, or until the intent's end.
        """
        bodies = {kind: [one.body for one in records if one.kind == kind] for kind in codec.STEPS}
        phases = [body.get("phase") for body in bodies[codec.PHASE]]
        returned = any(body.get("kind") == "start" for body in bodies[codec.EVIDENCE])
        succeeded = any(body.get("state") == "on" for body in bodies[codec.OUTCOME])
        if phases[-1:] != [Phase.STARTING.value] or returned or succeeded:
            return
        try:
            intent = codec.read_intent(operation, bodies[codec.INTENT][0], Phase.STARTING)
        except codec.Unreadable as error:
            _log.error("op=%s: unreadable intent: %s", operation, error)
            return
        if intent.boot_id == self._boot_id and self._shell.clock() < intent.end:
            self._starting[operation] = intent.vm
            self._shell.tasks.spawn(self._await_start(intent), f"fence {operation} start before the restart")

    async def _await_start(self, intent: Intent) -> None:
        shell = self._shell
        old = {process.identity for process in intent.named}
        while (left := intent.end - shell.clock()) > 0:
            found = shell.instances.registry.instances(intent.vm)
            if len(found) == 1 and found[0].run_state is RunState.RUNNING and found[0].identity not in old:
                break  # what the resumed operation takes for its success
            await asyncio.sleep(min(START_POLL_S, left))
        run = self._runs.get(intent.operation)
        if run is not None:  # it sees the same with its next look, unless it is taken over
            await self._wait(run, intent.end)
        shell.bus.publish(StartReport(intent.operation, shell.bus.host))

    async def _take_up(self, past: PastOperation, last: PastOperation | None) -> None:
        operation, backup = past.operation, self._shell.journal.restored
        restored = backup.seq if backup is not None else 0
        try:
            phase = codec.read_phase(past.phases[-1]) if past.phases else Phase.BEGUN
            intent = codec.read_intent(operation, past.body, phase)
        except codec.Unreadable as error:
            _log.error("op=%s: unreadable intent: %s", operation, error)
            lost: codec.Body = {"ok": False, "code": "failed", "reason": "the intent cannot be read"}
            await self._shell.journal.append(codec.OUTCOME, operation, lost)
            return
        if not past.phases:
            code, reason = (
                FenceCode.UNAVAILABLE,
                "it had not begun when the host daemon ended: nothing was done",
            )
        elif past.begun < restored:
            code, reason = FenceCode.FAILED, "the journal was restored from a backup; the outcome is unknown"
        elif past is not last:
            code, reason = FenceCode.FAILED, "it had ended before the restart; the outcome was not recorded"
        elif intent.boot_id != self._boot_id or self._shell.clock() >= intent.end:
            code, reason = FenceCode.FAILED, "the host daemon was down at its end; the outcome is unknown"
        else:
            _log.info("op=%s vm=%s: taken up again after a restart (%s)", operation, intent.vm, phase.value)
            self._new_run(intent).publish(intent)
            return
        outcome = failed(operation, code, reason)
        await self._shell.journal.append(codec.OUTCOME, operation, codec.outcome_body(outcome, intent, 0))

    def _new_run(self, intent: Intent) -> Run:
        run = Run(self._shell, intent, on_start=self._starts, on_end=self._ended)
        self._runs[intent.operation] = run
        run.done.add_done_callback(lambda _: self._runs.pop(intent.operation, None))
        return run

    async def _wait(self, run: Run, until: float) -> Outcome:
        clock = self._shell.clock
        while not run.done.done() and (left := until - clock()) > 0:
            await asyncio.wait((run.done,), timeout=min(MAX_SLEEP_S, left))
        if run.done.done() and not run.done.cancelled():
            return run.done.result()
        reason = "no outcome in time: unknown; what was begun goes on until its own end"
        return failed(run.intent.operation, FenceCode.DEADLINE, reason)

    # deliveries, in agreed order

    def _deliver(self, delivered: BusDelivered[Ordered]) -> None:
        message = delivered.message
        if isinstance(message, Intent):
            placed = self._runs.get(message.operation) or self._new_run(message)
            placed.token = delivered.token
            self._place(placed)
            return
        run = self._runs.get(message.operation)
        if isinstance(message, StartReport):
            self._start_returned(message)
        if run is None:
            return
        if isinstance(message, Outcome):
            run.apply(Delivered(message, delivered.valid))
        else:
            run.take(message)

    def _place(self, run: Run) -> None:
        placement = self._schedule.place(run.intent)
        operation = run.intent.operation
        match placement:
            case Begin():
                self._begin(run)
            case TakeOver(other):
                self._runs[other].apply(TakenOver(operation))
                self._begin(run)
            case Join(other):
                self._join(run, self._runs[other])
            case Busy(other, action):
                reason = (
                    f"busy op={other}: {action.name.lower()} of this VM runs; ask again when it has ended"
                )
                run.end(failed(operation, FenceCode.BUSY, reason))
            case Void(other):
                reason = f"void: the requester is itself the target of op={other}"
                run.end(failed(operation, FenceCode.VOID, reason))
            case _:
                assert_never(placement)

    def _begin(self, run: Run) -> None:
        intent = run.intent
        _log.info(
            "op=%s vm=%s name=%r action=%s requester=%s: begun",
            intent.operation,
            intent.vm,
            intent.name[:100],
            intent.action.name.lower(),
            intent.requester or "operator",
        )
        pending = tuple(
            sorted(one for one, vm in self._starting.items() if vm == intent.vm and one != intent.operation)
        )
        run.begin(self._settings, pending)

    def _join(self, run: Run, other: Run) -> None:
        share = other.machine is not None and other.machine.joinable
        run.spawn(self._follow(run, other, share=share), "follow")
        if share:
            other.apply(Joined())

    async def _follow(self, run: Run, other: Run, *, share: bool) -> None:
        """Wait for the operation that runs; then share its outcome, or take one's own turn."""
        operation = run.intent.operation
        outcome = await self._wait(other, run.intent.end)
        if self._shell.clock() >= run.intent.end:
            reason = f"op={other.intent.operation}, which it joined, has not ended in time: unknown"
            run.end(failed(operation, FenceCode.DEADLINE, reason))
        elif share:
            reason = f"{outcome.reason} (joined op={other.intent.operation})"
            run.end(replace(outcome, operation=operation, reason=reason))
        else:
            self._place(run)

    def _ended(self, run: Run) -> None:
        if run.machine is not None:  # one that only waited was never the VM's operation
            self._schedule.end(run.intent.operation, run.intent.vm, self._shell.clock())

    def _starts(self, run: Run) -> None:
        self._starting[run.intent.operation] = run.intent.vm

    def _start_returned(self, report: StartReport) -> None:
        """The VM's present operation may wait for the start of an earlier one."""
        vm = self._starting.pop(report.operation, None)
        running = self._schedule.running(vm) if vm is not None else None
        if running is not None and running.operation != report.operation:
            self._runs[running.operation].apply(report)

    def _news(self, event: HypervisorEvent) -> None:
        match event:
            case Seen(instance):
                vm = instance.vm_uuid
            case Ended(evidence=end):
                vm = end.identity.vm_uuid
            case _:
                assert_never(event)
        running = self._schedule.running(vm)
        if running is not None:
            self._runs[running.operation].stir()


def _view(run: Run) -> RunningOperation:
    intent = run.intent
    return RunningOperation(
        operation=intent.operation,
        action=intent.action,
        vm=intent.vm,
        name=intent.name,
        requester=intent.requester,
        phase=run.phase,
        begun_at=intent.begun_at,
        end=intent.end,
        lines=run.machine.lines if run.machine is not None else (),
    )
