# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hubs with real unix sockets and a socket pair as the port: what applications on either side can do."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import Limits
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    MessageTooLarge,
    ServiceRefused,
)
from fence_vmchannel.hub.events import (
    HubEvent,
    PeerConnected,
    PeerDisconnected,
    PortAdded,
    ServiceOffered,
    ServiceWithdrawn,
    Synced,
)
from tests.fakes.hub_pair import VM, hub_pair, next_event

MIB = 1 << 20


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def read_all(events: AsyncIterator[HubEvent]) -> None:
    async with asyncio.timeout(5):
        async for _ in events:
            pass


async def test_a_guest_application_gets_an_answer_from_a_host_service(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with connect(pair.guest_path) as client:
            assert await client.request("org.example.echo", b"hello", timeout_s=5) == b"hello"


async def test_a_service_knows_who_asks_by_the_port_and_greets_him(tmp_path: Path) -> None:
    async def who(channel: Channel) -> None:
        await channel.accept(b"welcome " + channel.payload)
        await channel.send(f"{channel.peer.name} {channel.peer.key}".encode())

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.who", who)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.who", payload=b"me", timeout_s=5) as channel,
        ):
            assert channel.greeting == b"welcome me"
            assert await channel.receive() == f"{VM.name} {VM.key}".encode()


async def test_twenty_clients_at_once_are_served(tmp_path: Path) -> None:
    async def one(path: str, number: int) -> None:
        async with connect(path) as client, await client.open("org.example.echo", timeout_s=20) as channel:
            for turn in range(20):
                text = f"{number}.{turn}".encode()
                assert await channel.request(text) == text

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(one(pair.guest_path, number))


async def test_large_transfers_both_ways_arrive_whole_and_in_bounded_memory(tmp_path: Path) -> None:
    """16 MiB each way at once; no hub ever holds more than the windows allow."""
    size, piece = 16 * MIB, 60_000
    down = random.Random(1).randbytes(size)
    up = random.Random(2).randbytes(size)
    received_up = hashlib.sha256()

    async def both_ways(channel: Channel) -> None:
        async def read() -> None:
            got = 0
            while got < size:
                message = await channel.receive()
                assert message is not None
                received_up.update(message)
                got += len(message)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            tasks.create_task(write(channel, down, piece))

    async def write(channel: Channel, data: bytes, step: int) -> None:
        for at in range(0, len(data), step):
            await channel.send(data[at : at + step])
            held.append(
                max(
                    peer.endpoint.connection.unsent_bytes
                    for hub in (pair.guest, pair.host)
                    for peer in hub.peers
                )
            )

    held: list[int] = []
    received_down = hashlib.sha256()
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.bulk", both_ways)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.bulk", timeout_s=5) as channel,
        ):
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(write(channel, up, piece))
                got = 0
                while got < size:
                    message = await channel.receive()
                    assert message is not None
                    received_down.update(message)
                    got += len(message)
                await writer
            await channel.receive()  # the service has read everything too, and closes
    assert received_down.digest() == hashlib.sha256(down).digest()
    assert received_up.digest() == hashlib.sha256(up).digest()
    assert max(held) <= 2 * Limits().window_bytes


async def test_a_reader_that_stalls_stops_only_its_own_writer(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def stall(channel: Channel) -> None:
        await channel.accept()
        await release.wait()

    async def fill(channel: Channel) -> None:
        while True:
            await channel.send(bytes(30_000))

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.stall", stall)
        pair.host.offer("org.example.echo", echo)
        async with connect(pair.guest_path) as client, connect(pair.guest_path) as other:
            stalled = await client.open("org.example.stall", timeout_s=5)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await fill(stalled)
            for _ in range(50):  # the same client, and another one
                assert await client.request("org.example.echo", bytes(20_000), timeout_s=5)
                assert await other.request("org.example.echo", bytes(20_000), timeout_s=5)
            held = max(peer.endpoint.connection.unsent_bytes for peer in pair.guest.peers)
            assert held <= 2 * Limits().window_bytes
            release.set()
            stalled.close()


async def test_a_message_that_the_window_never_takes_is_refused_at_once(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.echo", timeout_s=5) as channel,
        ):
            with pytest.raises(MessageTooLarge):
                await channel.send(bytes(Limits().window_bytes))
            assert await channel.request(bytes(200_000)) == bytes(200_000)


async def test_empty_messages_arrive_and_are_bounded_like_others(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.echo", timeout_s=5) as channel,
        ):
            for _ in range(50):
                assert await channel.request(b"") == b""


async def test_connection_and_disconnection_are_seen_on_both_sides_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.echo", timeout_s=5) as channel,
        ):
            with pair.guest.watch() as guest_events, pair.host.watch() as host_events:
                for turn in range(5):
                    pair.port.cut()
                    await channel.send(b"%d" % turn)
                    for events in (guest_events, host_events):
                        assert isinstance(await next_event(events, "PeerDisconnected"), PeerDisconnected)
                        back = await next_event(events, "PeerConnected")
                        assert isinstance(back, PeerConnected)
                        assert back.resumed
                    assert await channel.receive() == b"%d" % turn


