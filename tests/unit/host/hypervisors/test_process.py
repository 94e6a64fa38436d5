# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes found and identified in a made-up /proc. Pidfds are pipes: readable when the writer is closed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.host.hypervisors.test_proc_stat import stat_line
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.peer import QemuPeers, WrongPeer
from vmchannel_host.hypervisors.process import (
    NotAVm,
    ProcessGone,
    ProcessKey,
    ProcessTable,
    Unidentified,
    VerifiedProcess,
)
from vmchannel_host.hypervisors.scanner import Scan, Scanner
from vmchannel_host.model import NO_NAMESPACE, BootId, EndProof, PidNamespace, ProcessIdentity, VmUuid

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
OTHER = VmUuid("11111111-2222-4333-8444-555555555555")
QEMU = "/usr/bin/qemu-system-x86_64"
BOOT = BootId("this-boot")
SPACE = PidNamespace(4026532000)


EXITING, KERNEL_THREAD = 0x4, 0x200000
"""Flags of linux/sched.h."""


class Proc:
    """A /proc of our making, with the pidfds of its processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._writers: dict[int, int] = {}
        self._opened: list[VerifiedProcess] = []
        self.on_pidfd_open: dict[int, OSError] = {}
        self.add(1, executable="/sbin/init", arguments=("init",))

    def add(
        self,
        pid: int,
        *,
        start_time: int = 100,
        executable: str | None = QEMU,
        arguments: tuple[str, ...] = ("qemu", "-uuid", UUID),
        state: str = "S",
        flags: int = 0,
        threads: int = 1,
        command: str = "qemu-system-x86",
    ) -> None:
        directory = self.root / str(pid)
        (directory / "task").mkdir(parents=True)
        line = stat_line(pid, start_time, command=command, state=state, flags=flags, threads=threads)
        self._fill(directory, line, executable, arguments)

    def add_thread(self, pid: int, thread: int) -> None:
        directory = self.root / str(pid) / "task" / str(thread)
        directory.mkdir()
        self._fill(directory, stat_line(thread, 100), QEMU, ("qemu", "-uuid", UUID))

    def _fill(self, directory: Path, stat: str, executable: str | None, arguments: tuple[str, ...]) -> None:
        (directory / "stat").write_text(stat)
        (directory / "cmdline").write_bytes("".join(f"{argument}\0" for argument in arguments).encode())
        if executable is not None:
            (directory / "exe").symlink_to(executable)

    def opened(self, pid: int) -> bool:
        """Whether somebody has opened a pidfd of it."""
        return pid in self._writers

    def end(self, pid: int) -> None:
        os.close(self._writers.pop(pid))

    def pidfd_open(self, pid: int) -> int:
        if pid in self.on_pidfd_open:
            raise self.on_pidfd_open[pid]
        if not (self.root / str(pid)).exists():
            raise ProcessLookupError(errno.ESRCH, "No such process")
        reader, writer = os.pipe()
        if pid in self._writers:
            os.close(self._writers[pid])
        self._writers[pid] = writer
        return reader

    def table(self) -> ProcessTable:
        return ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=self.root, pidfd_open=self.pidfd_open)

    async def scan(self, known: frozenset[ProcessKey] = frozenset()) -> Scan:
        return await Scanner(self.table(), DetachedCalls()).scan(known, timeout_s=20)

    def keep(self, process: VerifiedProcess) -> VerifiedProcess:
        self._opened.append(process)
        return process

    def close(self) -> None:
        for process in self._opened:
            process.close()
        for writer in self._writers.values():
            os.close(writer)


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[Proc]:
    made = Proc(tmp_path / "proc")
    yield made
    made.close()


async def test_a_qemu_is_found_and_identified(proc: Proc) -> None:
    proc.add(10, start_time=77)
    proc.add(11, executable="/bin/sh", arguments=("sh",))
    (process,) = (await proc.scan()).new
    assert proc.keep(process).identity == ProcessIdentity(10, 77, QEMU, UUID, BOOT, SPACE)


@pytest.mark.parametrize("executable", ["/usr/libexec/qemu-kvm", "/usr/bin/kvm", "/x/qemu-system-aarch64"])
def test_every_usual_name_of_a_qemu_is_recognised(proc: Proc, executable: str) -> None:
    proc.add(10, executable=executable)
    assert proc.keep(proc.table().open(10)).identity.executable == executable


def test_a_qemu_whose_package_was_upgraded_keeps_its_identity(proc: Proc) -> None:
    proc.add(10, executable=f"{QEMU} (deleted)")
    assert proc.keep(proc.table().open(10)).identity.executable == QEMU


async def test_a_leader_that_has_exited_is_identified_by_its_living_threads(proc: Proc) -> None:
    proc.add(10, executable=None, arguments=(), state="Z")
    proc.add_thread(10, 12)
    (process,) = (await proc.scan()).new
    assert proc.keep(process).identity.vm_uuid == UUID


@pytest.mark.parametrize("flags", [0, KERNEL_THREAD, KERNEL_THREAD | EXITING])
async def test_a_zombie_without_threads_and_a_kernel_thread_are_no_vms(proc: Proc, flags: int) -> None:
    proc.add(10, executable=None, arguments=(), state="Z")
    proc.add(11, executable=None, arguments=(), flags=flags)
    scan = await proc.scan()
    assert scan.new == []
    assert scan.problems == []


EXITS = [
    {"flags": EXITING},  # after its memory, before its files
    {"state": "Z", "threads": 2},  # so do its threads
]


@pytest.mark.parametrize("exits", EXITS)
async def test_s1_a_process_that_exits_and_shows_no_program_may_be_any_vm_until_it_has_ended(
    proc: Proc, exits: dict[str, Any]
) -> None:
    """It may be a QEMU whose last writes are under way."""
    proc.add(10, executable=None, arguments=(), **exits)
    scan = await proc.scan()
    assert scan.new == []
    assert [(candidate.pid, problem.anyones) for candidate, problem in scan.unknown.items()] == [(10, True)]


@pytest.mark.parametrize("exits", EXITS)
async def test_s7_another_program_that_exits_is_no_vm_whatever_it_hangs_in(
    proc: Proc, exits: dict[str, Any]
) -> None:
    proc.add(10, executable=None, arguments=(), command="java", **exits)
    scan = await proc.scan()
    assert (scan.new, scan.unknown, scan.problems) == ([], {}, [])


@pytest.mark.parametrize("exits", EXITS)
def test_a_process_that_exits_is_waited_for_and_then_gone(proc: Proc, exits: dict[str, Any]) -> None:
    proc.add(10, executable=None, arguments=(), **exits)
    with ThreadPoolExecutor() as pool:
        opening = pool.submit(proc.table().open, 10)
        while not proc.opened(10):
            pass
        proc.end(10)
        with pytest.raises(ProcessGone):
            opening.result()


@pytest.mark.parametrize("exits", EXITS)
async def test_a_known_process_that_exits_is_not_lost(proc: Proc, exits: dict[str, Any]) -> None:
    proc.add(10, executable=None, arguments=(), command="renamed", **exits)
    scan = await proc.scan(frozenset({(10, 100)}))
    assert (scan.lost, scan.problems) == (set(), [])


def test_another_program_with_a_uuid_option_is_no_vm(proc: Proc) -> None:
    proc.add(10, executable="/usr/bin/socat")
    with pytest.raises(NotAVm):
        proc.table().open(10)


def test_a_process_that_ends_while_it_is_identified_is_gone_and_gets_no_identity(proc: Proc) -> None:
    proc.add(10)

    def open_and_end(pid: int) -> int:
        pidfd = proc.pidfd_open(pid)
        proc.end(pid)
        return pidfd

    table = ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=proc.root, pidfd_open=open_and_end)
    with pytest.raises(ProcessGone):
        table.open(10)


async def test_a_qemu_without_a_uuid_is_a_problem_that_names_it(proc: Proc) -> None:
    proc.add(10, arguments=("qemu", "-name", "nameless"))
    scan = await proc.scan()
    assert scan.new == []
    (problem,) = scan.problems
    assert "pid 10" in str(problem)
    assert "nameless" in str(problem)


async def test_a_qemu_with_two_uuids_makes_both_vms_uncertain(proc: Proc) -> None:
    proc.add(10, arguments=("qemu", "-uuid", UUID, "-uuid", OTHER))
    (problem,) = (await proc.scan()).problems
    assert problem.vm_uuids == (UUID, OTHER)


async def test_a_qemu_that_only_shows_capabilities_is_ignored(proc: Proc) -> None:
    proc.add(10, arguments=("qemu", "-S", "-machine", "none"))
    scan = await proc.scan()
    assert (scan.new, scan.problems) == ([], [])


async def test_a_qemu_without_a_readable_command_line_is_a_problem_not_nothing(proc: Proc) -> None:
    proc.add(10, arguments=())
    (problem,) = (await proc.scan()).problems
    assert "pid 10" in str(problem)


async def test_a_known_process_is_seen_again_and_one_that_became_another_program_is_lost(proc: Proc) -> None:
    proc.add(10)
    proc.add(11, executable="/bin/true")
    scan = await proc.scan(frozenset({(10, 100), (11, 100), (12, 100)}))
    assert scan.new == []
    assert scan.lost == {(11, 100), (12, 100)}


async def test_a_recycled_pid_is_a_new_process(proc: Proc) -> None:
    proc.add(10, start_time=200)
    scan = await proc.scan(frozenset({(10, 100)}))
    assert [proc.keep(process).key for process in scan.new] == [(10, 200)]
    assert scan.lost == {(10, 100)}


def test_a_proc_that_hides_processes_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "10").mkdir()
    with pytest.raises(HypervisorError, match="hides"):
        ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=tmp_path).sieve(frozenset())


def test_a_proc_that_cannot_be_listed_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError):
        ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=tmp_path / "none").sieve(frozenset())


IDENTITY = ProcessIdentity(10, 100, QEMU, UUID, BOOT, SPACE)


def test_a_recorded_process_that_lives_is_not_absent(proc: Proc) -> None:
    proc.add(10)
    assert proc.table().absence(IDENTITY) is None


def test_no_process_of_that_pid_is_absence(proc: Proc) -> None:
    assert proc.table().absence(IDENTITY) is EndProof.ABSENT


def test_a_pid_that_belongs_to_another_process_now_is_absence(proc: Proc) -> None:
    proc.add(10, start_time=101)
    assert proc.table().absence(IDENTITY) is EndProof.ABSENT


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT])
def test_a_pid_that_belongs_to_a_thread_now_is_absence(proc: Proc, code: int) -> None:
    proc.on_pidfd_open[10] = OSError(code, "a thread")
    assert proc.table().absence(IDENTITY) is EndProof.ABSENT


def test_another_boot_of_the_kernel_is_a_proof_of_its_own(proc: Proc) -> None:
    proc.add(10)
    before = ProcessIdentity(10, 100, QEMU, UUID, BootId("earlier-boot"), SPACE)
    assert proc.table().absence(before) is EndProof.OTHER_BOOT


@pytest.mark.parametrize("there", [PidNamespace(4026531836), NO_NAMESPACE])
def test_s1_a_pid_says_nothing_in_another_namespace_than_the_one_it_was_recorded_in(
    proc: Proc, there: PidNamespace
) -> None:
    recorded = replace(IDENTITY, pid_namespace=there)
    with pytest.raises(HypervisorError, match="namespace"):
        proc.table().absence(recorded)
    proc.add(10)
    with pytest.raises(HypervisorError, match="namespace"):
        proc.table().absence(recorded)


def test_another_boot_proves_the_end_whatever_the_namespace(proc: Proc) -> None:
    before = replace(IDENTITY, boot_id=BootId("earlier-boot"), pid_namespace=PidNamespace(1))
    assert proc.table().absence(before) is EndProof.OTHER_BOOT


def test_the_namespace_is_no_part_of_what_makes_two_records_one_process() -> None:
    """A record of an earlier version has none, and its process is seen again."""
    assert replace(IDENTITY, pid_namespace=NO_NAMESPACE) == IDENTITY


def test_a_record_without_a_pid_proves_nothing(proc: Proc) -> None:
    with pytest.raises(HypervisorError, match="no process"):
        proc.table().absence(ProcessIdentity(0, 100, QEMU, UUID, BOOT, SPACE))


def test_a_refused_pidfd_proves_nothing(proc: Proc) -> None:
    proc.on_pidfd_open[10] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(HypervisorError):
        proc.table().absence(IDENTITY)


def test_an_unreadable_start_time_proves_nothing(proc: Proc) -> None:
    proc.add(10)
    (proc.root / "10" / "stat").write_text("garbage")
    with pytest.raises(HypervisorError):
        proc.table().absence(IDENTITY)


async def test_the_end_wakes_every_waiter(proc: Proc) -> None:
    proc.add(10)
    process = proc.keep(proc.table().open(10))
    assert not process.ended()
    proc.end(10)
    await process.wait_ended()
    await process.wait_ended()
    assert process.ended()


async def test_whoever_waits_hears_of_an_end_that_was_noticed_otherwise(proc: Proc) -> None:
    """An end is concluded, and the pidfd closed, maybe before the event loop has told of it."""
    proc.add(10)
    process = proc.table().open(10)
    waiter = asyncio.create_task(process.wait_ended())
    await asyncio.sleep(0)
    proc.end(10)
    process.close()
    async with asyncio.timeout(20):
        await waiter


def test_the_peer_of_a_port_is_the_qemu_of_that_vm(proc: Proc) -> None:
    proc.add(10)
    QemuPeers(proc.table()).verify(10, IDENTITY)


def test_s7_the_peer_of_a_port_is_recognised_without_its_command_line(proc: Proc) -> None:
    proc.add(10)
    (proc.root / "10" / "cmdline").unlink()
    QemuPeers(proc.table()).verify(10, IDENTITY)


def test_the_qemu_of_another_vm_is_no_peer(proc: Proc) -> None:
    proc.add(10)
    proc.add(11, arguments=("qemu", "-uuid", OTHER))
    with pytest.raises(WrongPeer, match=UUID):
        QemuPeers(proc.table()).verify(11, IDENTITY)


@pytest.mark.parametrize(
    "change",
    [
        {"executable": "/usr/bin/socat"},
        {"start_time": 101},
        {"boot_id": BootId("earlier")},
        {"pid_namespace": PidNamespace(1)},
    ],
)
def test_a_process_that_differs_from_the_identified_one_is_no_peer(
    proc: Proc, change: dict[str, Any]
) -> None:
    proc.add(10)
    with pytest.raises(WrongPeer):
        QemuPeers(proc.table()).verify(10, replace(IDENTITY, **change))


def test_a_proxy_and_a_dead_process_are_no_peers(proc: Proc) -> None:
    proc.add(10, executable="/usr/bin/socat")
    with pytest.raises(WrongPeer):
        QemuPeers(proc.table()).verify(10, IDENTITY)
    with pytest.raises(WrongPeer):
        QemuPeers(proc.table()).verify(999, replace(IDENTITY, pid=999))


def test_a_process_that_ends_while_it_is_recognised_is_no_peer(proc: Proc) -> None:
    proc.add(10)

    def open_and_end(pid: int) -> int:
        pidfd = proc.pidfd_open(pid)
        proc.end(pid)
        return pidfd

    table = ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=proc.root, pidfd_open=open_and_end)
    with pytest.raises(WrongPeer):
        QemuPeers(table).verify(10, IDENTITY)


def test_a_problem_names_the_vms_it_may_concern() -> None:
    assert Unidentified("x", (UUID,)).vm_uuids == (UUID,)
