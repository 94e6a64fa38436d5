# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the journal's tests share: a journal in a directory, clocks that stand still, a pen for tampering."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from vmchannel_host.journal.journal import Journal
from vmchannel_host.journal.keys import public_key_path
from vmchannel_host.journal.types import VerifyResult
from vmchannel_host.journal.verify import verify_file
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    InstanceEnded,
    IoState,
    OperationId,
    ProcessIdentity,
    VmUuid,
)

BOOT = BootId("11111111-1111-4111-8111-111111111111")
HOST = HostName("hv1")
VM1 = VmUuid("aaaaaaaa-0000-4000-8000-000000000001")
VM2 = VmUuid("aaaaaaaa-0000-4000-8000-000000000002")
OP1 = OperationId("op-1")
OP2 = OperationId("op-2")


@dataclass
class Clock:
    """A wall clock that the test moves."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class JournalRig:
    """One journal's files."""

    directory: Path
    clock: Clock = field(default_factory=Clock)

    @property
    def path(self) -> Path:
        return self.directory / "journal.db"

    @property
    def wal(self) -> Path:
        return self.directory / "journal.db-wal"

    @property
    def key(self) -> Path:
        return self.directory / "journal.key"

    @property
    def public_key(self) -> Path:
        return public_key_path(self.key)

    def boottime(self) -> float:
        """CLOCK_BOOTTIME: 100 s at first, then as the wall clock goes."""
        return 100.0 + self.clock.now - Clock.now

    async def open(self, *, boottime: Callable[[], float] | None = None, max_pending: int = 1024) -> Journal:
        return await Journal.open(
            self.path,
            self.key,
            boot_id=BOOT,
            wall_clock=self.clock,
            boottime=boottime or self.boottime,
            max_pending=max_pending,
        )

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[Journal]:
        journal = await self.open()
        try:
            yield journal
        finally:
            await journal.close()

    async def filled(self, records: int = 10) -> None:
        """Make a journal with that many records and close it."""
        async with self.opened() as journal:
            for number in range(1, records + 1):
                await journal.append("fence.intent", OperationId(f"op-{number}"), {"number": number})

    def tamper(self, *statements: str) -> None:
        """Write into the closed journal's file, as someone without the key would."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    def verified(self) -> VerifyResult:
        """Walk the closed journal with its own public key."""
        return verify_file(self.path, self.public_key)


def process(
    pid: int = 4711, vm: VmUuid = VM1, executable: str = "/usr/bin/qemu-system-x86_64"
) -> ProcessIdentity:
    """A process of a VM."""
    return ProcessIdentity(pid, 123456, executable, vm, BOOT)


def ended(
    identity: ProcessIdentity, *, io: IoState = IoState.DRAINED, departed: bool = False
) -> InstanceEnded:
    """The evidence that it ended."""
    return InstanceEnded(HOST, identity, EndProof.PIDFD, EndCause.QUIT, io, departed, 12)
