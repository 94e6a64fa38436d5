# SPDX-License-Identifier: LGPL-2.1-or-later
"""`LibvirtSource` and its connection over a libvirt that is made up: lost, mute, ambiguous."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.unasked_libvirt import UnaskedLibvirt
from vmchannel_host.hypervisors.cmdline import CommandLine
from vmchannel_host.hypervisors.instances import InstanceTable
from vmchannel_host.hypervisors.libvirt.connection import Patience
from vmchannel_host.hypervisors.libvirt.followed import Followed
from vmchannel_host.hypervisors.libvirt.link import (
    Closed,
    DomainTexts,
    LibvirtError,
    Lifecycle,
    Link,
    NoSuchDomain,
    Sink,
)
from vmchannel_host.hypervisors.libvirt.monitor import LibvirtMonitor
from vmchannel_host.hypervisors.libvirt.source import LibvirtSettings, LibvirtSource
from vmchannel_host.hypervisors.libvirt.words import (
    PAUSED,
    SAVING,
    SHUTOFF,
    STOPPED,
    STOPPED_MIGRATED,
    STOPPED_SAVED,
    DomainRecord,
)
from vmchannel_host.hypervisors.monitors import MonitorMute
from vmchannel_host.hypervisors.process import ProcessTable, VerifiedProcess, read_boot_id, read_pid_namespace
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.model import BootId, HostName, Migration, ProcessIdentity, RunState, VmUuid

URI = "test:///made-up"
VM1 = VmUuid("11111111-1111-4111-8111-111111111111")
VM2 = VmUuid("22222222-2222-4222-8222-222222222222")
PATIENCE = Patience(open_s=60.0, command_s=60.0, ask_s=60.0, first_retry_s=0.01, last_retry_s=0.02)


class MadeUpLibvirt:
    """The libvirt behind all links; while `answers` is not set every call hangs."""

    def __init__(self, *records: DomainRecord) -> None:
        self.domains = {one.vm_uuid: one for one in records}
        self.answers = threading.Event()
        self.answers.set()
        self.refuses = ""
        self.sinks: list[Sink] = []
        self.saved = {VM1}
        self.removed: list[VmUuid] = []
        self.created: list[VmUuid] = []

    def open(self, uri: str, sink: Sink) -> Link:
        if self.refuses:
            raise LibvirtError(f"{uri}: {self.refuses}")
        self.sinks.append(sink)
        return MadeUpLink(self)


class MadeUpLink:
    """Implements `Link`."""

    def __init__(self, libvirt: MadeUpLibvirt) -> None:
        self._libvirt = libvirt

    def domains(self) -> Sequence[DomainRecord]:
        self._libvirt.answers.wait()
        return list(self._libvirt.domains.values())

    def domain(self, vm: VmUuid) -> DomainRecord:
        self._libvirt.answers.wait()
        if vm not in self._libvirt.domains:
            raise NoSuchDomain(vm)
        return self._libvirt.domains[vm]

    def xml(self, vm: VmUuid) -> str:
        return f"<domain><uuid>{vm}</uuid></domain>"

    def probe(self, vm: VmUuid) -> int | None:
        self._libvirt.answers.wait()
        return None

    def settle(self) -> None:
        self._libvirt.answers.wait()

    def remove_managed_save(self, vm: VmUuid) -> bool:
        self._libvirt.answers.wait()
        try:
            self._libvirt.saved.remove(vm)
        except KeyError:
            return False
        self._libvirt.removed.append(vm)
        return True

    def create(self, vm: VmUuid) -> None:
        self._libvirt.created.append(vm)

    def reset(self, vm: VmUuid) -> None:
        raise LibvirtError("not here")

    def definitions(self, vm: VmUuid) -> DomainTexts:
        raise LibvirtError("not here")

    def attach_device(self, vm: VmUuid, xml: str, *, live: bool, config: bool) -> None:
        raise LibvirtError("not here")

    def detach_device(self, vm: VmUuid, xml: str, *, live: bool) -> None:
        raise LibvirtError("not here")

    def close(self) -> None:
        pass


def defined(vm: VmUuid, name: str, *, autostart: bool = False) -> DomainRecord:
    return DomainRecord(vm, name, -1, SHUTOFF, 0, autostart=autostart)


class MadeUpProcess(VerifiedProcess):
    """Execution 7 of a domain; its pidfd is a pipe."""

    def __init__(self, vm: VmUuid) -> None:
        identity = ProcessIdentity(2**22 - 1, 1, "/usr/bin/qemu-system-x86_64", vm, BootId("boot"))
        reader, self._writer = os.pipe()
        super().__init__(identity, CommandLine((vm,), "vm", domain_id=7), reader)

    def end(self) -> None:
        os.close(self._writer)


def a_watch() -> ProcessWatch:
    processes = ProcessTable(boot_id=read_boot_id(), pid_namespace=read_pid_namespace())
    return ProcessWatch(processes, host=HostName("host1"), clock=lambda: 0.0)


@asynccontextmanager
async def running(
    libvirt: MadeUpLibvirt, saves: Path, patience: Patience = PATIENCE, watch: ProcessWatch | None = None
) -> AsyncGenerator[LibvirtSource]:
    """A source that has tried to reach its libvirt; no process is scanned."""
    watch = watch or a_watch()
    settings = LibvirtSettings(URI, saves, patience)
    source = LibvirtSource(settings, watch, libvirt.open, wall_clock=lambda: 1000.0)

    async def find() -> None:
        await source.find(timeout_s=60.0)

    task = asyncio.create_task(watch.run(find()))
    try:
        yield source
    finally:
        libvirt.answers.set()
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_lost_connection_is_told_and_opened_again(tmp_path: Path) -> None:
    libvirt = MadeUpLibvirt(defined(VM1, "vm1"))
    async with running(libvirt, tmp_path) as source:
        await until(lambda: source.can_start(VM1, "vm1"))
        assert source.state().problem == ""
        libvirt.refuses = "Connection refused"
        libvirt.sinks[0](Closed("end of file"))
        await until(lambda: source.state().problem == "Connection refused")
        assert source.state().since == 1000.0
        assert not source.can_start(VM1, "vm1")
        libvirt.refuses = ""
        await until(lambda: source.can_start(VM1, "vm1"))
        assert source.state().problem == ""
        assert len(libvirt.sinks) == 2


async def test_what_an_earlier_link_tells_does_not_end_the_present_one(tmp_path: Path) -> None:
    libvirt = MadeUpLibvirt(defined(VM1, "vm1"))
    async with running(libvirt, tmp_path) as source:
        await until(lambda: source.can_start(VM1, "vm1"))
        libvirt.sinks[0](Closed("end of file"))
        await until(lambda: len(libvirt.sinks) == 2 and source.can_start(VM1, "vm1"))
        libvirt.sinks[0](Closed("end of file, once more"))
        await source.ask(None, deadline=asyncio.get_running_loop().time() + 60.0)
        assert source.can_start(VM1, "vm1")
        assert len(libvirt.sinks) == 2


async def test_a_mute_libvirt_holds_a_call_until_its_deadline_only(tmp_path: Path) -> None:
    libvirt = MadeUpLibvirt(defined(VM1, "vm1"))
    async with running(libvirt, tmp_path) as source:
        await until(lambda: source.can_start(VM1, "vm1"))
        libvirt.answers.clear()
        async with asyncio.timeout(60.0):
            with pytest.raises(MonitorMute):
                await source.state_of(VM1, timeout_s=0.05)
            await source.ask(None, deadline=asyncio.get_running_loop().time() + 0.1)
        assert source.state().problem != ""
        libvirt.answers.set()
        await source.ask(None, deadline=asyncio.get_running_loop().time() + 60.0)
        assert source.state().problem == ""


async def test_saved_memory_is_not_called_removed_when_libvirt_is_mute(tmp_path: Path) -> None:
    libvirt = MadeUpLibvirt(defined(VM1, "vm1"))
    async with running(libvirt, tmp_path / "not there") as source:
        await until(lambda: source.can_start(VM1, "vm1"))
        libvirt.answers.clear()
        assert await source.discard_memory(VM1, timeout_s=0.05) == ()
        assert libvirt.removed == []
        answer = await source.ask(VM1, deadline=asyncio.get_running_loop().time() + 0.5)
        assert [vm for vm, _ in answer.silent] == [VM1]  # so nobody calls it off
        libvirt.answers.set()
        told: tuple[str, ...] = ()
        while not told:  # by whichever of the two calls removed it
            told = await source.discard_memory(VM1, timeout_s=60.0)
        assert "managed save removed" in told[0]
        assert libvirt.removed == [VM1]
        assert await source.discard_memory(VM1, timeout_s=60.0) == ()


async def test_of_two_domains_with_one_name_the_uuid_decides(tmp_path: Path) -> None:
    libvirt = MadeUpLibvirt(defined(VM1, "vm"), defined(VM2, "vm", autostart=True))
    async with running(libvirt, tmp_path) as source:
        await until(lambda: source.can_start(VM1, "vm"))
        assert source.state().autostart == ((VM2, "vm"),)
        await source.start(VM2, "vm", timeout_s=60.0)
        assert libvirt.created == [VM2]
        assert not source.can_start(VmUuid("33333333-3333-4333-8333-333333333333"), "vm")


def _learn_late(followed: Followed) -> None:
    followed.learn(followed.record, 2, None, probed=True, asked_at=followed.asked_at)


@pytest.mark.parametrize("managed", [True, False])
async def test_s1_what_libvirt_says_of_a_process_counts_though_a_scan_has_seen_it_end_before(
    tmp_path: Path, managed: bool
) -> None:
    saving = replace(defined(VM1, "vm1"), id=7, state=PAUSED, reason=SAVING)
    libvirt, watch, process = MadeUpLibvirt(saving), a_watch(), MadeUpProcess(VM1)
    watched = watch.adopt(process)
    async with running(libvirt, tmp_path, watch=watch) as source:
        await source.find(timeout_s=60.0)
        await until(lambda: watched.last_migration is Migration.OUTGOING)
        process.end()
        for _ in range(3):
            await source.find(timeout_s=60.0)
            await asyncio.sleep(0.01)
        libvirt.answers.clear()
        with pytest.raises(MonitorMute):  # asked before, and answered after libvirt's word
            await source.state_of(VM1, timeout_s=0.05)
        libvirt.domains[VM1] = replace(defined(VM1, "vm1"), managed_save=managed)
        libvirt.answers.set()
        libvirt.sinks[0](Lifecycle(VM1, -1, STOPPED, STOPPED_SAVED))
        await until(lambda: watched.evidence is not None)
    assert watched.evidence is not None
    assert watched.evidence.departed is not managed


@pytest.mark.parametrize("late", [Followed.mute, _learn_late])
def test_s1_what_was_under_way_when_libvirt_gave_its_last_word_changes_it_no_more(
    late: Callable[[Followed], None],
) -> None:
    table, process = InstanceTable(), MadeUpProcess(VM1)
    record = replace(defined(VM1, "vm1"), id=7, state=PAUSED, reason=SAVING)
    watched = table.adopt(process)
    followed = Followed(table, watched, record, LibvirtMonitor(UnaskedLibvirt(), record, lambda: 0.0))
    followed.learn(record, 2, None, probed=True, asked_at=followed.asked_at)
    assert watched.instance().migration is Migration.OUTGOING
    followed.stopped(Lifecycle(VM1, -1, STOPPED, STOPPED_SAVED), managed_save=True)
    late(followed)
    assert watched.instance().migration is Migration.NONE
    process.end()
    process.close()


async def test_s0_memory_that_libvirt_may_have_saved_is_doubted_until_it_says_how_the_domain_ended(
    tmp_path: Path,
) -> None:
    saving = replace(defined(VM1, "vm1"), id=7, state=PAUSED, reason=SAVING)
    libvirt, watch, process = MadeUpLibvirt(saving), a_watch(), MadeUpProcess(VM1)
    watch.adopt(process)
    async with running(libvirt, tmp_path, watch=watch) as source:
        await source.find(timeout_s=60.0)

        async def silent() -> list[VmUuid]:
            answer = await source.ask(VM1, deadline=asyncio.get_running_loop().time() + 60.0)
            return [vm for vm, _ in answer.silent]

        assert await silent() == []  # its process lives, and a look finds that
        process.end()
        assert await silent() == [VM1]
        libvirt.domains[VM1] = defined(VM1, "vm1")
        assert await silent() == []


async def test_a_late_word_of_an_earlier_execution_says_nothing_of_the_one_that_runs(tmp_path: Path) -> None:
    libvirt, watch, process = MadeUpLibvirt(), a_watch(), MadeUpProcess(VM1)
    libvirt.domains[VM1] = replace(defined(VM1, "vm1"), id=7, state=1)
    watched = watch.adopt(process)
    async with running(libvirt, tmp_path, watch=watch) as source:
        await source.find(timeout_s=60.0)
        await until(lambda: watched.last_migration is Migration.NONE)
        libvirt.sinks[0](Lifecycle(VM1, -1, STOPPED, STOPPED_MIGRATED))
        libvirt.domains[VM1] = replace(libvirt.domains[VM1], state=PAUSED, reason=1)
        await source.state_of(VM1, timeout_s=60.0)
        assert watched.instance().run_state is RunState.PAUSED
        assert watched.last_migration is Migration.NONE
        process.end()
        libvirt.sinks[0](Lifecycle(VM1, -1, STOPPED, STOPPED_MIGRATED))
        await until(lambda: watched.evidence is not None)
    assert watched.evidence is not None
    assert watched.evidence.departed
