# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of one VM's processes: those that may live, and how the others ended (S1).

Pure. A proof of an end stands until the VM is seen to live in another process; then it is history. A
departure is such a proof that says at the same time: the VM may live elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vmchannel_host.journal.types import LIVED, KnownInstance
from vmchannel_host.model import (
    EndCause,
    EndProof,
    HostName,
    Instance,
    InstanceEnded,
    IoState,
    ProcessIdentity,
)
from vmchannel_host.registry.instance_state import (
    EXECUTING,
    LEAVING,
    ImpossibleTransition,
    InstanceState,
    Observation,
    advance,
    from_migration,
    observe,
    to_migration,
)

KEPT_ENDS = 8
"""Ended processes kept in memory for each VM: enough to know late reports of them. The journal keeps all."""

FORK_TICKS = 200
"""A QEMU with `-daemonize` forks itself within this time after its start; in clock ticks of 10 ms."""


@dataclass(slots=True)
class Process:
    """One process that runs or ran the VM. Only `VmHistory` changes it."""

    host: HostName
    identity: ProcessIdentity
    order: int  # of its first record among all events of the VM
    name: str = ""
    state: InstanceState = InstanceState.UNWATCHED
    instance: Instance | None = None  # last report; None: not seen since the daemon began
    arrived: bool = False  # it was watched as the destination of a migration
    contradiction: str = ""  # a report that its state does not allow
    evidence: InstanceEnded | None = None  # proof of its end
    ended_as: InstanceState = InstanceState.UNWATCHED  # its state before the end
    ended_order: int = 0
    superseded: bool = False  # the VM was seen to live elsewhere on this host since
    confirmed_by: str = ""  # the operator who said after its end that the VM is off; "" when nobody did

    def departure(self, *, standalone: bool) -> str | None:
        """Why the VM may live elsewhere since this process ended (S1), or None."""
        if self.evidence is None or self.superseded or self.confirmed_by:
            return None
        who = f"pid {self.identity.pid} on {self.host}"
        if self.evidence.departed:
            handed = self.ended_as in (InstanceState.POSTMIGRATE, InstanceState.RESUMED)
            return f"{who} had handed the VM over" if handed else f"{who} ended during a migration of the VM"
        if standalone:
            return None
        if self.evidence.proof is not EndProof.PIDFD:
            return f"nobody watched the end of {who}, and another host could run the VM (cluster.standalone)"
        if self.ended_as is InstanceState.UNWATCHED:
            return f"the monitor of {who} never answered: a migration of the VM cannot be excluded"
        if self.ended_as is InstanceState.INCOMING:
            return f"{who} was still receiving the VM, which may live on at the source"
        return None


