# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps watch over the QEMU processes of this host, whoever started them: found, identified, seen to end.

The processes are the truth: a QEMU of which nothing tells is still an instance, in state UNKNOWN, and can be
ended. Sources (`source.py`) only add what a process does not show.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.ending import Endings
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.process import Candidate, ProcessGone, ProcessTable, VerifiedProcess
from vmchannel_host.hypervisors.scanner import IDENTIFY_S, Scan, Scanner
from vmchannel_host.hypervisors.unknown import UnknownProcesses
from vmchannel_host.model import HostName, ProcessIdentity, UnknownProcess

log = logging.getLogger(__name__)

LISTENING_S = 0.5
"""How long a look waits to learn where unidentified processes listen, in seconds."""

LeadsTo = Callable[[int, tuple[str, ...]], bool]
"""See `Source.leads_to`."""


class ProcessWatch:
    """The processes, and the tasks that follow them. For one event loop."""

    def __init__(self, processes: ProcessTable, *, host: HostName, clock: Callable[[], float]) -> None:
        """
        Args:
            processes: the processes of this host.
            host: this host's name, for the evidence.
            clock: CLOCK_BOOTTIME in seconds.
        """
        self.processes = processes
        self.calls = DetachedCalls()
        self.table = InstanceTable()
        self.endings = Endings(self.table, self.calls, host=host, clock=clock, proc=processes.proc)
        self.rescan = asyncio.Event()  # there is a reason to scan now
        self.stopped = False  # what was watched is forgotten
        self._scanner = Scanner(processes, self.calls, on_late=self.rescan.set)
        self._unknown = UnknownProcesses()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def runs(self) -> bool:
        """Whether `spawn` has somebody to run a task."""
        return self._tasks is not None

    async def run(self, work: Coroutine[object, object, None]) -> None:
        """Watch until cancelled, with `work` beside."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for watched in self.table.all():
                    self._watch_end(watched)
                tasks.create_task(work, name="scan")
        finally:
            self._tasks, self.stopped = None, True
            self.table.close()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run a task as long as the watch runs."""
        assert self._tasks is not None, "nobody runs the watch"
        return self._tasks.create_task(work, name=name)

    async def scan(self, leads_to: LeadsTo, *, timeout_s: float) -> Scan:
        """Find every QEMU process of this host and watch it.

        Raises:
            HypervisorError: /proc does not show all processes, or not in time.
        """
        scan = await self._scanner.scan(self.table.keys(), timeout_s=timeout_s)
        for process in scan.new:
            self.adopt(process, configured=leads_to(process.identity.pid, process.command.sockets))
        self._learn_beside(scan)
        return scan

    async def judge_unknown(self, scan: Scan) -> tuple[UnknownProcess, ...]:
        """What a look has to say of the processes that the scan could not identify (decision 0008)."""
        unknown = scan.unknown
        nothing_known = tuple(UnknownProcess(f"{problem}", frozenset()) for problem in scan.unreadable)
        if not unknown:
            return nothing_known

        def listening() -> dict[Candidate, frozenset[str] | None]:
            return {candidate: self.processes.listens_at(candidate.pid) for candidate in unknown}

        try:
            paths = await self.calls.call("find where processes listen", listening, timeout_s=LISTENING_S)
        except NotProven:
            paths = {}
        return nothing_known + self._unknown.judge(unknown, paths)

    async def identify(self, pid: int, *, timeout_s: float) -> VerifiedProcess:
        """See `Scanner.identify`."""
        return await self._scanner.identify(pid, timeout_s=timeout_s)

    def adopt(self, process: VerifiedProcess, *, configured: bool = True) -> Watched:
        """Watch a process. `configured`: the configuration leads to it."""
        new = self.table.get(process.key) is None
        watched = self.table.adopt(process, configured=configured)
        if new:
            self._watch_end(watched)
        return watched

    def watched(self, identity: ProcessIdentity) -> Watched | None:
        """The entry of that process, if it is watched."""
        watched = self.table.get((identity.pid, identity.start_time))
        return watched if watched is not None and watched.identity == identity else None

    async def find(self, identity: ProcessIdentity, *, timeout_s: float) -> Watched:
        """The watched process of that identity; opened now if it is not watched yet.

        Raises:
            ProcessGone: no such process.
            HypervisorError: the process of that pid and start time is another than the one named.
        """
        watched = self.table.get((identity.pid, identity.start_time))
        if watched is None or identity.boot_id != self.processes.boot_id:
            watched = await self._open(identity, timeout_s)
        if watched.identity != identity:
            named, runs = identity, watched.identity
            raise HypervisorError(
                f"{named} of VM {named.vm_uuid} is named, but {runs} of VM {runs.vm_uuid} runs"
            )
        return watched

    def directory(self, pid: int) -> str:
        """The directory where a process's relative paths start."""
        return _working_directory(self.processes.proc, pid)

    async def _open(self, identity: ProcessIdentity, timeout_s: float) -> Watched:
        if self.processes.absence(identity) is not None:
            raise ProcessGone(f"{identity} has ended")
        try:
            process = await self.identify(identity.pid, timeout_s=min(timeout_s, IDENTIFY_S))
        except NotProven:
            process = self.processes.reopen(identity)  # its command line blocks; it was read before
        if process.key != (identity.pid, identity.start_time):
            process.close()
            raise ProcessGone(f"{identity} has ended; its pid belongs to another process now")
        return self.adopt(process)

    def _watch_end(self, watched: Watched) -> None:
        if self._tasks is not None:
            watched.followed = True
            self._tasks.create_task(self._report_end(watched), name=f"end of pid {watched.identity.pid}")

    async def _report_end(self, watched: Watched) -> None:
        try:
            await self.endings.watch(watched)
            await self.endings.settle(watched)
        except Exception:
            log.exception("cannot report the end of %s", watched.identity)
        finally:
            watched.followed = False
            if watched.evidence is not None:
                watched.drop_storage()

    def _learn_beside(self, scan: Scan) -> None:
        """Which instances live beside the processes that could not be identified."""
        alive: dict[Watched, frozenset[str]] = {}
        if scan.unknown:
            for watched in self.table.all():
                if watched.process.key not in scan.lost and not watched.process.ended():
                    alive[watched] = watched.sockets(self.directory)
        self._unknown.learn(scan.unknown, alive)


def _working_directory(proc: os.PathLike[str], pid: int) -> str:
    """The directory where a process's relative paths start; "/" when it cannot be read."""
    try:
        return os.readlink(os.path.join(proc, str(pid), "cwd"))
    except OSError:
        return "/"
