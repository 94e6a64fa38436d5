# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannel-guestd in this process: its port is a pseudo-terminal, its host a hub with a fence service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.discovery import PortPaths
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.messages import FENCE_SERVICE
from tests.fakes.fake_port import PtyPort
from tests.fakes.fence_service import FakeFenceService
from tests.fakes.hub_pair import VM
from vmchannel_guest.announce import NodeSources
from vmchannel_guest.main import GuestOptions, serve
from vmchannel_guest.notify import Notifier

_T = TypeVar("_T")


@dataclass
class Name:
    """The host name of the guest, which a test changes."""

    text: str = "node1"


@dataclass(frozen=True)
class GuestSite:
    """One guest and its host."""

    host: Hub
    service: FakeFenceService
    port: PtyPort
    socket: str
    name: Name
    sources: NodeSources


@contextlib.asynccontextmanager
async def guest_site(folder: Path, service: FakeFenceService | None = None) -> AsyncGenerator[GuestSite]:
    """A host that is attached to the guest's port. The guest's hub does not run yet."""
    service, name, port = service or FakeFenceService(), Name(), PtyPort(folder, VM.port)
    sources = NodeSources(str(folder), lambda: name.text, lambda _: False, lambda: "")
    try:
        async with Hub(PeerIdentity("host-boot", "test host")) as host:
            host.offer(FENCE_SERVICE, service.serve)
            host.attach(VM, port)
            yield GuestSite(host, service, port, str(folder / "run" / "guest.sock"), name, sources)
    finally:
        port.close()


@contextlib.asynccontextmanager
async def guestd(
    site: GuestSite, *, ports: tuple[str, ...] = (), paths: PortPaths | None = None
) -> AsyncGenerator[None]:
    """Run vmchannel-guestd for that site."""
    stop = asyncio.Event()
    options = replace(GuestOptions(socket=site.socket), ports=ports)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(
            serve(options, Notifier({}, pid=1), site.sources, paths=paths or site.port.paths, stop=stop)
        )
        try:
            await until(lambda: running.done() or Path(site.socket).exists())
            yield
        finally:
            stop.set()


async def until(happens: Callable[[], bool], *, timeout_s: float = 20) -> None:
    """Wait until something is so; fails after `timeout_s` seconds."""
    async with asyncio.timeout(timeout_s):
        while not happens():
            await asyncio.sleep(0.01)


async def in_thread(work: Callable[[], _T], *, timeout_s: float = 30) -> _T:
    """Run blocking code beside the loop."""
    async with asyncio.timeout(timeout_s):
        return await asyncio.to_thread(work)


def soon(seconds: float = 15) -> float:
    """A deadline of `time.monotonic`."""
    return time.monotonic() + seconds
