# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one hypervisor of a host: its QEMU processes, described by any number of sources (decision 0012).

A process belongs to the host, not to the entry of the configuration that knows it: whoever describes it, or
nobody, it is found, counted and ended the same way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from vmchannel_host.hypervisors import (
    BeforeKill,
    CannotStart,
    Definitions,
    HypervisorError,
    HypervisorEvent,
    NotProven,
    Plugged,
)
from vmchannel_host.hypervisors.pluggers import Definer, Pluggers
from vmchannel_host.hypervisors.plugging import Plugging
from vmchannel_host.hypervisors.process import ProcessGone, ProcessTable, Unidentified
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.resetting import reset_instance
from vmchannel_host.hypervisors.scanner import Scan
from vmchannel_host.hypervisors.source import Conflict, LibvirtState, Source, Starter
from vmchannel_host.model import (
    DefinedPort,
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    InstanceReset,
    IoState,
    Look,
    PortName,
    ProcessIdentity,
    VmUuid,
)

log = logging.getLogger(__name__)

FollowDefinedPorts = Callable[[Callable[[tuple[DefinedPort, ...]], None]], None]
"""Has a function called with all the ports, now and at each change."""

NO_DEFINITIONS: Mapping[str, FollowDefinedPorts] = MappingProxyType({})

SCAN_S = 1.0
"""Between two scans of /proc, in seconds; longer when a scan is dear."""


