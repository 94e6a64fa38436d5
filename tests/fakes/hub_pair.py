# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's hub and a host's hub in one process, joined by a socket pair that plays the port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from fence_vmchannel.access import AccessRules
from fence_vmchannel.addresses import DEFAULT_PORT
from fence_vmchannel.core.events import Limits, PeerIdentity, Role
from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.events import HubEvent
from fence_vmchannel.hub.hub import LOCAL_LIMITS, Hub
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.hub.watch import Watch
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.stream import SocketLink
from fence_vmchannel.peers import HOST_PEER, PeerInfo, PeerKind

VM = PeerInfo("vm1", PeerKind.VM, DEFAULT_PORT, "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
HOST = PeerInfo(HOST_PEER, PeerKind.HOST, DEFAULT_PORT)


class FakePort:
    """Plays one port: whenever both ends ask for a link they get a fresh socket pair; `cut` drops the present
    one.
    """

    def __init__(self) -> None:
        self.guest = FakePortEnd(self)
        self.host = FakePortEnd(self)
        self.plugged = True
        self._waiting: dict[FakePortEnd, socket.socket] = {}
        self._live: list[socket.socket] = []

    def take(self, end: FakePortEnd) -> socket.socket:
        """The socket for one end; the other end gets its partner."""
        if not self.plugged:
            raise LinkError("the port is unplugged")
        if end in self._waiting:
            return self._waiting.pop(end)
        self.cut()  # an end that asks has lost what it had; the other one notices now
        mine, others = socket.socketpair()
        other = self.host if end is self.guest else self.guest
        self._waiting[other] = others
        self._live.append(mine.dup())
        return mine

    def cut(self) -> None:
        """Drop what connects the two ends; they may ask for links again."""
        for live in self._live:
            with contextlib.suppress(OSError):
                live.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Free all descriptors."""
        for sock in (*self._live, *self._waiting.values()):
            sock.close()
        self._live.clear()
        self._waiting.clear()


class FakePortEnd:
    """A `Connector`."""

    def __init__(self, port: FakePort) -> None:
        self._port = port

    async def connect(self) -> Link:
        """See `Connector`."""
        return SocketLink(self._port.take(self), "fake port")


@dataclass(frozen=True)
class HubPair:
    """Two hubs, their port, and where local applications of either connect."""

    guest: Hub
    host: Hub
    port: FakePort
    guest_path: str
    host_path: str


@contextlib.asynccontextmanager
async def hub_pair(
    directory: Path,
    *,
    guest_access: AccessRules | None = None,
    max_clients: int = 256,
    limits: Limits | None = None,
    terms: PeerTerms | None = None,
    guest_terms: PeerTerms | None = None,
    local_limits: Limits = LOCAL_LIMITS,
    mode: int = 0o660,
) -> AsyncGenerator[HubPair]:
    """Run both hubs, connected. `terms` are those of both, else `limits`; `guest_terms` the guest's."""
    port = FakePort()
    terms = terms or PeerTerms(limits or Limits())
    guest = Hub(
        PeerIdentity("guest-boot", "test guest"),
        access=guest_access or AccessRules(),
        default_peer=HOST_PEER,
        max_clients=max_clients,
        terms=guest_terms or terms,
        local_limits=local_limits,
    )
    host = Hub(PeerIdentity("host-boot", "test host"), terms=terms, local_limits=local_limits)
    try:
        async with host, guest:
            pair = HubPair(guest, host, port, str(directory / "guest.sock"), str(directory / "host.sock"))
            guest.serve(pair.guest_path, mode=mode)
            host.serve(pair.host_path)
            with guest.watch() as guest_events, host.watch() as host_events:
                host.attach(VM, port.host)
                guest.attach(HOST, port.guest, role=Role.GUEST)
                await next_event(guest_events, "PeerConnected")
                await next_event(host_events, "PeerConnected")
            yield pair
    finally:
        port.close()


async def next_event(events: Watch, kind: str) -> HubEvent:
    """The next event of that class; others are skipped. Fails after 10 s."""
    async with asyncio.timeout(10):
        async for event in events:
            if type(event).__name__ == kind:
                return event
    raise AssertionError(f"the watch ended without {kind}")


async def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within 5 s."""
    for _ in range(500):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False
