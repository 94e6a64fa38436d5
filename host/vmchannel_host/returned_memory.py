# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that comes back after an off (S6): a guest that speaks with a kernel boot that was declared dead.

Somebody has restored a saved state or a snapshot of a VM whose "off" was told to a cluster. Its services may
run elsewhere by now, so it is destroyed at sight, as an operation of its own, and reported.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from fence_vmchannel.hub.events import HubStatus, PeerConnected, PeerStatus
from fence_vmchannel.hub.watch import Watch
from fence_vmchannel.messages import FenceAnswer
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.journal.types import JournalError, OperationRows
from vmchannel_host.model import VmUuid

_log = logging.getLogger(__name__)

LOOK_BACK = 1000
"""How many of the latest operations may have declared a boot dead."""

BETWEEN_S = 0.5
"""Between two readings of them, seconds: one takes the journal some 70 ms."""


class Boots(Protocol):
    """What is asked of the journal."""

    async def remember_boot(self, vm_uuid: VmUuid, boot_id: str) -> int:
        """The last record before the boot's first sight."""
        ...

    async def operations(self, limit: int = ...) -> Sequence[OperationRows]:
        """The latest operations, newest first."""
        ...


class ReturnedMemory:
    """Watches who greets. It destroys a VM only while the greeting that it judged is the present one."""

    def __init__(
        self,
        journal: Boots,
        status: Callable[[], HubStatus],
        destroy: Callable[[VmUuid, str], Awaitable[FenceAnswer]],
        tasks: Tasks,
    ) -> None:
        """`status` gives the hub's peers; `destroy` fences a VM off for a reason."""
        self._journal = journal
        self._status = status
        self._destroy = destroy
        self._tasks = tasks
        self._waiting: dict[tuple[str, str], PeerConnected] = {}  # by VM and port
        self._judging = False

    async def follow(self, watch: Watch) -> None:
        """Judge every greeting, until cancelled. Of one port only the latest waits."""
        with watch as events:
            async for event in events:
                if isinstance(event, PeerConnected) and event.key:
                    self._waiting[event.key, event.port] = event
                    if not self._judging:
                        self._judging = True
                        self._tasks.spawn(self._judge_all(), "boots of guests")

    async def _judge_all(self) -> None:
        """Judge all that wait at once, a batch at a time: guests that greet in a loop must not keep the
        journal from those who fence (S7)."""
        try:
            while self._waiting:
                events, self._waiting = tuple(self._waiting.values()), {}
                await self._judge(events)
                await asyncio.sleep(BETWEEN_S)
        finally:
            self._judging = False

    async def _judge(self, events: Iterable[PeerConnected]) -> None:
        present = [(event, peer) for event in events if (peer := self._present(event)) and peer.boot_id]
        try:
            seen = [
                await self._journal.remember_boot(VmUuid(event.key), peer.boot_id) for event, peer in present
            ]
            past = await self._journal.operations(LOOK_BACK) if present else ()
        except JournalError as error:
            names = ", ".join(event.key for event, _ in present)
            _log.error("vm=%s: cannot tell whether its memory was declared off: %s", names, error)
            return
        for (event, peer), at in zip(present, seen, strict=True):
            dead = declared_dead(VmUuid(event.key), at, past)
            if dead and self._present(event) is not None:
                self._tasks.spawn(self._end(VmUuid(event.key), peer.boot_id, dead), f"end of {event.key}")

    async def _end(self, vm: VmUuid, boot_id: str, dead: str) -> None:
        reason = f"memory came back that op={dead} had declared off"
        _log.error("vm=%s boot=%r: %s: destroying it", vm, boot_id[:40], reason)
        answer = await self._destroy(vm, reason)
        _log.log(logging.INFO if answer.ok else logging.ERROR, "vm=%s: %s", vm, answer.reason)

    def _present(self, event: PeerConnected) -> PeerStatus | None:
        """The peer that greeted, if that greeting is the latest: an older one may be of a dead process."""
        for peer in self._status().peers:
            if (peer.key, peer.port, peer.session) == (event.key, event.port, event.session):
                return peer if peer.connected else None
        return None


def declared_dead(vm: VmUuid, seen_seq: int, operations: Sequence[OperationRows]) -> str:
    """The operation that declared off what was seen at `seen_seq` of the chain; "" when none did.

    What was first seen during an operation may be the next incarnation already, and is not judged by it.
    """
    for rows in operations:
        told = rows.last.body
        off = rows.last.kind == codec.OUTCOME and told.get("ok") is True and told.get("state") == "off"
        if off and told.get("vm") == vm and rows.first.seq > seen_seq:
            return rows.operation
    return ""
