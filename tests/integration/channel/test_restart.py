# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hubs that are stopped in order and begun again under load: every message once and in order, nobody is told
anything. And what is told when a session cannot go on."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.channel import Channel
from fence_vmchannel.client import Client
from fence_vmchannel.core.events import Limits
from fence_vmchannel.errors import ChannelClosed, CloseCode, SessionReset
from fence_vmchannel.hub.events import PeerConnected
from fence_vmchannel.hub.hub import boot_clock
from fence_vmchannel.hub.saved_hub import pack, unpack
from tests.fakes.hub_pair import VM, eventually, next_event
from tests.fakes.restarting_hubs import RestartingHub, RestartingPair, restarting_pair

LARGEST = 60_000
SERVICE = "org.example.work"


class Load:
    """Numbered messages of all sizes, in every channel both ways, until `enough`."""

    def __init__(self) -> None:
        self.enough = False
        self.received = 0

    async def both_ways(self, channel: Channel, seed: int) -> None:
        """Ends when both sides have said how many there were, and all have come."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(channel, random.Random(seed)))
            tasks.create_task(self._receive(channel))

    async def until(self, received: int) -> None:
        """Wait until more than so many messages have come."""
        assert await eventually(lambda: self.received > received)

    async def work(self, channel: Channel) -> None:
        """The service at the other end."""
        await self.both_ways(channel, 7)
        await channel.receive()  # until the opener closes

    async def _send(self, channel: Channel, rng: random.Random) -> None:
        number = 0
        while not self.enough:
            size = rng.choice((0, 100, 5_000, LARGEST))
            await channel.send(b"%d|" % number + bytes(rng.randrange(size + 1)))
            number += 1
            if rng.random() < 0.2:
                await asyncio.sleep(0)
        await channel.send(b"end %d|" % number)

    async def _receive(self, channel: Channel) -> None:
        """Fails on the first message that is missing, twice there or out of order."""
        number = 0
        while True:
            message = await channel.receive()
            assert message is not None
            head = message.partition(b"|")[0]
            if head.startswith(b"end "):
                assert head == b"end %d" % number
                return
            assert head == b"%d" % number
            number += 1
            self.received += 1


@asynccontextmanager
async def client_of(hub: RestartingHub) -> AsyncGenerator[Client]:
    async with connect(hub.path, resume_s=60) as client:
        yield client


def windows(pair: RestartingPair) -> list[int]:
    """What each hub's peer still holds back."""
    return [
        peer.endpoint.connection.unsent_bytes for one in (pair.guest, pair.host) for peer in one.hub.peers
    ]


@pytest.mark.parametrize("which", ["guest", "host", "both"])
async def test_restarts_under_load_lose_and_double_nothing(tmp_path: Path, which: str) -> None:
    """An application on each side, each with channels of its own and of the other side's."""
    load, rng = Load(), random.Random(which)

    async def restart(pair: RestartingPair) -> None:
        hubs = {"guest": [pair.guest], "host": [pair.host], "both": [pair.guest, pair.host]}[which]
        for hub in hubs:
            await hub.stop()
        for hub in rng.sample(hubs, len(hubs)):
            await hub.start()

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
        guest.offer(SERVICE, load.work),
        host.offer(SERVICE, load.work),
    ):
        channels = [await guest.open(SERVICE, timeout_s=10) for _ in range(2)]
        channels += [await host.open(f"{VM.name}/{SERVICE}", timeout_s=10) for _ in range(2)]
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for seed, channel in enumerate(channels):
                tasks.create_task(load.both_ways(channel, seed))
            for _ in range(6):
                await load.until(load.received + rng.randrange(50))
                await restart(pair)
            load.enough = True
        for channel in channels:
            channel.close()
        assert await eventually(lambda: not any(windows(pair)))


