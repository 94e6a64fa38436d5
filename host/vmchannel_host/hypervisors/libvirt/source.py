# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt as a source and a starter: what its domains do, and what could be continued of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

from vmchannel_host.hypervisors import CannotStart, HypervisorError, NotProven
from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.libvirt import words
from vmchannel_host.hypervisors.libvirt.connection import Connection, Patience
from vmchannel_host.hypervisors.libvirt.defined_ports import DefinedPorts
from vmchannel_host.hypervisors.libvirt.followed import Followed
from vmchannel_host.hypervisors.libvirt.link import (
    DomainChanged,
    LibvirtEvent,
    Lifecycle,
    Link,
    MonitorEvent,
    NoSuchDomain,
    OpenLink,
)
from vmchannel_host.hypervisors.libvirt.managed_saves import ManagedSaves
from vmchannel_host.hypervisors.libvirt.monitor import LibvirtMonitor
from vmchannel_host.hypervisors.libvirt.probes import NoPlace, Probes
from vmchannel_host.hypervisors.libvirt.words import DomainRecord
from vmchannel_host.hypervisors.monitors import MonitorMute
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.source import Answer, Conflict, LibvirtState
from vmchannel_host.model import Migration, ProcessIdentity, RunState, UnknownProcess, VmUuid

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ENDED: Final = 4096
"""Executions that are remembered to have ended."""

RETRY_S: Final = 1.0
"""When libvirt is asked again that did not answer, in seconds."""

SAVES_S: Final = 1.0
"""How long a look at the images on the disk may take, in seconds."""


@dataclass(frozen=True, slots=True)
class LibvirtSettings:
    """What the configuration says of one `libvirt` entry."""

    uri: str
    saves: Path  # where this libvirt keeps managed saves
    patience: Patience = field(default_factory=Patience)


