# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell around the registry: feeds it from hypervisor and records, and keeps durably what it learns.

Nothing that relies on a record is told to anybody before the record is on the disk (S1).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final, assert_never

from vmchannel_host.fencing import evidence
from vmchannel_host.fencing.ordered import LookReport
from vmchannel_host.fencing.records import InstanceStore
from vmchannel_host.hypervisors import Ended, Hypervisor, HypervisorError, HypervisorEvent
from vmchannel_host.journal.types import JournalError
from vmchannel_host.model import (
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    IoState,
    Look,
    OperationId,
    ProcessIdentity,
    VmUuid,
)
from vmchannel_host.registry.registry import RegistryRecord, RememberEnd, RememberInstance, VmRegistry

MAX_UNSAVED: Final = 4096
"""Records that may wait for a journal that fails. Beyond it every look fails until a restart."""

Absence = Callable[[ProcessIdentity], EndProof | None]
"""Whether a recorded process is proven to be gone; raises HypervisorError when it cannot be said."""

_NO_OPERATION: Final = OperationId("")
_log = logging.getLogger(__name__)


class Instances:
    """What this host knows of its VMs, as fresh as asked for."""

    def __init__(
        self,
        *,
        host: HostName,
        registry: VmRegistry,
        hypervisor: Hypervisor,
        absence: Absence,
        store: InstanceStore,
        clock: Callable[[], float],
    ) -> None:
        self.host = host
        self.registry = registry
        self._hypervisor = hypervisor
        self._absence = absence
        self._store = store
        self._clock = clock
        self._killed: frozenset[ProcessIdentity] = frozenset()  # by a daemon before us, their ends unseen
        self._ended_at: dict[VmUuid, float] = {}  # when an end of each VM was last learnt
        self._unsaved: deque[RegistryRecord] = deque()
        self._lost = False
        self._saving = asyncio.Lock()
        self._listeners: list[Callable[[HypervisorEvent], None]] = []

    async def restore(self) -> None:
        """Take the records, and prove the ends of those processes that are gone. Once, before `run`.

        Raises:
            JournalError: they cannot be read or written; nothing may be fenced.
        """
        rows = await self._store.known_instances()
        self._killed = frozenset(
            row.identity for row in rows if row.killed and row.end is None and row.host == self.host
        )
        self.registry.restore(rows)
        for vm in self.registry.vms():
            self.prove_absent(vm)
        await self.save()

    def subscribe(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Call `listener` for each event, after the registry has it. It must not block or raise."""
        self._listeners.append(listener)

    async def run(self) -> None:
        """Follow the hypervisor's events until cancelled; after `restore`, while `Hypervisor.run` runs."""
        async for event in self._hypervisor.events():
            if isinstance(event, Ended) and not self.registry.knows(event.evidence.identity.vm_uuid):
                continue  # a QEMU that never concerned us (`Instance.configured`)
            if isinstance(event, Ended):
                event = Ended(self._attributed(event.evidence))
            self._keep(self._apply(event))
            for listener in self._listeners:
                listener(event)
            try:
                await self.save()
            except JournalError as error:
                _log.error("instances not recorded, nothing can be proven off until they are: %s", error)

    async def look(
        self, *, timeout_s: float, vm: VmUuid | None = None, monitors: bool = True
    ) -> tuple[float, Look]:
        """Look afresh; return when it was asked for (CLOCK_BOOTTIME, seconds) and what was seen.

        `vm` and `monitors` say whose instances are asked anew what they do (`Hypervisor.look`).

        Raises:
            HypervisorError: the hypervisor could not look.
            TimeoutError: not within `timeout_s` seconds.
            JournalError: what was learnt could not be made durable.
        """
        async with asyncio.timeout(timeout_s):
            asked_at = self._clock()
            look = await self._hypervisor.look(timeout_s=timeout_s, vm=vm, monitors=monitors)
            self._keep(self.registry.apply_look(look))
            await self.save()
        return asked_at, look

    async def report(
        self,
        vm: VmUuid,
        name: str,
        *,
        timeout_s: float,
        operation: OperationId,
        number: int,
        monitors: bool = True,
    ) -> LookReport:
        """Look afresh for one VM and add what the records say of it. Raises as `look` does."""
        self.prove_absent(vm)  # first: a proof must be older than the look that counts (S2)
        asked_at, look = await self.look(timeout_s=timeout_s, vm=vm, monitors=monitors)
        return self.facts(vm, name, asked_at, look, operation=operation, number=number)

    def facts(
        self,
        vm: VmUuid,
        name: str,
        asked_at: float,
        look: Look,
        *,
        operation: OperationId = _NO_OPERATION,
        number: int = 0,
    ) -> LookReport:
        """What a look that was just taken and the records say of one VM.

        A look proves nothing of a VM of which an end was learnt after it was asked for (S2): what ended may
        have left another process behind that was not there yet when the look passed, as a QEMU does that
        makes itself a daemon.
        """
        registry = self.registry
        # A start command that goes by a name is of the one VM that bears it (S9).
        own_name = name if registry.directory().bearers(name) <= {vm} else ""
        overtaken = self._ended_at.get(vm, asked_at) > asked_at
        if overtaken:
            look = replace(look, silent=(*look.silent, (vm, "a process of it ended while this host looked")))
        return LookReport(
            operation=operation,
            round=number,
            asked_at=asked_at,
            look=look,
            unproven=tuple(one.identity for one in registry.unproven(vm)),
            ends=registry.ended(vm),
            confirmed=registry.confirmed(vm),
            departed=self._departed(vm),
            conflict=self.conflict(vm),
            objections=registry.objections(vm),
            can_start=self._hypervisor.can_start(vm, own_name),
            overtaken=overtaken,
        )

    def conflict(self, vm: VmUuid) -> str:
        """Why no fence of the VM may be tried (S9); "" when nothing is against it."""
        return next((one.text for one in self.registry.conflicts(vm) if one.refuses), "")

    def _departed(self, vm: VmUuid) -> str:
        text, restored = self.registry.departed(vm) or "", self._store.restored
        if restored is None:
            return text
        lost = f"the journal was restored from a backup ({restored.reason})"
        if not self.registry.knows(vm):
            return f"{lost} and may have known of it"
        return f"{text}, or the journal no longer knows: {lost}" if text else ""

    def ended(self, fresh: InstanceEnded) -> InstanceEnded:
        """Take the proof of an end; return it with what the records knew of it. `save` makes it durable."""
        fresh = self._attributed(fresh)
        recorded = {end.identity: end for end in self.registry.ended(fresh.identity.vm_uuid)}
        end = evidence.merge(recorded.get(fresh.identity), fresh)
        records = self._apply(Ended(end))
        self._keep(records)
        for record in records:
            if isinstance(record, RememberEnd) and record.evidence.identity == end.identity:
                end = replace(end, departed=end.departed or record.evidence.departed)
        return end

    async def remember_kill(self, identity: ProcessIdentity) -> None:
        """Make durable that a process is about to be killed while it may have writes under way.

        Raises:
            HypervisorError: it is not durable, so the process must not be killed.
        """
        try:
            await self.save()  # what was seen of it comes first
            await self._store.remember_kill(identity, self.host)
        except JournalError as error:
            raise HypervisorError(
                f"{identity} was not killed: the journal cannot take it: {error}"
            ) from error

    async def confirm_off(self, vm: VmUuid, by: str, covered: frozenset[ProcessIdentity]) -> bool:
        """Take the operator's word that nothing is left of these processes, which have ended: durably, then.

        Returns whether it counts. It does not when more ends are known by now: they are not what was judged.

        Raises:
            JournalError: it is not durable, and counts for nothing.
        """
        async with self._saving:
            await self._save_all()
            # Nothing is written between here and the call: the journal marks what is marked here.
            if frozenset(end.identity for end in self.registry.ended(vm)) != covered:
                return False
            await self._store.remember_confirmed(vm, by)
        self.registry.confirm_off(vm, by, covered)
        return True

    async def save(self) -> None:
        """Make durable what was learnt until now.

        Raises:
            JournalError: it is not; it is tried again with the next call.
        """
        async with self._saving:
            await self._save_all()

    async def _save_all(self) -> None:
        if self._lost:
            raise JournalError("records of instances were lost while the journal failed: restart the daemon")
        while self._unsaved:
            await self._write(self._unsaved[0])
            self._unsaved.popleft()

    def _keep(self, records: Iterable[RegistryRecord]) -> None:
        for record in records:
            if len(self._unsaved) >= MAX_UNSAVED:
                self._lost = True
                return
            self._unsaved.append(record)

    async def _write(self, record: RegistryRecord) -> None:
        match record:
            case RememberInstance(identity, name, host, migration):
                await self._store.remember_instance(identity, name, host, migration=migration)
            case RememberEnd(end):
                await self._store.remember_end(end)
            case _:
                assert_never(record)

    def _apply(self, event: HypervisorEvent) -> tuple[RegistryRecord, ...]:
        records = self.registry.apply(event)
        if isinstance(event, Ended) and records:
            self._ended_at[event.evidence.identity.vm_uuid] = self._clock()
        return records

    def _attributed(self, end: InstanceEnded) -> InstanceEnded:
        """Writes are unproven and the process was being killed at a restart: the end is our kill's."""
        unproven = end.cause is EndCause.NONE and end.io is IoState.UNPROVEN
        return replace(end, cause=EndCause.KILL) if unproven and end.identity in self._killed else end

    def prove_absent(self, vm: VmUuid) -> None:
        """Prove the ends of recorded processes that are gone, and were not seen since the daemon began."""
        for tracked in self.registry.unproven(vm):
            if tracked.host != self.host or tracked.instance is not None:
                continue  # the hypervisor watches it, and knows better how it ends
            try:
                proof = self._absence(tracked.identity)
            except HypervisorError as error:
                _log.warning("vm=%s %s: %s", vm, tracked.identity, error)
                continue
            if proof is not None:
                self.ended(_unwatched(self.host, tracked.identity, proof))


def _unwatched(host: HostName, identity: ProcessIdentity, proof: EndProof) -> InstanceEnded:
    io = IoState.SETTLED if proof is EndProof.OTHER_BOOT else IoState.UNPROVEN
    return InstanceEnded(host, identity, proof, EndCause.NONE, io, departed=False, elapsed_ms=0)
