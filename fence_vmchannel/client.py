# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio API for applications: connect to the hub of this machine, then open, request, offer, watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Final, TypeVar

from fence_vmchannel.addresses import HUB_SERVICE
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Limits, Opened, PeerIdentity, Reset, Role
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import (
    ChannelClosed,
    ChannelError,
    CloseCode,
    DeadlineExceeded,
    HubUnreachable,
)
from fence_vmchannel.hub.events import HubEvent, HubStatus
from fence_vmchannel.hub.local_protocol import (
    HubQuery,
    OfferQuery,
    Origin,
    StatusQuery,
    WatchQuery,
    decode_local,
    encode_local,
    gather_status,
)
from fence_vmchannel.hub.serving import Handler, serve_channel
from fence_vmchannel.links.local import GUEST_SOCKET
from fence_vmchannel.links.stream import SocketLink, try_connect
from fence_vmchannel.outcomes import request_error
from fence_vmchannel.peers import PeerInfo, PeerKind
from fence_vmchannel.supervisor import Supervisor

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

_T = TypeVar("_T")

_RETRY_S: Final = 0.02
_DRAIN_S: Final = 1.0
_STABLE_S: Final = 1.0
"""A link that lasted so long was good: when it ends, a new time to come back begins."""

RESUME_S: Final = 10.0
"""How long a hub may be away, being restarted for instance, before it counts as gone."""


def application_identity() -> PeerIdentity:
    """What an application says of itself: the session ends with its process, so that is its "boot"."""
    return PeerIdentity(boot_id=f"{os.getpid()}-{os.urandom(8).hex()}", software="fence_vmchannel")


@contextlib.asynccontextmanager
async def connect(
    path: str = GUEST_SOCKET, *, timeout_s: float = 10.0, resume_s: float = RESUME_S
) -> AsyncGenerator[Client]:
    """Connect to the hub on the unix socket `path`: `async with connect() as client: ...`.

    Waits up to `timeout_s` seconds for the hub to have a free place in its queue and to greet. A hub that
    goes away is waited for up to `resume_s` seconds: one that was stopped in order goes on where it was; from
    one that was killed each channel hears SESSION_RESET, and offers are made again.

    Raises:
        HubUnreachable: nobody serves the socket, it may not be opened, or the hub does not answer.
    """
    async with Supervisor() as tasks:
        client = Client(path, tasks, resume_s)
        try:
            await client.start(timeout_s)
            yield client
        finally:
            await client.stop()


