# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the hub's peers in step with the ports of the VMs: a port is attached while an instance has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.hub.peer_table import Connector
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.links.chardev import ChardevConnector
from fence_vmchannel.peers import PeerInfo, PeerKind
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.peer import ChardevPeers
from vmchannel_host.model import (
    NIL_UUID,
    DefinedPort,
    Instance,
    Port,
    PortName,
    ProcessIdentity,
    RunState,
    SocketMode,
    VmUuid,
)
from vmchannel_host.port_sockets.expected import ExpectedLink
from vmchannel_host.port_sockets.listeners import PortListeners, Trouble


@dataclass(frozen=True, slots=True)
class VmPort:
    """A port of one instance: what `PeerInfo.info` holds for a VM."""

    identity: ProcessIdentity
    name: str  # of the VM, "" when unknown; untrusted text
    port: Port

    @property
    def vm_uuid(self) -> VmUuid:
        """The VM whose port it is."""
        return self.identity.vm_uuid


class VmPorts:
    """The ports that are served. One instance of a VM speaks for it: the running one before any other."""

    def __init__(
        self,
        hub: Hub,
        prefix: str,
        peers: ChardevPeers,
        listeners: PortListeners,
        look: Callable[[ProcessIdentity], None],
        terms: Callable[[PortName], PeerTerms],
    ) -> None:
        """Serve no port yet.

        Args:
            hub: gets the ports as peers.
            prefix: of the names of ports to serve.
            peers: checks who is behind a chardev's socket.
            listeners: where QEMUs connect.
            look: has the hypervisor ask anew whether an instance's guest has its ports open.
            terms: what the guest at a port of that name may have.
        """
        self._hub = hub
        self._prefix = prefix
        self._peers = peers
        self._listeners = listeners
        self._look = look
        self._terms = terms
        self._served: dict[tuple[VmUuid, PortName], tuple[VmPort, PeerInfo]] = {}
        self._expected: dict[PeerInfo, ExpectedLink] = {}

    def update(self, vm: VmUuid, instances: Iterable[Instance]) -> None:
        """The VM has these instances now: attach and detach what changed."""
        wanted = {port.port.name: port for port in self._wanted(vm, instances)}
        for key in [key for key in self._served if key[0] == vm]:
            served, peer = self._served[key]
            want = wanted.get(key[1])
            if want is None or _is_another(want, served):
                del self._served[key]
                self._detach(peer)
        for name, want in wanted.items():
            key = (vm, name)
            if key not in self._served:
                self._served[key] = (want, self._attach(want))
                continue
            served, peer = self._served[key]
            self._served[key] = (want, peer)
            if served.port.guest_open and not want.port.guest_open:
                self._hub.guest_closed(peer)
            elif want.port.guest_open and not served.port.guest_open:
                self._hub.guest_opened(peer)

    def greeted(self, vm: VmUuid, port: str) -> None:
        """The guest spoke on that port. If the hypervisor called it closed, its word is old.

        Only a port that was known to be open can be seen to close.
        """
        found = self._served.get((vm, PortName(port)))
        if found is not None and not found[0].port.guest_open:
            self._look(found[0].identity)

    def define(self, definer: str, ports: Iterable[DefinedPort]) -> None:
        """These ports are defined there now, and their QEMUs will connect; see `PortListeners.define`."""
        self._listeners.define(definer, [one for one in ports if one.port.startswith(self._prefix)])

    def troubles(self) -> tuple[Trouble, ...]:
        """Ports whose QEMUs connect where nothing listens."""
        return self._listeners.troubles()

    def served(self) -> tuple[VmPort, ...]:
        """All ports that are attached now."""
        return tuple(port for port, _ in self._served.values())

    def _wanted(self, vm: VmUuid, instances: Iterable[Instance]) -> list[VmPort]:
        if vm == NIL_UUID:  # no identity (S9): nobody to speak for
            return []
        ranked = sorted(instances, key=lambda one: one.run_state is not RunState.RUNNING)
        taken: dict[PortName, VmPort] = {}
        for instance in ranked:
            for port in instance.ports:
                if port.name.startswith(self._prefix) and port.chardev_path and port.name not in taken:
                    taken[port.name] = VmPort(instance.identity, instance.name, port)
        return list(taken.values())

    def _attach(self, port: VmPort) -> PeerInfo:
        peer = PeerInfo(
            name=port.name or port.vm_uuid, kind=PeerKind.VM, port=port.port.name, key=port.vm_uuid, info=port
        )
        self._hub.attach(
            peer,
            self._connector(port, peer),
            terms=self._terms(port.port.name),
            owner=_owner(port),
            remake=port.port.reconnects,
        )
        return peer

    def _connector(self, port: VmPort, peer: PeerInfo) -> Connector:
        path = port.port.chardev_path
        if port.port.mode is SocketMode.BIND:
            return ChardevConnector(path, self._verifier(port))
        link = self._listeners.expect(
            path,
            port.identity,
            port.name,
            port.port.name,
            lambda pid: self._peers.verify(pid, port.identity),
        )
        self._expected[peer] = link
        return link

    def _detach(self, peer: PeerInfo) -> None:
        self._hub.detach(peer)
        link = self._expected.pop(peer, None)
        if link is not None:
            self._listeners.release(link)

    def _verifier(self, port: VmPort) -> Callable[[int], Awaitable[None]]:
        async def check(pid: int) -> None:
            try:
                self._peers.verify(pid, port.identity)
            except HypervisorError as error:
                raise LinkError(str(error)) from error

        return check


def _owner(port: VmPort) -> str:
    """Whose session it is: that process's, through that socket. A VM that is started again gets a new one."""
    who = port.identity
    return f"{who.boot_id} {who.pid} {who.start_time} {who.vm_uuid} {who.executable} {port.port.chardev_path}"


def _is_another(want: VmPort, served: VmPort) -> bool:
    return _essence(want) != _essence(served)


def _essence(one: VmPort) -> tuple[object, ...]:
    return (one.identity, one.name, one.port.chardev_path, one.port.mode)
