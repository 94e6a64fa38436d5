# SPDX-License-Identifier: LGPL-2.1-or-later
"""Both ends of channels on real guests: applications of the host's hub, programs in the guest, watchers.

The applications use the public library over the hubs' sockets, as any other program would.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import fence_vmchannel
from fence_vmchannel.channel import Channel
from fence_vmchannel.client import Client
from fence_vmchannel.hub.events import HubEvent, Synced
from tests.rig.guest import Guest, Job
from tests.rig.kernel import RigError
from tests.rig.qemu import PORT
from tests.system.site import Site

WAIT_S = 60
"""How long anything may take here. The machine may be loaded; figures come from `benchmarks/`."""

HUB_LOG = "/run/rig/guestd.log"

_E = TypeVar("_E")

# --- the host's side ---


@asynccontextmanager
async def host_client(site: Site) -> AsyncGenerator[Client, None]:
    """A local application of the host's hub."""
    async with fence_vmchannel.connect(str(site.folder / "run" / "host.sock"), timeout_s=WAIT_S) as client:
        yield client


@asynccontextmanager
async def offered(
    site: Site, service: str, handler: Callable[[Channel], Awaitable[None]]
) -> AsyncGenerator[Client, None]:
    """An application of the host that offers a service to all guests."""
    async with host_client(site) as client, client.offer(service, handler, timeout_s=WAIT_S):
        yield client


async def echo(channel: Channel) -> None:
    """A service that answers each message with the same bytes in reverse order."""
    while (message := await channel.receive()) is not None:
        await channel.send(message[::-1])


class HostWatch:
    """What the host's hub tells those who watch it, in order."""

    def __init__(self) -> None:
        self.events: list[HubEvent] = []
        self._taken = 0
        self._more = asyncio.Event()

    async def follow(self, events: AsyncIterator[HubEvent]) -> None:
        async for event in events:
            self.events.append(event)
            self._more.set()

    async def next(self, kind: type[_E], port: str = "") -> _E:
        """The next event of that kind (and about that port) after the one that was taken last.

        Raises:
            RigError: it does not come.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    self._more.clear()
                    while self._taken < len(self.events):
                        event = self.events[self._taken]
                        self._taken += 1
                        if isinstance(event, kind) and port in ("", getattr(event, "port", "")):
                            return event
                    await self._more.wait()
        except TimeoutError as error:
            raise RigError(f"no {kind.__name__} in {WAIT_S} s, but {self.events}") from error


@asynccontextmanager
async def host_watch(site: Site) -> AsyncGenerator[HostWatch, None]:
    """Watch the host's hub; what was there at the beginning has been taken."""
    watch = HostWatch()
    async with host_client(site) as client, client.watch() as events:
        following = asyncio.create_task(watch.follow(events), name="watch of the host's hub")
        try:
            await watch.next(Synced)
            yield watch
        finally:
            following.cancel()


class AdminEvents:
    """`GET /v1/events` of the admin socket: server-sent events from now on."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.seen: list[dict[str, Any]] = []

    async def next(self, kind: str) -> dict[str, Any]:
        """The next event of that kind.

        Raises:
            RigError: it does not come.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                while line := await self._reader.readline():
                    if line.startswith(b"data:"):
                        self.seen.append(json.loads(line.removeprefix(b"data:")))
                        if self.seen[-1]["kind"] == kind:
                            return self.seen[-1]
        except TimeoutError as error:
            raise RigError(f"no {kind} in {WAIT_S} s, but {self.seen}") from error
        raise RigError(f"the daemon hung up; seen: {self.seen}")


@asynccontextmanager
async def admin_events(site: Site) -> AsyncGenerator[AdminEvents, None]:
    """Follow the daemon's live view."""
    reader, writer = await asyncio.open_unix_connection(str(site.admin_socket))
    try:
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: vmchannel\r\n\r\n")
        while (await reader.readline()).strip():  # the head of the answer
            pass
        yield AdminEvents(reader)
    finally:
        writer.close()
        await writer.wait_closed()


