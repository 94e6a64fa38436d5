# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence service: what answers a `FenceRequest`, from a VM's channel or from the operator.

It decides whether a request may become an intent: who asks (S9), once (S5), in time (S6), by which rule of
the policy. Then the coordinator acts.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.messages import (
    Announce,
    AnnounceAnswer,
    FenceAction,
    FenceAnswer,
    FenceCode,
    FenceGreeting,
    FenceProgress,
    FenceRequest,
    PowerState,
    decode_message,
    encode_message,
)
from fence_vmchannel.pace import Pace
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.coordinator import Coordinator, Order
from vmchannel_host.fencing.evidence import cut
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.ordered import Outcome
from vmchannel_host.fencing.questions import Questions
from vmchannel_host.fencing.records import FenceJournal
from vmchannel_host.fencing.refusals import RefusalLog
from vmchannel_host.fencing.requester import Incarnations, Requester, Watching
from vmchannel_host.fencing.run import MAX_SLEEP_S
from vmchannel_host.fencing.shared_look import SharedLook
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.journal.types import JournalError, StoredRequest
from vmchannel_host.logs import BoundLogger, RateLimiter
from vmchannel_host.model import BootId, HostName, OperationId, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Refused, Resolved

ProgressSink = Callable[[FenceProgress], None]
"""Takes progress for the asker. Must not block or raise; what it cannot take it drops."""

MAX_FLIGHTS: Final = 64
"""Requests of one requester that may be under way; a further one is refused at once."""

TICK_SLACK_S: Final = 1.0
"""How far a request's tick may lie ahead: it is our own clock, echoed, so it cannot."""

MAX_MARGIN_S: Final = 0.5
"""How long before its deadline a request is answered; a twentieth of the time given, if that is less."""

ANNOUNCE_BURST: Final = 8
ANNOUNCE_PERIOD_S: Final = 10.0
"""So many names a VM may announce at once, then one per period: each is a record in the journal."""

FENCE_BURST: Final = 100
FENCE_PERIOD_S: Final = 5.0
"""So many operations a VM may ask for at once, then one per period: each is several records in the journal. A
whole cluster can be fenced at once, some times over."""

_log = BoundLogger(logging.getLogger(__name__), {})


@dataclass(frozen=True, slots=True)
class _Window:
    """The time that a request leaves, CLOCK_BOOTTIME in seconds."""

    received: float
    asked: float  # the request's tick
    end: float  # of the operation
    answer_by: float  # the asker has its answer before its own deadline
    deadline: float


def _no_sinks() -> list[ProgressSink]:
    return []


@dataclass(eq=False, slots=True)
class _Flight:
    """A request that is being answered. The same one asked again waits for the same answer."""

    request: FenceRequest
    requester: Requester
    requester_key: str
    digest: bytes
    window: _Window
    done: asyncio.Future[FenceAnswer]
    sinks: list[ProgressSink] = field(default_factory=_no_sinks)
    dropped: str = ""  # why it must not become an intent any more
    begun: bool = False  # it is an intent

    def may_begin(self) -> str:
        self.begun = not self.dropped
        return self.dropped

    def tell(self, operation: OperationId, text: str, elapsed_ms: int) -> None:
        progress = FenceProgress(self.request.request_id, operation, text, elapsed_ms)
        for sink in tuple(self.sinks):
            sink(progress)


