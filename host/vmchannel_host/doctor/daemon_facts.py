# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects what the daemon knows, for `doctor`: reads its parts' memory, and the journal with a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar

import fence_vmchannel
from fence_vmchannel.hub.events import HubStatus
from vmchannel_host.admin.view import Finding
from vmchannel_host.config.model import BusKind, ClusterConfig
from vmchannel_host.config.scalars import as_vm_uuid
from vmchannel_host.daemon_thread import in_daemon_thread
from vmchannel_host.doctor.facts import (
    DaemonFacts,
    JournalFact,
    LibvirtFact,
    MachineFacts,
    PolicyFact,
    PortFact,
    UnheardFact,
    VmFact,
)
from vmchannel_host.doctor.rules import judge
from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.hypervisors.source import LibvirtState
from vmchannel_host.journal.types import JournalError, OperationRows, VerifyResult
from vmchannel_host.model import BootId, RunState, SocketMode, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy
from vmchannel_host.policy.vm_directory import VmDirectory
from vmchannel_host.port_sockets.listeners import Trouble
from vmchannel_host.registry.registry import VmRegistry
from vmchannel_host.vm_ports import VmPorts

T = TypeVar("T")

_log = logging.getLogger(__name__)

VERIFY_S: Final = 5.0
"""How long the walk over the journal may take; a longer journal is for `verify-journal`."""

MACHINE_S: Final = 5.0
"""How long the look at sockets and processes may take."""


class Records(Protocol):
    """The journal."""

    async def verify(self) -> VerifyResult: ...

    async def operations(self, limit: int = ...) -> list[OperationRows]: ...


class MachineLook:
    """Looks at the machine in a thread: one at a time, for a disk that hangs would keep every thread."""

    def __init__(self, look: Callable[[Sequence[str], float], MachineFacts], *, slack_s: float = 2.0) -> None:
        """`look` gets the ports' sockets and the seconds that it may take, and blocks; it is not waited for
        more than `slack_s` seconds longer.
        """
        self._look = look
        self._slack_s = slack_s
        self._running: asyncio.Future[MachineFacts] | None = None

    async def facts(self, paths: Sequence[str], timeout_s: float) -> MachineFacts:
        """What it found; only `late` when it does not end in time. Who asks at once shares one look."""
        try:
            if self._running is None or self._running.done():
                self._running = in_daemon_thread("doctor", partial(self._look, paths, timeout_s))
                self._running.add_done_callback(_fetched)
            async with asyncio.timeout(timeout_s + self._slack_s):
                return await asyncio.shield(self._running)
        except (TimeoutError, OSError, RuntimeError) as error:
            _log.warning("doctor cannot look at this machine: %s", error or "no end in time")
            return MachineFacts(late=True)


def _fetched(look: asyncio.Future[MachineFacts]) -> None:
    if not look.cancelled():
        look.exception()  # looked at, so that it is not reported as forgotten