async def port_view(site: Site, vm_uuid: str, port: str = PORT) -> dict[str, Any] | None:
    """What `vmchannelctl ports` says of one port."""
    ports = cast("list[dict[str, Any]]", await site.ctl_json("ports"))
    return next((one for one in ports if (one["vm_uuid"], one["name"]) == (vm_uuid, port)), None)


# --- the guest's side ---


class GuestWatch:
    """`vmchannel watch --json` in a guest; use it in one test."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._taken = 0

    async def next(self, kind: str, port: str = "") -> dict[str, Any]:
        """The next event of that kind (and about that port) after the one that was taken last.

        Raises:
            RigError: it does not come, or the program has ended before.
        """
        return (await self.each(kind, port=port))[kind]

    async def each(self, *kinds: str, port: str = "") -> dict[str, dict[str, Any]]:
        """The next event of each of these kinds, in whatever order they come.

        Raises:
            RigError: one does not come, or the program has ended before.
        """
        deadline = time.monotonic() + WAIT_S
        found: dict[str, dict[str, Any]] = {}
        while True:
            now = await self.job.peek()
            events: list[dict[str, Any]] = [
                json.loads(line) for line in now.stdout.splitlines(keepends=True) if line.endswith("\n")
            ]
            while self._taken < len(events):
                event = events[self._taken]
                self._taken += 1
                if event["event"] in kinds and port in ("", event.get("port", "")):
                    found.setdefault(event["event"], event)
                if len(found) == len(kinds):
                    return found
            if now.code is not None or time.monotonic() > deadline:
                raise RigError(f"not each of {kinds}, but {events}\n{now.stderr}")
            await asyncio.sleep(0.05)


async def guest_watch(guest: Guest) -> GuestWatch:
    """Start `vmchannel watch --json`; what was there at the beginning has been taken."""
    watch = GuestWatch(await guest.start("vmchannel", "watch", "--json"))
    await watch.next("synced")
    return watch


_FIND_HUB = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")
    except OSError:
        continue
    if b"/usr/sbin/vmchannel-guestd" in words:
        print(pid)
"""


async def hub_pid(guest: Guest) -> int:
    """The process of the guest's hub; 0 when there is none."""
    found = (await guest.python(_FIND_HUB)).check().stdout.split()
    assert len(found) < 2, f"several hubs: {found}"
    return int(found[0]) if found else 0


async def start_hub(guest: Guest) -> None:
    """Start the guest's hub again; its lines go where those of the first one went."""
    await guest.start("sh", "-c", f"exec vmchannel-guestd >> {HUB_LOG} 2>&1")


async def end_hub(guest: Guest, number: int) -> None:
    """End the guest's hub with a signal and wait until it has gone."""
    pid = await hub_pid(guest)
    assert pid, "no hub runs"
    (await guest.sh(f"kill -{number} {pid} && while [ -e /proc/{pid} ]; do usleep 10000; done")).check()


async def hub_log(guest: Guest) -> str:
    """All that the guest's hubs have said since the guest's boot."""
    return (await guest.pull(HUB_LOG)).decode()


async def until(condition: Callable[[], Awaitable[bool]], what: str, *, timeout_s: float = WAIT_S) -> None:
    """Wait until something is so.

    Raises:
        RigError: it is not, in `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            raise RigError(f"no {what} in {timeout_s} s")
        await asyncio.sleep(0.1)


async def until_said(job: Job, wanted: Callable[[str], bool]) -> str:
    """Wait until a program's output is as wanted; returns it.

    Raises:
        RigError: it has ended, or a minute has passed.
    """
    deadline = time.monotonic() + WAIT_S
    while not wanted((now := await job.peek()).stdout):
        if now.code is not None or time.monotonic() > deadline:
            raise RigError(f"{now}")
        await asyncio.sleep(0.05)
    return now.stdout
