# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows of the field's virtio-serial suites: a VM stopped under load, many ports, a driver that goes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from fence_vmchannel import Channel
from tests.counts import Count
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import WAIT_S, echo, guest_watch, hub_pid, offered, until
from tests.system.site import Site, open_site

pytestmark = pytest.mark.slow

PORTS = 30
"""What one controller takes: 31 by default, of which number 0 is a console's."""

RECORD = struct.Struct(">Q4088x")
RECORDS = 300
"""For each stop of a VM, each way."""

BOTH_WAYS = f"""
import os, struct, time
from fence_vmchannel import BlockingClient
deadline = time.monotonic() + 200
record = struct.Struct({RECORD.format!r})

def up():
    with BlockingClient.connect(deadline=deadline) as client:
        with client.open("org.example.take", deadline=deadline) as channel:
            for number in range(RECORDS):
                channel.send(record.pack(number), deadline=deadline)
            assert channel.receive(deadline=deadline) == b"all"

def down():
    with BlockingClient.connect(deadline=deadline) as client:
        with client.open("org.example.give", deadline=deadline) as channel:
            for number in range(RECORDS):
                message = channel.receive(deadline=deadline)
                assert message is not None and record.unpack(message) == (number,)
            channel.send(b"all", deadline=deadline)

children = []
for work in (up, down):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    children.append(pid)
assert not [pid for pid in children if os.waitpid(pid, 0)[1]]
print("nothing lost")
"""

ASK_EACH = f"""
import time
from fence_vmchannel import BlockingClient
deadline = time.monotonic() + 100
with BlockingClient.connect(deadline=deadline) as client:
    for number in range({PORTS}):
        question = b"over port %d" % number
        target = f"org.vmchannel.{{number}}:org.example.echo"
        assert client.request(target, question, deadline=deadline) == question[::-1], number
print("all")
"""

ASK = """
import time
from fence_vmchannel import BlockingClient
deadline = time.monotonic() + 60
with BlockingClient.connect(deadline=deadline) as client:
    print(client.request("org.example.echo", b"still there", deadline=deadline).decode())
"""

CONTROLLER = "/sys/bus/virtio/drivers/virtio_console"


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        opened.serve()
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    return site.vm("row")


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await site.until_connected(vm)
    return guest


class Numbered:
    """The host's side of BOTH_WAYS: takes numbered records in order, and gives as many."""

    def __init__(self, records: int) -> None:
        self.records = records
        self.taken = 0
        self.given = 0
        self._moved = asyncio.Event()

    async def take(self, channel: Channel) -> None:
        while self.taken < self.records:
            message = await channel.receive()
            assert message is not None
            assert RECORD.unpack(message) == (self.taken,)
            self.taken += 1
            self._moved.set()
        await channel.send(b"all")
        assert await channel.receive() is None

    async def give(self, channel: Channel) -> None:
        while self.given < self.records:
            await channel.send(RECORD.pack(self.given))
            self.given += 1
            self._moved.set()
        assert await channel.receive() == b"all"

    async def reached(self, number: int) -> None:
        """Wait until so many went each way, as far as this side sees."""
        async with asyncio.timeout(WAIT_S):
            while min(self.taken, self.given) < number:
                self._moved.clear()
                await self._moved.wait()


# row 14: interrupted_transfer.stop_cont


@pytest.mark.counted
async def test_a_vm_that_is_stopped_and_continued_under_load_loses_nothing(
    site: Site, guest: Guest, count: Count
) -> None:
    stops = count(3, 30, "stops of a VM under load")
    numbered = Numbered(records := RECORDS * (stops + 1))
    async with (
        offered(site, "org.example.take", numbered.take),
        offered(site, "org.example.give", numbered.give),
    ):
        program = await guest.start_python(f"RECORDS = {records}\n{BOTH_WAYS}", timeout_s=200)
        for stop in range(1, stops + 1):
            await numbered.reached(stop * RECORDS)
            await guest.qmp("stop")
            await site.until_run_state(guest.vm, "paused")
            before = numbered.taken
            await guest.qmp("cont")
            await site.until_run_state(guest.vm, "running")
            assert before < records, "it was stopped in the middle"
        assert (await program.wait(200)).check().stdout == "nothing lost\n"
    assert (numbered.taken, numbered.given) == (records, records)


