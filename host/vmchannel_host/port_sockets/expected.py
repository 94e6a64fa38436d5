# SPDX-License-Identifier: LGPL-2.1-or-later
"""A port's connection that is waited for: what the hub has in place of a connector."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.stream import SocketLink
from vmchannel_host.model import PortName, ProcessIdentity, VmUuid

PATIENCE_S: Final = 5.0
"""How long QEMU may take to connect before that is told, seconds. It tries once a second with reconnect=1."""

Verify = Callable[[int], None]
"""Checks that a process id is the QEMU that is meant; raises HypervisorError if it is not. Does not block."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A port for which a path is listened on."""

    vm_uuid: VmUuid
    vm_name: str  # untrusted text
    port: PortName  # untrusted text
    path: str


class ExpectedLink:
    """Implements the hub's `Connector`: its links are the connections that this instance's QEMU makes."""

    def __init__(
        self,
        claim: Claim,
        identity: ProcessIdentity,
        verify: Verify,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """
        Args:
            claim: the port.
            identity: the process that connects.
            verify: see `Verify`.
            patience_s: see PATIENCE_S.
        """
        self.claim = claim
        self.identity = identity
        self.verify = verify
        self.problem = ""  # why no connection can come, for people
        self._patience_s = patience_s
        self._newest: socket.socket | None = None
        self._arrived = asyncio.Event()

    def offer(self, sock: socket.socket) -> None:
        """QEMU has connected. It has one connection of this port at a time, so an older one is dead."""
        self.drop()
        self._newest = sock
        self._arrived.set()

    def drop(self) -> None:
        """Close a connection that nobody has taken."""
        if self._newest is not None:
            self._newest.close()
            self._newest = None
        self._arrived.clear()

    async def connect(self) -> Link:
        """Wait for QEMU's connection.

        Raises:
            LinkError: it does not come, or the socket cannot be had; the hub calls again.
        """
        if self.problem:
            raise LinkError(f"{self.claim.path}: {self.problem}")
        try:
            async with asyncio.timeout(self._patience_s):
                while (sock := self._newest) is None:
                    await self._arrived.wait()
        except TimeoutError:
            reason = self.problem or "QEMU has not connected"
            raise LinkError(f"{self.claim.path}: {reason}") from None
        self._newest = None
        self._arrived.clear()
        try:
            return SocketLink(sock, os.path.basename(self.claim.path))
        except OSError as error:  # descriptors have run out
            sock.close()
            raise LinkError(f"{self.claim.path}: {error.strerror}") from error
