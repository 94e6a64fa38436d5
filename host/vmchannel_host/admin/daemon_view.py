# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as the operator sees it: snapshots of registry, policy, hub and journal for the admin API."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import fence_vmchannel
from fence_vmchannel.core.tally import Refusal
from fence_vmchannel.hub.events import PeerStatus
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceProgress, FenceRequest
from vmchannel_host.admin.feed import Feed
from vmchannel_host.admin.operations_view import full, summary
from vmchannel_host.admin.view import (
    AdminEvent,
    CanView,
    ConfirmView,
    DaemonStatus,
    DefinedVm,
    DefinitionsView,
    FenceOrder,
    Finding,
    HostView,
    InstanceView,
    OperationView,
    PortView,
    TrafficView,
    VmView,
)
from vmchannel_host.doctor.daemon_facts import Doctor
from vmchannel_host.doctor.facts import LibvirtFact
from vmchannel_host.doctor.rules import not_reached
from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.confirm import OperatorWord
from vmchannel_host.fencing.coordinator import RunningOperation
from vmchannel_host.fencing.evidence import Rules, silent_reasons
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.service import ProgressSink
from vmchannel_host.hot_plug import HotPlug, PlugOrder, PlugOutcome
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.source import LibvirtState
from vmchannel_host.journal.types import JournalError, OperationRows, Record, VerifyResult
from vmchannel_host.model import HostName, Instance, OperationId, RunState, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy, Refused
from vmchannel_host.vm_ports import VmPort, VmPorts

_LOOK_S = 5.0


class Operations(Protocol):
    """What runs now: the coordinator."""

    def running(self) -> tuple[RunningOperation, ...]: ...


class Operator(Protocol):
    """What answers the operator: the fence service."""

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer: ...

    def operator_request(
        self, request_id: bytes, action: FenceAction, plug: str, timeout_s: float
    ) -> FenceRequest: ...


class PastOperations(Protocol):
    """What ran: the journal."""

    async def operations(self, limit: int = ...) -> list[OperationRows]: ...

    async def operation(self, operation: OperationId) -> Sequence[Record]: ...

    async def verify(self) -> VerifyResult: ...

    @property
    def last_seq(self) -> int: ...

    @property
    def problem(self) -> str: ...


@dataclass(slots=True)
class Health:
    """What the daemon knows of its own state."""

    state: str = "starting"  # "ready", "stopping"
    journal: str = "ok"  # or what the last check found


def journal_state(journal: PastOperations, health: Health) -> str:
    """What is wrong with the journal, by its own word or by the last check; `ok` when nothing is."""
    return journal.problem or health.journal


