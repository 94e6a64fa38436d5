# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest whose kernel boot was declared off is destroyed when it speaks again (S6)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from fence_vmchannel.hub.events import HubEvent, HubStatus, PeerConnected, PeerStatus
from fence_vmchannel.hub.watch import Watch, WatchList
from fence_vmchannel.messages import FenceAnswer, FenceCode, PowerState
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.journal.types import JournalError, OperationRows, Record
from vmchannel_host.model import BootId, OperationId, VmUuid
from vmchannel_host.returned_memory import ReturnedMemory, declared_dead

VM = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
OTHER = VmUuid("0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")
PORT = "org.vmchannel.0"


def operation(
    seq: int, *, vm: str = VM, ok: bool = True, state: str = "off", kind: str = codec.OUTCOME
) -> OperationRows:
    """An operation whose intent has that place in the chain."""

    def record(at: int, kind: str, body: dict[str, str | bool]) -> Record:
        return Record(at, 0.0, 0.0, BootId("b"), kind, OperationId(f"op{seq}"), body)

    outcome = record(seq + 3, kind, {"ok": ok, "state": state, "vm": vm})
    return OperationRows(OperationId(f"op{seq}"), 2, record(seq, codec.INTENT, {}), outcome)


@pytest.mark.parametrize(
    ("past", "dead"),
    [
        (operation(20), "op20"),
        (operation(5), ""),  # the boot was first seen afterwards
        (operation(20, ok=False), ""),
        (operation(20, state="on"), ""),
        (operation(20, vm=OTHER), ""),
        (operation(20, kind=codec.EVIDENCE), ""),  # it has not ended
    ],
)
def test_a_boot_is_dead_when_an_off_was_ordered_after_it_was_seen_and_succeeded(
    past: OperationRows, dead: str
) -> None:
    assert declared_dead(VM, 10, [past]) == dead


@dataclass
class FakeJournal:
    """Remembers boots; its past is given."""

    past: list[OperationRows]
    seen: dict[tuple[VmUuid, str], int] = field(default_factory=dict[tuple[VmUuid, str], int])
    fails: bool = False

    async def remember_boot(self, vm_uuid: VmUuid, boot_id: str) -> int:
        if self.fails:
            raise JournalError("no disk")
        return self.seen.setdefault((vm_uuid, boot_id), 100)

    async def operations(self, limit: int = 1000) -> Sequence[OperationRows]:
        return self.past[:limit]


@dataclass
class World:
    """One VM's peer, a journal, and what was destroyed."""

    journal: FakeJournal
    session: str = "s1"
    boot_id: str = "boot-1"
    destroyed: list[VmUuid] = field(default_factory=list[VmUuid])

    def status(self) -> HubStatus:
        peer = PeerStatus(
            "vm1", PORT, "vm", True, True, self.session, "", 0, 0, 0, key=VM, boot_id=self.boot_id
        )
        return HubStatus("", "", (peer,))

    async def destroy(self, vm: VmUuid, reason: str) -> FenceAnswer:
        assert "op20" in reason
        self.destroyed.append(vm)
        return FenceAnswer(bytes(16), True, FenceCode.DONE, PowerState.OFF, "hv1", "off")

    async def greet(self, session: str = "s1") -> None:
        """Let the peer greet, and everything that follows happen."""
        events: list[HubEvent] = [PeerConnected("vm1", PORT, session, False, "", VM)]
        tasks = Tasks()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(tasks.run())
            await tasks.opened()
            memory = ReturnedMemory(self.journal, self.status, self.destroy, tasks)
            follow = group.create_task(memory.follow(watch_of(events)))
            for _ in range(20):
                await asyncio.sleep(0)
            for task in (follow, running):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def watch_of(events: list[HubEvent]) -> Watch:
    """A watch that gives these events."""
    return WatchList(lambda: events).add()


async def test_memory_that_was_declared_off_is_destroyed_at_sight() -> None:
    world = World(FakeJournal([operation(20)], {(VM, "boot-1"): 10}))
    await world.greet()
    assert world.destroyed == [VM]


async def test_a_new_boot_after_an_off_is_left_alone() -> None:
    world = World(FakeJournal([operation(20)], {(VM, "boot-1"): 10}), boot_id="boot-2")
    await world.greet()
    assert world.destroyed == []


async def test_a_greeting_that_is_not_the_present_one_is_not_judged() -> None:
    world = World(FakeJournal([operation(20)], {(VM, "boot-1"): 10}), session="s2")
    await world.greet(session="s1")
    assert world.destroyed == []


async def test_without_the_journal_nothing_is_judged() -> None:
    world = World(FakeJournal([operation(20)], {(VM, "boot-1"): 10}, fails=True))
    await world.greet()
    assert world.destroyed == []
