# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hostile local user of a guest's hub: he cannot keep a fence from the host, nor use the hub up."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.frames import FrameType
from fence_vmchannel.errors import ServiceRefused
from fence_vmchannel.hub.applications import MAX_OFFERS, MAX_QUERIES
from fence_vmchannel.hub.local_protocol import OfferQuery, StatusQuery, WatchQuery, encode_local
from fence_vmchannel.messages import FENCE_SERVICE
from tests.fakes.hub_pair import eventually, hub_pair
from tests.fakes.raw_guest import RawGuest, opening


async def mute(channel: Channel) -> None:
    await channel.accept()
    await channel.wait_closed()


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def test_whoever_takes_all_channels_to_the_host_cannot_keep_the_fence_out(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, AsyncExitStack() as hogs:
        pair.host.offer("org.example.mute", mute)
        pair.host.offer(FENCE_SERVICE, echo)
        refused = False
        while not refused:
            client = await hogs.enter_async_context(connect(pair.guest_path))
            for _ in range(100):
                try:
                    await client.open("org.example.mute", timeout_s=10)
                except ServiceRefused:
                    refused = True
                    break
        async with connect(pair.guest_path) as agent:
            assert await agent.request(FENCE_SERVICE, b"off", timeout_s=5) == b"off"


async def test_an_application_has_so_many_queries_and_offers_open_and_no_more(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        greedy = await RawGuest.connect(pair.guest_path)
        await greedy.greet()
        number = 1
        for most, query in ((MAX_QUERIES, WatchQuery()), (MAX_OFFERS, None)):
            for taken in range(most + 1):
                payload = encode_local(query or OfferQuery(f"org.example.s{taken}"))
                greedy.send(FrameType.OPEN, opening(".hub", 100_000, payload), channel=number)
                told = await greedy.answer(number)
                assert (told.type == FrameType.ACCEPT) == (taken < most)
                number += 2
        other = await RawGuest.connect(pair.guest_path)
        await other.greet()
        other.send(FrameType.OPEN, opening(".hub", 100_000, encode_local(StatusQuery())), channel=1)
        assert (await other.answer(1)).type == FrameType.ACCEPT
        await greedy.close()
        await other.close()


async def test_what_an_application_wrote_before_it_left_is_read_to_the_end(tmp_path: Path) -> None:
    """More than one turn's worth, and nobody there any more who would take the acknowledgement."""
    got: list[int] = []

    async def count(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            got.append(len(message))

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.count", count)
        hasty = await RawGuest.connect(pair.guest_path)
        await hasty.greet()
        hasty.send(FrameType.OPEN, opening("org.example.count"), channel=1)
        assert (await hasty.answer(1)).type == FrameType.ACCEPT
        for _ in range(5):
            hasty.send(FrameType.DATA, bytes(32_768), channel=1)
        await hasty.close()
        assert await eventually(lambda: got == 5 * [32_768])
