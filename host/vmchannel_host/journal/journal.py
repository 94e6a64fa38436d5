# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: what was asked, done and proven, durable before any answer leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from vmchannel_host.daemon_thread import in_daemon_thread
from vmchannel_host.journal import tables
from vmchannel_host.journal.file import StoreSettings
from vmchannel_host.journal.restored import Restored
from vmchannel_host.journal.store import JournalStore
from vmchannel_host.journal.types import (
    JournalBusy,
    Json,
    KnownInstance,
    OperationRows,
    Record,
    StoredAlias,
    StoredRequest,
    VerifyResult,
)
from vmchannel_host.journal.verify import verify_file
from vmchannel_host.journal.worker import StoreThread
from vmchannel_host.model import (
    BootId,
    HostName,
    InstanceEnded,
    Migration,
    OperationId,
    ProcessIdentity,
    VmUuid,
)

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0
"""How long a call waits for the disk, seconds, unless it says otherwise."""

CLOSE_S = 10.0
"""How long closing waits for it, seconds: all that a stop waits for is well under its unit's time."""

_log = logging.getLogger(__name__)


class Journal:
    """One SQLite file, used from one thread of its own.

    Every method but `open`, `verify` and `close` takes `timeout_s`, seconds. All raise `JournalError`
    (see `journal_types`); then nothing may be claimed that needed the call. A cancelled or late call may
    still be stored; a call that returns is on the disk. Calls take effect in the order of their making.
    """

    def __init__(self, thread: StoreThread, store: JournalStore) -> None:
        """Use `open`."""
        self._thread = thread
        self._store = store  # belongs to the thread: read here are three plain values only
        self._path = store.settings.path
        self._verifier = store.signer.verifier
        self._wall_clock = store.settings.wall_clock
        self._boot_id = store.settings.boot_id
        self._one_walk = asyncio.Lock()

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
        thread = StoreThread(
            lambda: JournalStore(StoreSettings(path, key_path, boot_id, wall_clock, boottime)), max_pending
        )
        thread.start()
        try:
            store = await asyncio.wrap_future(thread.opened)
        except asyncio.CancelledError:
            thread.close()
            raise
        return cls(thread, store)

    async def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """Finish the calls that wait, then close the file. Idempotent.

        A disk that does not answer is waited for `timeout_s` seconds, no longer: nothing that was told
        depends on what it still has to do, and the next opening recovers the journal as after a crash.
        """
        self._thread.close()
        ended = asyncio.wrap_future(self._thread.ended)
        done, _ = await asyncio.wait([ended], timeout=timeout_s)
        if not done:
            ended.cancel()
            _log.error("%s: not closed: no answer from the disk in %s s", self._path, timeout_s)

    @property
    def last_seq(self) -> int:
        """Number of the last durable record; 0 when there is none."""
        return self._store.last_seq

    @property
    def problem(self) -> str:
        """Why every call fails (`JournalDamaged`, `JournalDisk`); "" while they can succeed."""
        return self._store.problem

    @property
    def short(self) -> str:
        """Why only what an `off` needs can be stored (`JournalShort`); "" while there is room for all."""
        return self._store.short

    @property
    def restored(self) -> Restored | None:
        """When the journal was last put back to an older state; what it held then is no evidence (S11)."""
        return self._store.restored

    async def check(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Raise `JournalError` unless the journal is there and can be read. Writes nothing."""
        await self._call(lambda store: store.check(), timeout_s)

    # the chain
    async def append(
        self,
        kind: str,
        operation: OperationId,
        body: Mapping[str, Json],
        *,
        if_room: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> int:
        """Add a signed record; return its sequence number. At most 64 KiB of JSON.

        `if_room`: not on a full disk, in the room that is kept for `off`: then `JournalShort` is raised.
        """
        return await self._call(lambda store: store.append(kind, operation, body), timeout_s, if_room)

    async def verify(self) -> VerifyResult:
        """Walk the whole chain in a second connection, while other calls go on: 2 s per 10,000 records."""
        stop = threading.Event()
        async with self._one_walk:
            walk = in_daemon_thread(
                "verify", partial(verify_file, self._path, self._verifier, stopped=stop.is_set)
            )
            try:
                return await asyncio.shield(walk)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([walk], timeout=DEFAULT_TIMEOUT_S)
                raise

    async def operations(
        self, limit: int = 50, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[OperationRows]:
        """The latest operations, newest first."""
        return await self._call(lambda store: store.operations(limit), timeout_s)

    async def operation(
        self, operation: OperationId, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[Record]:
        """All records of one operation in their order; empty when it is unknown."""
        return await self._call(lambda store: store.operation(operation), timeout_s)

    async def prune(self, keep_s: float, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Remove records older than `keep_s` seconds behind a signed checkpoint; return how many went."""
        before = self._wall_clock() - keep_s
        await self._call(lambda store: tables.prune_tables(store, before), timeout_s)
        gone = 0
        while True:  # in parts, so that a fence never waits behind a large one
            part = await self._call(lambda store: store.prune(before), timeout_s)
            if not part:
                return gone
            gone += part

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
        """Store that this process runs a VM; a known one gets the new name and migration only."""
        await self._call(
            lambda store: tables.remember_instance(store, identity, name, host, migration), timeout_s
        )

    async def remember_kill(
        self, identity: ProcessIdentity, host: HostName, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Store that this process is about to be killed with writes perhaps under way. Never taken back."""
        await self._call(lambda store: tables.remember_kill(store, identity, host), timeout_s)

    async def remember_end(self, evidence: InstanceEnded, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Store how a process ended. A second proof may settle its I/O or add a departure, nothing else."""
        await self._call(lambda store: tables.remember_end(store, evidence), timeout_s)

    async def remember_confirmed(
        self, vm_uuid: VmUuid, by: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Store the operator's word that a VM is off, which covers the ends that are stored by now."""
        await self._call(lambda store: tables.remember_confirmed(store, vm_uuid, by), timeout_s)

    async def known_instances(
        self, vm_uuid: VmUuid | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[KnownInstance]:
        """Every process ever seen (of one VM), oldest first."""
        return await self._call(lambda store: tables.known_instances(store, vm_uuid), timeout_s)

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
        """Store a VM's claim to a node name (`claimed_at`: wall time, seconds).

        An accepted claim replaces all that the VM claimed before; a refused one only an earlier refused one.

        Raises:
            JournalShort: the disk is full.
        """
        alias = StoredAlias(vm_uuid, node_name, source, claimed_at, refused)
        await self._call(lambda store: tables.remember_alias(store, alias), timeout_s, if_room=True)

    async def aliases(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[StoredAlias]:
        """All claims that stand, oldest first."""
        return await self._call(tables.aliases, timeout_s)

    # guests
    async def remember_boot(
        self, vm_uuid: VmUuid, boot_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> int:
        """Store that a guest spoke with this boot id; return the last record before its first sight."""
        return await self._call(lambda store: tables.remember_boot(store, vm_uuid, boot_id), timeout_s)

    # requests
    async def remember_request(
        self,
        request_id: bytes,
        requester: str,
        digest: bytes,
        operation: OperationId,
        deadline: float,
        *,
        if_room: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Store a request before its operation acts (`deadline`: CLOCK_BOOTTIME, seconds).

        Raises:
            JournalMisuse: the id is stored already; ask `request` and compare.
            JournalShort: the disk is full, and with `if_room` the room for `off` is left alone.
        """
        request = StoredRequest(request_id, requester, digest, operation, deadline, self._boot_id, None)
        await self._call(lambda store: tables.remember_request(store, request), timeout_s, if_room)

    async def remember_answer(
        self, request_id: bytes, answer: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Store the answer of a stored request; the first one stays for ever.

        Raises:
            JournalMisuse: the id is unknown, or another answer is stored.
        """
        await self._call(lambda store: tables.remember_answer(store, request_id, answer), timeout_s)

    async def interrupt_requests(
        self, vm_uuid: VmUuid, now: float, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Let the stored answers of that VM's requests be nobody's (`now`: CLOCK_BOOTTIME, seconds)."""
        await self._call(lambda store: tables.interrupt_requests(store, vm_uuid, now), timeout_s)

    async def request(
        self, request_id: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> StoredRequest | None:
        """The stored request of that id, with its answer if there is one."""
        return await self._call(lambda store: tables.find_request(store, request_id), timeout_s)

    async def _call(self, call: Callable[[JournalStore], T], timeout_s: float, if_room: bool = False) -> T:
        def with_room(store: JournalStore) -> T:
            store.need_room()
            return call(store)

        future: Future[T] = self._thread.submit(with_room if if_room else call)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise JournalBusy(f"{self._path}: no answer from the disk in {timeout_s} s") from error