class Client:
    """A connection to a hub. Made by `connect`. After the hub has gone each call raises `HubUnreachable`."""

    def __init__(self, path: str, tasks: Supervisor, resume_s: float) -> None:
        self._path = path
        self._tasks = tasks
        self._resume_s = resume_s
        self._loop = asyncio.get_running_loop()
        self._greeted_at: float | None = None  # None: not on this link
        self._returning = False
        self._back_by = 0.0  # when a hub that is away counts as gone
        self._offers: dict[str, Handler] = {}
        self._greeted = asyncio.Event()
        self._gone = ""
        self._hub = PeerInfo("hub", PeerKind.LOCAL)
        connection = Connection(
            Role.GUEST, application_identity(), random_bytes=os.urandom, limits=Limits(channels=256)
        )
        self._endpoint = Endpoint(self._hub, connection, self, clock=time.monotonic)

    # --- channels ---

    async def open(self, service: str, *, payload: bytes = b"", timeout_s: float | None = None) -> Channel:
        """Open a channel to a service; waits until it is accepted. Cancelling closes it.

        Args:
            service: its address, `[VM/][PORT:]SERVICE`; in a guest the name alone.
            payload: goes to the service with the request.
            timeout_s: None waits for ever, also for a peer that is away.

        Raises:
            ServiceRefused: unknown, not permitted, the peer is not there, or a limit is reached; `code`
            tells. HubUnreachable: the hub has gone. DeadlineExceeded: no answer within `timeout_s`.
        """
        return await self._within(timeout_s, self._open(service, payload), f"opening {service}")

    async def request(self, service: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Send one message to a service and return its answer, over a channel of its own. May be cancelled.

        Raises:
            DeadlineExceeded: no answer within `timeout_s` seconds; the outcome is unknown.
            SessionReset, PeerMoved: the session ended meanwhile; the outcome is unknown.
            ServiceRefused, ChannelClosed, HubUnreachable: as for `open`, and when the service closes the
            channel.
        """
        return await self._within(timeout_s, self._request(service, payload), f"request to {service}")

    @contextlib.asynccontextmanager
    async def offer(self, service: str, handler: Handler, *, timeout_s: float = 10.0) -> AsyncGenerator[None]:
        """Offer a service to the peers of the hub while the context lasts.

        Each channel runs `handler` as a task; it is closed when the handler returns, with code INTERNAL (and
        a log line) when it raises. Channels that are open when the context ends go on.

        Raises:
            ServiceRefused: another application offers it, or this user may not.
        """
        self._offers[service] = handler
        try:
            query = self._ask(OfferQuery(service))
            channel = await self._within(timeout_s, query, f"offering {service}")
            keeper = self._tasks.start(self._keep_offered(service, channel), f"offer of {service}")
            try:
                yield
            finally:
                keeper.cancel()
        finally:
            self._offers.pop(service, None)

    # --- the hub ---

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncGenerator[AsyncIterator[HubEvent]]:
        """Watch the hub: `async with client.watch() as events: async for event in events: ...`.

        First what is there, then `Synced`, then each change; `Overflow` when the application was too slow: a
        new snapshot follows. The iteration raises `ChannelClosed` when the hub goes.
        """
        async with await self._ask(WatchQuery()) as channel:
            yield _events(channel)

    async def status(self, *, timeout_s: float = 10.0) -> HubStatus:
        """The hub's peers and services now.

        Raises:
            DeadlineExceeded, HubUnreachable: it does not answer.
        """
        return await self._within(timeout_s, self._status(), "the hub's status")

    # --- inside ---

    async def start(self, timeout_s: float) -> None:
        """Connect and wait for the hub's greeting; for `connect`."""
        try:
            async with asyncio.timeout(timeout_s):
                link = await self._link()
                self._use(link)
                await self._greeted.wait()
        except TimeoutError as error:
            raise HubUnreachable(f"the hub on {self._path} does not answer within {timeout_s:g} s") from error
        self._check()

    async def stop(self) -> None:
        """Send what is queued, then disconnect; for `connect`."""
        await self._endpoint.drain(_DRAIN_S)
        self._give_up("disconnected", CloseCode.NORMAL)

    async def _link(self) -> SocketLink:
        while True:
            try:
                sock = try_connect(self._path)
            except OSError as error:
                raise HubUnreachable(f"no hub answers on {self._path}: {error.strerror}") from error
            if sock is not None:
                return SocketLink(sock, self._path)
            await asyncio.sleep(_RETRY_S)

    def _use(self, link: SocketLink) -> None:
        self._greeted_at = None
        self._endpoint.use(link).add_done_callback(lambda ended: self._lost(ended.result()))

    def _lost(self, reason: str) -> None:
        """The link has ended: the hub restarts, or has gone."""
        self._greeted.set()  # whoever waits for the greeting looks again
        if self._gone or self._returning:
            return
        now = self._loop.time()
        if self._greeted_at is not None and now - self._greeted_at > _STABLE_S:
            self._back_by = now + self._resume_s
        self._greeted_at = None
        if now >= self._back_by:
            self._give_up(reason)
        else:
            self._returning = True
            self._tasks.start(self._come_back(reason), f"waiting for {self._path}")

    async def _come_back(self, reason: str) -> None:
        """Connect again and wait for the greeting; the session goes on or is reset there."""
        try:
            async with asyncio.timeout_at(self._back_by):
                while self._greeted_at is None and not self._gone:
                    await asyncio.sleep(_RETRY_S)
                    with contextlib.suppress(HubUnreachable):
                        self._use(await self._link())
                        self._greeted.clear()
                        await self._greeted.wait()
        except TimeoutError:
            self._give_up(reason)
        finally:
            self._returning = False

    def _give_up(self, reason: str, code: CloseCode = CloseCode.PEER_GONE) -> None:
        self._gone = self._gone or reason
        self._greeted.set()
        self._endpoint.stop(code, reason)

    async def _keep_offered(self, service: str, channel: Channel) -> None:
        """Offer it again to a hub that was killed and knows nothing of it."""
        try:
            while True:
                await channel.wait_closed()
                if channel.close_code is not CloseCode.SESSION_RESET:
                    return
                channel = await self._ask(OfferQuery(service))
        except ChannelError as error:
            log.warning("%s is offered no more: %s", service, error)
        finally:
            channel.close()

    def _check(self) -> None:
        if self._gone:
            raise HubUnreachable(f"the hub on {self._path} has gone: {self._gone}")

    async def _within(self, timeout_s: float | None, work: Coroutine[object, object, _T], what: str) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what}: no answer within {timeout_s:g} s") from error

    async def _open(self, service: str, payload: bytes) -> Channel:
        self._check()
        return await Channel.opened(self._endpoint, self._hub, service, payload=payload)

    async def _request(self, service: str, payload: bytes) -> bytes:
        async with await self._open(service, b"") as channel:
            try:
                return await channel.request(payload)
            except ChannelClosed as error:
                raise request_error(error) from error

    async def _ask(self, query: HubQuery) -> Channel:
        return await self._open(HUB_SERVICE, encode_local(query))

    async def _status(self) -> HubStatus:
        items: list[bytes] = []
        async with await self._ask(StatusQuery()) as channel:
            while (data := await channel.receive()) is not None:
                items.append(data)
            return gather_status(channel.greeting, items)

    # --- what happens on the connection: `Observer` ---

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None:
        """See `Observer`."""
        now = self._loop.time()
        if not self._back_by:  # the first greeting
            self._back_by = now + self._resume_s
        self._greeted_at = now
        self._greeted.set()

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None:
        """See `Observer`; a lost link comes by itself."""

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None:
        """See `Observer`; the channels know already."""

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """See `Observer`: a peer of the hub opened a channel to a service that we offer."""
        handler = self._offers.get(event.target)
        origin = _origin(event.payload)
        if handler is None or origin is None:
            endpoint.close(event.channel, CloseCode.UNKNOWN_SERVICE, "the application offers it no more")
            return
        peer = PeerInfo(origin.peer, PeerKind(origin.kind), origin.port, origin.key)
        channel = Channel.incoming(endpoint, peer, event, payload=origin.payload)
        self._tasks.start(serve_channel(handler, channel), f"{event.target} for {peer}")


def _origin(payload: bytes) -> Origin | None:
    try:
        message = decode_local(payload)
    except ChannelError:
        return None
    return message if isinstance(message, Origin) else None


async def _events(channel: Channel) -> AsyncIterator[HubEvent]:
    while (data := await channel.receive()) is not None:
        message = decode_local(data)
        if isinstance(message, HubEvent):
            yield message