class FenceService:
    """Answers fence requests. One object per daemon; any number of concurrent calls."""

    def __init__(
        self,
        *,
        host: HostName,
        boot_id: BootId,
        coordinator: Coordinator,
        instances: Instances,
        watching: Watching,
        policy: Callable[[], Policy],
        names: AliasTable,
        journal: FenceJournal,
        tasks: Tasks,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        """Build it.

        Args:
            boot_id: of this host's kernel; the domain of all ticks.
            watching: tells what happened to a requester's VM: the hypervisor.
            policy: gives the policy in force.
            clock: CLOCK_BOOTTIME, seconds.
            wall_clock: seconds since 1970, for people.
            random_bytes: for operation ids, and to name this run of the daemon.
        """
        self._host = host
        self._boot_id = boot_id
        self._coordinator = coordinator
        self._instances = instances
        self._policy = policy
        self._names = names
        self._journal = journal
        self._tasks = tasks
        self._clock = clock
        self._wall_clock = wall_clock
        self._random_bytes = random_bytes
        self._refusals = RefusalLog(journal, clock)
        self._log_limit = RateLimiter(clock=clock)
        self._fencing = Pace(1 / FENCE_PERIOD_S, clock, burst_s=FENCE_BURST * FENCE_PERIOD_S)
        self._announcing = Pace(1 / ANNOUNCE_PERIOD_S, clock, burst_s=ANNOUNCE_BURST * ANNOUNCE_PERIOD_S)
        self._flights: dict[bytes, _Flight] = {}
        self._incarnations = Incarnations(watching, journal, tasks, clock, random_bytes(4).hex())
        self._questions = Questions(
            instances=instances,
            look=SharedLook(instances, tasks, clock),
            policy=policy,
            names=names,
            rules=lambda: coordinator.settings.rules,
            journal=journal,
            clock=clock,
        )

    def greeting(self, requester: Requester) -> FenceGreeting:
        """What the channel's ACCEPT carries."""
        return FenceGreeting(
            self._host, self._boot_id, int(self._clock() * 1000), requester.vm or "", cut(requester.name)
        )

    def operator_request(
        self, request_id: bytes, action: FenceAction, plug: str, timeout_s: float
    ) -> FenceRequest:
        """A request as the operator's tool makes it, with `timeout_s` seconds from now.

        Raises:
            ValueError: the id is not 16 bytes, the plug too long, the time not 1 ms to 1 h.
        """
        tick_ms = int(self._clock() * 1000)
        return FenceRequest(request_id, action, plug, self._boot_id, tick_ms, int(timeout_s * 1000))

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer:
        """Answer a request, within its deadline whatever happens. Never raises for failure.

        Cancelling means that nobody waits any more; what is an intent goes on (S5), and its answer is stored.
        """
        received = self._clock()
        window = self._window(request, received)
        if isinstance(window, str):
            return self._refusal(request, requester, FenceCode.STALE, window)
        if request.action.destructive:
            return await self._answer_once(request, requester, window, progress)
        try:
            async with asyncio.timeout(window.answer_by - received):
                return await self._answer_question(request, requester, window)
        except TimeoutError:
            return self._refusal(request, requester, FenceCode.DEADLINE, "no answer in time: unknown")

    def cancel(self, request_id: bytes, requester: Requester) -> bool:
        """The client stops waiting. True: dropped, no intent follows; False: it goes on, or is unknown."""
        flight = self._flights.get(request_id)
        if flight is None or flight.begun or flight.requester != self._incarnations.present(requester):
            return False
        flight.dropped = "cancelled by the client before anything was done"
        return True

    def requester_interrupted(self, vm: VmUuid) -> None:
        """That VM was paused, reset or restored: its requests that are not yet intents end (S6)."""
        self._incarnations.interrupted(vm)
        for flight in self._flights.values():
            if flight.requester.vm == vm and not flight.begun:
                flight.dropped = "the requester's VM was paused, reset or restored meanwhile"

    async def announce(self, announce: Announce, requester: Requester) -> AnnounceAnswer:
        """Record a guest's cluster node name under its VM's UUID. One that announces in a loop waits."""
        if requester.vm is None:
            return AnnounceAnswer(False, "only a VM has a node name")
        await self._announcing.turn(requester.vm)
        rivals = self._policy().rivals(requester.vm, self._instances.registry.directory())
        told = self._names.announce(
            requester.vm, announce.node_name, announce.source, now=self._wall_clock(), rivals=rivals
        )
        try:
            for one in told.records:
                await self._journal.remember_alias(
                    one.vm_uuid, one.node_name, one.source, one.claimed_at, one.refused
                )
        except JournalError as error:
            return AnnounceAnswer(False, f"the journal cannot take the name: {error}")
        return AnnounceAnswer(told.accepted, told.reason)

    # questions

    async def _answer_question(
        self, request: FenceRequest, requester: Requester, window: _Window
    ) -> FenceAnswer:
        left = window.end - self._clock()
        match request.action:
            case FenceAction.LIST:
                targets = await self._questions.targets(requester.vm, timeout_s=left)
                reason = f"{len(targets)} plugs"
                answer = self._made(request, requester, True, FenceCode.DONE, reason)
                answer = replace(answer, targets=targets)
            case FenceAction.MONITOR:
                outcome = await self._questions.monitor(requester.vm, timeout_s=left)
                answer = self._from(request, requester, outcome, VmUuid(""), "")
            case _:
                answer = await self._status(request, requester, left)
        return replace(answer, elapsed_ms=self._elapsed_ms(window))

    async def _status(self, request: FenceRequest, requester: Requester, timeout_s: float) -> FenceAnswer:
        resolved = self._resolve(request, requester)
        if isinstance(resolved, Refused):
            await self._refusals.note(request, requester.vm, resolved.code, resolved.reason)
            return self._refusal(request, requester, resolved.code, resolved.reason)
        vm, name = resolved.vm_uuid, resolved.name
        outcome = await self._questions.status(vm, name, timeout_s=timeout_s)
        return self._from(request, requester, outcome, vm, name)

    # destructive requests, once each (S5)

    async def _answer_once(
        self, request: FenceRequest, requester: Requester, window: _Window, progress: ProgressSink | None
    ) -> FenceAnswer:
        digest = _digest(request)
        requester = self._incarnations.present(requester)
        flight = self._flights.get(request.request_id)
        if flight is not None:
            refused = await self._refuse_another(request, requester, flight.requester_key, flight.digest)
            if refused is not None:
                return refused
        else:
            many = sum(one.requester.vm == requester.vm for one in self._flights.values())
            if many >= MAX_FLIGHTS:
                reason = f"{many} requests of this requester are under way"
                return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
            flight = self._take_off(request, requester, digest, window)
        if progress is not None:
            flight.sinks.append(progress)
        try:
            while not flight.done.done() and (left := window.answer_by - self._clock()) > 0:
                await asyncio.wait((flight.done,), timeout=min(MAX_SLEEP_S, left))
        finally:
            if progress is not None:
                flight.sinks.remove(progress)  # or asking again and again would pile them up
        if flight.done.cancelled():
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, "the host daemon stops: unknown")
        # Asked again: a daemon that was stopped meanwhile must not tell old news when it goes on (S2, S6).
        if flight.done.done() and self._clock() < window.deadline:
            return flight.done.result()
        reason = "no answer in time: unknown; what was begun goes on until its own end"
        return self._refusal(request, requester, FenceCode.DEADLINE, reason)

    def _take_off(
        self, request: FenceRequest, requester: Requester, digest: bytes, window: _Window
    ) -> _Flight:
        done: asyncio.Future[FenceAnswer] = asyncio.get_running_loop().create_future()
        key = self._incarnations.key(requester)
        flight = _Flight(request, requester, key, digest, window, done)
        self._flights[request.request_id] = flight
        try:
            self._tasks.spawn(self._fly(flight), f"fence request {request.request_id.hex()[:8]}")
        except RuntimeError:
            self._land(flight)
        return flight

    async def _fly(self, flight: _Flight) -> None:
        try:
            answer = await self._process(flight)
            elapsed = replace(answer, elapsed_ms=self._elapsed_ms(flight.window))
            flight.done.set_result(elapsed)
        finally:
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        self._flights.pop(flight.request.request_id, None)
        flight.done.cancel()  # without effect when it has its answer

    async def _process(self, flight: _Flight) -> FenceAnswer:
        request, requester, window = flight.request, flight.requester, flight.window
        refused = await self._cannot_serve(flight)
        if refused is not None:
            return refused
        try:
            stored = await self._journal.request(request.request_id)
            if stored is not None:
                return await self._answer_again(flight, stored)
            resolved = await self._admit(request, requester)
        except JournalError as error:
            reason = f"the journal fails, so nothing is done: {error}"
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
        if isinstance(resolved, FenceAnswer):
            return resolved
        operation = OperationId(self._random_bytes(8).hex())
        self._incarnations.storing(requester, window.deadline)
        remember = self._journal.remember_request(
            request.request_id,
            flight.requester_key,
            flight.digest,
            operation,
            window.deadline,
            if_room=request.action is not FenceAction.OFF,
        )
        order = Order(
            action=request.action,
            vm=resolved.vm_uuid,
            name=resolved.name,
            named=self._policy().names_uuid(resolved.vm_uuid),
            requester=requester.vm,
            requested_at=window.asked,
            end=window.end,
            request_id=request.request_id,
        )
        outcome = await self._coordinator.execute(order, operation, flight.tell, flight.may_begin, remember)
        answer = self._from(request, requester, outcome, order.vm, order.name)
        return await self._stored(answer, window)

    async def _cannot_serve(self, flight: _Flight) -> FenceAnswer | None:
        """The answer while the daemon serves nobody, or nobody who asked when this one did."""
        request, requester, window = flight.request, flight.requester, flight.window
        if self._journal.problem:
            reason = f"the journal fails, so nothing is done: {self._journal.problem}"
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
        if not await self._coordinator.resumed(window.end):
            reason = "the host daemon has just started and takes up what it left; nothing was done"
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
        restored = self._journal.restored
        if restored and restored.boot_id == self._boot_id and window.asked < restored.boottime:
            # The same request may have been carried out already, and its record be among those lost (S5).
            reason = "asked before the journal was restored from a backup: ask with a new id"
            return self._refusal(request, requester, FenceCode.STALE, reason)
        return None

    async def _admit(self, request: FenceRequest, requester: Requester) -> Resolved | FenceAnswer:
        """The VM that is meant, or the refusal: by the policy, or because this requester asks too much.

        Raises:
            JournalError: a refusal could not be noted.
        """
        resolved = self._resolve(request, requester)
        if isinstance(resolved, Refused):
            await self._refusals.note(request, requester.vm, resolved.code, resolved.reason)
            return self._refusal(request, requester, resolved.code, resolved.reason)
        wait_s = self._fencing.take(requester.vm) if requester.vm is not None else 0.0
        if wait_s:
            reason = f"this VM asks for too many operations: the next one in {wait_s:.0f} s"
            await self._refusals.note(request, requester.vm, FenceCode.UNAVAILABLE, reason)
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
        return resolved

    async def _stored(self, answer: FenceAnswer, window: _Window) -> FenceAnswer:
        """The answer is durable before it leaves."""
        answer = replace(answer, elapsed_ms=self._elapsed_ms(window))
        try:
            await self._journal.remember_answer(answer.request_id, encode_message(answer))
        except JournalError as error:
            if not answer.ok:
                return answer  # it claims nothing, and there may be no request to store it with
            reason = f"{answer.reason}; but the journal cannot take the answer: {error}"
            return replace(answer, ok=False, code=FenceCode.FAILED, state=PowerState.UNKNOWN, reason=reason)
        return answer

    async def _answer_again(self, flight: _Flight, stored: StoredRequest) -> FenceAnswer:
        """The id was used before: give its result to its own incarnation in time; never act again (S5)."""
        request, requester = flight.request, flight.requester
        refused = await self._refuse_another(request, requester, stored.requester, stored.digest)
        if refused is not None:
            return refused
        if stored.boot_id != self._boot_id or self._clock() >= stored.deadline:
            reason = "this request's first deadline is past: ask with a new id"
            return self._refusal(request, requester, FenceCode.STALE, reason)
        if stored.answer is not None:
            return _read_answer(stored.answer) or self._unknown(request, requester, stored)
        outcome = await self._coordinator.wait(stored.operation, flight.window.end)
        if outcome is None:
            outcome = await self._coordinator.past_outcome(stored.operation)
        if outcome is None:
            return self._unknown(request, requester, stored)
        records = await self._journal.operation(stored.operation)
        body: codec.Body = records[0].body if records else {}
        vm, name = str(body.get("vm", "")), str(body.get("name", ""))
        return self._from(request, requester, outcome, VmUuid(vm), name)

    async def _refuse_another(
        self, request: FenceRequest, requester: Requester, key: str, digest: bytes
    ) -> FenceAnswer | None:
        """Refuse a known request id to another incarnation, and for another request; None: it is the same."""
        try:
            same = digest == _digest(request) and await self._incarnations.is_same(key, requester)
        except HypervisorError as error:
            reason = f"whether the VM that asked was reset or restored since is unknown: {error}"
            return self._refusal(request, requester, FenceCode.UNAVAILABLE, reason)
        reason = "this request id was used by another incarnation, or for another request"
        return None if same else self._refusal(request, requester, FenceCode.BAD_REQUEST, reason)

    def _unknown(self, request: FenceRequest, requester: Requester, stored: StoredRequest) -> FenceAnswer:
        reason = f"the host daemon was restarted in op={stored.operation}: its outcome is unknown"
        return self._refusal(request, requester, FenceCode.FAILED, reason)

    # small things

    def _window(self, request: FenceRequest, now: float) -> _Window | str:
        """The time a request leaves (S6), or why it is stale."""
        if request.boot_id != self._boot_id:
            return "the request's tick is of another boot or host: ask for a new tick"
        asked = request.tick_ms / 1000
        if asked > now + TICK_SLACK_S:
            return "the request's tick lies ahead of this host's clock: ask for a new tick"
        deadline = asked + request.within_ms / 1000
        if now >= deadline:
            return "the request's deadline was past when it arrived: nothing was done"
        margin = min(MAX_MARGIN_S, request.within_ms / 1000 / 20)
        return _Window(now, asked, deadline - margin, deadline - margin / 3, deadline)

    def _resolve(self, request: FenceRequest, requester: Requester) -> Resolved | Refused:
        """The VM that the plug means, without doubt about its identity (S9), or the refusal."""
        vms = self._instances.registry.directory()
        resolved = self._policy().resolve(
            requester.vm, request.action, request.plug, vms=vms, names=self._names
        )
        if isinstance(resolved, Refused):
            return resolved
        conflict = self._instances.conflict(resolved.vm_uuid)
        return Refused(FenceCode.AMBIGUOUS, cut(conflict)) if conflict else resolved

    def _from(
        self, request: FenceRequest, requester: Requester, outcome: Outcome, vm: VmUuid, name: str
    ) -> FenceAnswer:
        answer = self._made(request, requester, outcome.ok, outcome.code, outcome.reason)
        return replace(
            answer,
            state=outcome.state,
            operation=outcome.operation,
            vm_uuid=vm,
            vm_name=cut(name),
            evidence=outcome.evidence,
        )

    def _refusal(
        self, request: FenceRequest, requester: Requester, code: FenceCode, reason: str
    ) -> FenceAnswer:
        line = _log.bind(vm=requester.vm, action=request.action.name, code=code.name)
        line.limited(self._log_limit, logging.INFO, (requester.vm, code), "%s", cut(reason))
        return self._made(request, requester, False, code, reason)

    def _made(
        self, request: FenceRequest, requester: Requester, ok: bool, code: FenceCode, reason: str
    ) -> FenceAnswer:
        return FenceAnswer(
            request_id=request.request_id,
            ok=ok,
            code=code,
            state=PowerState.UNKNOWN,
            host=self._host,
            reason=reason,
            requester=requester.vm or "",
        )

    def _elapsed_ms(self, window: _Window) -> int:
        return max(0, int((self._clock() - window.received) * 1000))


def _digest(request: FenceRequest) -> bytes:
    """What makes a request the same: not its tick, which a retransmission may renew."""
    return hashlib.sha256(f"{request.action.name}\0{request.plug}".encode("utf-8", "surrogatepass")).digest()


def _read_answer(data: bytes) -> FenceAnswer | None:
    try:
        message = decode_message(data)
    except RemoteProtocolError as error:
        _log.error("a stored answer cannot be read: %s", error)
        return None
    return message if isinstance(message, FenceAnswer) else None
