# SPDX-License-Identifier: LGPL-2.1-or-later
"""A start command that takes its time: no look may call its VM absent while it may still start it (S12)."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from tests.integration.hypervisors.qemu_rig import QEMU, Host, Rig, watching
from vmchannel_host.model import Look, VmUuid


def slow_start(directory: Path, vm_uuid: VmUuid) -> tuple[str, ...]:
    """Waits for a file before it starts the VM, as for storage that is being made ready."""
    path = directory / "start-vm"
    machine = "-accel tcg -machine q35 -nodefaults -display none -m 32"
    path.write_text(
        f"#!/bin/sh\nwhile ! test -e {directory}/go; do sleep 0.05; done\n"
        f"test -s {directory}/go && exit 0\n"
        f"exec {QEMU} {machine} -uuid {vm_uuid} -name vm1 -qmp unix:{directory}/s.qmp,server=on,wait=off\n"
    )
    path.chmod(0o755)
    return (str(path),)


def silent(look: Look, vm_uuid: VmUuid) -> list[str]:
    return [reason for one, reason in look.silent if one == vm_uuid]


async def found(host: Host, vm_uuid: VmUuid) -> Look:
    async with asyncio.timeout(20):
        while True:
            look = await host.look()
            if any(one.vm_uuid == vm_uuid for one in look.instances):
                return look
            await asyncio.sleep(0.05)


async def test_s12_a_vm_whose_start_command_still_runs_is_not_absent(rig: Rig) -> None:
    vm_uuid = VmUuid(str(uuid.uuid4()))
    async with watching(rig.directory, start={"vm1": slow_start(rig.directory, vm_uuid)}) as host:
        await host.hypervisor.start(vm_uuid, "vm1", timeout_s=10)  # returns, the command goes on
        look = await host.look()
        assert not [one for one in look.instances if one.vm_uuid == vm_uuid]
        assert "start command" in silent(look, vm_uuid)[0]
        (rig.directory / "go").touch()
        look = await found(host, vm_uuid)
        assert not silent(look, vm_uuid)  # it is there: nothing is unknown
        identity = next(one.identity for one in look.instances if one.vm_uuid == vm_uuid)
        await host.off(identity)
        async with asyncio.timeout(10):
            while silent(await host.look(), vm_uuid):
                await asyncio.sleep(0.05)


async def test_s12_a_start_command_that_ends_while_a_look_is_under_way_leaves_that_look_in_doubt(
    rig: Rig,
) -> None:
    vm_uuid = VmUuid(str(uuid.uuid4()))
    hung = rig.qemu(name="hung")
    async with watching(rig.directory, start={"vm1": slow_start(rig.directory, vm_uuid)}) as host:
        while not any(one.monitor for one in (await host.look()).instances):
            await asyncio.sleep(0.05)
        await host.hypervisor.start(vm_uuid, "vm1", timeout_s=10)
        hung.stop()  # a look waits a second for its monitor
        looking = asyncio.create_task(host.look())
        await asyncio.sleep(0.3)  # the scan has passed
        (rig.directory / "go").write_text("nothing to start")
        assert silent(await looking, vm_uuid)


async def test_a_start_command_that_has_ended_leaves_no_doubt(rig: Rig) -> None:
    vm_uuid = VmUuid(str(uuid.uuid4()))
    async with watching(rig.directory, start={"vm1": slow_start(rig.directory, vm_uuid)}) as host:
        await host.hypervisor.start(vm_uuid, "vm1", timeout_s=10)
        assert silent(await host.look(), vm_uuid)
        (rig.directory / "go").write_text("nothing to start")
        async with asyncio.timeout(10):
            while silent(await host.look(), vm_uuid):
                await asyncio.sleep(0.05)