class HostHypervisor:
    """Implements `Hypervisor`."""

    def __init__(
        self,
        watch: ProcessWatch,
        sources: Sequence[Source],
        starters: Sequence[Starter],
        *,
        host: HostName,
        clock: Callable[[], float],
        ports: str,
        definers: Sequence[Definer] = (),
        libvirts: Sequence[Callable[[], LibvirtState]] = (),
        defined_ports: Mapping[str, FollowDefinedPorts] = NO_DEFINITIONS,
        scan_s: float = SCAN_S,
    ) -> None:
        """
        Args:
            watch: the processes of this host.
            sources: what tells of them.
            starters: what starts VMs. The first one is the configuration's own word: where it can start a
                VM the others are not asked.
            host: this host's name, for the evidence.
            clock: CLOCK_BOOTTIME in seconds.
            ports: our directory for the sockets of ports that are plugged into bare QEMUs.
            definers: what defines VMs, and plugs ports into those.
            libvirts: how it stands with each libvirt among the sources.
            defined_ports: by the name of who defines them, how to follow the ports to which QEMUs will
                connect.
            scan_s: between two scans, seconds.
        """
        self._watch = watch
        self._sources = tuple(sources)
        self._starters = tuple(starters)
        self._host = host
        self._clock = clock
        self._libvirts = tuple(libvirts)
        self._defined_ports = dict(defined_ports)
        self._scan_s = scan_s
        bare = Plugging(watch.table, ports, watch.directory, self.look_at_ports)
        self._pluggers = Pluggers(watch.table, bare, definers)
        self._last_problems: frozenset[str] = frozenset()

    @property
    def processes(self) -> ProcessTable:
        """The processes of this host."""
        return self._watch.processes

    def libvirts(self) -> tuple[LibvirtState, ...]:
        """How it stands with each configured libvirt. Reads memory only."""
        return tuple(state() for state in self._libvirts)

    def follow_defined_ports(self, tell: Callable[[str, tuple[DefinedPort, ...]], None]) -> None:
        """Tell which ports are defined whose QEMUs will connect: all of one definer's, at each change."""
        for definer, follow in self._defined_ports.items():
            follow(partial(tell, definer))

    async def run(self) -> None:
        """Follow the VMs until cancelled."""
        await self._watch.run(self._scan_forever())

    def events(self) -> AsyncIterator[HypervisorEvent]:
        """All changes from now on, after one Seen for each live instance. One consumer."""
        return self._watch.table.events()

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """See `Hypervisor`."""
        for source in self._sources:
            source.look_at_ports(identity)

    def interruptions(self, identity: ProcessIdentity) -> int:
        """See `Hypervisor`."""
        watched = self._watch.watched(identity)
        return watched.interruptions if watched is not None else -1

    async def catch_up(self, identity: ProcessIdentity, *, timeout_s: float) -> None:
        """See `Hypervisor`."""
        watched = self._watch.watched(identity)
        if watched is None or watched.monitor is None:
            raise HypervisorError(f"{identity}: no monitor tells what happened to it")
        await watched.monitor.run_state(timeout_s=timeout_s)

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        """See `Hypervisor.look`. A VM of which nothing can be said is in `silent`.

        Raises:
            HypervisorError: /proc could not be read in time: the look proves nothing.
        """
        began = self._clock()
        deadline = asyncio.get_running_loop().time() + timeout_s
        starting = self._starting()  # before the scan: what has just ended may have forked since
        scan = await self._find_all(timeout_s)
        unknown = await self._watch.judge_unknown(scan)
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(source.ask(vm, deadline=deadline), name="ask")
                for source in self._sources
                if monitors
            ]
        answers = [one.result() for one in asked]
        if self._watch.stopped:  # what was watched is forgotten: nothing found would mean nothing
            raise HypervisorError("the hypervisor is not watched any more: the daemon stops")
        live = [watched for watched in self._watch.table.all() if not watched.process.ended()]
        alive = {watched.identity.vm_uuid for watched in live}
        silent = [(vm_uuid, f"{problem}") for problem in scan.problems for vm_uuid in problem.vm_uuids]
        silent.extend(
            (watched.identity.vm_uuid, f"{watched.identity} is no longer recognised as QEMU")
            for watched in live
            if watched.process.key in scan.lost
        )
        silent.extend(
            (vm_uuid, "its start command still runs, or did a moment ago: it may bring an instance")
            for vm_uuid in sorted((starting | self._starting()) - alive)
        )
        silent.extend(one for answer in answers for one in answer.silent)
        conflicts = [f"{problem}" for problem in scan.problems if self._concerns_us(problem)]
        for conflict in self._conflicts():
            conflicts.append(f"{conflict}")
            silent.extend((vm_uuid, f"{conflict}") for vm_uuid in conflict.vm_uuids)
        return Look(
            host=self._host,
            at_boottime=began,
            instances=tuple(watched.instance() for watched in live),
            silent=tuple(silent),
            conflicts=(*conflicts, *self._watch.table.conflicts()),
            unknown=(*unknown, *(one for answer in answers for one in answer.unknown)),
        )

    async def off(
        self,
        identity: ProcessIdentity,
        *,
        quit_timeout_s: float,
        timeout_s: float,
        before_kill: BeforeKill | None = None,
    ) -> InstanceEnded:
        """End one instance; see `Hypervisor.off`.

        An end that was not watched here is proven by absence; it then says nothing of a departure or of late
        writes, and the caller has to hold what it knew of the process against it.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        ended = self._watch.table.ended(identity)
        if ended is not None:
            return ended
        try:
            watched = await self._watch.find(identity, timeout_s=timeout_s)
        except ProcessGone:
            return self._absent(identity, self.processes.absence(identity))
        remaining_s = deadline - asyncio.get_running_loop().time()
        return await self._watch.endings.end(
            watched, quit_timeout_s=quit_timeout_s, timeout_s=remaining_s, before_kill=before_kill
        )

    async def ended(self, identity: ProcessIdentity) -> InstanceEnded | None:
        """How a recorded process has ended, when that is proven; None while it lives. Changes nothing.

        Raises:
            HypervisorError: neither can be said.
        """
        ended = self._watch.table.ended(identity)
        if ended is not None or self._watch.watched(identity) is not None:
            return ended
        proof = self.processes.absence(identity)
        return None if proof is None else self._absent(identity, proof)

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """See `Hypervisor.discard_memory`."""
        async with asyncio.TaskGroup() as tasks:
            done = [
                tasks.create_task(source.discard_memory(vm, timeout_s=timeout_s), name="discard")
                for source in self._sources
            ]
        return tuple(line for one in done for line in one.result())

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        """`system_reset` the one running instance and prove it; see `Hypervisor.reset`."""
        watched = self._watch.watched(identity)
        if watched is None:
            raise HypervisorError(f"{identity} is not watched here")
        return await reset_instance(watched, host=self._host, clock=self._clock, timeout_s=timeout_s)

    def can_start(self, vm: VmUuid, name: str) -> bool:
        """Whether there is a way to start that VM."""
        return any(starter.can_start(vm, name) for starter in self._starters)

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """Start the VM by the one way that there is.

        Raises:
            CannotStart: there is none, or more than one, or it failed.
        """
        own, *others = self._starters
        able = [own] if own.can_start(vm, name) else [one for one in others if one.can_start(vm, name)]
        if len(able) > 1:
            raise CannotStart(f"VM {vm} is defined in {' and in '.join(map(str, able))}: undefine it in one")
        await (able or [own])[0].start(vm, name, timeout_s=timeout_s)
        self._watch.rescan.set()

    def definitions(self) -> Definitions:
        """See `Hypervisor`."""
        return self._pluggers.definitions()

    async def attach_port(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """See `Hypervisor.attach_port`."""
        return await self._pluggers.of(vm).attach(vm, port, timeout_s=timeout_s)

    async def detach_port(
        self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float
    ) -> Plugged:
        """See `Hypervisor.detach_port`."""
        return await self._pluggers.of(vm).detach(vm, port, force=force, timeout_s=timeout_s)

    def _absent(self, identity: ProcessIdentity, proof: EndProof | None) -> InstanceEnded:
        if proof is None:
            raise NotProven(f"{identity} ended while it was looked at, but a process like it exists")
        return InstanceEnded(
            self._host, identity, proof, EndCause.NONE, IoState.UNPROVEN, departed=False, elapsed_ms=0
        )

    async def _scan_forever(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._find_all(30.0)
            except HypervisorError as error:
                log.error("cannot see the host's processes: %s", error)
            except Exception:
                log.exception("scan failed")
            # On a host with thousands of processes a scan may cost at most 1 % of a core.
            pause_s = max(self._scan_s, 100 * (time.monotonic() - began))
            await asyncio.sleep(0.1)  # however often a monitor comes and goes
            self._watch.rescan.clear()
            try:
                async with asyncio.timeout(min(pause_s, 10.0)):
                    await self._watch.rescan.wait()
            except TimeoutError:
                continue

    async def _find_all(self, timeout_s: float) -> Scan:
        """Processes first, then what tells of them: a monitor that is found has its process looked for."""
        scan = await self._watch.scan(self._leads_to, timeout_s=timeout_s)
        self._report_problems([problem for problem in scan.problems if self._concerns_us(problem)])
        for source in self._sources:
            await source.find(timeout_s=timeout_s)
        return scan

    def _starting(self) -> frozenset[VmUuid]:
        return frozenset[VmUuid]().union(*(starter.running() for starter in self._starters))

    def _leads_to(self, pid: int, sockets: tuple[str, ...]) -> bool:
        return any(source.leads_to(pid, sockets) for source in self._sources)

    def _concerns_us(self, problem: Unidentified) -> bool:
        """Anybody on this host may run a QEMU without identity; only one behind our sockets is a doubt."""
        return problem.sockets is None or self._leads_to(problem.pid, problem.sockets)

    def _report_problems(self, problems: list[Unidentified]) -> None:
        """One line for each new problem, not one for each scan."""
        found = frozenset(f"{problem}" for problem in problems)
        for problem in sorted(found - self._last_problems):
            log.warning("conflict: %s", problem[:500])
        self._last_problems = found

    def _conflicts(self) -> list[Conflict]:
        return [conflict for source in self._sources for conflict in source.conflicts()]
