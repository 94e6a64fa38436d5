# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's and a host's hub in one process that can each be stopped and begun again, as by an upgrade."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.hub.peer_table import Connector
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.peers import HOST_PEER, PeerInfo
from tests.fakes.hub_pair import HOST, VM, FakePort


@dataclass
class RestartingHub:
    """One hub after the other, with one socket, one file of sessions and one peer."""

    identity: PeerIdentity
    folder: Path
    role: Role
    peer: PeerInfo
    connector: Connector
    owner: str = "process 1"
    terms: PeerTerms = field(default_factory=PeerTerms)  # of the peer, for the next start
    hub: Hub = field(init=False)
    _scope: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def path(self) -> str:
        """Where applications connect."""
        return str(self.folder / f"{self.role.value}.sock")

    @property
    def sessions(self) -> Path:
        """The file of sessions."""
        return self.folder / f"{self.role.value}.sessions"

    async def start(self) -> None:
        """Begin, as the process does: sessions first, then the peer, then applications."""
        default_peer = HOST_PEER if self.role is Role.GUEST else ""
        self.hub = Hub(self.identity, default_peer=default_peer, sessions=str(self.sessions))
        await self._scope.enter_async_context(self.hub)
        self.hub.attach(self.peer, self.connector, role=self.role, terms=self.terms, owner=self.owner)
        self.hub.serve(self.path)

    async def stop(self) -> None:
        """Stop in order: sessions are saved."""
        await self._scope.aclose()

    async def restart(self) -> None:
        """As by an upgrade."""
        await self.stop()
        await self.start()

    async def forget(self) -> None:
        """As if the process had been killed: nothing was saved."""
        await self.stop()
        self.sessions.unlink()
        await self.start()


@dataclass(frozen=True)
class RestartingPair:
    """Both, joined by a port."""

    guest: RestartingHub
    host: RestartingHub
    port: FakePort


@contextlib.asynccontextmanager
async def restarting_pair(folder: Path) -> AsyncGenerator[RestartingPair]:
    """Run both."""
    port = FakePort()
    guest = RestartingHub(PeerIdentity("guest-boot", "test guest"), folder, Role.GUEST, HOST, port.guest)
    host = RestartingHub(PeerIdentity("host-boot", "test host"), folder, Role.HOST, VM, port.host)
    try:
        await host.start()
        await guest.start()
        yield RestartingPair(guest, host, port)
    finally:
        await guest.stop()
        await host.stop()
        port.close()
