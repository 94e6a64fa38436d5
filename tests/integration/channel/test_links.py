# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links that come and go: a chardev socket that QEMU would serve, ports that appear, vanish and are busy."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from fence_vmchannel.channel import Channel
from fence_vmchannel.client import connect
from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.errors import ChannelClosed, CloseCode, LinkError, ServiceRefused, SessionReset
from fence_vmchannel.hub.events import PeerConnected, PortAdded, PortRemoved, PortUnusable
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.links.base import Link, wait_for
from fence_vmchannel.links.chardev import ChardevConnector
from fence_vmchannel.links.stream import SocketLink
from fence_vmchannel.peers import HOST_PEER
from tests.fakes.fake_port import PtyPort, busy_opener
from tests.fakes.hub_pair import HOST, VM, FakePort, eventually, next_event


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def trust(pid: int) -> None:
    """This process plays QEMU."""
    assert pid == os.getpid()


async def distrust(pid: int) -> None:
    raise LinkError(f"pid {pid} is not the QEMU of this VM")


async def never(pid: int) -> None:
    await asyncio.Event().wait()


class FakeQemu:
    """Listens as QEMU does for a chardev: serves one client; a second one waits in its backlog."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(path)
        self._socket.listen(1)
        self._path = path

    async def connect(self) -> Link:
        """A `Connector` for the guest's hub: the port's other end is the client that comes next."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        return SocketLink(sock, "guest end")

    def close(self) -> None:
        """QEMU ends."""
        self._socket.close()
        os.unlink(self._path)


async def test_a_host_follows_a_qemu_that_ends_and_returns(tmp_path: Path) -> None:
    path = str(tmp_path / "port.sock")
    async with Hub(PeerIdentity("host-boot", "host")) as host:
        with host.watch() as events:
            host.attach(VM, ChardevConnector(path, trust))
            unusable = await next_event(events, "PortUnusable")
            assert isinstance(unusable, PortUnusable)
            assert "No such file" in unusable.reason
            for boot in ("first boot", "second boot"):
                qemu = FakeQemu(path)
                async with Hub(PeerIdentity(boot, boot), default_peer=HOST_PEER) as guest:
                    guest.offer("org.example.echo", echo)
                    guest.attach(HOST, qemu, role=Role.GUEST)
                    connected = await next_event(events, "PeerConnected")
                    assert isinstance(connected, PeerConnected)
                    assert (connected.software, connected.resumed) == (boot, False)
                    async with await host.open(VM.name, "org.example.echo") as channel:
                        assert await channel.request(b"x") == b"x"
                    qemu.close()
                await next_event(events, "PeerDisconnected")


async def test_a_new_host_daemon_resets_the_session_and_the_application_is_told(tmp_path: Path) -> None:
    async def mute(channel: Channel) -> None:
        asked.add(await channel.receive())
        await channel.wait_closed()

    asked: set[bytes | None] = set()
    path = str(tmp_path / "guest.sock")
    port = FakePort()
    async with Hub(PeerIdentity("boot", "guest"), default_peer=HOST_PEER) as guest:
        guest.serve(path)
        with guest.watch() as events:
            guest.attach(HOST, port.guest, role=Role.GUEST)
            async with connect(path) as client:
                async with Hub(PeerIdentity("host-boot", "first daemon")) as first:
                    first.offer("org.example.mute", mute)
                    first.attach(VM, port.host)
                    channel = await client.open("org.example.mute", timeout_s=10)
                    request = asyncio.ensure_future(client.request("org.example.mute", b"?", timeout_s=10))
                    await channel.send(b"unconfirmed")
                    assert await eventually(lambda: asked == {b"?", b"unconfirmed"})
                    port.plugged = False
                    port.cut()  # as if it had been killed: nothing of its end comes through
                    await next_event(events, "PeerDisconnected")
                port.plugged = True
                async with Hub(PeerIdentity("host-boot", "second daemon")) as second:
                    second.attach(VM, port.host)
                    await next_event(events, "SessionWasReset")
                    connected = await next_event(events, "PeerConnected")
                    assert isinstance(connected, PeerConnected)
                    assert (connected.software, connected.resumed) == ("second daemon", False)
                    with pytest.raises(ChannelClosed) as closed:
                        await channel.receive()
                    assert closed.value.code is CloseCode.SESSION_RESET
                    with pytest.raises(SessionReset, match="whether the request was acted on is unknown"):
                        await request
    port.close()


async def test_a_socket_whose_process_is_not_the_vms_qemu_is_not_used(tmp_path: Path) -> None:
    path = str(tmp_path / "port.sock")
    qemu = FakeQemu(path)
    async with Hub(PeerIdentity("host-boot", "host")) as host:
        with host.watch() as events:
            host.attach(VM, ChardevConnector(path, distrust))
            unusable = await next_event(events, "PortUnusable")
            assert isinstance(unusable, PortUnusable)
            assert f"pid {os.getpid()} is not the QEMU of this VM" in unusable.reason
            assert not host.status().peers[0].connected
    qemu.close()


