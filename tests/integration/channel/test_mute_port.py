# SPDX-License-Identifier: LGPL-2.1-or-later
"""A port that QEMU has stopped for good is freed by another connection; a quiet one is left in peace."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator

from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.hub.peer_table import MAX_MUTE_ROUNDS, MUTE_S
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.stream import SocketLink
from tests.fakes.hub_pair import VM
from tests.fakes.virtual_time import virtual_time


class QuietQemu:
    """Takes connections, and what comes over them; the test says what it sends."""

    def __init__(self) -> None:
        self.connected_at: list[float] = []
        self.ends: list[socket.socket] = []

    async def connect(self) -> Link:
        """See `Connector`."""
        self.connected_at.append(asyncio.get_running_loop().time())
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        return SocketLink(ours, "quiet port")


@contextlib.asynccontextmanager
async def attached(*, remake: bool = True) -> AsyncGenerator[tuple[Hub, QuietQemu]]:
    """A hub that serves the port."""
    qemu = QuietQemu()
    try:
        async with Hub(PeerIdentity("boot", "host"), clock=asyncio.get_running_loop().time) as hub:
            hub.attach(VM, qemu, remake=remake)
            yield hub, qemu
    finally:
        for end in qemu.ends:
            end.close()


@virtual_time
async def test_a_port_over_which_nothing_comes_is_connected_anew_ever_more_rarely() -> None:
    async with attached() as (_, qemu):
        await asyncio.sleep(3 * 3_600)
        waits = [
            after - before for before, after in zip(qemu.connected_at, qemu.connected_at[1:], strict=False)
        ]
        assert waits[0] == MUTE_S
        assert waits == sorted(waits)
        assert waits[-1] == MAX_MUTE_ROUNDS * MUTE_S


@virtual_time
async def test_it_is_connected_anew_soon_after_the_guest_has_opened_it() -> None:
    async with attached() as (hub, qemu):
        await asyncio.sleep(3 * 3_600 + 1)
        opened_at = asyncio.get_running_loop().time()
        hub.guest_opened(VM)
        await asyncio.sleep(2 * MUTE_S)
        assert qemu.connected_at[-1] > opened_at


@virtual_time
async def test_a_link_that_would_be_the_last_is_kept_however_quiet() -> None:
    async with attached(remake=False) as (hub, qemu):
        await asyncio.sleep(3_600)
        hub.guest_opened(VM)
        await asyncio.sleep(3_600)
        assert len(qemu.connected_at) == 1


@virtual_time
async def test_a_link_over_which_anything_came_is_kept() -> None:
    async with attached() as (_, qemu):
        await asyncio.sleep(1)
        qemu.ends[0].send(b"x")
        await asyncio.sleep(3_600)
        assert len(qemu.connected_at) == 1
