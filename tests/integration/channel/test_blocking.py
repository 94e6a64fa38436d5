# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client without asyncio: over a hub, and straight over a port."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
    LinkError,
    MessageTooLarge,
    PortBusy,
    PortNotFound,
    ServiceRefused,
)
from fence_vmchannel.hub.events import PeerConnected, PortAdded, Synced
from fence_vmchannel.hub.hub import Hub
from tests.fakes.fake_port import PtyPort, busy_opener
from tests.fakes.hub_pair import VM, hub_pair

_T = TypeVar("_T")
ROOT = Path(__file__).parents[3]


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


async def in_thread(call: Callable[[], _T]) -> _T:
    return await asyncio.to_thread(call)


def test_neither_the_package_nor_the_blocking_client_imports_asyncio() -> None:
    program = (
        "import sys\n"
        "import fence_vmchannel\n"
        "ours = [name for name in sys.modules if name.startswith('fence_vmchannel')]\n"
        "assert ours == ['fence_vmchannel'], ours\n"
        "heavy = {'asyncio', 'socket', 'dataclasses', 'logging', 'ssl'} & set(sys.modules)\n"
        "assert not heavy - before, heavy\n"
        "import fence_vmchannel.blocking\n"
        "assert fence_vmchannel.BlockingClient and fence_vmchannel.BlockingChannel\n"
        "assert fence_vmchannel.PortBusy and fence_vmchannel.CloseCode\n"
        "unused = {'asyncio', 'ssl', 'concurrent.futures', 'subprocess', 'fence_vmchannel.hub_events'}\n"
        "loaded = unused & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    program = "import sys\nbefore = set(sys.modules)\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_a_request_over_the_hub_is_answered(tmp_path: Path) -> None:
    def ask() -> bytes:
        with BlockingClient.connect(pair.guest_path, deadline=soon()) as client:
            return client.request("org.example.echo", b"hello", deadline=soon())

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        assert await in_thread(ask) == b"hello"


async def test_many_large_messages_pass_both_ways(tmp_path: Path) -> None:
    def ask() -> int:
        with (
            BlockingClient.connect(pair.guest_path, deadline=soon()) as client,
            client.open("org.example.echo", deadline=soon()) as channel,
        ):
            return sum(len(channel.request(bytes(200_000), deadline=soon(30))) for _ in range(20))

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        assert await in_thread(ask) == 4_000_000


async def test_refusals_and_misuse_have_their_own_errors(tmp_path: Path) -> None:
    def ask() -> None:
        with BlockingClient.connect(pair.guest_path, deadline=soon()) as client:
            with pytest.raises(ServiceRefused) as refused:
                client.open("org.example.nothing", deadline=soon())
            assert refused.value.code is CloseCode.UNKNOWN_SERVICE
            with client.open("org.example.echo", deadline=soon()) as channel:
                with pytest.raises(MessageTooLarge):
                    channel.send(bytes(1_000_000), deadline=soon())
                with pytest.raises(DeadlineExceeded):
                    channel.receive(deadline=soon(0.05))
                assert channel.request(b"still", deadline=soon()) == b"still"

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        await in_thread(ask)


async def test_the_service_closing_normally_is_the_end_of_messages(tmp_path: Path) -> None:
    async def two(channel: Channel) -> None:
        await channel.send(b"one")
        await channel.send(b"two")

    def ask() -> list[bytes | None]:
        with (
            BlockingClient.connect(pair.guest_path, deadline=soon()) as client,
            client.open("org.example.two", deadline=soon()) as channel,
        ):
            return [channel.receive(deadline=soon()) for _ in range(3)]

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.two", two)
        assert await in_thread(ask) == [b"one", b"two", None]


async def test_what_was_sent_before_close_arrives(tmp_path: Path) -> None:
    got: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def count(channel: Channel) -> None:
        size = 0
        while (message := await channel.receive()) is not None:
            size += len(message)
        got.set_result(size)

    def send() -> None:
        with (
            BlockingClient.connect(pair.guest_path, deadline=soon()) as client,
            client.open("org.example.count", deadline=soon()) as channel,
        ):
            for _ in range(20):
                channel.send(bytes(50_000), deadline=soon())

    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.count", count)
        await in_thread(send)
        async with asyncio.timeout(5):
            assert await got == 1_000_000


async def test_status_and_watch_tell_what_the_hub_knows(tmp_path: Path) -> None:
    def look() -> None:
        with BlockingClient.connect(pair.guest_path, deadline=soon()) as client:
            status = client.status(deadline=soon())
            assert status.software == "test guest"
            assert [peer.connected for peer in status.peers] == [True]
            with client.watch(deadline=soon()) as watch:
                seen = [type(watch.next(deadline=soon())) for _ in range(3)]
                assert seen == [PortAdded, PeerConnected, Synced]
                with pytest.raises(DeadlineExceeded):
                    watch.next(deadline=soon(0.05))

    async with hub_pair(tmp_path) as pair:
        await in_thread(look)


async def test_an_offered_service_is_reached_from_the_other_side(tmp_path: Path) -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()

    def serve() -> None:
        with (
            BlockingClient.connect(pair.guest_path, deadline=soon()) as client,
            client.offer("org.example.clip", deadline=soon()) as offer,
        ):
            loop.call_soon_threadsafe(ready.set)
            channel = offer.next(deadline=soon())
            assert (channel.peer.name, channel.payload) == ("host", b"p")
            message = channel.receive(deadline=soon())
            assert message == b"get"
            channel.send(b"text", deadline=soon())
            channel.close()

    async with hub_pair(tmp_path) as pair, asyncio.TaskGroup() as tasks:
        tasks.create_task(in_thread(serve))
        await ready.wait()
        async with await pair.host.open(VM.name, "org.example.clip", payload=b"p") as channel:
            assert await channel.request(b"get") == b"text"


def test_no_hub_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HubUnreachable, match="no hub answers"):
        BlockingClient.connect(str(tmp_path / "nothing"), deadline=soon())


