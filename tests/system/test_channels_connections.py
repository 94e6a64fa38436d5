# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connection and disconnection, as each side is told: hubs that stop or are killed and return, a reset."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fence_vmchannel import (
    Channel,
    ChannelClosed,
    CloseCode,
    PeerConnected,
    PeerDisconnected,
    ServiceRefused,
    SessionWasReset,
)
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    WAIT_S,
    admin_events,
    echo,
    end_hub,
    guest_watch,
    host_client,
    host_watch,
    offered,
    port_view,
    start_hub,
    until,
    until_said,
)
from tests.system.site import Site, open_site

pytestmark = pytest.mark.slow

FLOW = """
import time
from fence_vmchannel import BlockingClient, ChannelClosed, ServiceRefused
deadline = time.monotonic() + 200
with BlockingClient.connect(deadline=deadline) as client:
    with client.open("org.example.flow", deadline=deadline) as channel:
        print("flows", flush=True)
        try:
            while True:
                channel.send(bytes(30000), deadline=deadline)
        except ChannelClosed as error:
            print(error.code.name, flush=True)
    while time.monotonic() < deadline:
        try:
            answer = client.request("org.example.echo", b"again", deadline=deadline)
        except ServiceRefused as error:
            assert error.code.name == "UNKNOWN_SERVICE"  # not offered again yet
            time.sleep(0.1)
        else:
            print(answer.decode(), flush=True)
            break
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("conn")
    site.serve()
    return vm


@pytest.fixture(scope="module")
def vm_without_port_ids(site: Site, vm: Vm) -> Vm:
    return site.vm("noid", port_ids=False)


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await site.until_connected(vm)
    return guest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_the_host_is_told_that_a_guests_hub_has_gone_and_is_back(
    site: Site, guest: Guest, number: int
) -> None:
    name, uuid = guest.spec.name, guest.spec.uuid
    async with host_watch(site) as watch, admin_events(site) as live:
        await end_hub(guest, number)
        gone = await watch.next(PeerDisconnected, PORT)
        told = await live.next("port.disconnected")
        away = await port_view(site, uuid)
        await start_hub(guest)
        back = await watch.next(PeerConnected, PORT)
        told_back = await live.next("port.connected")
        there = await port_view(site, uuid)
    assert (gone.peer, gone.key) == (back.peer, back.key) == (name, uuid)
    assert told["vm_uuid"] == told_back["vm_uuid"] == uuid
    assert gone.reason in told["text"]
    assert away is not None
    assert there is not None
    assert (away["connected"], away["guest_open"]) == (False, False)
    assert away["problem"] == gone.reason == "the guest has closed the port"
    assert (there["connected"], there["guest_open"], there["session"]) == (True, True, back.session)


async def test_the_host_is_told_too_where_qemu_gives_no_sign_because_the_port_has_no_id(
    site: Site, vm_without_port_ids: Vm, attach: Attach
) -> None:
    guest = await attach(vm_without_port_ids)
    await site.until_connected(vm_without_port_ids)
    async with host_watch(site) as watch:
        await end_hub(guest, signal.SIGTERM)
        gone = await watch.next(PeerDisconnected, PORT)
        await start_hub(guest)
        back = await watch.next(PeerConnected, PORT)
    assert gone.reason == "the guest has closed the port"
    assert gone.key == back.key == guest.spec.uuid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_the_guest_is_told_that_the_hosts_daemon_has_gone_and_is_back(
    site: Site, guest: Guest, number: int
) -> None:
    watch = await guest_watch(guest)
    site.daemon.end(number)
    gone = await watch.next("peer-disconnected", PORT)
    site.daemon.start()
    back = await watch.next("peer-connected", PORT)
    assert gone["peer"] == back["peer"] == "host"
    assert back["software"].startswith("vmchanneld ")


async def test_a_killed_hosts_daemon_resets_the_session_and_the_guests_programs_are_told(
    site: Site, guest: Guest
) -> None:
    async def swallow(channel: Channel) -> None:
        while await channel.receive() is not None:
            pass

    async with offered(site, "org.example.flow", swallow):
        program = await guest.start_python(FLOW, timeout_s=200)
        await until_said(program, lambda said: "flows" in said)
        watch = await guest_watch(guest)
        site.daemon.kill()
    await watch.next("peer-disconnected", PORT)
    site.daemon.start()
    await watch.next("session-was-reset", PORT)
    await watch.next("peer-connected", PORT)
    async with offered(site, "org.example.echo", echo):
        done = (await program.wait(WAIT_S)).check()
    assert done.stdout.splitlines() == ["flows", "SESSION_RESET", "niaga"]


async def test_a_guest_that_is_reset_under_traffic_resets_its_session_and_programs_of_the_host_are_told(
    site: Site, guest: Guest
) -> None:
    ends: asyncio.Queue[CloseCode] = asyncio.Queue()
    received = asyncio.Event()

    async def count(channel: Channel) -> None:
        try:
            while await channel.receive() is not None:
                received.set()
        except ChannelClosed as error:
            ends.put_nowait(error.code)

    async with offered(site, "org.example.flow", count), host_watch(site) as watch:
        await guest.start_python(FLOW)
        await asyncio.wait_for(received.wait(), WAIT_S)
        before = await guest.boot_id()
        await guest.qmp("system_reset")
        await guest.disconnect()
        await watch.next(PeerDisconnected, PORT)
        await watch.next(SessionWasReset, PORT)
        assert await asyncio.wait_for(ends.get(), WAIT_S) is CloseCode.SESSION_RESET
        back = await watch.next(PeerConnected, PORT)
        assert not back.resumed
        await guest.wait_ready()
        assert await guest.boot_id() != before
        received.clear()
        await guest.start_python(FLOW)
        await asyncio.wait_for(received.wait(), WAIT_S)
    assert ends.empty()


async def test_channels_to_a_guest_wait_for_its_hub_and_open_when_it_is_there(
    site: Site, guest: Guest
) -> None:
    """A request of the host's is not lost because the guest's hub is just being restarted."""
    await end_hub(guest, signal.SIGTERM)

    async def is_away() -> bool:
        port = await port_view(site, guest.spec.uuid)
        return port is not None and not port["connected"]

    await until(is_away, "notice of the hub's end")
    async with host_client(site) as client:
        asking = asyncio.create_task(
            client.open(f"{guest.spec.name}/org.example.none", timeout_s=WAIT_S), name="open"
        )
        await start_hub(guest)
        with pytest.raises(ServiceRefused) as refused:
            await asking
    assert refused.value.code is CloseCode.UNKNOWN_SERVICE  # the guest's hub said so
