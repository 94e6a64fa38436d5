# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ports of VMs the daemon serves, and when it asks the hypervisor about them again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fence_vmchannel import Hub, PeerStatus
from fence_vmchannel.core.events import PeerIdentity
from tests.unit.host.registry_builders import VM1, instance, process
from vmchannel_host.config.model import HostConfig, PortLimits, PortsConfig
from vmchannel_host.hypervisors.peer import WrongPeer
from vmchannel_host.hypervisors.process import ProcessGone, ProcessKey
from vmchannel_host.model import HostName, Instance, Port, PortName, ProcessIdentity, RunState
from vmchannel_host.port_sockets.listeners import PortListeners
from vmchannel_host.port_terms import terms_of_port
from vmchannel_host.vm_ports import VmPorts

PORT = PortName("org.vmchannel.0")
OVERRIDDEN = PortName("org.vmchannel.1")
CONFIG = HostConfig(
    HostName("hv1"),
    ports=PortsConfig(overrides={OVERRIDDEN: PortLimits(65_536, 65_536, cache_buffers=False)}),
)


class NobodyKnown:
    """Identifies no process."""

    def verify(self, pid: int, identity: ProcessIdentity) -> None:
        raise WrongPeer(f"pid {pid} is unknown")

    def key_of(self, pid: int) -> ProcessKey:
        raise ProcessGone(f"pid {pid} is unknown")

    def may_be_vm(self, pid: int) -> bool:
        return False

    def user_of(self, pid: int) -> int | None:
        return None


class Served:
    """Ports over a hub, and what they had the hypervisor asked."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.asked: list[ProcessIdentity] = []
        self.ports = VmPorts(
            hub,
            "org.vmchannel.",
            NobodyKnown(),
            PortListeners((), NobodyKnown()),
            self.asked.append,
            partial(terms_of_port, CONFIG),
        )

    def instance(self, *names: str, pid: int = 100, guest_open: bool = False) -> Instance:
        found = tuple(
            Port(PortName(name), str(self.folder / f"{pid}-{name}"), guest_open=guest_open) for name in names
        )
        return replace(instance(pid), ports=found)

    @property
    def status(self) -> list[PeerStatus]:
        return list(self.hub.status().peers)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Hub(PeerIdentity("boot", "test")) as hub:
        yield Served(hub, tmp_path)


async def test_ports_with_the_prefix_are_served_as_long_as_an_instance_has_them(served: Served) -> None:
    served.ports.update(VM1, [served.instance(PORT, "org.vmchannel.1", "org.qemu.guest_agent.0")])
    assert [peer.port for peer in served.status] == [PORT, "org.vmchannel.1"]
    served.ports.update(VM1, [served.instance(PORT)])
    assert [peer.port for peer in served.status] == [PORT]
    served.ports.update(VM1, [])
    assert served.status == []


async def test_each_port_gets_the_limits_that_are_configured_for_it(served: Served) -> None:
    served.ports.update(VM1, [served.instance(PORT, OVERRIDDEN)])
    terms = {peer.info.port: peer.terms for peer in served.hub.peers}
    assert (terms[PORT].limits.max_window_bytes, terms[PORT].keep) == (1_048_576, True)
    assert (terms[OVERRIDDEN].limits.max_window_bytes, terms[OVERRIDDEN].keep) == (65_536, False)


async def test_the_running_instance_of_a_vm_speaks_for_it(served: Served) -> None:
    waiting = replace(served.instance(PORT, pid=100), run_state=RunState.INMIGRATE)
    running = served.instance(PORT, pid=200)
    served.ports.update(VM1, [waiting, running])
    assert [port.identity for port in served.ports.served()] == [process(200)]
    served.ports.update(VM1, [replace(waiting, run_state=RunState.RUNNING)])
    assert [port.identity for port in served.ports.served()] == [process(100)]


async def test_a_guest_that_speaks_on_a_port_called_closed_has_the_hypervisor_asked_again(
    served: Served,
) -> None:
    served.ports.update(VM1, [served.instance(PORT)])
    served.ports.greeted(VM1, PORT)
    assert served.asked == [process(100)]


async def test_a_guest_that_speaks_on_an_open_or_an_unknown_port_changes_nothing(served: Served) -> None:
    served.ports.update(VM1, [served.instance(PORT, guest_open=True)])
    served.ports.greeted(VM1, PORT)
    served.ports.greeted(VM1, "org.vmchannel.7")
    assert served.asked == []


async def test_a_port_that_the_guest_closes_is_told_to_its_session(served: Served) -> None:
    served.ports.update(VM1, [served.instance(PORT, guest_open=True)])
    served.ports.update(VM1, [served.instance(PORT, guest_open=False)])
    assert [peer.detail for peer in served.status] == ["the guest has closed the port"]
