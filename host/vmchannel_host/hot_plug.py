# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's orders to attach a port to a VM or detach it: which VM is meant, and whether now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from fence_vmchannel.messages import FenceAction
from vmchannel_host.fencing.coordinator import RunningOperation
from vmchannel_host.hypervisors import Definitions, HypervisorError, PlugError, Plugged, PlugProblem
from vmchannel_host.journal.types import JournalError, Json
from vmchannel_host.model import OperationId, PortName, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Refused
from vmchannel_host.policy.vm_directory import VmDirectory

DONE: Final = "done"
ALREADY: Final = "already"

_log = logging.getLogger(__name__)


class Plugs(Protocol):
    """What plugs: the hypervisor."""

    def definitions(self) -> Definitions: ...

    async def attach_port(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged: ...

    async def detach_port(
        self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float
    ) -> Plugged: ...


class Log(Protocol):
    """Where it is recorded: the journal."""

    async def append(
        self, kind: str, operation: OperationId, body: dict[str, Json], *, if_room: bool = ...
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class PlugOrder:
    """An operator's order."""

    attach: bool  # else detach
    vm: str  # UUID, name or alias
    port: str  # a port's name; "" (detach only): every port that was attached
    timeout_s: float
    force: bool = False  # detach: also a port that the VM was started or defined with
    operator: str = ""  # who asks


@dataclass(frozen=True, slots=True)
class PlugOutcome:
    """What became of it."""

    code: str  # DONE, ALREADY, a `PlugProblem`, or why no VM was found (`FenceCode` in lower case)
    reason: str  # one line for people
    remedy: str = ""
    vm_uuid: str = ""
    vm_name: str = ""  # untrusted text
    ports: tuple[str, ...] = ()  # that are there now (attach), or were taken away (detach); untrusted text
    advice: tuple[str, ...] = ()  # what is left to do by hand

    @property
    def ok(self) -> bool:
        """Whether the VM is as it was ordered."""
        return self.code in (DONE, ALREADY)


class HotPlug:
    """Takes the orders. One at a time for each VM, and none while it is fenced (S12).

    A fence that is ordered meanwhile waits for nothing here: it ends the VM under the plugging.
    """

    def __init__(
        self,
        *,
        plugs: Plugs,
        directory: Callable[[], VmDirectory],
        policy: Callable[[], Policy],
        names: AliasTable,
        running: Callable[[], Iterable[RunningOperation]],
        log: Log,
        prefix: str,
    ) -> None:
        self._plugs = plugs
        self._directory = directory
        self._policy = policy
        self._names = names
        self._running = running
        self._journal = log
        self._prefix = prefix
        self._busy: set[VmUuid] = set()

    def definitions(self) -> Definitions:
        """The VMs that are defined here, running or not."""
        return self._plugs.definitions()

    async def carry_out(self, order: PlugOrder) -> PlugOutcome:
        """Attach or detach; answers within the order's time and 2 s. Never raises for a failure."""
        defined = self._plugs.definitions()
        found = self._policy().resolve(
            None, FenceAction.STATUS, order.vm, vms=self._directory(), names=self._names
        )
        if isinstance(found, Refused):
            remedy = "see `vmchannelctl vms`, and name it by its UUID if need be"
            reason = "; ".join((found.reason, *defined.problems))
            return PlugOutcome(found.code.name.lower(), reason, remedy)
        vm = found.vm_uuid
        refused = self._refusal(vm, order)
        if refused is not None:
            outcome = refused
        else:
            self._busy.add(vm)
            try:
                outcome = await self._plug(vm, order)
            finally:
                self._busy.discard(vm)
        return replace(outcome, vm_uuid=vm, vm_name=found.name)

    def _refusal(self, vm: VmUuid, order: PlugOrder) -> PlugOutcome | None:
        operation = next((one.operation for one in self._running() if one.vm == vm), None)
        if operation is not None:
            reason = f"busy op={operation}: the VM is being fenced"
            return PlugOutcome(PlugProblem.BUSY.value, reason, "wait for its end")
        if vm in self._busy:
            reason = "busy: another attach or detach of this VM runs"
            return PlugOutcome(PlugProblem.BUSY.value, reason, "wait for its end")
        if order.attach and not order.port.startswith(self._prefix):
            reason = f"a port named {order.port!r} would not be served"
            remedy = f"name it {self._prefix}NUMBER (`ports.prefix` in host.yaml)"
            return PlugOutcome("bad_request", reason, remedy)
        return None

    async def _plug(self, vm: VmUuid, order: PlugOrder) -> PlugOutcome:
        try:
            if order.attach:
                done = await self._plugs.attach_port(vm, PortName(order.port), timeout_s=order.timeout_s)
            else:
                port = PortName(order.port) if order.port else None
                done = await self._plugs.detach_port(vm, port, force=order.force, timeout_s=order.timeout_s)
        except PlugError as error:
            return PlugOutcome(error.problem.value, str(error), error.remedy)
        except HypervisorError as error:
            return PlugOutcome(PlugProblem.FAILED.value, str(error), "see `vmchannelctl doctor`")
        advice = done.advice
        if done.changed:
            advice += await self._record(vm, done, order)
        return PlugOutcome(
            DONE if done.changed else ALREADY, _reason(order, done), ports=done.ports, advice=advice
        )

    async def _record(self, vm: VmUuid, done: Plugged, order: PlugOrder) -> tuple[str, ...]:
        """Into the journal. It proves nothing, so a journal that cannot take it undoes nothing."""
        kind = "port.attached" if order.attach else "port.detached"
        body: dict[str, Json] = {"vm_uuid": vm, "ports": list(done.ports), "by": order.operator or "operator"}
        _log.info("vm=%s %s ports=%r by=%r", vm, kind, done.ports, order.operator)
        try:
            await self._journal.append(kind, OperationId(""), body, if_room=True)
        except JournalError as error:
            return (f"it is not in the journal: {error}",)
        return ()


def _reason(order: PlugOrder, done: Plugged) -> str:
    names = ", ".join(done.ports)
    if order.attach:
        return f"port {names} attached" if done.changed else f"port {names} is there already"
    if done.changed:
        return f"port {names} detached"
    return f"there is no port {order.port}" if order.port else "no port was attached to it"
