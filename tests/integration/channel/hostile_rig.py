# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's hub under attack by one guest on a real socket, beside an honest VM whose records are counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path

from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import Limits, PeerIdentity, Role
from fence_vmchannel.core.greeting import NO_SESSION
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.hub.terms import PeerTerms
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
)
from fence_vmchannel.pace import Pace
from fence_vmchannel.peers import HOST_PEER, PeerInfo, PeerKind
from tests.fakes.hub_pair import HOST, VM, FakePort, eventually
from tests.fakes.raw_guest import RawGuest
from vmchannel_host.fence_channel import FenceChannels
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.service import ProgressSink
from vmchannel_host.model import BootId, Port, PortName, ProcessIdentity, VmUuid
from vmchannel_host.vm_ports import VmPort

ENDLESS = Pace(1e9, time.monotonic)
HONEST = replace(VM, name="vm2", key="0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")


class Answers:
    """A fence service that knows no VM, and remembers who asked what."""

    def __init__(self) -> None:
        self.asked: list[tuple[FenceRequest | Announce, Requester]] = []

    def greeting(self, requester: Requester) -> FenceGreeting:
        return FenceGreeting("hv1", "host-boot", 1, requester.vm or "", requester.name)

    async def answer(
        self, request: FenceRequest, requester: Requester, progress: ProgressSink | None = None
    ) -> FenceAnswer:
        self.asked.append((request, requester))
        return FenceAnswer(
            request.request_id, False, FenceCode.UNKNOWN_PLUG, PowerState.UNKNOWN, "hv1", "no such VM"
        )

    async def announce(self, announce: Announce, requester: Requester) -> AnnounceAnswer:
        self.asked.append((announce, requester))
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
    service: Answers
    attacker: PeerInfo
    refused: list[str]  # "fence" for each fence message that was refused
    echoed: int = 0  # of the honest VM, since `undisturbed` began

    async def socket(self) -> socket.socket:
        """The attacker's end of the hub's next connection."""
        async with asyncio.timeout(10):
            sock, _ = await asyncio.get_running_loop().sock_accept(self.qemu)
        return sock

    async def guest(self) -> RawGuest:
        """The attacker, on the hub's next connection."""
        return RawGuest(*await asyncio.open_unix_connection(sock=await self.socket()))

    @property
    def attacked(self) -> Connection:
        """The hub's connection to the attacker."""
        peer = self.hub.peers.get(self.attacker)
        assert peer is not None
        return peer.endpoint.connection

    @property
    def honest_session(self) -> bytes:
        """The id of the honest VM's session, as the hub has it."""
        peer = self.hub.peers.get(HONEST)
        assert peer is not None
        return peer.endpoint.connection.session_id

    @contextlib.asynccontextmanager
    async def undisturbed(self) -> AsyncGenerator[None]:
        """The honest VM sends numbered records throughout; each must come back once, in order, in the
        same session.
        """
        session, done = self.honest_session, asyncio.Event()
        self.echoed = 0

        async def work() -> None:
            async with await self.honest.open("", "org.example.echo") as channel:
                while not done.is_set() or self.echoed < 20:
                    record = b"%d" % self.echoed
                    assert await channel.request(record) == record
                    self.echoed += 1
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work(), name="honest records")
            try:
                yield
            finally:
                done.set()
        assert self.honest_session == session, "its session has nothing to do with the attack"

    async def honest_is_served(self) -> None:
        """The other VM has its echo soon."""
        async with asyncio.timeout(5), await self.honest.open("", "org.example.echo") as channel:
            assert await channel.request(b"still here?") == b"still here?"


@contextlib.asynccontextmanager
async def scene(
    directory: Path,
    *,
    name: str = VM.name,
    limits: Limits | None = None,
    pace: Pace | None = None,
    opening: Pace | None = None,
) -> AsyncGenerator[Scene]:
    """The hub, the honest VM's hub connected to it, and the attacker's VM, which is called `name`."""
    path = str(directory / "port.sock")
    qemu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    qemu.bind(path)
    qemu.listen(1)
    process = ProcessIdentity(1, 1, "/qemu", VmUuid(VM.key), BootId("host-boot"))
    port = VmPort(process, name, Port(PortName(DEFAULT_PORT), path, guest_open=True))
    fake, service = FakePort(), Answers()
    attacker = replace(VM, name=name, kind=PeerKind.VM, info=port)
    try:
        async with (
            Hub(
                PeerIdentity("host-boot", "host"), terms=PeerTerms(limits or Limits()), opening=opening
            ) as hub,
            Hub(PeerIdentity("honest-boot", "honest"), default_peer=HOST_PEER) as honest,
        ):
            hub.offer("org.example.echo", echo)
            refused: list[str] = []
            channels = FenceChannels(
                service, lambda _: None, pace or ENDLESS, lambda: refused.append("fence")
            )
            hub.offer(FENCE_SERVICE, channels.serve)
            hub.attach(attacker, ChardevConnector(path, trust))
            hub.attach(HONEST, fake.host)
            honest.attach(HOST, fake.guest, role=Role.GUEST)
            assert await eventually(lambda: honest.status().peers[0].connected)
            stage = Scene(hub, honest, qemu, service, attacker, refused)
            assert await eventually(lambda: stage.honest_session != NO_SESSION)  # the host is sure of it too
            yield stage
    finally:
        fake.close()
        qemu.close()


def code_of(payload: bytes) -> int:
    """The code of a CLOSE."""
    code: int = struct.unpack_from(">H", payload)[0]
    return code
