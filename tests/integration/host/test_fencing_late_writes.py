# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gone is not written (S1): a QEMU is killed while a write of it is under way that takes seconds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import rig_dir
from tests.rig.guest import qmp_client
from tests.rig.slow_disk import BYTES_PER_S, SlowDisk, slow_disk, why_not
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["rig_dir"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

WRITTEN = 6 * BYTES_PER_S
"""Six seconds of writing: less than the ten for which a kill's writes are waited for."""

MARK = 0xAB


@pytest.fixture
def disk(rig_dir: Path) -> Iterator[SlowDisk]:
    with slow_disk(rig_dir) as made:
        yield made


@pytest.fixture
def site(rig_dir: Path, disk: SlowDisk) -> Iterator[Site]:
    with open_site(rig_dir) as site:
        site.config["fencing"] = {"quit_timeout": "500ms", "after_kill": "settle"}
        site.serve()
        yield site


async def writing(site: Site, disk: SlowDisk, options: str, name: str = "writes") -> Vm:
    """A VM that has just begun to write; without a guest, so QEMU itself is told to."""
    drive = f"file={disk.device},format=raw,if=none,id=disk,cache=none,{options}"
    extra = ("-drive", drive, "-device", "virtio-blk-pci,drive=disk")
    vm = site.vm(name, machine="q35", paused=True, extra=extra)
    await site.until_run_state(vm, "prelaunch")
    disk.slow_down(vm.pid)
    async with qmp_client(vm.spec) as monitor:
        line = f'qemu-io disk "aio_write -P {MARK} 0 {WRITTEN}"'
        await monitor.execute("human-monitor-command", {"command-line": line})
    return vm


async def gone(pidfd: int) -> None:
    """Wait until the process has ended."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(30):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


async def off_while_writing(site: Site, disk: SlowDisk, name: str) -> bool:
    """Fence a VM that writes; whether its process was gone before the write had landed."""
    vm = await writing(site, disk, "aio=io_uring", name)
    pid, pidfd = vm.pid, os.pidfd_open(vm.pid)
    fencing = asyncio.create_task(site.fence("off", vm))
    await gone(pidfd)
    outlived = disk.count(MARK) == 0
    assert not fencing.done()
    answer = await fencing
    assert disk.count(MARK) == WRITTEN
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "off"), answer
    lines = answer["evidence"]
    (end,) = [number for number, line in enumerate(lines) if f"pid {pid} on hv1 gone" in line]
    (look,) = [number for number, line in enumerate(lines) if "look by hv1: no instance" in line]
    assert "pidfd, by SIGKILL, I/O settled: no image lock left" in lines[end]
    assert end < look
    assert await site.status(vm) == "off"
    return outlived


async def test_s1_off_is_told_only_when_the_write_of_the_killed_qemu_has_landed(
    site: Site, disk: SlowDisk
) -> None:
    for number in range(3):
        if await off_while_writing(site, disk, f"writes{number}"):
            return
        disk.wipe()  # a worker in the kernel held the process back: once more
    pytest.skip("this kernel held each end back until the write had landed: nothing to wait for after it")


async def test_a_write_by_a_thread_of_qemu_holds_its_end_back(site: Site, disk: SlowDisk) -> None:
    vm = await writing(site, disk, "aio=threads")
    pidfd = os.pidfd_open(vm.pid)
    fencing = asyncio.create_task(site.fence("off", vm))
    await gone(pidfd)
    assert disk.count(MARK) == WRITTEN
    answer = await fencing
    assert (answer["ok"], answer["code"]) == (True, "done"), answer
    assert any("by SIGKILL, I/O settled" in line for line in answer["evidence"])


async def test_s1_where_writes_cannot_be_probed_settle_refuses_and_accept_says_that_they_are_unproven(
    site: Site, disk: SlowDisk
) -> None:
    vm = await writing(site, disk, "aio=io_uring,file.locking=off")
    pid = vm.pid
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (False, "unknown"), answer
    assert "not proven to have settled" in answer["reason"]
    assert "after_kill: accept" in answer["reason"]
    assert any("by SIGKILL, I/O unproven" in line for line in answer["evidence"]), answer
    assert await site.status(vm) == "unknown"
    site.config["fencing"]["after_kill"] = "accept"
    await site.reload()
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (True, "off"), answer
    assert any(f"pid {pid} " in line and "by SIGKILL, I/O unproven" in line for line in answer["evidence"])


async def test_an_off_that_a_slow_disk_failed_succeeds_once_the_write_has_landed(
    site: Site, disk: SlowDisk
) -> None:
    vm = await writing(site, disk, "aio=io_uring")
    pid = vm.pid
    answer = await site.fence("off", vm, timeout_s=3)
    assert disk.count(MARK) == 0
    assert (answer["ok"], answer["state"]) == (False, "unknown"), answer
    late = f"writes have settled: pid {pid} "
    at_once = f" pid {pid} (start"  # where a worker in the kernel kept the process until they had
    await site.until(
        lambda: any(
            late in line or (at_once in line and line.rstrip().endswith("io=settled departed=False"))
            for line in site.daemon.log.splitlines()
        ),
        "settled write",
    )
    assert disk.count(MARK) == WRITTEN
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (True, "off"), answer
    assert any("by SIGKILL, I/O settled" in line for line in answer["evidence"]), answer
    site.daemon.restart()
    assert await site.status(vm) == "off"  # it is recorded