async def test_windows_are_right_after_a_restart(tmp_path: Path) -> None:
    """What the reader had not taken before counts on; what it takes gives credit again."""
    release = asyncio.Event()
    got = 0

    async def stall(channel: Channel) -> None:
        nonlocal got
        await channel.accept()
        await release.wait()
        while (message := await channel.receive()) is not None:
            assert int(message.partition(b"|")[0]) == got
            got += 1

    async def fill(channel: Channel) -> int:
        sent = 0
        while True:
            try:
                async with asyncio.timeout(0.5):
                    await channel.send(b"%d|" % sent + bytes(30_000))
            except TimeoutError:
                return sent
            sent += 1

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
        host.offer(SERVICE, stall),
    ):
        channel = await guest.open(SERVICE, timeout_s=10)
        sent = await fill(channel)
        assert 0 < sent * 30_000 <= Limits().window_bytes
        for hub in (pair.guest, pair.host):
            await hub.restart()
            assert await fill(channel) == 0
        release.set()
        for number in range(sent, sent + 50):
            await channel.send(b"%d|" % number + bytes(30_000))
        channel.close()
        assert await eventually(lambda: got == sent + 50)


async def test_an_offer_goes_on_after_a_restart_and_peers_find_it(tmp_path: Path) -> None:
    async def echo(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            await channel.send(message)

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
    ):
        async with host.offer(SERVICE, echo):
            await pair.host.restart()
            assert await guest.request(SERVICE, b"x", timeout_s=10) == b"x"
            await pair.host.restart()
            assert await guest.request(SERVICE, b"y", timeout_s=10) == b"y"
        with pytest.raises(ChannelClosed) as refused:  # and it ends as any other
            await guest.open(SERVICE, timeout_s=10)
        assert refused.value.code is CloseCode.UNKNOWN_SERVICE


async def test_a_killed_hub_is_a_session_reset_for_both_applications_and_then_service_again(
    tmp_path: Path,
) -> None:
    ends: list[CloseCode | None] = []
    asked = asyncio.Event()

    async def wait(channel: Channel) -> None:
        await channel.accept()
        try:
            while await channel.receive() is not None:
                asked.set()
        finally:
            ends.append(channel.close_code)

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
        host.offer(SERVICE, wait),
    ):
        for hub in (pair.guest, pair.host):
            ends.clear()
            asked.clear()
            channel = await guest.open(SERVICE, timeout_s=10)
            waiting = asyncio.create_task(guest.request(SERVICE, b"?", timeout_s=30))
            await asked.wait()
            await hub.forget()
            await channel.wait_closed()
            assert channel.close_code is CloseCode.SESSION_RESET
            with pytest.raises(SessionReset):
                await waiting
            assert await eventually(lambda: ends == [CloseCode.SESSION_RESET] * 2)
            assert await eventually(lambda: bool(pair.host.hub.status().services))


