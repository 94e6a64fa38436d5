# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports are found by their names without udev, and may come, go and return while both hubs run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fence_vmchannel import PeerConnected, PortAdded, PortRemoved
from tests.counts import Count
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    WAIT_S,
    echo,
    guest_watch,
    host_watch,
    hub_pid,
    offered,
    port_view,
    until,
)
from tests.system.site import Site, open_site
from tests.system.test_channels import connections, open_files

SECOND = "org.vmchannel.1"

WATCHERS = 8
"""Sockets and epolls of the test's own watchers and its service."""

REQUEST = """
import time
from fence_vmchannel import BlockingClient
deadline = time.monotonic() + 60
with BlockingClient.connect(deadline=deadline) as client:
    print(client.request("org.vmchannel.1:org.example.echo", b"second", deadline=deadline).decode())
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("plug", ports=("org.example.first", "org.vmchannel.0", "com.example.last"))
    site.serve()
    return vm


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await site.until_connected(vm)
    return guest


async def plug(guest: Guest, name: str) -> None:
    """Add a port to the running VM."""
    path = str(guest.spec.folder / "second.sock")
    socket = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": socket, "server": True, "wait": False}}
    await guest.qmp("chardev-add", id="second", backend=backend)
    await guest.qmp(
        "device_add", driver="virtserialport", bus="vserial.0", chardev="second", id="vsecond", name=name
    )


async def unplug(guest: Guest) -> None:
    """Take the port away; the guest agrees to it."""
    async with guest.monitor() as monitor:
        with monitor.listener("DEVICE_DELETED") as deleted:
            await monitor.execute("device_del", {"id": "vsecond"})
            async with asyncio.timeout(WAIT_S):
                await deleted.get()
        await monitor.execute("chardev-remove", {"id": "second"})


async def is_gone(site: Site, uuid: str) -> bool:
    """Whether the daemon shows the second port no more."""
    return await port_view(site, uuid, SECOND) is None


async def test_a_port_is_found_by_its_name_in_sysfs_without_udev(site: Site, guest: Guest) -> None:
    udev = await guest.sh("ls -d /dev/virtio-ports /run/udev")
    names = await guest.sh("cat /sys/class/virtio-ports/vport0p*/name")
    assert udev.stdout == ""
    assert names.stdout.split() == ["org.example.first", "org.vmchannel.0", "com.example.last"]
    served = [port["name"] for port in await site.ctl_json("ports")]
    assert served == ["org.vmchannel.0"]


@pytest.mark.counted
@pytest.mark.timeout(1_800)
async def test_a_port_that_is_plugged_and_unplugged_again_and_again_is_served_each_time(
    site: Site, guest: Guest, count: Count
) -> None:
    uuid, hub = guest.spec.uuid, await hub_pid(guest)

    async def open_now() -> tuple[int, int]:
        there = (await guest.sh(f"ls -l /proc/{hub}/fd")).check().stdout
        return connections(there), connections(open_files(site.daemon.pid))

    before = await open_now()
    inside = await guest_watch(guest)
    async with host_watch(site) as outside, offered(site, "org.example.echo", echo):
        for _ in range(count(2, 100, "hot-plug loops")):
            await plug(guest, SECOND)
            assert (await inside.next("port-added", SECOND))["peer"] == "host"
            await inside.next("peer-connected", SECOND)
            assert (await outside.next(PortAdded, SECOND)).key == uuid
            assert (await outside.next(PeerConnected, SECOND)).key == uuid
            assert (await guest.python(REQUEST)).check().stdout == "dnoces\n"
            await unplug(guest)
            await inside.next("port-removed", SECOND)
            assert (await outside.next(PortRemoved, SECOND)).key == uuid
            await until(lambda: is_gone(site, uuid), "end of the port")
        inside_now, outside_now = await open_now()
        first = await port_view(site, uuid)
    assert inside_now <= before[0] + WATCHERS
    assert outside_now <= before[1] + WATCHERS
    assert first is not None
    assert first["connected"], "the first port has nothing to do with it"


async def test_a_port_of_another_name_is_left_alone(site: Site, guest: Guest) -> None:
    await plug(guest, "com.example.late")
    try:

        async def visible() -> bool:
            return "com.example.late" in (await guest.sh("cat /sys/class/virtio-ports/*/name")).stdout

        await until(visible, "port in the guest")
        free = await guest.python(
            "import os\n"
            "names = {n: open(f'/sys/class/virtio-ports/{n}/name').read().strip()\n"
            "         for n in os.listdir('/sys/class/virtio-ports')}\n"
            "for node, name in sorted(names.items()):\n"
            "    if not name.startswith('org.vmchannel.'):\n"
            "        os.close(os.open(f'/dev/{node}', os.O_RDWR | os.O_NONBLOCK))\n"
            "        print(name)\n"
        )
        assert free.check().stdout.split() == ["org.example.first", "com.example.last", "com.example.late"]
        assert [port["name"] for port in await site.ctl_json("ports")] == ["org.vmchannel.0"]
    finally:
        await unplug(guest)
