# SPDX-License-Identifier: LGPL-2.1-or-later
"""`cache_buffers: false`: what waits for a peer that is away is dropped, and its sender is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.errors import ChannelClosed, CloseCode, ServiceRefused
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.messages import FENCE_SERVICE
from tests.fakes.hub_pair import VM, HubPair, eventually, hub_pair, next_event
from tests.fakes.restarting_hubs import restarting_pair

NOTHING_KEPT = PeerTerms(keep=False)
CLIPBOARD_NOT_KEPT = PeerTerms(not_kept=frozenset({"org.example.clipboard", FENCE_SERVICE}))


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def send_for_ever(channel: Channel) -> None:
    while True:
        await channel.send(bytes(1_000))


@asynccontextmanager
async def host_away(pair: HubPair) -> AsyncGenerator[None]:
    """The guest's hub sees its host go; it is back at the end, and both sides know."""
    with pair.guest.watch() as guest_events, pair.host.watch() as host_events:
        pair.port.plugged = False
        pair.port.cut()
        await next_event(guest_events, "PeerDisconnected")
        await next_event(host_events, "PeerDisconnected")
        yield
        pair.port.plugged = True
        await next_event(guest_events, "PeerConnected")
        await next_event(host_events, "PeerConnected")


async def test_the_sender_and_the_reader_are_told_that_their_channel_has_ended(tmp_path: Path) -> None:
    ended: asyncio.Queue[CloseCode] = asyncio.Queue()

    async def read(channel: Channel) -> None:
        try:
            while await channel.receive() is not None:
                pass
        except ChannelClosed as error:
            ended.put_nowait(error.code)

    async with hub_pair(tmp_path, terms=NOTHING_KEPT) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.read", read)
        channel = await client.open("org.example.read", timeout_s=5)
        await channel.send(b"there")
        async with host_away(pair):
            with pytest.raises(ChannelClosed) as told:
                await asyncio.wait_for(send_for_ever(channel), 5)
            assert told.value.code is CloseCode.PEER_GONE
            assert "nothing is kept" in told.value.reason
            assert await asyncio.wait_for(ended.get(), 5) is CloseCode.PEER_GONE
            assert all(peer.endpoint.connection.unsent_bytes < 4_000 for peer in pair.guest.peers)


async def test_a_channel_to_a_peer_that_is_away_is_refused_at_once_and_opens_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with hub_pair(tmp_path, terms=NOTHING_KEPT) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.echo", echo)
        async with host_away(pair):
            with pytest.raises(ServiceRefused, match="nothing is kept") as told:
                await client.open("org.example.echo", timeout_s=5)
            assert told.value.code is CloseCode.PEER_GONE
        assert await client.request("org.example.echo", b"again", timeout_s=5) == b"again"


async def test_a_fence_is_kept_whatever_the_port_and_the_services_say(tmp_path: Path) -> None:
    for terms in (NOTHING_KEPT, CLIPBOARD_NOT_KEPT):
        async with hub_pair(tmp_path, terms=terms) as pair, connect(pair.guest_path) as client:
            pair.host.offer(FENCE_SERVICE, echo)
            old = await client.open(FENCE_SERVICE, timeout_s=5)
            async with asyncio.TaskGroup() as tasks, host_away(pair):
                await old.send(b"off")
                new = tasks.create_task(client.request(FENCE_SERVICE, b"status", timeout_s=10))
                await asyncio.sleep(0.05)
                assert not new.done()
            assert new.result() == b"status"
            assert await old.receive() == b"off"


async def test_a_service_for_which_nothing_is_kept_ends_alone(tmp_path: Path) -> None:
    async with hub_pair(tmp_path, terms=CLIPBOARD_NOT_KEPT) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.clipboard", echo)
        pair.host.offer("org.example.echo", echo)
        dropped = await client.open("org.example.clipboard", timeout_s=5)
        kept = await client.open("org.example.echo", timeout_s=5)
        async with host_away(pair):
            await kept.send(b"kept")
            with pytest.raises(ChannelClosed):
                await asyncio.wait_for(dropped.receive(), 5)
            with pytest.raises(ServiceRefused):
                await client.open("org.example.clipboard", timeout_s=5)
        assert await kept.receive() == b"kept"
        assert await client.request("org.example.clipboard", b"x", timeout_s=5) == b"x"


async def test_a_host_application_is_told_when_its_guest_is_away(tmp_path: Path) -> None:
    async with (
        hub_pair(tmp_path, terms=NOTHING_KEPT) as pair,
        connect(pair.guest_path) as guest,
        connect(pair.host_path) as host,
        guest.offer("org.example.echo", echo),
    ):
        channel = await host.open("vm1/org.example.echo", timeout_s=5)
        assert await channel.request(b"x") == b"x"
        async with host_away(pair):
            with pytest.raises(ChannelClosed) as told:
                await asyncio.wait_for(channel.receive(), 5)
            assert told.value.code is CloseCode.PEER_GONE


async def test_a_guest_that_knows_nothing_of_it_is_told_when_the_link_is_back(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def read(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            got.append(message)

    async with (
        hub_pair(tmp_path, terms=NOTHING_KEPT, guest_terms=PeerTerms()) as pair,
        connect(pair.guest_path) as client,
    ):
        pair.host.offer("org.example.read", read)
        channel = await client.open("org.example.read", timeout_s=5)
        async with host_away(pair):
            await channel.send(b"too late")
        with pytest.raises(ChannelClosed) as told:
            await asyncio.wait_for(channel.receive(), 5)
        assert told.value.code is CloseCode.PEER_GONE
        again = await client.open("org.example.read", timeout_s=5)
        await again.send(b"in time")
        assert await eventually(lambda: got == [b"in time"])


async def test_without_it_everything_waits(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.echo", echo)
        channel = await client.open("org.example.echo", timeout_s=5)
        async with host_away(pair):
            for number in range(100):
                await channel.send(b"%d" % number)
        assert [await channel.receive() for _ in range(100)] == [b"%d" % number for number in range(100)]


async def test_what_a_hub_finds_from_before_its_restart_is_dropped_too_and_the_sender_told(
    tmp_path: Path,
) -> None:
    got: list[bytes] = []

    async def read(channel: Channel) -> None:
        await channel.accept()
        while (message := await channel.receive()) is not None:
            got.append(message)

    async with (
        restarting_pair(tmp_path) as pair,
        connect(pair.guest.path, resume_s=60) as guest,
        connect(pair.host.path, resume_s=60) as host,
        guest.offer("org.example.read", read),
        guest.offer("org.example.clipboard", read),
    ):
        kept = await host.open(f"{VM.name}/org.example.read", timeout_s=10)
        dropped = await host.open(f"{VM.name}/org.example.clipboard", timeout_s=10)
        pair.port.plugged = False
        pair.port.cut()
        assert await eventually(lambda: not pair.host.hub.status().peers[0].connected)
        await dropped.send(b"too late")
        await kept.send(b"kept")
        pair.host.terms = CLIPBOARD_NOT_KEPT
        await pair.host.restart()
        with pytest.raises(ChannelClosed) as told:
            await asyncio.wait_for(dropped.receive(), 60)
        assert told.value.code is CloseCode.PEER_GONE
        assert "nothing is kept" in told.value.reason
        assert kept.close_code is None
        assert not got
        pair.port.plugged = True
        assert await eventually(lambda: got == [b"kept"])
