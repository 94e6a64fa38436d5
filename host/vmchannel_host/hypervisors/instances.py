# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instances that are watched now: one pidfd each, what was last seen of it, and the changes as events."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace

from vmchannel_host.hypervisors import Ended, HypervisorEvent, Seen
from vmchannel_host.hypervisors.image_locks import OpenStorage
from vmchannel_host.hypervisors.monitors import InstanceMonitor
from vmchannel_host.hypervisors.process import ProcessKey, VerifiedProcess
from vmchannel_host.hypervisors.qmp_state import MonitorFacts, migration_after_event
from vmchannel_host.model import (
    EndCause,
    Instance,
    InstanceEnded,
    IoState,
    Migration,
    ProcessIdentity,
    RunState,
    VmUuid,
)

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Ends that are remembered, and ends that may wait for the consumer; the oldest go first."""


class Watched:
    """One live instance: its process, and what its monitor last said."""

    def __init__(self, process: VerifiedProcess, *, configured: bool = True) -> None:
        self.process = process
        self.configured = configured  # see `Instance.configured`
        self.monitor: InstanceMonitor | None = None
        self.monitored = False  # a monitor was believed once
        self.facts: MonitorFacts | None = None  # kept when the monitor falls silent
        self.connecting = process.command.connecting  # its chardevs that connect, as last known
        self.mute = False
        self.last_migration = Migration.UNKNOWN  # as last watched, also while the monitor is silent
        self.migration_events = 0  # heard so far
        self.interruptions = 0  # see `Instance.interruptions`
        self.shutdown_seen = False  # QEMU said that it leaves by itself
        self.cause = EndCause.NONE  # the strongest thing that we did to it
        self.quit_taken = False  # QEMU has said that it carries out our `quit`
        self.storage_at_kill: OpenStorage | None = None  # what it had open then; closed when it has settled
        self.followed = False  # somebody waits until its writes have settled, if its end did not prove it
        self.evidence: InstanceEnded | None = None
        self.ending = asyncio.Lock()  # held by whoever ends it or concludes that it has ended

    @property
    def identity(self) -> ProcessIdentity:
        return self.process.identity

    @property
    def departed(self) -> bool:
        """Whether the VM may live elsewhere, by the last that was seen of its migration (S1, *departure*)."""
        return self.last_migration in (Migration.OUTGOING, Migration.COMPLETED)

    def instance(self) -> Instance:
        """What is known now. Without an answering monitor the run state is UNKNOWN: on, for all we know."""
        facts = self.facts
        answering = self.monitor is not None and not self.mute and facts is not None
        return Instance(
            identity=self.identity,
            name=self._name(),
            run_state=facts.run_state if facts and answering else RunState.UNKNOWN,
            migration=self.last_migration if answering else Migration.UNKNOWN,
            ports=facts.ports if facts else (),
            version=facts.version if facts else "",
            resettable=bool(facts and answering and facts.resettable and not self._reset_is_no_proof()),
            monitor=self.monitor.path if self.monitor and answering else "",
            configured=self.configured,
            interruptions=self.interruptions,
        )

    def attach(self, monitor: InstanceMonitor) -> None:
        """Believe this monitor from now on. What happened since an earlier one closed, nobody heard."""
        if self.monitored:
            self.interruptions += 1
        self.monitored = True
        self.monitor, self.facts, self.mute = monitor, None, False

    def sockets(self, directory: Callable[[int], str]) -> frozenset[str]:
        """Paths of the unix sockets that it uses, as far as known.

        Args:
            directory: the working directory of a process, where its relative paths begin.
        """
        paths = [*self.process.command.sockets, self.monitor.path if self.monitor else ""]
        paths += [port.chardev_path for port in self.facts.ports] if self.facts else []
        start = "" if all(map(os.path.isabs, filter(None, paths))) else directory(self.identity.pid)
        return frozenset(os.path.normpath(os.path.join(start, path)) for path in paths if path)

    def drop_storage(self) -> None:
        """Close what `storage_at_kill` holds open."""
        if self.storage_at_kill is not None:
            self.storage_at_kill.close()
            self.storage_at_kill = None

    def learn(self, facts: MonitorFacts, *, asked_at: int) -> None:
        """Take a monitor's answers.

        Args:
            facts: the answers.
            asked_at: `migration_events` when they were asked for. What was heard of a migration since then is
                newer, and must not be lost should the process end before it can be asked again.
        """
        if self.migration_events != asked_at:
            facts = replace(facts, migration=self.last_migration)
        self.facts, self.connecting = facts, facts.connecting
        self.mute = False
        self.last_migration = facts.migration

    def learn_state(self, run_state: RunState, migration: Migration, *, asked_at: int) -> None:
        """Take a monitor's answers on these two alone; see `learn`."""
        if self.facts is not None:
            self.learn(replace(self.facts, run_state=run_state, migration=migration), asked_at=asked_at)

    def hear(self, event: str, data: Mapping[str, object]) -> None:
        """Take an event at once: there may be no time for a query before the process is gone."""
        if event == "MIGRATION":
            self.migration_events += 1
            run_state = self.facts.run_state if self.facts else RunState.UNKNOWN
            self.last_migration = migration_after_event(data.get("status"), self.last_migration, run_state)
        elif event == "SHUTDOWN":
            self.shutdown_seen = True
        elif event in ("RESET", "RESUME"):
            self.interruptions += 1
            self.shutdown_seen = False  # -no-shutdown: it had stayed

    def _name(self) -> str:
        if not self.configured:
            return ""
        return (self.facts.name if self.facts else "") or self.process.command.name

    def _reset_is_no_proof(self) -> bool:
        command = self.process.command
        return command.passthrough or command.no_reboot


