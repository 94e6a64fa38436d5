# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every state a real QEMU can be in: not off until its end is proven, then fenced for real (S0, S1)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.guest import qmp_client
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


@contextmanager
def frozen(site: Site) -> Generator[None]:
    """The daemon sees nothing of what happens in the block as it happens."""
    os.kill(site.daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)


async def assert_not_off(site: Site, vm: Vm) -> None:
    """While its process lives, nothing says off."""
    assert vm.running
    assert await site.status(vm) == "on"


async def assert_off_is_proven(site: Site, vm: Vm, *, by: str) -> dict[str, Any]:
    """off ends the process, and says how it knows; afterwards status says off too."""
    pid = vm.pid
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "off"), answer
    assert not vm.running
    assert any(f"pid {pid} on hv1 gone" in line and f"pidfd, {by}" in line for line in answer["evidence"])
    assert any("look by hv1: no instance" in line for line in answer["evidence"])
    assert await site.status(vm) == "off"
    again = await site.fence("off", vm)
    assert (again["ok"], again["code"], again["state"]) == (True, "already", "off"), again
    assert any(f"pid {pid} on hv1 gone" in line for line in again["evidence"]), again
    return answer


async def test_a_running_vm_is_fenced(site: Site) -> None:
    vm = site.vm("running")
    await site.until_run_state(vm, "running")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_paused_vm_is_not_off_and_is_fenced(site: Site) -> None:
    vm = site.vm("paused")
    async with qmp_client(vm.spec) as monitor:
        await monitor.execute("stop")
    await site.until_run_state(vm, "paused")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_vm_that_never_ran_its_guest_is_not_off_and_is_fenced(site: Site) -> None:
    vm = site.vm("prelaunch", paused=True)
    await site.until_run_state(vm, "prelaunch")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_hung_qemu_is_not_off_and_is_killed(site: Site) -> None:
    vm = site.vm("hung")
    await site.until_run_state(vm, "running")
    vm.signal(signal.SIGSTOP)
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by SIGKILL")


async def test_a_qemu_that_hung_before_the_daemon_saw_it_is_killed(site: Site) -> None:
    with frozen(site):
        vm = site.vm("hungearly")
        vm.signal(signal.SIGSTOP)
    await site.until_run_state(vm, "unknown")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by SIGKILL")


async def test_a_vm_whose_monitor_another_client_holds_is_not_off_and_is_killed(site: Site) -> None:
    with socket.socket(socket.AF_UNIX) as holder:
        with frozen(site):
            vm = site.vm("held")
            holder.connect(str(vm.spec.qmp))
            holder.settimeout(60)
            said = b""
            while b"QMP" not in said:  # its greeting; QEMU may tell an event before it
                said += await asyncio.to_thread(holder.recv, 4096)
        await site.until_run_state(vm, "unknown")
        await assert_not_off(site, vm)
        await assert_off_is_proven(site, vm, by="by SIGKILL")


async def test_a_vm_whose_monitor_socket_was_removed_is_not_off_and_is_killed(site: Site) -> None:
    with frozen(site):
        vm = site.vm("removed")
        vm.spec.qmp.unlink()
    await site.until_run_state(vm, "unknown")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by SIGKILL")


async def test_a_monitor_socket_that_is_removed_while_it_is_used_goes_on_working(site: Site) -> None:
    vm = site.vm("removedlate")
    await site.until_run_state(vm, "running")
    vm.spec.qmp.unlink()
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


PANIC = bytes([0xBA, 0x05, 0x05, 0xB0, 0x01, 0xEE, 0xF4])
"""A machine's first instructions: tell the pvpanic device, at port 0x505, of a panic, and halt."""


async def test_a_vm_whose_guest_told_its_panic_is_not_off_and_is_fenced(site: Site) -> None:
    firmware = site.folder / "panic.bin"
    firmware.write_bytes(bytes(0xFFF0) + PANIC.ljust(16, b"\xf4"))
    device = ("-device", "pvpanic", "-action", "panic=pause", "-bios", str(firmware))
    vm = site.vm("panicked", machine="q35", extra=device)
    await site.until_run_state(vm, "guest-panicked")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_destination_of_a_migration_is_not_off_and_is_fenced(site: Site) -> None:
    vm = site.vm("incoming", machine="q35", extra=("-incoming", "defer"))
    await site.until_run_state(vm, "inmigrate")
    await assert_not_off(site, vm)
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_vm_that_was_migrated_away_is_never_off(site: Site) -> None:
    vm = site.vm("away", machine="q35")
    await site.until_run_state(vm, "running")
    await site.migrate_away(vm)
    await site.until_run_state(vm, "postmigrate")
    status = await site.fence("status", vm)
    assert (status["ok"], status["code"], status["state"]) == (False, "migrated_away", "unknown"), status
    for _ in range(2):
        answer = await site.fence("off", vm)
        assert (answer["ok"], answer["code"], answer["state"]) == (False, "migrated_away", "unknown"), answer
    assert not vm.running  # the memory that was left here cannot be continued
    status = await site.fence("status", vm)
    assert (status["ok"], status["code"], status["state"]) == (False, "migrated_away", "unknown"), status
    site.daemon.restart()
    status = await site.fence("status", vm)
    assert (status["ok"], status["code"], status["state"]) == (False, "migrated_away", "unknown"), status


async def test_a_vm_that_comes_back_from_a_migration_can_be_fenced_again(site: Site) -> None:
    vm = site.vm("back", machine="q35")
    await site.until_run_state(vm, "running")
    await site.migrate_away(vm)
    assert (await site.fence("off", vm))["code"] == "migrated_away"
    vm.start()
    await site.until_run_state(vm, "running")
    await assert_off_is_proven(site, vm, by="by quit")


async def crash(site: Site, word: str) -> Vm:
    """A VM whose QEMU was killed by somebody else, before the daemon's eyes."""
    vm = site.vm(word)
    await site.until_run_state(vm, "running")
    pid = vm.pid
    vm.signal(signal.SIGKILL)
    await site.until(lambda: f"pid {pid} (" in site.daemon.log and not vm.running, "end of it")
    return vm


async def test_a_qemu_that_crashed_is_already_off_and_its_evidence_says_what_is_unproven(site: Site) -> None:
    vm = await crash(site, "crashed")
    for _ in range(2):
        assert await site.status(vm) == "off"
        answer = await site.fence("off", vm)
        assert (answer["ok"], answer["code"], answer["state"]) == (True, "already", "off"), answer
        assert any("pidfd, by itself, I/O unproven" in line for line in answer["evidence"]), answer
        site.daemon.restart()


async def test_a_crashed_vm_that_was_started_again_can_be_fenced(site: Site) -> None:
    vm = await crash(site, "restarted")
    vm.start()
    await site.until_run_state(vm, "running")
    await assert_off_is_proven(site, vm, by="by quit")


async def test_a_qemu_that_left_by_itself_is_already_off(site: Site) -> None:
    vm = site.vm("left")
    await site.until_run_state(vm, "running")
    pid = vm.pid
    async with qmp_client(vm.spec) as monitor:
        await monitor.execute("quit")
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (True, "off"), answer
    assert any(f"pid {pid} on hv1 gone" in line for line in answer["evidence"]), answer