async def test_a_check_of_the_process_that_hangs_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "port.sock")
    qemu = FakeQemu(path)
    with pytest.raises(LinkError, match="could not be identified in time"):
        await ChardevConnector(path, never, verify_timeout_s=0.05).connect()
    qemu.close()


async def test_a_chardev_that_another_client_holds_is_busy_and_tried_again(tmp_path: Path) -> None:
    path = str(tmp_path / "port.sock")
    qemu = FakeQemu(path)
    others = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for other in others:
        other.connect(path)
    with pytest.raises(LinkError, match="another client talks to this port"):
        await ChardevConnector(path, trust).connect()
    for other in others:
        other.close()
    for _ in others:
        (await qemu.connect()).close()
    (await ChardevConnector(path, trust).connect()).close()
    qemu.close()


async def test_a_guest_serves_ports_as_they_come_and_go(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(Hub(PeerIdentity("host-boot", "host")))
        guest = await stack.enter_async_context(Hub(PeerIdentity("boot", "guest"), default_peer=HOST_PEER))
        host.offer("org.example.echo", echo)
        first = PtyPort(tmp_path, VM.port)
        stack.callback(first.close)
        events = stack.enter_context(guest.watch())
        guest.serve_ports(paths=first.paths, rescan_s=0.02)
        host.attach(VM, first)
        added = await next_event(events, "PortAdded")
        assert added == PortAdded(VM.port, HOST_PEER)
        await next_event(events, "PeerConnected")
        async with await guest.open(HOST_PEER, "org.example.echo") as channel:
            assert await channel.request(b"x") == b"x"
        shutil.rmtree(Path(first.paths.sysfs) / "vport0p1")
        assert await next_event(events, "PortRemoved") == PortRemoved(VM.port, HOST_PEER)
        with pytest.raises(ServiceRefused, match="is not there now"):
            await guest.open(HOST_PEER, "org.example.echo")
        second = PtyPort(tmp_path, "org.vmchannel.1", entry="vport0p2")
        stack.callback(second.close)
        host.attach(replace(VM, port="org.vmchannel.1"), second)
        assert await next_event(events, "PortAdded") == PortAdded("org.vmchannel.1", HOST_PEER)
        connected = await next_event(events, "PeerConnected")
        assert isinstance(connected, PeerConnected)
        assert connected.port == "org.vmchannel.1"
        async with await guest.open("", "org.example.echo", port="org.vmchannel.1") as channel:
            assert await channel.request(b"y") == b"y"


async def test_ports_of_other_products_are_left_alone(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, "org.qemu.guest_agent.0")
    async with Hub(PeerIdentity("boot", "guest"), default_peer=HOST_PEER) as guest:
        guest.serve_ports(paths=port.paths, rescan_s=0.02)
        await asyncio.sleep(0.1)
        assert guest.status().peers == ()
    port.close()


async def test_a_busy_port_is_told_once_with_its_holder_and_used_when_it_is_free(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, VM.port)
    opener = SwitchedOpener()
    paths = replace(port.paths, open=opener)
    async with (
        Hub(PeerIdentity("host-boot", "host")) as host,
        Hub(PeerIdentity("boot", "guest"), default_peer=HOST_PEER) as guest,
    ):
        host.attach(VM, port)
        with guest.watch() as events:
            guest.serve_ports(paths=paths, rescan_s=0.02)
            unusable = await next_event(events, "PortUnusable")
            assert isinstance(unusable, PortUnusable)
            assert f"held by pid {os.getpid()}" in unusable.reason
            assert guest.status().peers[0].detail == unusable.reason
            opener.opener = os.open
            await next_event(events, "PeerConnected")
    port.close()


class SwitchedOpener:
    """Opens nodes as its `opener` does."""

    def __init__(self) -> None:
        self.opener: Callable[[str, int], int] = busy_opener()

    def __call__(self, path: str, flags: int) -> int:
        return self.opener(path, flags)


def test_a_socket_wakes_its_writer_only_when_a_write_had_to_wait() -> None:
    mine, other = socket.socketpair()
    link = SocketLink(mine, "mine")
    assert link.send(memoryview(b"read at once")) == 12
    other.recv(100)
    assert not wait_for(link, 0), "that the other end reads is no news"
    while link.send(memoryview(bytes(65_536))):
        pass
    assert not wait_for(link, 0)
    while not wait_for(link, 0):
        assert other.recv(65_536)
    link.refresh()
    assert link.send(memoryview(b"room again")) == 10
    assert not wait_for(link, 0)
    link.close()
    other.close()