class View:
    """Implements `AdminView`. The plain methods read memory only."""

    def __init__(
        self,
        *,
        host: HostName,
        instances: Instances,
        policy: Callable[[], Policy],
        names: AliasTable,
        hub: Hub,
        ports: VmPorts,
        operations: Operations,
        operator: Operator,
        rules: Callable[[], Rules],
        word: OperatorWord,
        hot_plug: HotPlug,
        doctor: Doctor,
        libvirts: Callable[[], Sequence[LibvirtState]],
        journal: PastOperations,
        feed: Feed,
        health: Health,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._host = host
        self._instances = instances
        self._registry = instances.registry
        self._policy = policy
        self._names = names
        self._hub = hub
        self._ports = ports
        self._operations = operations
        self._operator = operator
        self._rules = rules
        self._word = word
        self._hot_plug = hot_plug
        self._doctor = doctor
        self._libvirts = libvirts
        self._journal = journal
        self._feed = feed
        self._health = health
        self._clock = clock
        self._wall_clock = wall_clock
        self._began = clock()

    def status(self) -> DaemonStatus:
        """The daemon now."""
        ports = self.ports()
        return DaemonStatus(
            host=self._host,
            version=fence_vmchannel.__version__,
            state=self._health.state,
            pid=os.getpid(),
            uptime_s=self._clock() - self._began,
            bus="local",
            vms=len(self._registry.vms()),
            ports=len(ports),
            ports_connected=sum(port.connected for port in ports),
            operations_running=len(self._operations.running()),
            journal=self._journal_state(),
            journal_seq=self._journal.last_seq,
            problems=self._problems(),
        )

    def vms(self) -> Sequence[VmView]:
        """Every VM ever seen, or defined here, by name."""
        connected = {peer.key for peer in self._hub.status().peers if peer.connected}
        running = {one.vm: one.operation for one in self._operations.running()}
        directory = self._registry.directory()
        policy = self._policy()
        views = [
            VmView(
                uuid=vm,
                name=self._registry.name(vm) or directory.name(vm),
                power=self._power(vm),
                instances=tuple(self._instance(one) for one in self._registry.instances(vm)),
                groups=tuple(group.name for group in policy.groups_of(vm, directory)),
                aliases=self._aliases(vm, policy),
                connected=vm in connected,
                operation=running.get(vm, ""),
                problem="" if self._registry.instances(vm) else "; ".join(self._doubts(vm)),
            )
            for vm in directory.vms()
        ]
        return sorted(views, key=lambda view: (view.name, view.uuid))

    def ports(self) -> Sequence[PortView]:
        """Every port that is served."""
        peers = {(peer.key, peer.port): peer for peer in self._hub.status().peers}
        views = [self._port(port, peers.get((port.vm_uuid, port.port.name))) for port in self._ports.served()]
        return sorted(views, key=lambda view: (view.vm_name, view.name))

    def hosts(self) -> Sequence[HostView]:
        """This host: the bus is local."""
        count = sum(len(self._registry.instances(vm)) for vm in self._registry.vms())
        return (HostView(name=self._host, member=True, synced=True, instances=count),)

    def traffic(self) -> TrafficView:
        """What the hub counts. Every kind is there from the beginning, so that an increase shows."""
        load = self._hub.load()
        refused = {kind.value: self._hub.refused[kind] for kind in Refusal}
        return TrafficView(refused, load.full_out, load.full_in, load.unsent_bytes)

    async def ops(self, limit: int) -> Sequence[OperationView]:
        """Newest first."""
        phases = {one.operation: one.phase for one in self._operations.running()}
        rows = await self._journal.operations(limit)
        return [
            summary(
                row,
                self._host,
                running=row.operation in phases,
                phase=phases.get(row.operation, ""),
            )
            for row in rows
        ]

    async def op(self, operation: str) -> OperationView | None:
        """One operation with its steps."""
        records = await self._journal.operation(OperationId(operation))
        if not records:
            return None
        phases = {one.operation: one.phase for one in self._operations.running()}
        return full(
            records,
            self._host,
            running=OperationId(operation) in phases,
            phase=phases.get(OperationId(operation), ""),
        )

    async def can(self, vm: str, action: FenceAction, plug: str) -> CanView:
        """Ask the policy, then look afresh."""
        directory = self._registry.directory()
        found = self._policy().can(vm, action, plug, vms=directory, names=self._names)
        if isinstance(found, Refused):
            return CanView(False, False, vm, action.name.lower(), plug, reason=found.reason)
        doubt = await self._doubt(found.vm_uuid, found.name, action)
        return CanView(
            allowed=True,
            provable=not doubt,
            vm=vm,
            action=action.name.lower(),
            plug=plug,
            target_uuid=found.vm_uuid,
            target_name=found.name,
            reason=doubt or found.rule,
        )

    async def doctor(self) -> Sequence[Finding]:
        """What is wrong."""
        return await self._doctor.examine()

    async def fence(self, order: FenceOrder, progress: Callable[[FenceProgress], None]) -> FenceAnswer:
        """Carry out an operator's order."""
        request = self._operator.operator_request(order.request_id, order.action, order.vm, order.timeout_s)
        return await self._operator.answer(request, Requester(None, order.operator), progress)

    async def confirm_off(self, vm: str, operator: str) -> ConfirmView:
        """Take an operator's word."""
        told = await self._word.confirm_off(vm, operator)
        uuid = told.vm_uuid or ""
        if told.ok:
            text = f"{told.reason}; {len(told.lines)} ends"
            self._feed.publish(AdminEvent(self._wall_clock(), "vm.confirmed-off", text, uuid, told.name))
        return ConfirmView(told.ok, told.code, told.reason, uuid, told.name, told.lines)

    def definitions(self) -> DefinitionsView:
        """The VMs that are defined, as last told."""
        told = self._hot_plug.definitions()
        vms = sorted(told.names.items(), key=lambda one: (one[1], one[0]))
        return DefinitionsView(tuple(DefinedVm(vm, name) for vm, name in vms), told.problems)

    async def plug(self, order: PlugOrder) -> PlugOutcome:
        """Attach or detach a port."""
        told = await self._hot_plug.carry_out(order)
        if told.ok and told.ports:
            kind = "port.attached" if order.attach else "port.detached"
            event = AdminEvent(self._wall_clock(), kind, told.reason, told.vm_uuid, told.vm_name)
            self._feed.publish(event)
        return told

    def events(self) -> AsyncIterator[AdminEvent]:
        """What happens from now on."""
        return self._feed.read()

    async def verify_journal(self) -> VerifyResult:
        """Walk the whole chain."""
        return await self._journal.verify()

    def _journal_state(self) -> str:
        return journal_state(self._journal, self._health)

    def _power(self, vm: VmUuid) -> str:
        if self._registry.instances(vm):
            return "on"
        # From memory: a cache may answer ON only (S0). `status` of the VM takes the look that OFF needs.
        return "unknown" if any(self._doubts(vm)) else "gone"

    def _doubts(self, vm: VmUuid) -> Iterator[str]:
        """What stands against calling a VM off of which no process is left here."""
        yield from self._registry.objections(vm)
        for end in evidence.unsettled(self._registry.ended(vm), self._rules()):
            yield f"its last writes are not proven to have settled: {evidence.end_line(end)}"

    def _instance(self, one: Instance) -> InstanceView:
        return InstanceView(
            host=self._host,
            pid=one.identity.pid,
            start_time=one.identity.start_time,
            executable=one.identity.executable,
            run_state=one.run_state.value,
            migration=one.migration.value,
            monitor=one.monitor,
        )

    def _aliases(self, vm: VmUuid, policy: Policy) -> tuple[str, ...]:
        names = self._registry.names(vm)
        pinned = [plug for plug, value in policy.aliases.items() if value == vm or value in names]
        announced = self._names.name_of(vm)
        return tuple(sorted({*pinned, *([announced] if announced else [])}))

    def _port(self, port: VmPort, peer: PeerStatus | None) -> PortView:
        connected = peer is not None and peer.connected
        return PortView(
            vm_uuid=port.vm_uuid,
            vm_name=port.name,
            name=port.port.name,
            path=port.port.chardev_path,
            guest_open=port.port.guest_open or connected,  # who greets has it open; the monitor may be slow
            connected=connected,
            session=peer.session if peer is not None and connected else "",
            channels=peer.channels if peer is not None else 0,
            received_bytes=peer.received_bytes if peer is not None else 0,
            sent_bytes=peer.sent_bytes if peer is not None else 0,
            problem=peer.detail if peer is not None and not connected else "",
        )

    async def _doubt(self, vm: VmUuid, name: str, action: FenceAction) -> str:
        try:
            report = await self._instances.report(
                vm, name, timeout_s=_LOOK_S, operation=OperationId(""), number=0
            )
        except (HypervisorError, JournalError, TimeoutError) as error:
            return f"this host cannot look: {error or 'no answer in time'}"
        silent = silent_reasons(report.look, vm)
        if report.conflict or report.departed or silent:
            return report.conflict or report.departed or silent[0]
        if not self._registry.knows(vm) and not self._policy().names_uuid(vm):
            return "the VM was never seen here, and no group names its UUID"
        if action is FenceAction.ON and not report.can_start:
            return "no start command is configured for it (hypervisors: start)"
        mute = [
            one for one in report.look.instances if one.vm_uuid == vm and one.run_state is RunState.UNKNOWN
        ]
        if mute and action is FenceAction.STATUS:
            return "its monitor does not answer"
        return ""

    def _problems(self) -> tuple[str, ...]:
        problems: list[str] = []
        if self._journal_state() != "ok":
            problems.append(f"journal: {self._journal_state()}")
        if self._policy().allows_nobody:
            problems.append(
                "the policy allows nobody to fence: add a group to policy.d (man vmchannel-host.yaml)"
            )
        facts = [LibvirtFact(one.uri, one.problem, one.since) for one in self._libvirts()]
        problems += [not_reached(one) for one in facts if one.problem]
        problems += [conflict.text for conflict in self._registry.all_conflicts()]
        return tuple(problems)
