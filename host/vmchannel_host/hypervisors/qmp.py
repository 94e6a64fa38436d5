# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bare QEMU as a hypervisor: processes from /proc, what they do from QMP, ends through pidfds.

The processes are the truth: a QEMU without a usable monitor is still an instance, in state UNKNOWN, and can
be ended. The monitors only add what a process does not show: run state, migration, ports.
"""

from __future__ import annotations

import asyncio
import fnmatch
import glob
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vmchannel_host.hypervisors import BeforeKill, HypervisorError, HypervisorEvent, NotProven, Plugged
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.ending import Endings
from vmchannel_host.hypervisors.follower import Conflict, SocketFollower, Timings
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.hypervisors.plugging import Plugging
from vmchannel_host.hypervisors.process import (
    Candidate,
    ProcessGone,
    ProcessTable,
    Unidentified,
    VerifiedProcess,
)
from vmchannel_host.hypervisors.qmp_monitor import read_run_state, working_directory
from vmchannel_host.hypervisors.resetting import reset_instance
from vmchannel_host.hypervisors.scanner import IDENTIFY_S, Scan, Scanner
from vmchannel_host.hypervisors.unknown import UnknownProcesses
from vmchannel_host.model import (
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    InstanceReset,
    IoState,
    Look,
    PortName,
    ProcessIdentity,
    UnknownProcess,
    VmUuid,
)

log = logging.getLogger(__name__)

MAX_SOCKETS = 4096
"""QMP sockets followed; further matches of the globs are ignored with a warning."""


LISTENING_S = 0.5
"""How long a look waits to learn where unidentified processes listen, in seconds."""


@dataclass(frozen=True, slots=True)
class QmpSettings:
    """What the configuration says of one `qmp` hypervisor."""

    sockets: tuple[str, ...] = ()  # globs of QMP socket paths
    scan_s: float = 1.0  # between two scans of /proc and the globs; longer when a scan is dear
    ask_s: float = 1.0  # how long a look waits for each monitor
    ports: str = ""  # our directory for the sockets of ports that are plugged in
    timings: Timings = field(default_factory=Timings)


class QmpHypervisor:
    """Implements `Hypervisor` for QEMU processes that nobody else manages."""

    def __init__(
        self,
        settings: QmpSettings,
        *,
        host: HostName,
        processes: ProcessTable,
        launcher: Launcher,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            settings: sockets and timings.
            host: this host's name, for the evidence.
            processes: the processes of this host.
            launcher: runs start commands.
            clock: CLOCK_BOOTTIME in seconds.
        """
        self._settings = settings
        self._host = host
        self._processes = processes
        self._launcher = launcher
        self._clock = clock
        self._calls = DetachedCalls()
        self._table = InstanceTable()
        self._endings = Endings(self._table, self._calls, host=host, clock=clock, proc=processes.proc)
        self._plugging = Plugging(self._table, settings.ports, self._directory, self.look_at_ports)
        self._followers: dict[str, tuple[SocketFollower, asyncio.Task[None]]] = {}
        self._sockets: Mapping[str, tuple[int, int]] = MappingProxyType({})
        self._rescan = asyncio.Event()
        self._scanner = Scanner(processes, self._calls, on_late=self._rescan.set)
        self._unknown = UnknownProcesses()
        self._tasks: asyncio.TaskGroup | None = None
        self._stopped = False
        self._last_problems: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Follow the VMs until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for watched in self._table.all():
                    self._watch_end(watched)
                tasks.create_task(self._scan_forever(), name="scan")
        finally:
            self._tasks, self._stopped = None, True
            self._followers.clear()
            self._table.close()

    def events(self) -> AsyncIterator[HypervisorEvent]:
        """All changes from now on, after one Seen for each live instance. One consumer."""
        return self._table.events()

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """See `Hypervisor`."""
        for follower, _ in self._followers.values():
            follower.look_at_ports(identity)

    def interruptions(self, identity: ProcessIdentity) -> int:
        """See `Hypervisor`."""
        watched = self._table.get((identity.pid, identity.start_time))
        return watched.interruptions if watched is not None and watched.identity == identity else -1

    async def catch_up(self, identity: ProcessIdentity, *, timeout_s: float) -> None:
        """See `Hypervisor`. QEMU writes events and replies in the order in which they happen."""
        watched = self._table.get((identity.pid, identity.start_time))
        if watched is None or watched.identity != identity or watched.monitor is None:
            raise HypervisorError(f"{identity}: no monitor tells what happened to it")
        await read_run_state(watched.monitor, timeout_s=timeout_s)

    async def look(self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True) -> Look:
        """See `Hypervisor.look`. A VM of which nothing can be said is in `silent`.

        Raises:
            HypervisorError: /proc could not be read in time: the look proves nothing.
        """
        began = self._clock()
        deadline = asyncio.get_running_loop().time() + timeout_s
        starting = self._launcher.running()  # before the scan: what has just ended may have forked since
        scan = await self._find_all(timeout_s)
        unknown = await self._judge_unknown(scan)
        if monitors:
            await self._ask(vm, deadline)
        if self._stopped:  # what was watched is forgotten: nothing found would mean nothing
            raise HypervisorError("the hypervisor is not watched any more: the daemon stops")
        live = [watched for watched in self._table.all() if not watched.process.ended()]
        silent = [(vm_uuid, f"{problem}") for problem in scan.problems for vm_uuid in problem.vm_uuids]
        silent.extend(
            (watched.identity.vm_uuid, f"{watched.identity} is no longer recognised as QEMU")
            for watched in live
            if watched.process.key in scan.lost
        )
        silent.extend(
            (vm_uuid, "its start command still runs, or did a moment ago: it may bring an instance")
            for vm_uuid in sorted(
                (starting | self._launcher.running()) - {watched.identity.vm_uuid for watched in live}
            )
        )
        conflicts = [f"{problem}" for problem in scan.problems if self._concerns_us(problem)]
        for conflict in self._monitor_conflicts():
            conflicts.append(f"{conflict}")
            silent.extend((vm_uuid, f"{conflict}") for vm_uuid in conflict.vm_uuids)
        return Look(
            host=self._host,
            at_boottime=began,
            instances=tuple(watched.instance() for watched in live),
            silent=tuple(silent),
            conflicts=(*conflicts, *self._table.conflicts()),
            unknown=unknown,
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
        ended = self._table.ended(identity)
        if ended is not None:
            return ended
        try:
            watched = await self._find(identity, timeout_s)
        except ProcessGone:
            return self._absent(identity, self._processes.absence(identity))
        remaining_s = deadline - asyncio.get_running_loop().time()
        return await self._endings.end(
            watched, quit_timeout_s=quit_timeout_s, timeout_s=remaining_s, before_kill=before_kill
        )

    async def ended(self, identity: ProcessIdentity) -> InstanceEnded | None:
        """How a recorded process has ended, when that is proven; None while it lives. Changes nothing.

        Raises:
            HypervisorError: neither can be said.
        """
        ended = self._table.ended(identity)
        watched = self._table.get((identity.pid, identity.start_time))
        if ended is not None or (watched is not None and watched.identity == identity):
            return ended
        proof = self._processes.absence(identity)
        return None if proof is None else self._absent(identity, proof)

    async def reset(self, identity: ProcessIdentity, *, timeout_s: float) -> InstanceReset:
        """`system_reset` the one running instance and prove it; see `Hypervisor.reset`."""
        watched = self._table.get((identity.pid, identity.start_time))
        if watched is None or watched.identity != identity:
            raise HypervisorError(f"{identity} is not watched here")
        return await reset_instance(watched, host=self._host, clock=self._clock, timeout_s=timeout_s)

    def can_start(self, vm: VmUuid, name: str) -> bool:
        """Whether a start command is configured for that VM."""
        return self._launcher.can_start(vm, name)

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """Run the VM's start command; see `Launcher.start`."""
        await self._launcher.start(vm, name, timeout_s=timeout_s)
        self._rescan.set()

    async def attach_port(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """Plug a port into the running VM; a bare QEMU has no persistent definition (`Plugged.advice`)."""
        return await self._plugging.attach(vm, port, timeout_s=timeout_s)

    async def detach_port(
        self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float
    ) -> Plugged:
        """Take a port away; see `Hypervisor.detach_port`."""
        return await self._plugging.detach(vm, port, force=force, timeout_s=timeout_s)

    async def _find(self, identity: ProcessIdentity, timeout_s: float) -> Watched:
        """The watched process of that identity; opened now if it is not watched yet.

        Raises:
            ProcessGone: no such process.
            HypervisorError: the process of that pid and start time is another than the one named.
        """
        watched = self._table.get((identity.pid, identity.start_time))
        if watched is None or identity.boot_id != self._processes.boot_id:
            watched = await self._open(identity, timeout_s)
        if watched.identity != identity:
            named, runs = identity, watched.identity
            raise HypervisorError(
                f"{named} of VM {named.vm_uuid} is named, but {runs} of VM {runs.vm_uuid} runs"
            )
        return watched

    async def _open(self, identity: ProcessIdentity, timeout_s: float) -> Watched:
        if self._processes.absence(identity) is not None:
            raise ProcessGone(f"{identity} has ended")
        try:
            process = await self._scanner.identify(identity.pid, timeout_s=min(timeout_s, IDENTIFY_S))
        except NotProven:
            process = self._processes.reopen(identity)  # its command line blocks; it was read before
        if process.key != (identity.pid, identity.start_time):
            process.close()
            raise ProcessGone(f"{identity} has ended; its pid belongs to another process now")
        return self._adopt(process)

    def _absent(self, identity: ProcessIdentity, proof: EndProof | None) -> InstanceEnded:
        if proof is None:
            raise NotProven(f"{identity} ended while it was looked at, but a process like it exists")
        return InstanceEnded(
            self._host, identity, proof, EndCause.NONE, IoState.UNPROVEN, departed=False, elapsed_ms=0
        )

    def _adopt(self, process: VerifiedProcess, *, configured: bool = True) -> Watched:
        """`configured`: a configured socket led to it."""
        new = self._table.get(process.key) is None
        watched = self._table.adopt(process, configured=configured)
        if new:
            self._watch_end(watched)
        return watched

    def _watch_end(self, watched: Watched) -> None:
        if self._tasks is not None:
            watched.followed = True
            self._tasks.create_task(self._report_end(watched), name=f"end of pid {watched.identity.pid}")

    async def _report_end(self, watched: Watched) -> None:
        try:
            await self._endings.watch(watched)
            await self._endings.settle(watched)
        except Exception:
            log.exception("cannot report the end of %s", watched.identity)
        finally:
            watched.followed = False
            if watched.evidence is not None:
                watched.drop_storage()

    async def _identify(self, pid: int) -> VerifiedProcess:
        return await self._scanner.identify(pid, timeout_s=self._settings.timings.command_s)

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
            pause_s = max(self._settings.scan_s, 100 * (time.monotonic() - began))
            await asyncio.sleep(0.1)  # however often a monitor comes and goes
            self._rescan.clear()
            try:
                async with asyncio.timeout(min(pause_s, 10.0)):
                    await self._rescan.wait()
            except TimeoutError:
                continue

    async def _find_all(self, timeout_s: float) -> Scan:
        """Processes first, then sockets: a monitor that is found has its process looked for already."""
        scan = await self._scan(timeout_s)
        sockets = await self._calls.call("find sockets", self._find_sockets, timeout_s=timeout_s)
        self._follow_sockets(sockets)
        return scan

    async def _scan(self, timeout_s: float) -> Scan:
        scan = await self._scanner.scan(self._table.keys(), timeout_s=timeout_s)
        for process in scan.new:
            self._adopt(
                process, configured=self._is_configured(process.identity.pid, process.command.sockets)
            )
        self._learn_beside(scan)
        self._report_problems([problem for problem in scan.problems if self._concerns_us(problem)])
        return scan

    def _learn_beside(self, scan: Scan) -> None:
        """Which instances live beside the processes that could not be identified."""
        alive: dict[Watched, frozenset[str]] = {}
        if scan.unknown:
            for watched in self._table.all():
                if watched.process.key not in scan.lost and not watched.process.ended():
                    alive[watched] = watched.sockets(self._directory)
        self._unknown.learn(scan.unknown, alive)

    async def _judge_unknown(self, scan: Scan) -> tuple[UnknownProcess, ...]:
        unknown = scan.unknown
        nothing_known = tuple(UnknownProcess(f"{problem}", frozenset()) for problem in scan.unreadable)
        if not unknown:
            return nothing_known

        def listening() -> dict[Candidate, frozenset[str] | None]:
            return {candidate: self._processes.listens_at(candidate.pid) for candidate in unknown}

        try:
            paths = await self._calls.call("find where processes listen", listening, timeout_s=LISTENING_S)
        except NotProven:
            paths = {}
        return nothing_known + self._unknown.judge(unknown, paths)

    def _concerns_us(self, problem: Unidentified) -> bool:
        """Anybody on this host may run a QEMU without identity; only one behind our sockets is a doubt."""
        return problem.sockets is None or self._is_configured(problem.pid, problem.sockets)

    def _is_configured(self, pid: int, sockets: tuple[str, ...]) -> bool:
        """Whether a socket on a command line is one that the configuration names, there or removed since."""
        if not sockets:
            return False
        directory = "" if all(map(os.path.isabs, sockets)) else working_directory(self._processes.proc, pid)
        paths = [os.path.normpath(os.path.join(directory, path)) for path in sockets]
        return any(_matches_glob(path, pattern) for path in paths for pattern in self._settings.sockets)

    def _report_problems(self, problems: list[Unidentified]) -> None:
        """One line for each new problem, not one for each scan."""
        found = frozenset(f"{problem}" for problem in problems)
        for problem in sorted(found - self._last_problems):
            log.warning("conflict: %s", problem[:500])
        self._last_problems = found

    async def _ask(self, vm: VmUuid | None, deadline: float) -> None:
        """Ask the VM's monitors (None: all) afresh, all at the same time; mute ones together cost `ask_s`."""
        loop = asyncio.get_running_loop()
        followers = [follower for follower, _ in self._followers.values()]
        until = min(deadline, loop.time() + self._settings.ask_s)
        try:
            async with asyncio.timeout_at(until):
                for follower in followers:
                    await follower.attempted.wait()  # a daemon that has just started
        except TimeoutError:
            log.debug("some monitors have not been tried yet")
        timeout_s = min(self._settings.ask_s, max(deadline - loop.time(), 0.05))
        async with asyncio.TaskGroup() as tasks:
            for follower in followers:
                if follower.connected and (vm is None or follower.follows(vm)):
                    tasks.create_task(follower.refresh(timeout_s=timeout_s), name=f"refresh {follower.path}")

    def _monitor_conflicts(self) -> list[Conflict]:
        return [
            follower.conflict for follower, _ in self._followers.values() if follower.conflict is not None
        ]

    def _find_sockets(self) -> dict[str, tuple[int, int]]:
        """Path to (inode, change time) of each QMP socket that the globs match. Blocks."""
        found: dict[str, tuple[int, int]] = {}
        for pattern in self._settings.sockets:
            for path in glob.iglob(pattern):
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                if stat.S_ISSOCK(status.st_mode):
                    found[path] = (status.st_ino, status.st_ctime_ns)
        return found

    def _follow_sockets(self, found: dict[str, tuple[int, int]]) -> None:
        """Start a follower for each new path, drop those whose path is gone and that hold no connection."""
        if self._tasks is None:
            return  # nobody runs us: a look by processes alone
        ports = {port.chardev_path for watched in self._table.all() for port in watched.instance().ports}
        for path in list(self._followers):
            follower, task = self._followers[path]
            if path in found and found[path] != self._sockets.get(path):
                follower.retry_now()
            if task.done() or (path not in found and not follower.connected):
                task.cancel()
                del self._followers[path]
        for path in sorted(found.keys() - self._followers.keys() - ports):
            if len(self._followers) >= MAX_SOCKETS:
                log.warning("more than %d QMP sockets: %r is not followed", MAX_SOCKETS, path)
                break
            follower = self._follower(path)
            self._followers[path] = (follower, self._tasks.create_task(follower.run(), name=f"follow {path}"))
        self._sockets = found

    def _directory(self, pid: int) -> str:
        return working_directory(self._processes.proc, pid)

    def _follower(self, path: str) -> SocketFollower:
        return SocketFollower(
            path,
            self._table,
            identify=self._identify,
            adopt=self._adopt,
            on_close=self._rescan.set,
            directory=self._directory,
            timings=self._settings.timings,
        )


def _matches_glob(path: str, pattern: str) -> bool:
    """As `glob` would match an existing file: a wildcard stands for no slash."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
