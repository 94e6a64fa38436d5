# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be said of the writes of a process whose off was cut off, repeated, or met a crash (S1)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.unit.host.hypervisors.test_ending import HOST, MadeUpProcess
from vmchannel_host.hypervisors import BeforeKill, HypervisorError, NotProven
from vmchannel_host.hypervisors.cmdline import CommandLine
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.ending import Endings
from vmchannel_host.hypervisors.image_locks import look_at_storage
from vmchannel_host.hypervisors.instances import InstanceTable
from vmchannel_host.hypervisors.monitors import MonitorClosed
from vmchannel_host.hypervisors.qmp_monitor import Monitor
from vmchannel_host.model import EndCause, InstanceEnded, IoState


class MadeUpProc:
    """What /proc shows of one process with one writable image, which it holds locked."""

    def __init__(self, root: Path, pid: int) -> None:
        self.root = root
        self.base = root / str(pid)
        for name in ("fd", "fdinfo"):
            (self.base / name).mkdir(parents=True)
        (self.base / "mountinfo").write_text("22 1 254:0 / / rw - ext4 /dev/vda1 rw\n")
        image = root / "disk.img"
        image.touch()
        (self.base / "fd/5").symlink_to(image)
        lock = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:5 100 101\n"
        (self.base / "fdinfo/5").write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t1\n{lock}")

    def ends(self) -> None:
        """The leader's file table is gone; threads and the kernel may still write."""
        (self.base / "fd/5").unlink(missing_ok=True)


class Rig:
    def __init__(self, root: Path, *, dies: bool) -> None:
        self.process = MadeUpProcess(dies=dies)
        self.proc = MadeUpProc(root, self.process.identity.pid)
        self.table = InstanceTable()
        self.watched = self.table.adopt(self.process)
        self.endings = Endings(self.table, DetachedCalls(), host=HOST, clock=lambda: 0.0, proc=root)

    async def off(self, timeout_s: float = 5.0, before_kill: BeforeKill | None = None) -> InstanceEnded:
        return await self.endings.end(
            self.watched, quit_timeout_s=0.05, timeout_s=timeout_s, before_kill=before_kill
        )

    def close(self) -> None:
        self.process.end()
        self.table.close()


@pytest.fixture
def immortal(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, dies=False)
    yield rig
    rig.close()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, dies=True)
    yield rig
    rig.close()


class CrashingMonitor(Monitor):
    """Of a QEMU that ends while it is asked to quit; it takes the command first, or does not."""

    def __init__(self, process: MadeUpProcess, *, takes: bool) -> None:
        self.path = "/made/up"
        self._process = process
        self._takes = takes

    @property
    def open(self) -> bool:
        return not self._process.ended()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        self._process.end()
        await asyncio.sleep(0.02)  # its end is seen before the answer is
        if not self._takes:
            raise MonitorClosed("closed before the answer")
        return {}

    async def wait_closed(self) -> None:
        return


@pytest.mark.parametrize(("takes", "io"), [(True, IoState.DRAINED), (False, IoState.UNPROVEN)])
async def test_an_end_counts_as_drained_only_if_qemu_took_the_quit(
    mortal: Rig, takes: bool, io: IoState
) -> None:
    """The exit status is not known here, as on a kernel before 6.15 whose init was quick to reap."""
    mortal.watched.monitor = CrashingMonitor(mortal.process, takes=takes)
    end = await mortal.off()
    assert (end.cause, end.io) == (EndCause.QUIT, io)


async def test_a_kill_whose_caller_went_away_is_still_proven_settled(immortal: Rig) -> None:
    """Else the VM could never be called off again: its end is known, and nobody can probe it any more."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await immortal.off(timeout_s=30)
    immortal.proc.ends()
    immortal.process.end()
    await immortal.endings.watch(immortal.watched)
    end = immortal.table.ended(immortal.process.identity)
    assert end is not None
    assert (end.cause, end.io) == (EndCause.KILL, IoState.SETTLED)
    assert immortal.watched.storage_at_kill is None


async def test_a_second_kill_does_not_forget_what_was_open_at_the_first(immortal: Rig) -> None:
    with pytest.raises(NotProven):
        await immortal.off(timeout_s=0.1)
    immortal.proc.ends()
    with pytest.raises(NotProven):
        await immortal.off(timeout_s=0.1)
    assert immortal.process.kills == 2
    storage = immortal.watched.storage_at_kill
    assert storage is not None
    assert [file.path for file in storage.files] == [str(immortal.proc.root / "disk.img")]


async def test_a_process_that_is_ending_has_not_nothing_open(mortal: Rig) -> None:
    mortal.proc.ends()
    storage = look_at_storage(mortal.process.identity.pid, CommandLine((), "vm"), proc=mortal.proc.root)
    assert not storage.nothing
    assert "ending" in storage.unprovable
    assert (await mortal.off()).io is IoState.UNPROVEN


async def test_a_kill_is_noted_once_before_it_is_sent(immortal: Rig) -> None:
    kills: list[int] = []

    async def note() -> None:
        kills.append(immortal.process.kills)

    for _ in range(2):
        with pytest.raises(NotProven):
            await immortal.off(timeout_s=0.2, before_kill=note)
    assert (kills, immortal.process.kills) == ([0], 2)


async def test_what_is_opened_while_the_kill_is_noted_is_seen(immortal: Rig) -> None:
    async def note() -> None:
        (immortal.proc.base / "fdinfo/5").write_text(
            "pos:\t0\nflags:\t02\nmnt_id:\t1\n"
        )  # its locks are gone

    with pytest.raises(NotProven):
        await immortal.off(timeout_s=0.2, before_kill=note)
    storage = immortal.watched.storage_at_kill
    assert storage is not None
    assert "without image locks" in storage.unprovable


async def test_a_process_with_nothing_open_is_killed_without_a_note(mortal: Rig) -> None:
    (mortal.proc.base / "fd/5").unlink()
    (mortal.proc.base / "fd/0").symlink_to("/dev/null")

    async def note() -> None:
        raise AssertionError("nothing was to be noted")

    assert (await mortal.off(before_kill=note)).io is IoState.NONE


async def test_a_kill_that_cannot_be_noted_is_not_sent(mortal: Rig) -> None:
    async def refuse() -> None:
        raise HypervisorError("the journal is full")

    async def hang() -> None:
        await asyncio.Event().wait()

    with pytest.raises(HypervisorError, match="the journal is full"):
        await mortal.off(before_kill=refuse)
    with pytest.raises(NotProven, match="was not killed"):
        await mortal.off(timeout_s=0.1, before_kill=hang)
    assert mortal.process.kills == 0
    assert mortal.watched.storage_at_kill is None
