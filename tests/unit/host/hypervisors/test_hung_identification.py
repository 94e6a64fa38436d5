# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process whose command line blocks while it is read: a FIFO in a made-up /proc blocks for real."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.host.hypervisors.test_process import OTHER, Proc
from vmchannel_host.hypervisors import NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.process import VerifiedProcess
from vmchannel_host.hypervisors.scanner import Scan, Scanner


class HungProc(Proc):
    """A /proc in which some command lines block."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._fifos: dict[int, Path] = {}

    def hang(self, pid: int) -> None:
        """Add a QEMU whose command line blocks its reader."""
        self.add(pid)
        command_line = self.root / str(pid) / "cmdline"
        text = command_line.read_bytes()
        command_line.unlink()
        os.mkfifo(command_line)
        self._fifos[pid] = command_line
        (self.root / str(pid) / "cmdline.real").write_bytes(text)

    def wake(self, pid: int) -> None:
        """The process lets go of its memory map: its readers get their text."""
        fifo = self._fifos.pop(pid)
        kept = fifo.with_suffix(".fifo")
        fifo.rename(kept)
        fifo.with_suffix(".real").rename(fifo)
        try:
            writer = os.open(kept, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return  # nobody reads
        os.write(writer, fifo.read_bytes())
        os.close(writer)

    def close(self) -> None:
        for pid in list(self._fifos):
            self.wake(pid)
        super().close()


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[HungProc]:
    made = HungProc(tmp_path / "proc")
    yield made
    made.close()


class Late:
    """Hears that an identification nobody waited for has returned."""

    def __init__(self) -> None:
        self._heard = asyncio.Event()

    def __call__(self) -> None:
        self._heard.set()

    async def wait(self) -> None:
        async with asyncio.timeout(20):
            await self._heard.wait()


def scanner(proc: Proc, late: Late | None = None, *, limit: int = 4, identify_s: float = 0.1) -> Scanner:
    return Scanner(proc.table(), DetachedCalls(), on_late=late or Late(), limit=limit, identify_s=identify_s)


async def scan(made: Scanner) -> Scan:
    return await made.scan(frozenset(), timeout_s=20)


def pids(proc: Proc, processes: list[VerifiedProcess]) -> list[int]:
    return sorted(proc.keep(process).identity.pid for process in processes)


def threads() -> int:
    return sum(thread.name.startswith("vmchannel identify") for thread in threading.enumerate())


async def test_s7_a_hung_command_line_hides_no_other_process_and_is_reported(proc: HungProc) -> None:
    proc.hang(10)
    proc.add(11, arguments=("qemu", "-uuid", OTHER))
    found = await scan(scanner(proc))
    assert pids(proc, found.new) == [11]
    assert [candidate.pid for candidate in found.unknown] == [10]
    (problem,) = found.problems
    assert problem.anyones
    assert "pid 10" in str(problem)


async def test_one_call_of_a_hung_process_is_under_way_however_often_it_is_scanned(proc: HungProc) -> None:
    proc.hang(10)
    made = scanner(proc)
    before = threads()
    for _ in range(5):
        assert len((await scan(made)).unknown) == 1
    with pytest.raises(NotProven, match="pid 10"):
        await made.identify(10, timeout_s=0.05)
    assert threads() - before == 1


async def test_a_scan_does_not_wait_for_a_process_that_is_known_to_hang(proc: HungProc) -> None:
    proc.hang(10)
    made = scanner(proc, identify_s=3600)
    with pytest.raises(NotProven):
        await made.identify(10, timeout_s=0.05)
    async with asyncio.timeout(20):
        assert len((await made.scan(frozenset(), timeout_s=3600)).unknown) == 1


async def test_a_process_that_wakes_is_identified_by_the_next_scan(proc: HungProc) -> None:
    proc.hang(10)
    late = Late()
    made = scanner(proc, late)
    assert (await scan(made)).new == []
    proc.wake(10)
    await late.wait()
    found = await scan(made)
    assert pids(proc, found.new) == [10]
    assert (found.unknown, found.problems) == ({}, [])


async def test_a_recycled_pid_does_not_wait_for_the_call_of_the_process_before_it(proc: HungProc) -> None:
    proc.hang(10)
    made = scanner(proc)
    await scan(made)
    (proc.root / "10").rename(proc.root / "gone")
    proc.add(10, start_time=200)
    assert pids(proc, (await scan(made)).new) == [10]
    (proc.root / "10").rename(proc.root / "11")
    (proc.root / "gone").rename(proc.root / "10")


async def test_when_too_many_hang_a_further_one_is_unknown_until_one_of_them_wakes(proc: HungProc) -> None:
    late = Late()
    made = scanner(proc, late, limit=2)
    proc.hang(10)
    proc.hang(11)
    assert len((await scan(made)).unknown) == 2
    proc.add(12)
    found = await scan(made)
    assert (found.new, len(found.unknown)) == ([], 3)
    proc.wake(10)
    await late.wait()
    assert 12 in pids(proc, (await scan(made)).new)


async def test_more_new_processes_than_calls_are_all_identified_when_none_hangs(proc: HungProc) -> None:
    for pid in range(100, 130):
        proc.add(pid)
    found = await scan(scanner(proc, limit=2, identify_s=20))
    assert pids(proc, found.new) == list(range(100, 130))


async def test_a_pidfd_that_is_refused_leaves_a_process_that_may_be_any_vms(proc: HungProc) -> None:
    proc.add(10)
    proc.on_pidfd_open[10] = OSError(24, "Too many open files")
    found = await scan(scanner(proc))
    assert [candidate.pid for candidate in found.unknown] == [10]


async def test_a_process_of_which_nothing_can_be_read_is_reported_as_such(proc: HungProc) -> None:
    proc.add(10)
    (proc.root / "10" / "stat").write_text("garbage")
    found = await scan(scanner(proc))
    assert [problem.pid for problem in found.unreadable] == [10]


def test_the_sockets_at_which_a_process_listens_are_read_without_its_command_line(proc: HungProc) -> None:
    proc.hang(10)
    base = proc.root / "10"
    (base / "fd").mkdir()
    (base / "net").mkdir()
    (base / "cwd").symlink_to("/srv/vms")
    for number, inode in enumerate((501, 502, 503, 504)):
        (base / "fd" / str(number)).symlink_to(f"socket:[{inode}]")
    (base / "net" / "unix").write_text(
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 501 /run/a dir/vm1.qmp\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 502 vm1.port\n"
        "0000000000000000: 00000003 00000000 00000000 0001 03 503 /run/accepted\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 504 @abstract\n"
        "0000000000000000: 00000002 00000000 00010000 0001 01 777 /run/anothers\n"
    )
    assert proc.table().listens_at(10) == frozenset({"/run/a dir/vm1.qmp", "/srv/vms/vm1.port"})


def test_where_a_process_listens_is_unknown_when_its_files_cannot_be_read(proc: HungProc) -> None:
    proc.hang(10)
    assert proc.table().listens_at(10) is None


def test_a_made_up_command_line_blocks(proc: HungProc) -> None:
    """Else the tests above would show nothing."""
    proc.hang(10)
    reader = threading.Thread(target=lambda: proc.table().open(10).close(), daemon=True)
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    proc.wake(10)
    reader.join(20)
    assert not reader.is_alive()
