# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pid that goes to another process at the worst moment: that one is neither believed nor touched (S9)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.host.hypervisors.test_process import BOOT, IDENTITY, OTHER, SPACE, UUID, Proc
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.host import HostHypervisor
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.hypervisors.process import ProcessTable
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.scanner import Scanner
from vmchannel_host.model import EndCause, EndProof, HostName, VmUuid


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[Proc]:
    made = Proc(tmp_path / "proc")
    yield made
    made.close()


def recycle(proc: Proc, vm_uuid: VmUuid) -> None:
    """Process 10 ends, and its pid goes to a QEMU that was started just now."""
    shutil.rmtree(proc.root / "10")
    proc.add(10, start_time=200, arguments=("qemu", "-uuid", vm_uuid))


def table(proc: Proc, *, before_open: int, event: Callable[[], None]) -> ProcessTable:
    """Just before the n-th pidfd is opened something happens."""
    opened = 0

    def pidfd_open(pid: int) -> int:
        nonlocal opened
        opened += 1
        if opened == before_open:
            event()
        return proc.pidfd_open(pid)

    return ProcessTable(boot_id=BOOT, pid_namespace=SPACE, proc=proc.root, pidfd_open=pidfd_open)


def hypervisor(processes: ProcessTable) -> HostHypervisor:
    host = HostName("hv1")
    watch = ProcessWatch(processes, host=host, clock=lambda: 0.0)
    return HostHypervisor(watch, (), (Launcher({}),), host=host, clock=lambda: 0.0, ports="/nonexistent")


@pytest.mark.parametrize("before_open", [1, 2])
@pytest.mark.parametrize("vm_uuid", [UUID, OTHER])
async def test_off_of_a_process_whose_pid_is_recycled_meanwhile_touches_nobody(
    proc: Proc, before_open: int, vm_uuid: VmUuid
) -> None:
    """`off` opens a first pidfd to see whether the process is there, and a second one to identify it."""
    proc.add(10)
    processes = table(proc, before_open=before_open, event=lambda: recycle(proc, vm_uuid))
    # A kill would raise: a pipe, which stands for the pidfd here, takes no signal.
    end = await hypervisor(processes).off(IDENTITY, quit_timeout_s=1, timeout_s=20)
    assert (end.identity, end.proof, end.cause) == (IDENTITY, EndProof.ABSENT, EndCause.NONE)


async def test_a_scan_during_which_a_pid_is_recycled_finds_the_process_that_has_it(proc: Proc) -> None:
    proc.add(10)
    processes = table(proc, before_open=1, event=lambda: recycle(proc, OTHER))
    scan = await Scanner(processes, DetachedCalls()).scan(frozenset(), timeout_s=20)
    assert [proc.keep(process).identity.vm_uuid for process in scan.new] == [OTHER]
    assert scan.new[0].key == (10, 200)


async def test_a_known_process_whose_pid_is_recycled_is_lost_and_the_other_one_is_new(proc: Proc) -> None:
    proc.add(10)
    known = frozenset({IDENTITY_KEY})
    recycle(proc, OTHER)
    scan = await proc.scan(known)
    assert scan.lost == known
    assert [proc.keep(process).key for process in scan.new] == [(10, 200)]


IDENTITY_KEY = (IDENTITY.pid, IDENTITY.start_time)