class VmHistory:
    """The processes of one VM."""

    def __init__(self) -> None:
        self._processes: dict[ProcessIdentity, Process] = {}  # in the order of their first record
        self._events = 0  # numbers first records and ends

    def restore(self, rows: Sequence[KnownInstance]) -> None:
        """Take the VM's remembered processes, oldest first; once, before anything else.

        What came first is told by wall time, the only clock that the records of several boots share. An end
        and a first sight at one time count as if the end came last: it stands, which makes a claim harder.
        """
        order = self._order(rows)
        ran = [number for row, (number, _) in zip(rows, order, strict=True) if row.migration in LIVED]
        for row, (first, ended) in zip(rows, order, strict=True):
            process = Process(row.host, row.identity, first, row.name, from_migration(row.migration))
            process.arrived = process.state is InstanceState.INCOMING
            if row.end is not None:
                self._finish(process, row.end, ended)
                process.superseded = max(ran, default=0) > ended
                process.confirmed_by = row.confirmed_by
            self._processes[row.identity] = process
        for process in self._processes.values():
            self._explain_fork(process)
        self._forget_old()

    def see(self, host: HostName, instance: Instance) -> Process | None:
        """Take a report; return the process when something durable about it changed."""
        process = self._processes.get(instance.identity)
        is_new = process is None
        if process is None:
            process = Process(host, instance.identity, self._next())
            self._processes[instance.identity] = process
        if process.state is InstanceState.GONE:
            return None  # the report was under way when the end was proven
        before = process.name, to_migration(process.state), process.identity.pid_namespace
        process.identity = instance.identity  # equal, but its record may lack the namespace
        was_executing = process.state in EXECUTING and process.instance is not None
        self._observe(process, instance)
        if process.state in EXECUTING and not was_executing:
            self._supersede(process)
        self._explain_fork(process)
        after = process.name, to_migration(process.state), process.identity.pid_namespace
        return process if is_new or before != after else None

    def end(self, evidence: InstanceEnded) -> InstanceEnded | None:
        """Take the proof of an end; return what is to be remembered, None when it is nothing new."""
        process = self._processes.get(evidence.identity)
        if process is None:
            process = Process(evidence.host, evidence.identity, self._next())
            self._processes[evidence.identity] = process
        known = process.evidence
        if known is not None:
            # A second proof can settle the I/O or add a departure, never take one back.
            io = evidence.io if known.io is IoState.UNPROVEN else known.io
            process.evidence = replace(known, io=io, departed=known.departed or evidence.departed)
            return process.evidence if process.evidence != known else None
        evidence = replace(evidence, departed=evidence.departed or process.state in LEAVING)
        self._finish(process, evidence, self._next())
        process.superseded = self._lives_on(process) or any(_forked(process, one) for one in self.unproven())
        self._forget_old()
        return process.evidence

    def confirm_off(self, by: str, covered: frozenset[ProcessIdentity]) -> None:
        """The operator says that nothing is left of these processes of the VM, which have ended.

        An end that is proven later is not covered, nor is a process that is unproven (S1).
        """
        for process in self._gone():
            if process.identity in covered and not process.confirmed_by:
                process.confirmed_by = by

    def unproven(self) -> list[Process]:
        """Processes whose end is not proven, in the order of their first record."""
        return [process for process in self._processes.values() if process.state is not InstanceState.GONE]

    def ends(self) -> tuple[InstanceEnded, ...]:
        """Proofs that stand, oldest first."""
        standing = sorted(self._standing(), key=lambda process: process.ended_order)
        return tuple(process.evidence for process in standing if process.evidence is not None)

    def confirmed(self) -> tuple[tuple[InstanceEnded, str], ...]:
        """Ends behind which the operator's word stands instead of proof, oldest first, with who gave it."""
        words = [one for one in self._gone() if one.confirmed_by and not one.superseded]
        words.sort(key=lambda process: process.ended_order)
        return tuple((one.evidence, one.confirmed_by) for one in words if one.evidence is not None)

    def departure(self, *, standalone: bool) -> str | None:
        """Why the VM may live elsewhere, by its latest departure; None when it has not left."""
        for process in sorted(self._standing(), key=lambda process: process.ended_order, reverse=True):
            reason = process.departure(standalone=standalone)
            if reason is not None:
                return reason
        return None

    def names(self) -> frozenset[str]:
        """Names of the unproven processes; when there are none, the last name that was told."""
        names = frozenset(process.name for process in self.unproven() if process.name)
        last = self.name()
        return names or (frozenset({last}) if last else frozenset())

    def name(self) -> str:
        """The name of the latest process that told one, unproven ones first; "" when none did."""
        for processes in (self.unproven(), list(self._processes.values())):
            for process in reversed(processes):
                if process.name:
                    return process.name
        return ""

    def _observe(self, process: Process, instance: Instance) -> None:
        try:
            process.state = advance(process.state, observe(instance))
            process.contradiction = ""
        except ImpossibleTransition as error:
            process.contradiction = str(error)
        process.instance = instance
        process.name = instance.name or process.name
        process.arrived = process.arrived or process.state is InstanceState.INCOMING

    def _finish(self, process: Process, evidence: InstanceEnded, order: int) -> None:
        process.ended_as = process.state
        process.state = advance(process.state, Observation.ENDS)
        process.evidence = evidence
        process.ended_order = order

    def _order(self, rows: Sequence[KnownInstance]) -> list[tuple[int, int]]:
        """Numbers for each row's first sight and end, in the order of their times."""
        never = float("inf")
        times = [(row.first_seen, 0, index) for index, row in enumerate(rows)]
        times += [
            (never if row.ended_at is None else row.ended_at, 1, index) for index, row in enumerate(rows)
        ]
        numbers = {(what, index): self._next() for _, what, index in sorted(times)}
        return [(numbers[0, index], numbers[1, index]) for index in range(len(rows))]

    def _supersede(self, living: Process) -> None:
        """The VM is seen to live in a process: earlier ends are history.

        A process that was there already when the other left, and was not watched to receive it, may be a
        second copy: it is no sign that the VM that left is here.
        """
        for process in self._gone():
            if living.arrived or living.order > process.ended_order:
                process.superseded = True

    def _lives_on(self, ended: Process) -> bool:
        """Whether the VM of a process that just ended was seen to live in another one already."""
        others = [one for one in self.unproven() if one.instance is not None and one.state in EXECUTING]
        if ended.ended_as is InstanceState.INCOMING:
            return bool(others)  # a migration that failed: its source lives
        return any(one.arrived and one.order > ended.order for one in others)

    def _explain_fork(self, living: Process) -> None:
        for process in self._gone():
            process.superseded = process.superseded or _forked(process, living)

    def _gone(self) -> Iterable[Process]:
        return (process for process in self._processes.values() if process.state is InstanceState.GONE)

    def _standing(self) -> list[Process]:
        return [one for one in self._gone() if not one.superseded and not one.confirmed_by]

    def _forget_old(self) -> None:
        """Bound what a VM that restarts for ever costs.

        The latest departure always stays, and what we killed while its writes stay unproven until the VM is
        seen to live: a start that fails because the dead one still holds the disk must not outweigh it (S1).
        """
        gone = sorted(self._gone(), key=lambda process: process.ended_order)
        departed = [process for process in gone if process.departure(standalone=False) is not None]
        for process in gone[:-KEPT_ENDS]:
            if process in departed[-1:] or _unsettled_kill(process):
                continue
            if process is not self._named_last():
                del self._processes[process.identity]

    def _named_last(self) -> Process | None:
        return next((one for one in reversed(self._processes.values()) if one.name), None)

    def _next(self) -> int:
        self._events += 1
        return self._events


def _unsettled_kill(process: Process) -> bool:
    end = process.evidence
    stands = not process.superseded and not process.confirmed_by
    return stands and end is not None and end.cause is not EndCause.NONE and end.io is IoState.UNPROVEN


def _forked(gone: Process, living: Process) -> bool:
    """Whether `gone` only forked `living`, whose monitor answers, and waited until that one had begun.

    So a QEMU with `-daemonize` comes to be: two processes for a moment, of which the first never has an image
    open. Anybody else's end, ours or one in a migration, is never explained away by this.
    """
    end, first, second = gone.evidence, gone.identity, living.identity
    if end is None or end.departed or end.cause is not EndCause.NONE or gone.host != living.host:
        return False
    now = living.ended_as if living.state is InstanceState.GONE else living.state
    silent = gone.ended_as is InstanceState.UNWATCHED and now is not InstanceState.UNWATCHED
    together = first.boot_id == second.boot_id and 0 <= second.start_time - first.start_time <= FORK_TICKS
    return silent and together and first != second
