# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports served over sockets to which real QEMUs connect: a hypervisor, a hub, and what joins them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

from fence_vmchannel import Hub, PeerStatus
from fence_vmchannel.core.events import PeerIdentity
from tests.integration.hypervisors.qemu_rig import Qemu, Rig, SecondMonitor, make_host
from vmchannel_host.config.model import HostConfig
from vmchannel_host.hypervisors import Ended, HypervisorEvent
from vmchannel_host.hypervisors.host import HostHypervisor
from vmchannel_host.hypervisors.peer import QemuPeers
from vmchannel_host.model import HostName, Instance, ProcessIdentity, VmUuid
from vmchannel_host.port_sockets.listeners import PortListeners
from vmchannel_host.port_terms import terms_of_port
from vmchannel_host.vm_ports import VmPorts

PORT = "org.vmchannel.0"
WAIT_S = 30


class Server:
    """Serves the ports of a hypervisor's VMs, as the daemon does."""

    def __init__(self, hypervisor: HostHypervisor, hub: Hub, listeners: PortListeners) -> None:
        self.hypervisor = hypervisor
        self.hub = hub
        self.listeners = listeners
        self.ports = VmPorts(
            hub,
            "org.vmchannel.",
            QemuPeers(hypervisor.processes),
            listeners,
            hypervisor.look_at_ports,
            partial(terms_of_port, HostConfig(HostName("hv1"))),
        )
        self._instances: dict[ProcessIdentity, Instance] = {}
        hypervisor.follow_defined_ports(self.ports.define)

    async def follow(self) -> None:
        """Keep the ports in step, until cancelled."""
        async for event in self.hypervisor.events():
            vm = self._take(event)
            self.ports.update(vm, [one for one in self._instances.values() if one.vm_uuid == vm])

    def _take(self, event: HypervisorEvent) -> VmUuid:
        if isinstance(event, Ended):
            self._instances.pop(event.evidence.identity, None)
            return event.evidence.identity.vm_uuid
        self._instances[event.instance.identity] = event.instance
        return event.instance.vm_uuid

    def look_at_ports(self, vm: VmUuid) -> None:
        """Have the VM's ports asked for now."""
        for identity in self._instances:
            if identity.vm_uuid == vm:
                self.hypervisor.look_at_ports(identity)

    def peer(self, vm: VmUuid) -> PeerStatus | None:
        found = [peer for peer in self.hub.status().peers if peer.key == vm]
        return found[0] if found else None

    async def until_linked(self, vm: VmUuid, port: str = PORT) -> None:
        """Wait until the port has a link, over which its guest is greeted."""

        def linked() -> bool:
            peers = [peer for peer in self.hub.peers if (peer.info.key, peer.info.port) == (vm, port)]
            return bool(peers) and peers[0].endpoint.linked

        await until(linked, f"a link of {port}")

    async def until_gone(self, vm: VmUuid) -> None:
        await until(lambda: self.peer(vm) is None, "the end of its ports")


async def until(wanted: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not wanted():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what}: not seen in {WAIT_S} s") from None


@asynccontextmanager
async def serving(
    directory: Path, *, refused: Callable[[], None] = lambda: None, listen_in: str = ""
) -> AsyncGenerator[Server, None]:
    """Run a hypervisor over the QMP sockets of a directory, and serve the ports of what it finds."""
    hypervisor = make_host(directory).hypervisor
    async with served(hypervisor, listen_in or str(directory), refused) as server:
        running = asyncio.create_task(hypervisor.run())
        try:
            yield server
        finally:
            running.cancel()
            await asyncio.wait((running,))


@asynccontextmanager
async def served(
    hypervisor: HostHypervisor, listen_in: str, refused: Callable[[], None] = lambda: None
) -> AsyncGenerator[Server, None]:
    """Serve the ports of what a hypervisor finds; it is run by others."""
    listeners = PortListeners((listen_in,), hypervisor.processes, refused=refused, check_s=0.2)
    with closing(listeners):
        async with Hub(PeerIdentity("boot", "test")) as hub:
            server = Server(hypervisor, hub, listeners)
            following = asyncio.create_task(server.follow())
            try:
                yield server
            finally:
                following.cancel()
                await asyncio.wait((following,))


def connecting(
    path: Path, *, name: str = PORT, number: int = 0, reconnect: str = ",reconnect=1"
) -> list[str]:
    """Arguments of a QEMU that connects to the socket; the controller comes with number 0."""
    controller = ["-device", "virtio-serial"] if number == 0 else []
    return [
        *controller,
        *("-chardev", f"socket,id=c{number},path={path},server=off{reconnect}"),
        *("-device", f"virtserialport,chardev=c{number},name={name},id=p{number}"),
    ]


def start(rig: Rig, path: Path, *more: str) -> Qemu:
    """A QEMU with a port that connects to the socket."""
    return rig.qemu(*connecting(path), *more)


async def is_connected(monitor: SecondMonitor, label: str = "c0") -> bool:
    """What QEMU says of its chardev."""
    told = await monitor.ask("query-chardev")
    [name] = [one["filename"] for one in told if one["label"] == label]
    return str(name) == "unix:"


def connect(path: Path) -> socket.socket:
    """A stranger's connection."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(WAIT_S)
    sock.connect(str(path))
    return sock
