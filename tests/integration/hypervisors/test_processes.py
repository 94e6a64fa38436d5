# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real processes: pidfds, zombies, threads that outlive their leader, replaced executables."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import Rig, boottime, make_host
from vmchannel_host.hypervisors import Hypervisor, HypervisorError
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.peer import QemuPeers, WrongPeer
from vmchannel_host.hypervisors.process import (
    ProcessGone,
    ProcessTable,
    VerifiedProcess,
    read_boot_id,
    read_pid_namespace,
)
from vmchannel_host.hypervisors.scanner import Scan, Scanner
from vmchannel_host.model import NIL_UUID, BootId

UUID = "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11"
BOOT = read_boot_id()

THREADED = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(0.2)
ctypes.CDLL(None).syscall(60, 0)  # exit of this thread alone: the leader
"""


def table(*executables: str) -> ProcessTable:
    return ProcessTable(
        boot_id=BOOT, pid_namespace=read_pid_namespace(), executables=executables or ("qemu-system-*",)
    )


def scan(*executables: str) -> Scan:
    async def once() -> Scan:
        return await Scanner(table(*executables), DetachedCalls()).scan(frozenset(), timeout_s=20)

    return asyncio.run(once())


def program(directory: Path) -> Path:
    path = directory / "qemu-system-made-up"
    shutil.copy("/usr/bin/sleep", path)
    return path


async def test_the_hypervisor_keeps_the_contract_of_its_protocol(rig: Rig) -> None:
    hypervisor: Hypervisor = make_host(rig.directory).hypervisor
    assert (await hypervisor.look(timeout_s=10)).at_boottime <= boottime()


async def test_a_pidfd_wakes_its_waiter_and_kills_only_its_process(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    process = table().open(qemu.pid)
    waiter = asyncio.create_task(process.wait_ended())
    await asyncio.sleep(0)
    assert not process.ended()
    process.kill()
    async with asyncio.timeout(10):
        await waiter
    assert process.ended()
    process.kill()  # nothing is left to kill
    process.close()
    process.close()


def test_the_exit_status_is_known_before_and_after_the_parent_reaps(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    process = table().open(qemu.pid)
    qemu.kill_without_reaping()
    assert process.exit_status() == 9
    qemu.close()
    assert process.exit_status() in (9, None)  # None before Linux 6.15
    process.close()


def test_a_process_whose_leader_has_exited_lives_until_its_last_thread(rig: Rig) -> None:
    python = rig.directory / "qemu-system-threads"
    shutil.copy(os.path.realpath("/usr/bin/python3"), python)
    with subprocess.Popen([python, "-c", THREADED, "-uuid", UUID], env={"PYTHONHOME": "/usr"}) as child:
        try:
            while _state(child.pid) != "Z":
                pass
            (process,) = scan("qemu-system-threads").new
            assert process.identity.pid == child.pid
            assert process.identity.vm_uuid == UUID
            assert not process.ended()
            assert table().absence(process.identity) is None
            process.kill()
            child.wait(10)
            assert process.ended()
            process.close()
        finally:
            child.kill()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_qemu_whose_file_was_replaced_is_still_found(rig: Rig) -> None:
    path = program(rig.directory)
    with subprocess.Popen([path, "60"]) as child:
        try:
            path.unlink()
            program(rig.directory)
            assert os.readlink(f"/proc/{child.pid}/exe").endswith(" (deleted)")
            with pytest.raises(HypervisorError, match=r"qemu-system-made-up, .* no -uuid"):
                table().open(child.pid)
        finally:
            child.kill()


def test_an_exec_into_qemu_is_noticed_though_pid_and_start_time_stay(rig: Rig) -> None:
    qmp = rig.directory / "x.qmp"
    options = f"-machine none -display none -uuid {UUID} -qmp unix:{qmp},server=on,wait=off"
    script = f"sleep 0.3; exec qemu-system-x86_64 {options}"
    with subprocess.Popen(["/bin/sh", "-c", script]) as child:
        try:
            assert child.pid not in [process.identity.pid for process in _scan_and_close()]
            while not qmp.exists():
                pass
            assert [p for p in _scan_and_close() if p.identity.pid == child.pid]
        finally:
            child.kill()


def _scan_and_close() -> list[VerifiedProcess]:
    found = scan()
    found.close()
    return found.new


def test_a_nil_uuid_is_no_identity(rig: Rig) -> None:
    qemu = rig.qemu("-uuid", NIL_UUID, with_uuid=False)
    with pytest.raises(HypervisorError, match="nil"):
        table().open(qemu.pid)


def test_a_dead_process_is_gone() -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        pass
    with pytest.raises(ProcessGone):
        table().open(child.pid)


def test_the_peer_of_a_real_port_is_its_qemu_and_no_other(rig: Rig) -> None:
    qemu, other = rig.qemu(machine="none"), rig.qemu(machine="none")
    peers = QemuPeers(table())
    process = table().open(qemu.pid)
    peers.verify(qemu.pid, process.identity)
    for pid in (other.pid, os.getpid(), 0):
        with pytest.raises(WrongPeer):
            peers.verify(pid, process.identity)
    process.close()
    qemu.close()
    with pytest.raises(WrongPeer):
        peers.verify(qemu.pid, process.identity)


def test_the_boot_id_is_that_of_this_boot() -> None:
    assert read_boot_id() == BootId(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
