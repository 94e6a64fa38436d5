# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a scan of /proc may miss, and what a closed pidfd may not say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.host.hypervisors.test_process import BOOT, SPACE, Proc
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.process import ProcessKey, ProcessTable
from vmchannel_host.hypervisors.scanner import Scanner


class ForkingTable(ProcessTable):
    """Just before a process gets its turn in a scan, something happens."""

    def __init__(self, proc: Proc, before: dict[int, Callable[[], None]]) -> None:
        super().__init__(boot_id=BOOT, pid_namespace=SPACE, proc=proc.root, pidfd_open=proc.pidfd_open)
        self._before = before
        self.listings = 0

    def _executable_or_denied(self, pid: int, known: frozenset[ProcessKey] = frozenset()) -> str | None:
        self._before.pop(pid, lambda: None)()
        return super()._executable_or_denied(pid, known)

    def _pids(self) -> frozenset[int]:
        self.listings += 1
        return super()._pids()


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[Proc]:
    made = Proc(tmp_path / "proc")
    yield made
    made.close()


async def found(proc: Proc, table: ForkingTable) -> list[int]:
    scan = await Scanner(table, DetachedCalls()).scan(frozenset(), timeout_s=20)
    return [proc.keep(process).identity.pid for process in scan.new]


def forks(proc: Proc, parent: int, child: int, *, reaped: bool) -> Callable[[], None]:
    def fork() -> None:
        proc.add(child)
        shutil.rmtree(proc.root / str(parent))
        if not reaped:
            proc.add(parent, executable=None, arguments=(), state="Z")

    return fork


@pytest.mark.parametrize("reaped", [True, False])
async def test_a_qemu_that_forks_and_leaves_during_the_scan_is_found_in_its_child(
    proc: Proc, reaped: bool
) -> None:
    """`-daemonize` forks twice; the child was not there when /proc was listed."""
    proc.add(50)
    before = {50: forks(proc, 50, 40, reaped=reaped), 40: forks(proc, 40, 60, reaped=reaped)}
    assert await found(proc, ForkingTable(proc, before)) == [60]


async def test_processes_that_come_and_go_do_not_hold_up_the_scan(proc: Proc) -> None:
    before: dict[int, Callable[[], None]] = {}
    for pid in range(50, 150):
        before[pid] = forks(proc, pid, pid + 1, reaped=True)
    proc.add(50)
    table = ForkingTable(proc, before)
    await found(proc, table)
    assert table.listings < 20


async def test_a_quiet_host_is_listed_once(proc: Proc) -> None:
    proc.add(50)
    table = ForkingTable(proc, {})
    assert await found(proc, table) == [50]
    assert table.listings == 1


async def test_one_that_was_reaped_by_nobody_costs_one_more_listing(proc: Proc) -> None:
    proc.add(50, executable=None, arguments=(), state="Z")
    table = ForkingTable(proc, {})
    assert await found(proc, table) == []
    assert table.listings == 2


def test_a_closed_pidfd_does_not_say_that_the_process_has_ended(proc: Proc) -> None:
    """The daemon closes all when it stops; an off that is under way then must not take that for an end."""
    proc.add(50)
    process = proc.table().open(50)
    process.close()
    assert not process.ended()


def test_a_pidfd_that_was_closed_after_the_end_still_says_so(proc: Proc) -> None:
    proc.add(50)
    process = proc.table().open(50)
    proc.end(50)
    process.close()
    assert process.ended()
