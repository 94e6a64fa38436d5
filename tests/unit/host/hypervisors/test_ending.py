# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ends that cannot be brought about for real: processes that hang in the kernel, ends in the wrong moment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from tests.fakes.unasked_libvirt import UnaskedLibvirt
from tests.fakes.virtual_time import virtual_time
from vmchannel_host.hypervisors import Ended, HypervisorError, NotProven, Seen
from vmchannel_host.hypervisors.cmdline import CommandLine
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.ending import STREAM_TIMEOUT_S, Endings
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.hypervisors.libvirt.monitor import LibvirtMonitor
from vmchannel_host.hypervisors.libvirt.words import PAUSED, DomainRecord
from vmchannel_host.hypervisors.process import VerifiedProcess
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    IoState,
    Migration,
    ProcessIdentity,
    VmUuid,
)

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
HOST = HostName("hv1")


class MadeUpProcess(VerifiedProcess):
    """Its pidfd is a pipe; SIGKILL does to it what the test says."""

    def __init__(self, *, dies: bool, permitted: bool = True) -> None:
        identity = ProcessIdentity(2**22 - 1, 1, "/usr/bin/qemu-system-x86_64", UUID, BootId("boot"))
        reader, self._writer = os.pipe()
        super().__init__(identity, CommandLine((UUID,), "vm"), reader)
        self.kills = 0
        self._dies = dies
        self._permitted = permitted

    def kill(self) -> None:
        self.kills += 1
        if not self._permitted:
            raise HypervisorError("not permitted")
        if self._dies:
            self.end()

    def end(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


class Rig:
    def __init__(self, process: MadeUpProcess) -> None:
        self.process = process
        self.table = InstanceTable()
        self.events = self.table.events()
        self.watched: Watched = self.table.adopt(process)
        self.now = 0.0
        self.endings = Endings(
            self.table, DetachedCalls(), host=HOST, clock=lambda: self.now, proc=Path("/nonexistent")
        )

    def close(self) -> None:
        self.process.end()
        self.process.close()


@pytest.fixture
def immortal() -> Iterator[Rig]:
    rig = Rig(MadeUpProcess(dies=False))
    yield rig
    rig.close()


@pytest.fixture
def mortal() -> Iterator[Rig]:
    rig = Rig(MadeUpProcess(dies=True))
    yield rig
    rig.close()


async def test_a_process_that_does_not_end_after_sigkill_is_not_proven_off(immortal: Rig) -> None:
    with pytest.raises(NotProven, match="hang in the kernel"):
        await immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=0.1)
    assert immortal.process.kills == 1
    assert immortal.table.ended(immortal.watched.identity) is None


async def test_its_late_end_is_reported_with_what_was_done_to_it(immortal: Rig) -> None:
    with pytest.raises(NotProven):
        await immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=0.05)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(immortal.endings.watch(immortal.watched))
        await asyncio.sleep(0)
        immortal.process.end()
    assert isinstance(await anext(immortal.events), Seen)
    event = await anext(immortal.events)
    assert isinstance(event, Ended)
    assert (event.evidence.cause, event.evidence.io) == (EndCause.KILL, IoState.UNPROVEN)


async def test_a_second_off_kills_again_and_waits_no_longer_than_it_may(immortal: Rig) -> None:
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(
            _not_proven(immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=0.3))
        )
        await asyncio.sleep(0.05)
        with pytest.raises(NotProven, match="another off"):
            await immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=0.05)
    assert first.result()
    with pytest.raises(NotProven):
        await immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=0.05)
    assert immortal.process.kills == 2


async def _not_proven(off: Awaitable[object]) -> bool:
    with pytest.raises(NotProven):
        await off
    return True


async def test_a_refused_sigkill_is_an_error_not_an_end() -> None:
    rig = Rig(MadeUpProcess(dies=False, permitted=False))
    with pytest.raises(HypervisorError, match="not permitted"):
        await rig.endings.end(rig.watched, quit_timeout_s=0.01, timeout_s=1)
    assert rig.watched.evidence is None
    rig.close()


async def test_files_that_could_not_be_looked_at_leave_writes_unproven(mortal: Rig) -> None:
    mortal.now = 5.0
    evidence = await mortal.endings.end(mortal.watched, quit_timeout_s=0.01, timeout_s=5)
    assert (evidence.proof, evidence.cause, evidence.io) == (EndProof.PIDFD, EndCause.KILL, IoState.UNPROVEN)


@pytest.mark.parametrize("last", list(Migration))
async def test_an_end_is_a_departure_exactly_if_an_outgoing_migration_was_last_watched(
    mortal: Rig, last: Migration
) -> None:
    mortal.watched.last_migration = last
    evidence = await mortal.endings.end(mortal.watched, quit_timeout_s=0.01, timeout_s=5)
    assert evidence.departed == (last in (Migration.OUTGOING, Migration.COMPLETED))


@pytest.mark.parametrize("told", [True, False])
@virtual_time
async def test_s1_a_vm_in_a_migration_whose_process_ends_has_left_unless_libvirt_says_otherwise(
    told: bool,
) -> None:
    """libvirt saves a VM by a migration, ends its QEMU, and says so when its own work is done."""
    rig = Rig(MadeUpProcess(dies=True))
    monitor = LibvirtMonitor(UnaskedLibvirt(), DomainRecord(UUID, "vm", 7, PAUSED, 3), lambda: 0.0)
    rig.watched.attach(monitor)
    rig.watched.last_migration = Migration.OUTGOING
    rig.process.end()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(rig.endings.watch(rig.watched))
        await asyncio.sleep(2 * STREAM_TIMEOUT_S)
        assert rig.watched.evidence is None
        if told:
            rig.watched.last_migration = Migration.NONE
            monitor.close()
    ended = rig.table.ended(rig.watched.identity)
    assert ended is not None
    assert ended.departed is not told
    rig.close()


async def test_an_off_that_is_cancelled_leaves_the_end_to_the_watcher(immortal: Rig) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await immortal.endings.end(immortal.watched, quit_timeout_s=0.01, timeout_s=30)
    immortal.process.end()
    await immortal.endings.watch(immortal.watched)
    ended = immortal.table.ended(immortal.watched.identity)
    assert ended is not None
    assert ended.cause is EndCause.KILL


async def test_an_instance_that_has_ended_is_not_killed_again(mortal: Rig) -> None:
    first = await mortal.endings.end(mortal.watched, quit_timeout_s=0.01, timeout_s=5)
    assert await mortal.endings.end(mortal.watched, quit_timeout_s=0.01, timeout_s=5) == first
    assert mortal.process.kills == 1
