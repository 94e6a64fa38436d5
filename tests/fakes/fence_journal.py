# SPDX-License-Identifier: LGPL-2.1-or-later
"""A journal in memory, with the faults that a real one has: full, slow, hung. It outlives a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from vmchannel_host.journal.restored import Restored
from vmchannel_host.journal.types import (
    JournalBusy,
    JournalError,
    JournalFull,
    JournalMisuse,
    JournalShort,
    Json,
    KnownInstance,
    OperationRows,
    Record,
    StoredAlias,
    StoredRequest,
)
from vmchannel_host.model import (
    BootId,
    HostName,
    InstanceEnded,
    Migration,
    OperationId,
    ProcessIdentity,
    VmUuid,
)


class FakeJournal:
    """Durable, as far as a test goes: give the same object to the daemon after the restart."""

    def __init__(self, clock: Callable[[], float], boot_id: BootId) -> None:
        self.clock = clock
        self.boot_id = boot_id
        self.records: list[Record] = []
        self.known: dict[ProcessIdentity, KnownInstance] = {}
        self.requests: dict[bytes, StoredRequest] = {}
        self.stored_aliases: list[StoredAlias] = []
        self.full: Callable[[str], bool] = lambda _: False  # by kind of record, or name of the method
        self.restored: Restored | None = None
        self.problem = ""  # why nothing can be done
        self.short = ""  # why only what an `off` needs is taken
        self.hung: Callable[[str], bool] = lambda _: False
        self.late: Callable[[str], bool] = lambda _: False  # stored, though the call's time was over
        self.slow: Callable[[str], float] = lambda _: 0.001  # seconds that a write takes
        self.hook: Callable[[str], None] = lambda _: None  # called before each write

    def kinds(self, operation: OperationId | None = None) -> list[str]:
        """The kinds of records in their order."""
        return [one.kind for one in self.records if operation is None or one.operation == operation]

    async def append(
        self,
        kind: str,
        operation: OperationId,
        body: Mapping[str, Json],
        *,
        if_room: bool = False,
        timeout_s: float = 5.0,
    ) -> int:
        self._need_room(if_room)
        await self._write(kind, timeout_s)
        self.records.append(
            Record(len(self.records) + 1, 0.0, self.clock(), self.boot_id, kind, operation, dict(body))
        )
        if self.late(kind):
            raise JournalBusy("the disk does not answer")
        return len(self.records)

    async def check(self, *, timeout_s: float = 5.0) -> None:
        if self.problem or self.full("check"):
            raise JournalError(self.problem or "the journal cannot be read")

    async def operations(self, limit: int = 50, *, timeout_s: float = 5.0) -> list[OperationRows]:
        rows: dict[OperationId, list[Record]] = {}
        for record in self.records:
            if record.operation:
                rows.setdefault(record.operation, []).append(record)
        newest = list(reversed(rows.items()))[:limit]
        return [OperationRows(one, len(records), records[0], records[-1]) for one, records in newest]

    async def operation(self, operation: OperationId, *, timeout_s: float = 5.0) -> list[Record]:
        return [record for record in self.records if record.operation == operation]

    async def remember_instance(
        self,
        identity: ProcessIdentity,
        name: str,
        host: HostName,
        *,
        migration: Migration = Migration.NONE,
        timeout_s: float = 5.0,
    ) -> None:
        await self._write("remember_instance", timeout_s)
        old = self.known.get(identity)
        first_seen = old.first_seen if old else self.clock()
        new = KnownInstance(host, identity, name, migration, first_seen, None, None)
        self.known[identity] = replace(old, name=name, migration=migration) if old else new

    async def remember_kill(
        self, identity: ProcessIdentity, host: HostName, *, timeout_s: float = 5.0
    ) -> None:
        await self._write("remember_kill", timeout_s)
        self.known[identity] = replace(self.known[identity], killed=True)

    async def remember_end(self, evidence: InstanceEnded, *, timeout_s: float = 5.0) -> None:
        await self._write("remember_end", timeout_s)
        old = self.known.get(evidence.identity)
        name, migration = (old.name, old.migration) if old else ("", Migration.NONE)
        first_seen = old.first_seen if old else self.clock()
        self.known[evidence.identity] = KnownInstance(
            evidence.host,
            evidence.identity,
            name,
            migration,
            first_seen,
            evidence,
            self.clock(),
            old.killed if old else False,
            old.confirmed_by if old else "",
        )

    async def remember_confirmed(self, vm_uuid: VmUuid, by: str, *, timeout_s: float = 5.0) -> None:
        await self._write("remember_confirmed", timeout_s)
        for identity, one in self.known.items():
            if identity.vm_uuid == vm_uuid and one.end is not None and not one.confirmed_by:
                self.known[identity] = replace(one, confirmed_by=by)

    async def known_instances(
        self, vm_uuid: VmUuid | None = None, *, timeout_s: float = 5.0
    ) -> list[KnownInstance]:
        return [one for one in self.known.values() if vm_uuid in (None, one.identity.vm_uuid)]

    async def remember_request(
        self,
        request_id: bytes,
        requester: str,
        digest: bytes,
        operation: OperationId,
        deadline: float,
        *,
        if_room: bool = False,
        timeout_s: float = 5.0,
    ) -> None:
        self._need_room(if_room)
        await self._write("remember_request", timeout_s)
        if request_id in self.requests:
            raise JournalMisuse("the id is stored already")
        self.requests[request_id] = StoredRequest(
            request_id, requester, digest, operation, deadline, self.boot_id, None
        )

    async def interrupt_requests(self, vm_uuid: VmUuid, now: float, *, timeout_s: float = 5.0) -> None:
        await self._write("interrupt_requests", timeout_s)
        for key, one in self.requests.items():
            if one.requester.startswith(f"{vm_uuid} ") and one.deadline > now:
                self.requests[key] = replace(one, requester=f"{one.requester} interrupted")

    async def remember_answer(self, request_id: bytes, answer: bytes, *, timeout_s: float = 5.0) -> None:
        await self._write("remember_answer", timeout_s)
        one = self.requests.get(request_id)
        if one is None:
            raise JournalMisuse("the request is not stored")
        self.requests[request_id] = StoredRequest(
            one.request_id, one.requester, one.digest, one.operation, one.deadline, one.boot_id, answer
        )

    async def request(self, request_id: bytes, *, timeout_s: float = 5.0) -> StoredRequest | None:
        if self.problem:
            raise JournalError(self.problem)
        if self.full("request"):
            raise JournalFull("the journal cannot be read")
        return self.requests.get(request_id)

    async def remember_alias(
        self,
        vm_uuid: VmUuid,
        node_name: str,
        source: str,
        claimed_at: float,
        refused: bool,
        *,
        timeout_s: float = 5.0,
    ) -> None:
        self._need_room(True)
        await self._write("remember_alias", timeout_s)
        self.stored_aliases.append(StoredAlias(vm_uuid, node_name, source, claimed_at, refused))

    async def aliases(self, *, timeout_s: float = 5.0) -> list[StoredAlias]:
        return list(self.stored_aliases)

    def _need_room(self, if_room: bool) -> None:
        if if_room and self.short:
            raise JournalShort(self.short)

    async def _write(self, what: str, timeout_s: float) -> None:
        self.hook(what)
        if self.problem:
            raise JournalError(self.problem)
        if self.full(what):
            raise JournalFull("no space left on device")
        if self.hung(what):
            await asyncio.sleep(timeout_s)
            raise JournalBusy("the disk does not answer")
        await asyncio.sleep(self.slow(what))