@dataclass(frozen=True, slots=True)
class Doctor:
    """Examines a daemon that runs. The functions give what is in force now."""

    registry: VmRegistry
    policy: Callable[[], Policy]
    names: AliasTable
    rules: Callable[[], Rules]
    cluster: Callable[[], ClusterConfig]
    hub: Callable[[], HubStatus]
    ports: VmPorts
    journal: Records
    journal_problem: Callable[[], str]
    state: Callable[[], str]
    boot_id: BootId
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    machine: MachineLook
    libvirts: Callable[[], Sequence[LibvirtState]]

    async def examine(self) -> tuple[Finding, ...]:
        """All findings. Takes as long as its two deadlines allow."""
        served = [one.port for one in self.ports.served()]
        paths = [port.chardev_path for port in served if port.mode is SocketMode.BIND]
        machine = await self.machine.facts(paths, MACHINE_S)
        journal = await self._journal()
        directory = self.registry.directory()
        return judge(
            machine,
            DaemonFacts(
                version=fence_vmchannel.__version__,
                state=self.state(),
                vms=tuple(
                    sorted((self._vm(vm, directory) for vm in self.registry.vms()), key=lambda vm: vm.name)
                ),
                ports=tuple(self._ports(directory)),
                unheard=tuple(map(self._unheard, self.ports.troubles())),
                conflicts=tuple(one.text for one in self.registry.all_conflicts()),
                libvirts=tuple(self._libvirt(one, directory) for one in self.libvirts()),
                policy=self._policy(directory),
                journal=journal,
            ),
        )

    def _vm(self, vm: VmUuid, directory: VmDirectory) -> VmFact:
        instances = self.registry.instances(vm)
        seen = {one.identity for one in instances}
        served = {port.vm_uuid for port in self.ports.served()}
        unsettled = evidence.unsettled(self.registry.ended(vm), self.rules())
        return VmFact(
            name=self._who(vm),
            pids=tuple(one.identity.pid for one in instances),
            mute=all(one.run_state is RunState.UNKNOWN for one in instances),
            has_port=vm in served,
            libvirt=any(one.monitor and not one.monitor.startswith("/") for one in instances),
            grouped=bool(self.policy().groups_of(vm, directory)),
            departed=self.registry.departed(vm) or "",
            unsettled=tuple(map(evidence.end_line, unsettled)),
            lost=tuple(str(one.identity) for one in self.registry.unproven(vm) if one.identity not in seen),
            qemu=tuple(sorted({one.version for one in instances} - {""})),
        )

    def _libvirt(self, one: LibvirtState, directory: VmDirectory) -> LibvirtFact:
        auto = [name or vm for vm, name in one.autostart if self.policy().groups_of(vm, directory)]
        return LibvirtFact(one.uri, one.problem, one.since, tuple(sorted(auto)))

    def _ports(self, directory: VmDirectory) -> list[PortFact]:
        peers = {(peer.key, peer.port): peer for peer in self.hub().peers}
        found: list[PortFact] = []
        for port in self.ports.served():
            peer = peers.get((port.vm_uuid, port.port.name))
            found.append(
                PortFact(
                    vm=self._who(port.vm_uuid),
                    port=port.port.name,
                    path=port.port.chardev_path,
                    guest_open=port.port.guest_open,
                    connected=peer is not None and peer.connected,
                    grouped=bool(self.policy().groups_of(port.vm_uuid, directory)),
                    software=peer.software if peer is not None else "",
                    problem=peer.detail if peer is not None else "",
                    reconnects=port.port.reconnects,
                )
            )
        return sorted(found, key=lambda port: (port.vm, port.port))

    def _unheard(self, one: Trouble) -> UnheardFact:
        claim = one.claim
        vm = self.registry.name(claim.vm_uuid) or claim.vm_name or claim.vm_uuid
        return UnheardFact(vm, claim.port, claim.path, one.reason, one.remedy)

    def _policy(self, directory: VmDirectory) -> PolicyFact:
        policy, cluster = self.policy(), self.cluster()
        members = [(group, name) for group in policy.groups for name in group.members if not as_vm_uuid(name)]
        claims = [record for record in self.names.records() if record.refused]
        return PolicyFact(
            allows_nobody=policy.allows_nobody,
            standalone=cluster.standalone or cluster.bus is not BusKind.LOCAL,
            unknown_members=tuple(
                (group.name, name) for group, name in members if not directory.bearers(name)
            ),
            doubtful_members=tuple(
                (group.name, name) for group, name in members if len(directory.bearers(name)) > 1
            ),
            unknown_aliases=tuple(
                (alias, name)
                for alias, name in policy.aliases.items()
                if not as_vm_uuid(name) and not directory.bearers(name)
            ),
            refused_names=tuple(
                (self._who(one.vm_uuid), one.node_name, self._holder(one.node_name, one.vm_uuid))
                for one in claims
                if one.node_name not in policy.aliases
            ),
        )

    def _holder(self, node_name: str, claimant: VmUuid) -> str:
        return ", ".join(self._who(vm) for vm in sorted(self.names.holders(node_name) - {claimant}))

    async def _journal(self) -> JournalFact:
        now, boottime = self.wall_clock(), self.clock()
        problem = self.journal_problem()
        if problem and problem != "ok":
            return JournalFact(problem, None, now=now, boottime=boottime)
        newest = await _within(self.journal.operations(1))
        walk = await _within(self.journal.verify())
        at = boottime_at = None
        if newest:
            last = newest[0].last
            at = last.at
            boottime_at = last.boottime if last.boot_id == self.boot_id else None
        return JournalFact(
            problem="" if newest is not None else "it cannot be read",
            verified=walk.ok if walk is not None else None,
            bad=walk.problem if walk is not None else "",
            newest_at=at,
            newest_boottime=boottime_at,
            now=now,
            boottime=boottime,
        )

    def _who(self, vm: VmUuid) -> str:
        return self.registry.name(vm) or vm


async def _within(reading: Awaitable[T]) -> T | None:
    """What the journal says, or None when it does not say it in time."""
    try:
        async with asyncio.timeout(VERIFY_S):
            return await reading
    except (TimeoutError, JournalError):
        return None
