# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hub counts what it refuses, and says how full its queues are."""

from __future__ import annotations

from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.tally import Refusal
from fence_vmchannel.errors import ChannelError, ServiceRefused
from tests.fakes.hub_pair import eventually, hub_pair
from tests.fakes.raw_guest import RawGuest


async def stalls(channel: Channel) -> None:
    await channel.accept()
    await channel.wait_closed()


async def test_a_service_that_is_not_offered_is_counted_where_it_was_refused(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        with pytest.raises(ServiceRefused):
            await client.open("org.example.none", timeout_s=5)
        assert (pair.host.refused, pair.guest.refused) == ({Refusal.SERVICE: 1}, {})


async def test_a_client_too_many_is_counted(tmp_path: Path) -> None:
    async with hub_pair(tmp_path, max_clients=1) as pair:
        pair.host.offer("org.example.stalls", stalls)
        async with connect(pair.guest_path) as client, await client.open("org.example.stalls", timeout_s=5):
            with pytest.raises(ChannelError):
                async with connect(pair.guest_path) as other:
                    await other.open("org.example.stalls", timeout_s=5)
        assert pair.guest.refused[Refusal.CLIENT_LIMIT] >= 1


async def test_garbage_of_a_local_application_is_counted(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        noisy = await RawGuest.connect(pair.guest_path)
        await noisy.greet()
        noisy.write(b"\0garbage\0")
        assert await eventually(lambda: pair.guest.refused == {Refusal.GARBAGE: 1})
        await noisy.close()


async def test_a_reader_that_stalls_shows_as_a_full_channel_until_it_goes(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.stalls", stalls)
        async with connect(pair.guest_path) as client:
            channel = await client.open("org.example.stalls", timeout_s=5)
            assert (pair.host.load().full_in, pair.guest.load().full_out) == (0, 0)
            for _ in range(8):
                await channel.send(bytes(30_000))
            assert await eventually(lambda: pair.host.load().full_in == 1)
            assert await eventually(lambda: pair.guest.load().full_out == 1)
            channel.close()
        assert await eventually(lambda: pair.host.load().full_in == 0)
        assert not pair.host.refused