async def test_a_service_of_the_process_itself_ends_with_shutdown(tmp_path: Path) -> None:
    """Its handler dies with the process: whoever waits for it is told to ask again."""

    async def mute(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()

    async with restarting_pair(tmp_path) as pair, client_of(pair.guest) as guest:
        pair.host.hub.offer(SERVICE, mute)
        channel = await guest.open(SERVICE, timeout_s=10)
        await pair.host.restart()
        with pytest.raises(ChannelClosed, match="ask again") as closed:
            await channel.receive()
        assert closed.value.code is CloseCode.SHUTDOWN


async def test_a_session_is_of_one_process_behind_the_peer_only(tmp_path: Path) -> None:
    async def mute(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
        host.offer(SERVICE, mute),
    ):
        channel = await guest.open(SERVICE, timeout_s=10)
        pair.host.owner = "process 2"
        await pair.host.restart()
        await channel.wait_closed()
        assert channel.close_code is CloseCode.SESSION_RESET


async def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


async def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


async def open_to_others(path: Path) -> None:
    path.chmod(0o644)


async def by_another_name(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("harm", [damage, cut, open_to_others, by_another_name])
async def test_sessions_that_cannot_be_trusted_are_reset_with_a_line_in_the_log(
    tmp_path: Path, harm: Callable[[Path], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async with restarting_pair(tmp_path) as pair, client_of(pair.guest) as guest:
        with pair.host.hub.watch() as events:
            await next_event(events, "PeerConnected")
        await pair.guest.stop()
        await harm(pair.guest.sessions)
        await pair.guest.start()
        with pair.guest.hub.watch() as events:
            event = await next_event(events, "PeerConnected")
        assert isinstance(event, PeerConnected)
        assert not event.resumed
        assert "saved sessions are not resumed" in caplog.text
        assert (await guest.status()).software == "test guest"


async def test_a_session_that_was_left_out_ends_what_hung_on_it_and_nothing_else(tmp_path: Path) -> None:
    """The host's application is forgotten: its channels end on the other side too, others go on."""

    async def wait(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.guest) as guest,
        client_of(pair.host) as host,
        host.offer(SERVICE, wait),
        guest.offer("org.example.guest", wait),
    ):
        channel = await guest.open(SERVICE, timeout_s=10)
        session = pair.host.hub.status().peers[0].session
        await pair.host.stop()
        saved = unpack(pair.host.sessions.read_bytes(), boot_id="host-boot", now=boot_clock())
        kept = tuple(replace(one, session=b"") if one.kind == "local" else one for one in saved.endpoints)
        pair.host.sessions.write_bytes(pack(replace(saved, endpoints=kept)))
        await pair.host.start()
        await channel.wait_closed()
        assert channel.close_code is CloseCode.SESSION_RESET
        assert pair.host.hub.status().peers[0].session == session
        assert await eventually(lambda: bool(pair.host.hub.status().services))  # it offers again
        again = await guest.open(SERVICE, timeout_s=10)
        assert again.close_code is None


async def test_sessions_that_cannot_be_written_are_lost_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with restarting_pair(tmp_path) as pair, client_of(pair.guest) as guest:
        blocked = pair.guest.sessions.with_suffix(".sessions.new")
        blocked.mkdir()
        await pair.guest.stop()
        assert "sessions are lost" in caplog.text
        blocked.rmdir()
        await pair.guest.start()
        assert (await guest.status()).software == "test guest"


async def test_saved_sessions_are_gone_before_they_are_used(tmp_path: Path) -> None:
    async with restarting_pair(tmp_path) as pair:
        await pair.guest.stop()
        assert pair.guest.sessions.stat().st_mode & 0o777 == 0o600
        await pair.guest.start()
        assert not pair.guest.sessions.exists()
        assert await eventually(lambda: pair.guest.hub.status().peers[0].connected)


async def test_an_application_that_does_not_come_back_ends_its_channels(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def wait(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()
        assert channel.close_code is CloseCode.PEER_GONE
        ended.set()

    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.host) as host,
        host.offer(SERVICE, wait),
        connect(pair.guest.path, resume_s=0) as guest,
    ):
        await guest.open(SERVICE, timeout_s=10)
        await pair.guest.restart()
        pair.guest.hub.end_waiting()  # its time is over
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_client_without_asyncio_goes_on_too(tmp_path: Path) -> None:
    async def echo(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            await channel.send(message)

    def ask() -> None:
        deadline = time.monotonic() + 60
        with (
            BlockingClient.connect(pair.guest.path, deadline=deadline) as client,
            client.open(SERVICE, deadline=deadline) as channel,
        ):
            for number in range(300):
                text = b"%d" % number + bytes(number * 100)
                assert channel.request(text, deadline=deadline) == text
                loop.call_soon_threadsafe(progress.set)

    loop, progress = asyncio.get_running_loop(), asyncio.Event()
    async with (
        restarting_pair(tmp_path) as pair,
        client_of(pair.host) as host,
        host.offer(SERVICE, echo),
        asyncio.TaskGroup() as tasks,
    ):
        asking = tasks.create_task(asyncio.to_thread(ask))
        for hub in (pair.guest, pair.host, pair.guest):
            progress.clear()
            await progress.wait()
            await hub.restart()
            if asking.done():
                break


async def test_a_second_hub_does_not_take_the_sessions_of_the_first(tmp_path: Path) -> None:
    async with restarting_pair(tmp_path) as pair:
        second = RestartingHub(
            pair.guest.identity, tmp_path, pair.guest.role, pair.guest.peer, pair.guest.connector
        )
        with pytest.raises(Exception, match="another hub"):
            await second.start()
        assert os.path.exists(pair.guest.path)
