# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds and identifies the QEMU processes of this host; one whose identification hangs holds up nobody (S7).

A scan lists /proc in one call, which blocks on no process, and identifies each new process in a call of its
own. Reading a command line can block for as long as a hung process holds its memory map: then its call stays
behind, one for each process, and the process is a problem that the scan reports until the call returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.process import (
    Candidate,
    NotAVm,
    ProcessGone,
    ProcessKey,
    ProcessTable,
    Sieve,
    Unidentified,
    VerifiedProcess,
)

MAX_ROUNDS = 8
"""How often a scan lists /proc: a QEMU forks twice, and others that come and go must not hold it up."""

MAX_IDENTIFYING = 32
"""Identifications under way at one time, hung ones included."""

IDENTIFY_S = 1.0
"""How long a scan waits for the identification of a new process, in seconds; it takes under a millisecond."""


def _new_processes() -> list[VerifiedProcess]:
    return []


def _no_keys() -> set[ProcessKey]:
    return set()


def _no_problems() -> list[Unidentified]:
    return []


def _no_candidates() -> dict[Candidate, Unidentified]:
    return {}


@dataclass(slots=True)
class Scan:
    """What one scan found. Its reader owns the new processes."""

    new: list[VerifiedProcess] = field(default_factory=_new_processes)
    lost: set[ProcessKey] = field(default_factory=_no_keys)  # those given as known and not seen again
    problems: list[Unidentified] = field(default_factory=_no_problems)
    unreadable: list[Unidentified] = field(default_factory=_no_problems)  # nothing at all is known of them
    unknown: dict[Candidate, Unidentified] = field(default_factory=_no_candidates)  # those that are `anyones`

    def close(self) -> None:
        """Give back the pidfds of the new processes, when nobody takes them over."""
        for process in self.new:
            process.close()


class Scanner:
    """The processes of this host, seen without waiting long for any of them. For one event loop."""

    def __init__(
        self,
        processes: ProcessTable,
        calls: DetachedCalls,
        *,
        on_late: Callable[[], None] = lambda: None,
        identify_s: float = IDENTIFY_S,
        limit: int = MAX_IDENTIFYING,
    ) -> None:
        """
        Args:
            processes: the processes of this host.
            calls: for the listing of /proc. Identifications have threads of their own.
            on_late: called when one has ended that nobody waited for any more: a scan now learns more.
            identify_s: how long a scan waits for a new process, seconds.
            limit: identifications under way at one time.
        """
        self._processes = processes
        self._calls = calls
        self._identifications = DetachedCalls(limit)
        self._places = asyncio.Semaphore(limit)
        self._running: dict[ProcessKey, asyncio.Future[None]] = {}
        self._overdue: set[ProcessKey] = set()
        self._on_late = on_late
        self._identify_s = identify_s

    async def scan(self, known: frozenset[ProcessKey], *, timeout_s: float) -> Scan:
        """Find every QEMU process.

        A QEMU that becomes a daemon forks and leaves, maybe between the listing and its turn: while one that
        was listed is gone at its turn, what began since is looked at too.

        Raises:
            HypervisorError: /proc does not show all processes, or not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        scan = Scan(lost=set(known))
        listed: frozenset[int] = frozenset()
        try:
            for _ in range(MAX_ROUNDS):
                sieve = await self._sieve(known, listed, deadline)
                listed |= sieve.pids
                scan.lost -= sieve.seen
                scan.problems += sieve.unreadable
                scan.unreadable += sieve.unreadable
                gone = await self._identify_all(sieve.candidates, deadline, scan)
                if not (sieve.vanished or gone):
                    break
        except BaseException:
            scan.close()
            raise
        return scan

    async def identify(self, pid: int, *, timeout_s: float) -> VerifiedProcess:
        """Open a pidfd, then identify the process; see `ProcessTable.open`. Its caller owns it.

        Raises:
            ProcessGone: it does not exist, or ended meanwhile.
            NotAVm: its executable is another one.
            Unidentified: it is a QEMU without an unambiguous UUID, or cannot be read.
            NotProven: not in time: its memory map may be held, or too many others hang.
        """
        key = self._processes.key_of(pid)
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._wait_for_place(key)
        except TimeoutError as error:
            raise NotProven(f"pid {pid} could not be identified in {timeout_s:.3g} s") from error
        return await self._begin(key, deadline - asyncio.get_running_loop().time())

    async def _sieve(self, known: frozenset[ProcessKey], earlier: frozenset[int], deadline: float) -> Sieve:
        left_s = deadline - asyncio.get_running_loop().time()
        return await self._calls.call(
            "list /proc", lambda: self._processes.sieve(known, earlier), timeout_s=left_s
        )

    async def _identify_all(self, candidates: list[Candidate], deadline: float, scan: Scan) -> bool:
        """Identify them all at the same time; says whether one was gone."""
        left_s = deadline - asyncio.get_running_loop().time()
        timeout_s = max(0.0, min(self._identify_s, left_s))
        async with asyncio.TaskGroup() as tasks:
            found = [
                tasks.create_task(self._identify_one(one, timeout_s, scan), name=f"identify pid {one.pid}")
                for one in candidates
            ]
        return any(task.result() for task in found)

    async def _identify_one(self, candidate: Candidate, timeout_s: float, scan: Scan) -> bool:
        """Returns whether it was gone."""
        try:
            if candidate.key in self._overdue:
                raise NotProven("its identification has not returned yet")
            scan.new.append(await self.identify(candidate.pid, timeout_s=timeout_s))
        except ProcessGone:
            return True
        except NotAVm:
            return False
        except Unidentified as problem:
            _note(scan, candidate, problem)
        except HypervisorError:
            reason = f"pid {candidate.pid} may be a QEMU, but its command line cannot be read"
            _note(scan, candidate, Unidentified(reason, pid=candidate.pid, anyones=True))
        return False

    async def _wait_for_place(self, key: ProcessKey) -> None:
        """Wait until a call for it may begin: one for each process, `limit` in all."""
        while True:
            while (running := self._running.get(key)) is not None:
                await asyncio.wait((running,))
            await self._places.acquire()
            if key not in self._running:
                return
            self._places.release()

    async def _begin(self, key: ProcessKey, timeout_s: float) -> VerifiedProcess:
        """Identify it in a call of its own, which may outlive this one; a place was acquired for it."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def returned() -> None:
            self._places.release()
            del self._running[key]
            over.set_result(None)
            if key in self._overdue:
                self._overdue.discard(key)
                self._on_late()

        self._running[key] = over
        try:
            return await self._identifications.call(
                f"identify pid {key[0]}",
                lambda: self._processes.open(key[0]),
                timeout_s=timeout_s,
                discard=VerifiedProcess.close,
                on_return=returned,
            )
        except NotProven:
            if key in self._running:
                self._overdue.add(key)
            raise


def _note(scan: Scan, candidate: Candidate, problem: Unidentified) -> None:
    scan.problems.append(problem)
    if problem.anyones:
        scan.unknown[candidate] = problem