async def test_a_guest_that_closed_its_port_is_seen_by_the_host_before_any_time_out(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        with pair.host.watch() as events:
            pair.host.guest_closed(VM)
            event = await next_event(events, "PeerDisconnected")
            assert isinstance(event, PeerDisconnected)
            assert event.reason == "the guest has closed the port"
            await next_event(events, "PeerConnected")  # this guest is still there, and greets again


async def test_an_unknown_service_is_refused_by_name(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        with pytest.raises(ServiceRefused, match=r"nobody offers 'org\.example\.nothing'") as refused:
            await client.open("org.example.nothing", timeout_s=5)
        assert refused.value.code is CloseCode.UNKNOWN_SERVICE


async def test_a_port_that_this_machine_lacks_is_refused_with_those_that_it_has(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        with pytest.raises(ServiceRefused, match=r"it has 'org\.vmchannel\.0'") as refused:
            await client.open("org.vmchannel.7:org.example.echo", timeout_s=5)
        assert refused.value.code is CloseCode.PEER_GONE


async def test_an_unknown_vm_is_refused(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.host_path) as client:
        with pytest.raises(ServiceRefused, match="no peer 'vm9'"):
            await client.open("vm9/org.example.echo", timeout_s=5)


async def test_a_malformed_address_is_refused_and_the_client_goes_on(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        with pytest.raises(ServiceRefused, match="no service name"):
            await client.open("not a name", timeout_s=5)
        assert (await client.status()).software == "test guest"


async def test_a_peer_does_not_reach_the_hub_itself(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        endpoint = next(iter(pair.guest.peers)).endpoint
        with pytest.raises(ServiceRefused, match=r"nobody offers '\.hub'"):
            await Channel.opened(endpoint, endpoint.peer, ".hub")
        assert client is not None


async def test_a_client_that_opens_too_many_channels_is_refused_and_keeps_those_it_has(
    tmp_path: Path,
) -> None:
    async with hub_pair(tmp_path, limits=Limits(channels=8)) as pair:
        pair.host.offer("org.example.echo", echo)
        async with connect(pair.guest_path) as client:
            channels = [await client.open("org.example.echo", timeout_s=5) for _ in range(8)]
            with pytest.raises(ServiceRefused) as refused:
                await client.open("org.example.echo", timeout_s=5)
            assert refused.value.code is CloseCode.LIMIT
            for channel in channels:
                assert await channel.request(b"still here") == b"still here"


async def test_a_client_over_the_limit_is_turned_away_and_the_others_stay(tmp_path: Path) -> None:
    async with hub_pair(tmp_path, max_clients=3) as pair:
        pair.host.offer("org.example.echo", echo)
        async with connect(pair.guest_path) as client, connect(pair.guest_path), connect(pair.guest_path):
            with pytest.raises(HubUnreachable):
                async with connect(pair.guest_path):
                    pass
            assert await client.request("org.example.echo", b"x", timeout_s=5) == b"x"


async def test_a_service_of_a_guest_application_is_reached_from_the_host(tmp_path: Path) -> None:
    async def clipboard(channel: Channel) -> None:
        assert channel.payload == b"get"
        await channel.send(f"text for {channel.peer.name}".encode())

    async with (
        hub_pair(tmp_path) as pair,
        connect(pair.guest_path) as application,
        application.offer("org.example.clipboard", clipboard),
    ):
        async with connect(pair.host_path) as client:
            for vm in (VM.name, VM.key):
                address = f"{vm}/org.example.clipboard"
                async with await client.open(address, payload=b"get", timeout_s=5) as channel:
                    assert await channel.receive() == b"text for host"
                    assert await channel.receive() is None
        async with await pair.host.open(VM.name, "org.example.clipboard", payload=b"get") as channel:
            assert await channel.receive() == b"text for host"


async def test_a_service_is_offered_once_and_ends_with_its_application(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as second:
        with pair.guest.watch() as events:
            async with connect(pair.guest_path) as first, first.offer("org.example.one", echo):
                await next_event(events, "ServiceOffered")
                with pytest.raises(ServiceRefused, match="offered already"):
                    async with second.offer("org.example.one", echo):
                        pass
                await first.stop()  # as if the application had died
                await next_event(events, "ServiceWithdrawn")
            async with (
                second.offer("org.example.one", echo),
                await pair.host.open(VM.name, "org.example.one") as channel,
            ):
                assert await channel.request(b"x") == b"x"


async def test_an_application_that_dies_closes_its_channels_on_the_other_side(tmp_path: Path) -> None:
    ended: asyncio.Future[CloseCode] = asyncio.get_running_loop().create_future()

    async def wait_for_end(channel: Channel) -> None:
        await channel.accept()
        try:
            await channel.receive()
        except ChannelClosed as error:
            ended.set_result(error.code)

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.wait", wait_for_end)
        async with connect(pair.guest_path) as client:
            await client.open("org.example.wait", timeout_s=5)
            await client.stop()
            async with asyncio.timeout(5):
                assert await ended is CloseCode.PEER_GONE


async def test_what_a_client_sent_before_it_left_arrives(tmp_path: Path) -> None:
    got: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def count(channel: Channel) -> None:
        size = 0
        while (message := await channel.receive()) is not None:
            size += len(message)
        got.set_result(size)

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.count", count)
        async with (
            connect(pair.guest_path) as client,
            await client.open("org.example.count", timeout_s=5) as channel,
        ):
            for _ in range(20):
                await channel.send(bytes(50_000))
        async with asyncio.timeout(5):
            assert await got == 1_000_000


async def test_a_service_that_fails_says_so_and_hurts_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(channel: Channel) -> None:
        raise ZeroDivisionError("a bug")

    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.fail", fail)
        pair.host.offer("org.example.echo", echo)
        with pytest.raises(ServiceRefused) as refused:
            await client.open("org.example.fail", timeout_s=5)
        assert refused.value.code is CloseCode.INTERNAL
        assert "ZeroDivisionError" in caplog.text
        assert await client.request("org.example.echo", b"x", timeout_s=5) == b"x"


async def test_a_service_refuses_with_its_own_code_and_words(tmp_path: Path) -> None:
    async def refuse(channel: Channel) -> None:
        raise ServiceRefused(CloseCode.NOT_PERMITTED, "rule 7 says no")

    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.refuse", refuse)
        with pytest.raises(ServiceRefused, match="rule 7 says no") as refused:
            await client.open("org.example.refuse", timeout_s=5)
        assert refused.value.code is CloseCode.NOT_PERMITTED


async def test_a_request_without_an_answer_ends_with_its_time_out_and_closes_its_channel(
    tmp_path: Path,
) -> None:
    closed = asyncio.Event()

    async def mute(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()
        closed.set()

    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.mute", mute)
        with pytest.raises(DeadlineExceeded):
            await client.request("org.example.mute", b"?", timeout_s=0.1)
        async with asyncio.timeout(5):
            await closed.wait()


async def test_a_channel_opened_while_the_peer_is_away_waits_for_it(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.host.offer("org.example.echo", echo)
        pair.port.plugged = False
        with pair.guest.watch() as events:
            pair.port.cut()
            await next_event(events, "PeerDisconnected")
            async with asyncio.TaskGroup() as tasks:
                request = tasks.create_task(client.request("org.example.echo", b"x", timeout_s=10))
                await asyncio.sleep(0.05)
                assert not request.done()
                pair.port.plugged = True
            assert request.result() == b"x"


async def test_the_hub_stopping_ends_clients_channels_with_shutdown(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path, resume_s=0) as client:
        async with client.watch() as events:
            await pair.guest.stop()
            with pytest.raises(ChannelClosed):
                await read_all(events)
        with pytest.raises(HubUnreachable):
            await client.status()


async def test_a_watch_begins_with_what_is_there_and_goes_on_with_changes(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.guest_path) as client:
        pair.guest.offer("org.example.a", echo)
        async with client.watch() as events:
            seen: list[HubEvent] = []
            async with asyncio.timeout(5):
                async for event in events:
                    seen.append(event)
                    if event == Synced():
                        break
                assert [type(event) for event in seen] == [PortAdded, PeerConnected, ServiceOffered, Synced]
                pair.guest.withdraw("org.example.a")
                assert await anext(events) == ServiceWithdrawn("org.example.a")
                pair.port.cut()
                assert isinstance(await anext(events), PeerDisconnected)
                assert isinstance(await anext(events), PeerConnected)


async def test_status_tells_of_peers_and_services(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair, connect(pair.host_path) as client:
        pair.host.offer("org.example.a", echo)
        status = await client.status()
        assert (status.software, status.boot_id) == ("test host", "host-boot")
        assert status.services == (ServiceOffered("org.example.a", "hub"),)
        (peer,) = status.peers
        assert (peer.peer, peer.key, peer.port, peer.connected) == (VM.name, VM.key, VM.port, True)
        assert peer.software == "test guest"
        assert peer.received_bytes > 0


async def test_a_detached_peer_is_gone_for_its_users(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.guest.offer("org.example.echo", echo)
        with pair.host.watch() as events:
            channel = await pair.host.open(VM.name, "org.example.echo")
            pair.host.detach(VM)
            with pytest.raises(ChannelClosed) as closed:
                await channel.receive()
            assert closed.value.code is CloseCode.PEER_GONE
            await next_event(events, "PortRemoved")
            with pytest.raises(ServiceRefused):
                await pair.host.open(VM.name, "org.example.echo")