async def test_a_hub_that_stops_ends_a_call_that_waits(tmp_path: Path) -> None:
    async def mute(channel: Channel) -> None:
        await channel.accept()
        loop.call_soon(waiting.set)
        await channel.wait_closed()

    def ask() -> None:
        with BlockingClient.connect(pair.guest_path, deadline=soon(), resume_s=0) as client:
            with pytest.raises(ChannelClosed) as closed:
                client.request("org.example.mute", b"?", deadline=soon())
            assert closed.value.code is CloseCode.PEER_GONE
            with pytest.raises(HubUnreachable):
                client.status(deadline=soon())

    loop, waiting = asyncio.get_running_loop(), asyncio.Event()
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.mute", mute)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(in_thread(ask))
            await waiting.wait()
            await pair.guest.stop()


# --- straight over a port ---


async def test_a_request_over_a_port_without_a_hub_is_answered(tmp_path: Path) -> None:
    def ask() -> list[bytes]:
        with BlockingClient.open_port(VM.port, deadline=soon(), paths=port.paths) as client:
            assert client.tick > 0
            return [client.request("org.example.echo", bytes(size), deadline=soon()) for size in (5, 100_000)]

    port = PtyPort(tmp_path, VM.port)
    try:
        async with Hub(PeerIdentity("host-boot", "host")) as host:
            host.offer("org.example.echo", echo)
            host.attach(VM, port)
            for _ in range(3):  # one client after the other; each is a session of its own
                assert await in_thread(ask) == [bytes(5), bytes(100_000)]
    finally:
        port.close()


def test_a_port_without_a_host_fails_in_time_without_spinning(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, VM.port)
    try:
        used = time.process_time()
        with pytest.raises(DeadlineExceeded, match=r"the host on port org\.vmchannel\.0"):
            BlockingClient.open_port(VM.port, deadline=soon(0.5), paths=port.paths)
        assert time.process_time() - used < 0.25
    finally:
        port.close()


def test_a_port_that_does_not_exist_is_reported_with_those_that_do(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, "org.other.0")
    try:
        with pytest.raises(PortNotFound, match=r"it has 'org\.other\.0'"):
            BlockingClient.open_port(VM.port, deadline=soon(), paths=port.paths)
    finally:
        port.close()


def test_a_port_that_stays_busy_is_reported_with_its_holder_at_the_deadline(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, VM.port)
    try:
        began = time.monotonic()
        with pytest.raises(PortBusy, match=f"held by pid {os.getpid()}"):
            BlockingClient.open_port(
                VM.port, deadline=soon(0.2), paths=replace(port.paths, open=busy_opener())
            )
        assert time.monotonic() - began >= 0.2
    finally:
        port.close()


def test_a_port_that_may_not_be_opened_is_reported_at_once(tmp_path: Path) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    port = PtyPort(tmp_path, VM.port)
    try:
        with pytest.raises(LinkError, match="Permission denied"):
            BlockingClient.open_port(VM.port, deadline=soon(), paths=replace(port.paths, open=refuse))
    finally:
        port.close()
