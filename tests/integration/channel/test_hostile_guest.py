# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hostile guest on its port, towards a real hub with the fence channel, beside an honest VM (S7)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.core.frames import MAGIC, FrameType, encode_frame
from fence_vmchannel.errors import CloseCode
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.links.chardev import ChardevConnector
from fence_vmchannel.messages import (
    FENCE_SERVICE,
    Announce,
    AnnounceAnswer,
    FenceAnswer,
    FenceCode,
    FenceGreeting,
    FenceRequest,
    PowerState,
    encode_message,
)
from fence_vmchannel.peers import HOST_PEER, PeerKind
from tests.fakes.hub_pair import HOST, VM, FakePort, eventually
from tests.fakes.raw_guest import RawGuest, opening
from vmchannel_host.fence_channel import MAX_CHANNELS, FenceChannels
from vmchannel_host.fencing.service import ProgressSink, Requester
from vmchannel_host.model import BootId, Port, PortName, ProcessIdentity, VmUuid
from vmchannel_host.vm_ports import VmPort

HONEST = replace(VM, name="vm2", key="0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")


class Answers:
    """A fence service that knows no VM."""

    def greeting(self, requester: Requester) -> FenceGreeting:
        return FenceGreeting("hv1", "host-boot", 1, requester.vm or "", requester.name)

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer:
        return FenceAnswer(
            request.request_id, False, FenceCode.UNKNOWN_PLUG, PowerState.UNKNOWN, "hv1", "no such VM"
        )

    async def announce(self, announce: Announce, requester: Requester) -> AnnounceAnswer:
        return AnnounceAnswer(True, "")

    def cancel(self, request_id: bytes, requester: Requester) -> bool:
        return False


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def trust(pid: int) -> None:
    """This process plays QEMU."""
    assert pid == os.getpid()


