# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hypervisor over real libvirtds, and domains for it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tests.integration.hypervisors.qemu_rig import HOST, QUICK, Host, boottime
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.host import HostHypervisor
from vmchannel_host.hypervisors.launch import Launcher
from vmchannel_host.hypervisors.libvirt.binding import open_link
from vmchannel_host.hypervisors.libvirt.connection import Patience
from vmchannel_host.hypervisors.libvirt.link import OpenLink
from vmchannel_host.hypervisors.libvirt.plug_words import channel_directory
from vmchannel_host.hypervisors.libvirt.plugging import LibvirtPlugging
from vmchannel_host.hypervisors.libvirt.source import LibvirtSettings, LibvirtSource
from vmchannel_host.hypervisors.process import ProcessTable, read_boot_id, read_pid_namespace
from vmchannel_host.hypervisors.process_watch import ProcessWatch
from vmchannel_host.hypervisors.qmp import QmpSettings, QmpSockets
from vmchannel_host.model import Instance, Look, RunState, VmUuid

T = TypeVar("T")

PORT = "org.vmchannel.0"
WAIT_S = 60


def a_domain(libvirtd: Libvirtd, *, name: str = "", extra: str = "", devices: str = "") -> Domain:
    """A domain with one port, of a name that no other has."""
    vm = str(uuid.uuid4())
    ports = ((PORT, libvirtd.sockets / f"{vm[:8]}.sock"),)
    return Domain(name or f"vm-{vm[:8]}", vm, ports, extra, devices)


def vm_of(domain: Domain) -> VmUuid:
    return VmUuid(domain.uuid)


async def off_loop(function: Callable[[], T]) -> T:
    """What blocks, while the hypervisor goes on."""
    return await asyncio.to_thread(function)


class LibvirtHost(Host):
    """A hypervisor under test, asked about domains."""

    async def instances(self, domain: Domain) -> list[Instance]:
        look = await self.look(vm=vm_of(domain))
        return [one for one in look.instances if one.vm_uuid == domain.uuid]

    async def until_state(
        self, domain: Domain, wanted: Callable[[Instance], bool] = lambda one: one.monitor != ""
    ) -> Instance:
        """Look until the domain has one instance, and that is as wanted."""
        return await self.until_look(domain, lambda look: _the_one(look, domain, wanted))

    async def until_running(self, domain: Domain) -> Instance:
        return await self.until_state(domain, lambda one: one.run_state is RunState.RUNNING)

    async def until_look(self, domain: Domain, wanted: Callable[[Look], T | None]) -> T:
        """Look until `wanted` makes something of it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            look: Look | None = None
            with suppress(HypervisorError):
                look = await self.look(vm=vm_of(domain))
            found = wanted(look) if look is not None else None
            if found is not None:
                return found
            assert time.monotonic() < deadline, f"not seen in {WAIT_S} s: {look}"
            await asyncio.sleep(0.1)


def silent_of(look: Look, domain: Domain) -> list[str]:
    """Why a look proves nothing of the domain."""
    named = [reason for vm, reason in look.silent if vm == domain.uuid]
    return named + [one.reason for one in look.unknown if domain.uuid not in one.not_of]


def _the_one(look: Look, domain: Domain, wanted: Callable[[Instance], bool]) -> Instance | None:
    found = [one for one in look.instances if one.vm_uuid == domain.uuid]
    return found[0] if len(found) == 1 and wanted(found[0]) else None


@asynccontextmanager
async def watching(
    *libvirtds: Libvirtd,
    sockets: Sequence[str] = (),
    open_libvirt: OpenLink = open_link,
    patience: Patience | None = None,
    saves: Path | None = None,
    ports: Path = Path("/nonexistent"),
) -> AsyncGenerator[LibvirtHost, None]:
    """Run a hypervisor over libvirtds and QMP sockets."""
    processes = ProcessTable(boot_id=read_boot_id(), pid_namespace=read_pid_namespace())
    watch = ProcessWatch(processes, host=HOST, clock=boottime)
    patience = patience or Patience(last_retry_s=0.5, poll_s=5.0)
    libvirts = [
        LibvirtSource(
            LibvirtSettings(one.uri, saves or one.saves, patience), watch, open_libvirt, wall_clock=time.time
        )
        for one in libvirtds
    ]
    qmp = QmpSockets(QmpSettings(sockets=tuple(sockets), timings=QUICK), watch)
    launcher = Launcher({}, systemd=Path("/nonexistent"))
    host = LibvirtHost(
        HostHypervisor(
            watch,
            (qmp, *libvirts),
            (launcher, *libvirts),
            host=HOST,
            clock=boottime,
            ports=str(ports),
            definers=[
                LibvirtPlugging(source, str(channel_directory(one.saves)))
                for one, source in zip(libvirtds, libvirts, strict=True)
            ],
            scan_s=0.2,
            defined_ports={one.uri: one.defined_ports.follow for one in libvirts},
        )
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(host.hypervisor.run(), name="hypervisor")
        collecting = tasks.create_task(host.collect(), name="collect")
        try:
            yield host
        finally:
            running.cancel()
            collecting.cancel()
