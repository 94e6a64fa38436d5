# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's end of a port: the unix socket on which QEMU listens (`-chardev socket,server=on,wait=off`).

QEMU serves one client. A second one connects into the backlog and hears nothing, a third gets EAGAIN: so a
connection proves nothing until the guest has greeted, and who listens is checked each time.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from fence_vmchannel.errors import LinkError
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.stream import SocketLink, peer_credentials, try_connect

Verify = Callable[[int], Awaitable[None]]
"""Checks that a process id is the QEMU that we mean; raises LinkError (or OSError) if it is not, or is not
known.
"""

VERIFY_TIMEOUT_S: Final = 10.0


class ChardevConnector:
    """Connects to one chardev socket, as often as the hub asks."""

    def __init__(self, path: str, verify: Verify, *, verify_timeout_s: float = VERIFY_TIMEOUT_S) -> None:
        """`verify` gets the pid that listens on `path` (SO_PEERCRED: who called listen() last)."""
        self._path = path
        self._verify = verify
        self._verify_timeout_s = verify_timeout_s

    async def connect(self) -> Link:
        """Connect once and check who listens.

        Raises:
            LinkError: no such socket, nobody listens, the backlog is full, or the process is not the one
            expected.
        """
        try:
            sock = try_connect(self._path)
        except OSError as error:
            raise LinkError(f"{self._path}: {error.strerror}") from error
        if sock is None:
            raise LinkError(f"{self._path}: busy; another client talks to this port")
        try:
            await self._check(sock)
            return SocketLink(sock, os.path.basename(self._path))
        except OSError as error:  # descriptors have run out
            sock.close()
            raise LinkError(f"{self._path}: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise

    async def _check(self, sock: socket.socket) -> None:
        pid = peer_credentials(sock).pid
        try:
            async with asyncio.timeout(self._verify_timeout_s):
                await self._verify(pid)
        except TimeoutError as error:
            raise LinkError(f"{self._path}: pid {pid} could not be identified in time") from error
        except OSError as error:
            raise LinkError(f"{self._path}: pid {pid}: {error}") from error