class LibvirtSource:
    """Implements `Source` and `Starter`."""

    def __init__(
        self,
        settings: LibvirtSettings,
        watch: ProcessWatch,
        open_link: OpenLink,
        *,
        wall_clock: Callable[[], float],
    ) -> None:
        self.uri = settings.uri
        self._patience = settings.patience
        self._watch = watch
        self._wall_clock = wall_clock
        self._connection = Connection(settings.uri, open_link, self._on_event, wall_clock)
        self._saves = ManagedSaves(self._connection, settings.saves, watch.calls)
        self._probes = Probes()
        self.defined_ports = DefinedPorts(self.call_link)
        self._domains: dict[VmUuid, DomainRecord] = {}  # kept while libvirt is mute: what it defines or held
        self._names: Mapping[VmUuid, str] | None = None  # of these; None: to be made anew
        self._listed = False  # libvirt has told all that it has, once
        self._mute = ""  # why the link that there is does not answer
        self._mute_since = 0.0
        self._followed: dict[VmUuid, Followed] = {}
        self._ended: dict[tuple[VmUuid, int], None] = {}  # executions seen to end through this link
        self._home = ""  # where this libvirt keeps what its QEMUs need; learnt from the first of them
        self._starting: dict[VmUuid, int] = {}
        self._dirty: set[VmUuid] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return self.uri

    def state(self) -> LibvirtState:
        """How it stands with this libvirt, from memory."""
        problem, since = self._mute, self._mute_since
        if not self._connection.open:
            problem, since = self._connection.problem, self._connection.since
        if not self._connection.attempted.is_set():
            problem = ""
        auto = tuple((one.vm_uuid, one.name) for one in self._domains.values() if one.autostart)
        return LibvirtState(self.uri, problem.removeprefix(f"{self.uri}: "), since, auto)

    # --- Source

    def leads_to(self, pid: int, sockets: tuple[str, ...]) -> bool:
        """No command line tells it: libvirt does, a moment later."""
        return False

    async def find(self, *, timeout_s: float) -> None:
        """New processes may be those of domains. Does not wait."""
        if self._watch.runs and self._task is None:
            self._task = self._watch.spawn(self._run(), f"libvirt {self.uri}")
            self._watch.spawn(self.defined_ports.run(), f"definitions of {self.uri}")
        for vm, one in list(self._followed.items()):
            if one.watched.process.ended() and not one.ending:
                self._forget(vm, one)
        for record in list(self._domains.values()):
            if record.active and self._connection.open and record.vm_uuid not in self._followed:
                self._follow(record)

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """See `Source`."""
        one = self._followed.get(identity.vm_uuid)
        if one is not None and one.watched.identity == identity:
            self._look_at(identity.vm_uuid)

    async def ask(self, vm: VmUuid | None, *, deadline: float) -> Answer:
        """Ask libvirt, and the QEMU of `vm`. Of a mute libvirt the disk tells what it has saved."""
        loop = asyncio.get_running_loop()
        timeout_s = max(0.05, min(self._patience.ask_s, deadline - loop.time()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.attempted.wait()  # a daemon that has just started
            if vm is None:
                await self._relist(timeout_s=timeout_s)
                concerned = tuple(self._domains.values())
            else:
                await self._refresh(vm, timeout_s=timeout_s)
                concerned = tuple(filter(None, (self._domains.get(vm),)))
        except NoSuchDomain:
            return Answer()
        except (HypervisorError, TimeoutError) as error:
            return await self._answer_from_disk(vm, f"{error}" or "it has not been reached yet", deadline)
        return Answer(tuple((one.vm_uuid, text) for one in concerned if (text := self._doubt(one))))

    def conflicts(self) -> Iterable[Conflict]:
        """None: whose process a domain's is, is told by its UUID and number; else it is nobody's."""
        return ()

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """See `Hypervisor.discard_memory`."""
        return await self._saves.discard(vm, timeout_s=timeout_s)

    # --- Starter

    def can_start(self, vm: VmUuid, name: str) -> bool:
        """Whether libvirt defines it. By UUID: a domain's name may have passed to another."""
        return vm in self._domains and self._connection.open

    def running(self) -> frozenset[VmUuid]:
        """Domains whose start has not returned."""
        return frozenset(self._starting)

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """Boot the domain.

        Raises:
            CannotStart: libvirt refuses, or there is saved memory, which nothing but an off may take away.
            NotProven: no answer in time; it may start yet.
        """

        def work(link: Link) -> None:
            if link.domain(vm).managed_save:
                raise CannotStart(f"{self.uri} keeps a managed save of VM {vm}: fence it off first")
            link.create(vm)

        self._starting[vm] = self._starting.get(vm, 0) + 1
        try:
            await self._connection.call(
                "start", work, timeout_s=timeout_s, on_return=lambda: self._start_returned(vm)
            )
        except CannotStart:
            raise
        except MonitorMute as error:
            raise NotProven(f"VM {vm} may start yet: {error}") from error
        except HypervisorError as error:
            raise CannotStart(f"libvirt did not start VM {vm}: {error}") from error
        self._look_at(vm)

    def _start_returned(self, vm: VmUuid) -> None:
        self._starting[vm] -= 1
        if not self._starting[vm]:
            del self._starting[vm]

    # --- what monitors ask (`monitor.Asking`)

    async def state_of(self, vm: VmUuid, *, timeout_s: float) -> tuple[RunState, Migration]:
        """Ask libvirt and its QEMU afresh; all events before were told when this returns."""
        await self._refresh(vm, timeout_s=timeout_s)
        await self._connection.call("settle", lambda link: link.settle(), timeout_s=timeout_s)
        one = self._followed.get(vm)
        if one is None or one.watched.facts is None or one.watched.mute:
            raise MonitorMute(f"{self.uri}: VM {vm} does not answer")
        return one.watched.facts.run_state, one.watched.last_migration

    async def is_resettable(self, vm: VmUuid, *, timeout_s: float) -> bool:
        """Ask libvirt for its devices."""
        text = await self._connection.call("read XML", lambda link: link.xml(vm), timeout_s=timeout_s)
        return words.read_domain_xml(text).resettable

    async def call_link(
        self,
        name: str,
        function: Callable[[Link], T],
        *,
        timeout_s: float,
        on_return: Callable[[], None] = lambda: None,
    ) -> T:
        """Make one call."""
        return await self._connection.call(name, function, timeout_s=timeout_s, on_return=on_return)

    # --- what plugging asks (`plugging.Domains`)

    @property
    def problem(self) -> str:
        """Why it may have domains that are not known; "" when it has told all."""
        if not self._connection.open:
            return f"{self.uri} is not connected: {self._connection.problem}"
        return "" if self._listed else f"{self.uri} has not answered yet"

    def defined(self) -> Mapping[VmUuid, str]:
        """The domains that it defines or runs, with their names, as it told last.

        The same object until it tells otherwise.
        """
        if self._names is None:
            self._names = MappingProxyType({vm: record.name for vm, record in self._domains.items()})
        return self._names

    def follows(self, identity: ProcessIdentity) -> bool:
        """Whether it tells of that process."""
        one = self._followed.get(identity.vm_uuid)
        return one is not None and one.alive and one.watched.identity == identity

    # --- following

    async def _run(self) -> None:
        await self._connection.run(self._session, self._patience)

    async def _session(self) -> None:
        """Follow what libvirt tells, for the life of one link."""
        self._ended.clear()
        self._home = ""
        try:
            while True:
                await self._keep_up()
        finally:
            for vm, one in list(self._followed.items()):
                del self._followed[vm]
                one.lose()

    async def _keep_up(self) -> None:
        patience_s = self._patience.command_s
        try:
            await self._relist(timeout_s=patience_s)
            self._connection.attempted.set()
            async with asyncio.timeout(self._patience.poll_s):
                while True:
                    await self._news.wait()
                    self._news.clear()
                    await asyncio.sleep(0.02)  # a storm of events is one question
                    dirty, self._dirty = self._dirty, set()
                    for vm in dirty:
                        await self._look_again(vm)
        except TimeoutError:
            return
        except HypervisorError as error:
            log.info("libvirt does not answer: %s", error)
            self._connection.attempted.set()
            await asyncio.sleep(self._patience.first_retry_s)

    async def _look_again(self, vm: VmUuid) -> None:
        try:
            await self._refresh(vm, timeout_s=self._patience.command_s)
        except NoSuchDomain:
            return
        except HypervisorError as error:
            log.debug("vm=%s: %s", vm, error)
            asyncio.get_running_loop().call_later(RETRY_S, self._look_at, vm)

    async def _relist(self, *, timeout_s: float) -> None:
        try:
            records = await self._connection.call("list", lambda link: link.domains(), timeout_s=timeout_s)
        except HypervisorError as error:
            if not self._mute:
                self._mute_since = self._wall_clock()
            self._mute = f"{error}"
            raise
        self._mute = ""
        self._domains, self._names = {record.vm_uuid: record for record in records}, None
        self._listed = True
        self.defined_ports.listed(self.defined())
        for record in records:
            if record.active:
                self._follow(record)

    async def _refresh(self, vm: VmUuid, *, timeout_s: float) -> None:
        """Ask for one domain: libvirt, then its QEMU. A QEMU that does not answer is mute, no error."""
        one = self._followed.get(vm)
        asked_at = one.asked_at if one is not None else 0
        try:
            record = await self._connection.call("ask", lambda link: link.domain(vm), timeout_s=timeout_s)
        except NoSuchDomain:
            self._domains.pop(vm, None)
            self._names = None
            raise
        except HypervisorError:
            if one is not None:
                one.mute()
            raise
        self._domains[vm] = record
        if self._names is not None and self._names.get(vm) != record.name:
            self._names = None
        if record.active:
            self._follow(record)
        one = self._followed.get(vm)
        if one is None or one.record.id != record.id:
            return
        text = await self._connection.call("read XML", lambda link: link.xml(vm), timeout_s=timeout_s)
        xml = words.read_domain_xml(text)
        if one.receives(record):  # libvirt lets nobody ask such a QEMU, so no answer is no silence
            one.learn(record, None, xml, probed=False, asked_at=asked_at)
            return
        try:
            job = await self._probes.probe(self._connection, vm, timeout_s=timeout_s, late=self._look_at)
            one.learn(record, job, xml, probed=True, asked_at=asked_at)
        except NoPlace:
            one.learn(record, None, xml, probed=False, asked_at=asked_at)
        except HypervisorError:
            one.learn(record, None, xml, probed=False, asked_at=asked_at)
            one.mute()

    def _follow(self, record: DomainRecord) -> None:
        """Join a domain that runs with its process, once that is found."""
        vm = record.vm_uuid
        present = self._followed.get(vm)
        if present is not None:
            if present.record.id == record.id and (present.alive or present.ending):
                return
            self._forget(vm, present)
        watched = self._process_of(record)
        if watched is None:
            return
        self._followed[vm] = Followed(
            self._watch.table, watched, record, LibvirtMonitor(self, record, self._wall_clock)
        )
        self._look_at(vm)

    def _process_of(self, record: DomainRecord) -> Watched | None:
        """The one process that bears the domain's UUID and the number of this execution."""
        if (record.vm_uuid, record.id) in self._ended:
            return None  # this execution had its process; libvirt has not noticed its end yet
        found = [
            watched
            for watched in self._watch.table.all()
            if watched.identity.vm_uuid == record.vm_uuid
            and watched.process.command.domain_id == record.id
            and (watched.monitor is None or not watched.monitor.open)  # else it is another libvirt's
            and self._home in ("", watched.process.command.libvirt_home)
            and not watched.process.ended()
        ]
        if len(found) != 1:
            return None
        self._home = found[0].process.command.libvirt_home
        return found[0]

    def _forget(self, vm: VmUuid, one: Followed) -> None:
        """Its process has ended, or it is another execution now."""
        self._ended[vm, one.record.id] = None
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        if self._followed.get(vm) is one:
            del self._followed[vm]
        one.monitor.close()

    def _look_at(self, vm: VmUuid) -> None:
        self._dirty.add(vm)
        self._news.set()

    def _on_event(self, event: LibvirtEvent) -> None:
        match event:
            case Lifecycle():
                self._on_lifecycle(event)
            case MonitorEvent(vm_uuid, domain_id, name):
                one = self._followed.get(vm_uuid)
                if one is not None and one.record.id == domain_id:
                    one.hear(event)
                if name != "VSERPORT_CHANGE":
                    self._look_at(vm_uuid)
            case DomainChanged(vm_uuid):
                self._look_at(vm_uuid)
            case _:
                pass

    def _on_lifecycle(self, event: Lifecycle) -> None:
        vm = event.vm_uuid
        one = self._followed.get(vm)
        if event.event == words.STOPPED and one is not None and event.domain_id in (-1, one.record.id):
            if event.domain_id == one.record.id or one.watched.process.ended():
                self._stopped(event, one)
            else:
                self._watch.spawn(self._stopped_unless_it_runs(event, one), f"stopped {vm}")
        if event.event == words.STARTED:
            self._watch.rescan.set()
        if event.event in (words.DEFINED, words.UNDEFINED):
            self.defined_ports.changed(vm)
        self._look_at(vm)

    def _stopped(self, event: Lifecycle, one: Followed) -> None:
        if event.detail == words.STOPPED_SAVED:
            self._watch.spawn(self._saved(event, one), f"saved {event.vm_uuid}")
        else:
            one.stopped(event, managed_save=False)

    async def _stopped_unless_it_runs(self, event: Lifecycle, one: Followed) -> None:
        """Its process lives, so this may be the end of the execution before: libvirt does not tell which.

        What it tells over one connection may come later than what it answers over another.
        """
        try:
            record = await self._connection.call(
                "ask", lambda link: link.domain(event.vm_uuid), timeout_s=0.5
            )
        except HypervisorError:
            pass  # the worse for a claim: it counts
        else:
            if record.id == one.record.id:
                return
        self._stopped(event, one)

    async def _saved(self, event: Lifecycle, one: Followed) -> None:
        vm = event.vm_uuid
        managed: bool | None = None
        try:
            record = await self._connection.call("ask", lambda link: link.domain(vm), timeout_s=0.5)
            managed = record.managed_save
        except HypervisorError as error:
            if vm in (await self._saves.on_disk(timeout_s=SAVES_S)).vm_uuids:
                managed = True
            else:
                log.warning("vm=%s was saved, and where is unknown: %s", vm, error)
        one.stopped(event, managed_save=managed)

    # --- what a look says

    def _doubt(self, record: DomainRecord) -> str:
        """Why libvirt's word keeps the VM from being called off; "" when it does not."""
        if record.managed_save:
            return f"libvirt ({self.uri}) keeps a managed save of it, from which it could be continued"
        execution, one = (record.vm_uuid, record.id), self._followed.get(record.vm_uuid)
        if not record.active or (one is not None and not one.watched.process.ended()):
            return ""
        if (record.state, record.reason) == (words.PAUSED, words.SAVING):
            return f"libvirt ({self.uri}) saves its memory, or has and does not say so yet"
        starts = (record.state, record.reason) == (words.PAUSED, words.STARTING_UP)
        ended = execution in self._ended or (one is not None and one.record.id == record.id)
        if ended and not starts:
            return ""  # libvirt has not noticed yet
        others = [one for one in self._watch.table.all() if one.identity.vm_uuid == record.vm_uuid]
        if any(not one.process.ended() for one in others):
            return ""  # which of them is the domain's cannot be said: each is an instance
        return f"libvirt ({self.uri}) says that it runs, but no process of it is found"

    async def _answer_from_disk(self, vm: VmUuid | None, problem: str, deadline: float) -> Answer:
        """libvirt is mute. Its processes are found without it; what it has saved stands on the disk (S0)."""
        left_s = max(0.05, min(SAVES_S, deadline - asyncio.get_running_loop().time()))
        saved = await self._saves.on_disk(timeout_s=left_s)
        text = f"libvirt ({self.uri}) does not answer"
        silent = [
            (one, f"{text}, and keeps a managed save of it")
            for one in sorted(saved.vm_uuids)
            if vm in (None, one)
        ]
        if not saved.problem:
            return Answer(tuple(silent))
        reason = f"{text} ({problem[:200]}), and whether it has saved memory is not known: {saved.problem}"
        if not self._listed:
            return Answer(tuple(silent), (UnknownProcess(reason, self._not_of()),))
        held = self._domains.keys() | {one for one, _ in self._ended}
        silent += [(one, reason) for one in sorted(held) if vm in (None, one)]
        return Answer(tuple(silent))

    def _not_of(self) -> frozenset[VmUuid]:
        """VMs that another source leads to: their QEMU was not started by libvirt."""
        return frozenset(
            watched.identity.vm_uuid
            for watched in self._watch.table.all()
            if watched.configured and watched.process.command.domain_id is None
        )
