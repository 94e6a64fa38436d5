# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: what was asked, done and proven, durable before any answer leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vmchannel_host.journal_types import (
    Json,
    KnownInstance,
    OperationRows,
    Record,
    StoredAlias,
    StoredRequest,
    VerifyResult,
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

DEFAULT_TIMEOUT_S = 5.0
"""How long a call waits for the disk, seconds, unless it says otherwise."""


class Journal:
    """One SQLite file, used from one thread of its own.

    Every method but `open`, `verify` and `close` takes `timeout_s`, seconds. All raise `JournalError`
    (see `journal_types`); then nothing may be claimed that needed the call. A cancelled or late call may
    still be stored; a call that returns is on the disk. Calls take effect in the order in which they were made.
    """

    @classmethod
    async def open(
        cls,
        path: Path,
        key_path: Path,
        *,
        boot_id: BootId,
        wall_clock: Callable[[], float] = time.time,
        boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        max_pending: int = 1024,
    ) -> Journal:
        """Open the journal, or make it where neither the file nor its public key exists.

        Args:
            path: the data-base file; its directory is made 0700 when missing.
            key_path: the Ed25519 private key (PEM, 0600); the public key lies beside it, suffix `.pub`.
            boot_id: the running kernel's boot.
            max_pending: calls that may wait for the disk; one more raises `JournalBusy` at once.

        Raises:
            JournalLocked: another process has it open.
            JournalCorrupt: damaged, missing beside its key, or of another key.
            JournalError: not readable or writable, or its modes let others in.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Finish the calls that wait, then close the file. Idempotent."""
        raise NotImplementedError

    # the chain
    async def append(
        self,
        kind: str,
        operation: OperationId,
        body: Mapping[str, Json],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> int:
        """Add a signed record; return its sequence number. At most 64 KiB of JSON."""
        raise NotImplementedError

    async def verify(self) -> VerifyResult:
        """Walk the whole chain in a second connection; the other calls go on meanwhile. Seconds per 10,000 records."""
        raise NotImplementedError

    async def operations(
        self, limit: int = 50, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[OperationRows]:
        """The latest operations, newest first."""
        raise NotImplementedError

    async def operation(
        self, operation: OperationId, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Record]:
        """All records of one operation in their order; empty when it is unknown."""
        raise NotImplementedError

    async def prune(self, keep_s: float, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Remove records older than `keep_s` seconds behind a signed checkpoint; return how many went."""
        raise NotImplementedError

    # instances
    async def remember_instance(
        self,
        identity: ProcessIdentity,
        name: str,
        host: HostName,
        *,
        migration: Migration = Migration.NONE,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Store that this process runs, or ran, a VM; known ones get the new name and migration. Never ends one."""
        raise NotImplementedError

    async def remember_end(self, evidence: InstanceEnded, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Store how a process ended. A second proof of the same end may only improve what is known of its I/O."""
        raise NotImplementedError

    async def known_instances(
        self, vm_uuid: VmUuid | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[KnownInstance]:
        """Every process ever seen (of one VM), oldest first."""
        raise NotImplementedError

    # aliases
    async def remember_alias(
        self,
        vm_uuid: VmUuid,
        node_name: str,
        source: str,
        claimed_at: float,
        refused: bool,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Store a VM's claim to a node name; an accepted or refused claim of the same kind before it is replaced."""
        raise NotImplementedError

    async def aliases(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[StoredAlias]:
        """All claims that stand, oldest first."""
        raise NotImplementedError

    # requests
    async def remember_request(
        self,
        request_id: bytes,
        requester: str,
        digest: bytes,
        operation: OperationId,
        deadline: float,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Store a request before its operation acts (`deadline`: CLOCK_BOOTTIME, seconds).

        Raises:
            JournalMisuse: the id is stored already; ask `request` and compare.
        """
        raise NotImplementedError

    async def remember_answer(
        self, request_id: bytes, answer: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Store the answer of a stored request; the first one stays for ever.

        Raises:
            JournalMisuse: the id is unknown, or another answer is stored.
        """
        raise NotImplementedError

    async def request(
        self, request_id: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> StoredRequest | None:
        """The stored request of that id, with its answer if there is one."""
        raise NotImplementedError
