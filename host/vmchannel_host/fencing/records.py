# SPDX-License-Identifier: LGPL-2.1-or-later
"""What fencing asks of the journal: small Protocols, which `journal.journal.Journal` implements.

What a method stores is durable when it returns. Whatever raises `JournalError` has failed, and what needed it
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vmchannel_host.journal.restored import Restored
from vmchannel_host.journal.types import (
    Json,
    KnownInstance,
    OperationRows,
    Record,
    StoredAlias,
    StoredRequest,
)
from vmchannel_host.model import HostName, InstanceEnded, Migration, OperationId, ProcessIdentity, VmUuid


class OperationLog(Protocol):
    """The chain: one operation is an intent, what happened, and an outcome.

    Kinds: `fence.intent`, `fence.evidence`, `fence.phase`, `fence.outcome`, `fence.refused`, `fence.check`.
    """

    async def append(
        self,
        kind: str,
        operation: OperationId,
        body: Mapping[str, Json],
        *,
        if_room: bool = ...,
        timeout_s: float = ...,
    ) -> int:
        """Add a record; return its sequence number. `if_room`: not in the room that is kept for `off`."""
        ...

    @property
    def problem(self) -> str:
        """Why every call fails; "" while they can succeed."""
        ...

    @property
    def restored(self) -> Restored | None:
        """When it was last put back to an older state (S11)."""
        ...

    async def check(self, *, timeout_s: float = ...) -> None:
        """Raise `JournalError` unless the journal can be read now."""
        ...

    async def operations(self, limit: int = ..., *, timeout_s: float = ...) -> list[OperationRows]:
        """The latest operations, newest first, each with its first and last record."""
        ...

    async def operation(self, operation: OperationId, *, timeout_s: float = ...) -> Sequence[Record]:
        """All records of one operation, in order."""
        ...


class InstanceStore(Protocol):
    """Every process of a VM that was ever seen, and how it ended (S1)."""

    @property
    def restored(self) -> Restored | None:
        """When the records were last put back to an older state (S11)."""
        ...

    async def remember_instance(
        self,
        identity: ProcessIdentity,
        name: str,
        host: HostName,
        *,
        migration: Migration = ...,
        timeout_s: float = ...,
    ) -> None: ...

    async def remember_kill(
        self, identity: ProcessIdentity, host: HostName, *, timeout_s: float = ...
    ) -> None: ...

    async def remember_end(self, evidence: InstanceEnded, *, timeout_s: float = ...) -> None: ...

    async def remember_confirmed(self, vm_uuid: VmUuid, by: str, *, timeout_s: float = ...) -> None: ...

    async def known_instances(
        self, vm_uuid: VmUuid | None = None, *, timeout_s: float = ...
    ) -> Sequence[KnownInstance]: ...


class RequestStore(Protocol):
    """Requests that became operations, with their answers (S5)."""

    async def remember_request(
        self,
        request_id: bytes,
        requester: str,
        digest: bytes,
        operation: OperationId,
        deadline: float,
        *,
        if_room: bool = ...,
        timeout_s: float = ...,
    ) -> None: ...

    async def interrupt_requests(self, vm_uuid: VmUuid, now: float, *, timeout_s: float = ...) -> None:
        """The VM was reset or perhaps restored: its requests with a deadline after `now` are nobody's."""
        ...

    async def remember_answer(self, request_id: bytes, answer: bytes, *, timeout_s: float = ...) -> None: ...

    async def request(self, request_id: bytes, *, timeout_s: float = ...) -> StoredRequest | None: ...


class AliasStore(Protocol):
    """The node names that VMs announced."""

    async def remember_alias(
        self,
        vm_uuid: VmUuid,
        node_name: str,
        source: str,
        claimed_at: float,
        refused: bool,
        *,
        timeout_s: float = ...,
    ) -> None: ...

    async def aliases(self, *, timeout_s: float = ...) -> Sequence[StoredAlias]: ...


class FenceJournal(OperationLog, InstanceStore, RequestStore, AliasStore, Protocol):
    """All of it: one journal."""
