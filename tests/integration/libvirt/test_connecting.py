# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels of domains whose QEMU connects (`mode='connect'`): they are listened for before they start."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from tests.integration.host.connecting_rig import PORT, Server, served, until
from tests.integration.libvirt.libvirt_rig import off_loop, vm_of, watching
from tests.rig.kernel import RigError
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.model import SocketMode


def a_domain(libvirtd: Libvirtd, *, reconnect: str = "") -> Domain:
    vm = str(uuid.uuid4())
    path = libvirtd.sockets / f"{vm[:8]}.sock"
    channel = (
        f"<channel type='unix'><source mode='connect' path='{path}'>{reconnect}</source>"
        f"<target type='virtio' name='{PORT}'/></channel>"
    )
    return Domain(f"vm-{vm[:8]}", vm, devices=channel)


@asynccontextmanager
async def serving(libvirtd: Libvirtd) -> AsyncGenerator[Server, None]:
    async with watching(libvirtd) as host, served(host.hypervisor, str(libvirtd.sockets)) as server:
        yield server


@pytest.mark.parametrize("which", ["libvirtd", "system_libvirtd"])
async def test_a_domain_without_reconnect_is_listened_for_as_soon_as_it_is_defined(
    which: str, request: pytest.FixtureRequest
) -> None:
    libvirtd: Libvirtd = request.getfixturevalue(which)
    domain = a_domain(libvirtd)
    path = libvirtd.sockets / f"{domain.uuid[:8]}.sock"
    libvirtd.define(domain)
    with pytest.raises(RigError, match="No such file or directory"):
        libvirtd.virsh("start", domain.uuid)
    async with serving(libvirtd) as server:
        for _ in range(2):
            await until(path.is_socket, "a socket for the domain")
            await off_loop(lambda: libvirtd.virsh("start", domain.uuid))
            await server.until_linked(vm_of(domain))
            [port] = server.ports.served()
            assert (port.port.mode, port.port.reconnects) == (SocketMode.CONNECT, False)
            await off_loop(lambda: libvirtd.virsh("destroy", domain.uuid))
            await server.until_gone(vm_of(domain))
        await off_loop(lambda: libvirtd.virsh("undefine", domain.uuid))
        await until(lambda: not path.exists(), "the end of the socket")


async def test_a_domain_that_reconnects_outlives_the_daemon(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd, reconnect="<reconnect enabled='yes' timeout='1'/>")
    libvirtd.create(domain)
    for _ in range(2):
        async with serving(libvirtd) as server:
            await server.until_linked(vm_of(domain))
            [port] = server.ports.served()
            assert port.port.reconnects
    libvirtd.virsh("destroy", domain.uuid)