class EventQueue:
    """Changes for one consumer. Of each live instance only its newest state waits: that is what counts.

    Ends are never merged away; when MAX_REMEMBERED of them wait, the oldest is dropped with a warning: the
    consumer learns of it from the next look.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[ProcessIdentity, bool], HypervisorEvent] = OrderedDict()
        self._arrived = asyncio.Event()
        self._ends = 0

    def put(self, event: HypervisorEvent) -> None:
        """Add a change. Never blocks."""
        identity = event.instance.identity if isinstance(event, Seen) else event.evidence.identity
        ended = isinstance(event, Ended)
        self._waiting[(identity, ended)] = event
        if ended:
            self._ends += 1
            if self._ends > MAX_REMEMBERED:
                self._drop_oldest_end()
        self._arrived.set()

    async def get(self) -> HypervisorEvent:
        """Wait for the next change."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        (_, ended), event = self._waiting.popitem(last=False)
        self._ends -= ended
        return event

    def _drop_oldest_end(self) -> None:
        oldest = next(key for key in self._waiting if key[1])
        del self._waiting[oldest]
        self._ends -= 1
        log.warning("event dropped, nobody reads: end of %s", oldest[0])


class InstanceTable:
    """All watched instances of this host, by process."""

    def __init__(self) -> None:
        self._watched: dict[ProcessKey, Watched] = {}
        self._ended: OrderedDict[ProcessIdentity, InstanceEnded] = OrderedDict()
        self._queue = EventQueue()
        self._last_seen: dict[ProcessKey, Instance] = {}

    def keys(self) -> frozenset[ProcessKey]:
        return frozenset(self._watched)

    def all(self) -> tuple[Watched, ...]:
        return tuple(self._watched.values())

    def get(self, key: ProcessKey) -> Watched | None:
        return self._watched.get(key)

    def adopt(self, process: VerifiedProcess, *, configured: bool = True) -> Watched:
        """Watch a process from now on, or close it when it is watched already. Returns its entry."""
        present = self._watched.get(process.key)
        if present is not None:
            if present.process is not process:
                process.close()
            present.configured = present.configured or configured
            return present
        watched = Watched(process, configured=configured)
        self._watched[process.key] = watched
        self.changed(watched)
        return watched

    def changed(self, watched: Watched) -> None:
        """Tell the consumer, unless nothing is new."""
        key = watched.process.key
        instance = watched.instance()
        if watched.evidence is None and key in self._watched and self._last_seen.get(key) != instance:
            self._last_seen[key] = instance
            self._queue.put(Seen(instance))

    def conclude(self, watched: Watched, evidence: InstanceEnded) -> None:
        """The instance has ended: remember how, tell the consumer, give the pidfd back."""
        watched.evidence = evidence
        self._watched.pop(watched.process.key, None)
        self._last_seen.pop(watched.process.key, None)
        self._ended[watched.identity] = evidence
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)
        self._queue.put(Ended(evidence))
        if evidence.io is not IoState.UNPROVEN or not watched.followed:
            watched.drop_storage()
        watched.process.close()

    def settled(self, watched: Watched) -> None:
        """The last writes of an instance that has ended are known to have settled since."""
        if watched.evidence is not None:
            watched.evidence = replace(watched.evidence, io=IoState.SETTLED)
            self._ended[watched.identity] = watched.evidence
            self._queue.put(Ended(watched.evidence))

    def ended(self, identity: ProcessIdentity) -> InstanceEnded | None:
        """How an instance ended that was watched here, as long as it is remembered."""
        return self._ended.get(identity)

    def events(self) -> AsyncIterator[HypervisorEvent]:
        """The changes from now on, after one Seen for each live instance. A later call takes over."""
        queue = EventQueue()
        self._queue = queue
        self._last_seen.clear()
        for watched in self.all():
            self.changed(watched)
        return _drain(queue)

    def close(self) -> None:
        """Give all pidfds back."""
        for watched in self._watched.values():
            watched.drop_storage()
            watched.process.close()
        self._watched.clear()
        self._last_seen.clear()

    def conflicts(self) -> tuple[str, ...]:
        """One UUID with two names that no watched migration joins (S9)."""
        names: dict[VmUuid, set[str]] = {}
        for watched in self.all():
            name = watched.instance().name
            if name and watched.last_migration in (Migration.NONE, Migration.UNKNOWN):
                names.setdefault(watched.identity.vm_uuid, set()).add(name)
        return tuple(
            f"VM {vm_uuid} has {len(found)} names: {', '.join(repr(name[:100]) for name in sorted(found))}"
            for vm_uuid, found in names.items()
            if len(found) > 1
        )


async def _drain(queue: EventQueue) -> AsyncIterator[HypervisorEvent]:
    while True:
        yield await queue.get()
