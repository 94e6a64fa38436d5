# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hubs with real unix sockets and a socket pair as the port: what applications on either side can do."""

from __future__ import annotations

from pathlib import Path

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from tests.fakes.hub_pair import hub_pair


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def test_a_guest_application_gets_an_answer_from_a_host_service(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with connect(pair.guest_path) as client:
            assert await client.request("org.example.echo", b"hello", timeout_s=5) == b"hello"