# rows 24, 28: max_ports, virtio_serial_file_transfer_max_ports


async def test_thirty_ports_on_one_controller_carry_data_each(site: Site, attach: Attach) -> None:
    vm = site.vm("ports", ports=tuple(f"org.vmchannel.{number}" for number in range(PORTS)))
    try:
        guest = await attach(vm)

        async def all_connected() -> bool:
            ports = [port for port in await site.ask("ports") if port["vm_uuid"] == vm.spec.uuid]
            return len(ports) == PORTS and all(port["connected"] for port in ports)

        await until(all_connected, "connection of every port", timeout_s=180)
        async with offered(site, "org.example.echo", echo):
            assert (await guest.python(ASK_EACH, timeout_s=100)).check().stdout == "all\n"
    finally:
        vm.stop()


# row 21: hotplug_virtio_pci


@asynccontextmanager
async def device(guest: Guest, number: int) -> AsyncGenerator[None, None]:
    """A whole virtio-serial device with a port, in a slot of the running VM; the guest lets it go again."""
    path = str(guest.spec.folder / f"replug{number}.sock")
    socket = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": socket, "server": True, "wait": False}}
    await guest.qmp("device_add", driver="virtio-serial-pci", id="device", bus="slot1")
    await guest.qmp("chardev-add", id="line", backend=backend)
    await guest.qmp(
        "device_add", driver="virtserialport", bus="device.0", chardev="line", id="port", name=PORT
    )
    yield
    async with guest.monitor() as monitor:
        with monitor.listener("DEVICE_DELETED") as deleted:
            await monitor.execute("device_del", {"id": "device"})
            async with asyncio.timeout(WAIT_S):
                async for event in deleted:
                    if cast("dict[str, object]", event["data"]).get("device") == "device":
                        break  # its port has gone before it
        await monitor.execute("chardev-remove", {"id": "line"})


@pytest.mark.counted
async def test_a_whole_device_that_is_unplugged_and_plugged_again_is_served_each_time(
    site: Site, attach: Attach, count: Count
) -> None:
    slot = ("-device", "pcie-root-port,id=slot1")
    vm = site.vm("device", ports=(), controller=False, extra=slot)
    try:
        guest = await attach(vm)
        watch = await guest_watch(guest)
        async with offered(site, "org.example.echo", echo):
            for number in range(count(2, 10, "replugs of the whole device")):
                async with device(guest, number):
                    await watch.next("peer-connected")
                    assert (await guest.python(ASK)).check().stdout == "ereht llits\n"
                await watch.next("port-removed")
    finally:
        vm.stop()


# row 23: rmmod


async def test_the_driver_is_unloaded_and_loaded_again_under_the_hub(site: Site, guest: Guest) -> None:
    """While the hub has a port open the kernel refuses that; the device can be taken from it at any time."""
    hub = await hub_pid(guest)
    refused = await guest.sh("rmmod virtio_console")
    assert refused.code != 0, "the hub's open port holds the module"
    watch = await guest_watch(guest)
    taken = f"for one in {CONTROLLER}/virtio*; do basename $one > {CONTROLLER}/unbind; done"
    (await guest.sh(taken)).check()
    await watch.next("port-removed")

    async def unloaded() -> bool:
        return (await guest.sh("rmmod virtio_console")).code == 0

    await until(unloaded, "unloading of the driver: the hub lets go of the port")
    (await guest.sh("insmod $(grep virtio_console /rig/modules)")).check()
    await watch.next("peer-connected")
    async with offered(site, "org.example.echo", echo):
        assert (await guest.python(ASK)).check().stdout == "ereht llits\n"
    assert await hub_pid(guest) == hub, "the same hub"