@dataclass
class Scene:
    """The hub under attack, the attacker's QEMU, and an honest VM's hub."""

    hub: Hub
    honest: Hub
    qemu: socket.socket
    refused: list[str] = field(default_factory=list[str])  # "fence" for each fence message that was refused

    async def guest(self) -> RawGuest:
        """The attacker, on the hub's next connection."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self.qemu)
        return RawGuest(*await asyncio.open_unix_connection(sock=sock))

    async def honest_is_served(self) -> None:
        """The other VM has its echo soon."""
        async with asyncio.timeout(5), await self.honest.open("", "org.example.echo") as channel:
            assert await channel.request(b"still here?") == b"still here?"


@contextlib.asynccontextmanager
async def scene(directory: Path) -> AsyncGenerator[Scene]:
    path = str(directory / "port.sock")
    qemu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    qemu.bind(path)
    qemu.listen(1)
    process = ProcessIdentity(1, 1, "/qemu", VmUuid(VM.key), BootId("host-boot"))
    port = VmPort(process, VM.name, Port(PortName(DEFAULT_PORT), path, guest_open=True))
    fake = FakePort()
    try:
        async with (
            Hub(PeerIdentity("host-boot", "host")) as hub,
            Hub(PeerIdentity("honest-boot", "honest"), default_peer=HOST_PEER) as honest,
        ):
            hub.offer("org.example.echo", echo)
            refused: list[str] = []
            channels = FenceChannels(Answers(), lambda _: None, lambda: refused.append("fence"))
            hub.offer(FENCE_SERVICE, channels.serve)
            hub.attach(replace(VM, kind=PeerKind.VM, info=port), ChardevConnector(path, trust))
            hub.attach(HONEST, fake.host)
            honest.attach(HOST, fake.guest, role=Role.GUEST)
            assert await eventually(lambda: honest.status().peers[0].connected)
            yield Scene(hub, honest, qemu, refused)
    finally:
        fake.close()
        qemu.close()


def code_of(payload: bytes) -> int:
    """The code of a CLOSE."""
    code: int = struct.unpack_from(">H", payload)[0]
    return code


@pytest.mark.parametrize("message", [b"", b"garbage", encode_message(AnnounceAnswer(True, ""))])
async def test_what_is_no_message_of_a_client_ends_its_fence_channel_and_is_counted(
    tmp_path: Path, message: bytes
) -> None:
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1)
        assert (await guest.answer(1)).type == FrameType.ACCEPT
        guest.send(FrameType.DATA, message, channel=1)
        assert code_of((await guest.expect(FrameType.CLOSE)).payload) == CloseCode.PROTOCOL
        assert stage.refused == ["fence"]
        await stage.honest_is_served()
        await guest.close()


async def test_a_guest_gets_so_many_fence_channels_and_a_closed_one_makes_room(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        for number in range(MAX_CHANNELS):
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=2 * number + 1)
            assert (await guest.answer(2 * number + 1)).type == FrameType.ACCEPT
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1_001)
        refused = await guest.answer(1_001)
        assert (refused.type, code_of(refused.payload)) == (FrameType.CLOSE, CloseCode.LIMIT)
        guest.send(FrameType.CLOSE, struct.pack(">H", CloseCode.NORMAL), channel=1)
        await asyncio.sleep(0.1)  # its handler ends
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=1_003)
        assert (await guest.answer(1_003)).type == FrameType.ACCEPT
        await stage.honest_is_served()
        await guest.close()


async def test_bad_messages_and_new_sessions_in_a_loop_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        for _ in range(8):  # as many as may be had at once
            await guest.greet()
        for number in range(1, 201, 2):
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=number)
            assert (await guest.answer(number)).type == FrameType.ACCEPT
            guest.send(FrameType.DATA, b"\xff\xff\x1b[2J\n", channel=number)
            assert code_of((await guest.answer(number)).payload) == CloseCode.PROTOCOL
        for number in range(201, 401, 2):
            guest.send(FrameType.OPEN, opening("no\nservice\x1b[2J"), channel=number)
            assert code_of((await guest.answer(number)).payload) == CloseCode.UNKNOWN_SERVICE
        await stage.honest_is_served()
        await guest.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) < 40
    assert not [line for line in lines if not line.isprintable()]


async def test_the_largest_and_the_strangest_messages_end_their_channel_only(tmp_path: Path) -> None:
    bombs = (
        b"",
        b"\0\1" + struct.pack(">HI", 999, 0) * 5_000,  # tiny unknown fields
        b"\0\3" + struct.pack(">HI", 10, 0) * 5_000,  # one tag again and again
        b"\0\3" + struct.pack(">HI", 11, 29_994) + struct.pack(">HI", 4, 29_988) + bytes(29_988),
        b"\0\1" + struct.pack(">HI", 1, 0xFFFF_FFFF),  # a length that lies
        b"\0\1" + struct.pack(">HI", 3, 3) + b"\xff\xfe\0",  # no UTF-8
        encode_message(AnnounceAnswer(True, "I am the host")),
    )
    async with scene(tmp_path) as stage:
        guest = await stage.guest()
        await guest.greet()
        for number, bomb in enumerate(bombs):
            channel = 2 * number + 1
            guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=channel)
            await guest.answer(channel)
            guest.send(FrameType.DATA, bomb, channel=channel)
            assert code_of((await guest.answer(channel)).payload) == CloseCode.PROTOCOL
        guest.send(FrameType.OPEN, opening(FENCE_SERVICE), channel=101)
        assert (await guest.answer(101)).type == FrameType.ACCEPT
        await guest.close()


GARBAGE = {
    "noise": random.Random(1).randbytes(400_000),
    "magics": MAGIC * 100_000,
    "half a frame": encode_frame(FrameType.DATA, bytes(65_536))[:-1],
    "knocks": encode_frame(FrameType.KNOCK) * 5_000,
    "another's session": encode_frame(FrameType.OPEN, opening("x"), channel=1, sequence=1, epoch=99) * 1_000,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_after_any_garbage_the_guest_can_greet_and_the_honest_vm_noticed_nothing(
    tmp_path: Path, garbage: bytes
) -> None:
    async with scene(tmp_path) as stage:
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(stage.qemu)
        with contextlib.suppress(ConnectionError):  # the hub has had enough
            await loop.sock_sendall(sock, garbage)
        await stage.honest_is_served()
        sock.close()
        guest = await stage.guest()
        await guest.greet()
        guest.send(FrameType.OPEN, opening("org.example.echo"), channel=1)
        assert (await guest.answer(1)).type == FrameType.ACCEPT
        await guest.close()
