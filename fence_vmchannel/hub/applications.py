# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hub's side towards local applications: accepting them, and the service ".hub"."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol, assert_never

from fence_vmchannel.access import Credentials
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Granted,
    Opened,
    PeerIdentity,
    Reset,
)
from fence_vmchannel.core.tally import Refusal, Tally
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import ChannelError, CloseCode, RemoteProtocolError, ServiceRefused
from fence_vmchannel.hub.events import HubStatus
from fence_vmchannel.hub.local_protocol import (
    HubInfo,
    HubQuery,
    OfferQuery,
    StatusQuery,
    WatchQuery,
    decode_local,
    encode_local,
)
from fence_vmchannel.hub.router import Router
from fence_vmchannel.hub.shares import ClientPlaces
from fence_vmchannel.hub.waiting import Waiting
from fence_vmchannel.hub.watch import Watch
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.local import LocalListener
from fence_vmchannel.links.stream import SocketLink
from fence_vmchannel.logs import RateLimitedLog, quoted

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

MAX_QUERIES: Final = 16
"""Status and watch queries of one application that may be open: each holds a queue of events."""

MAX_OFFERS: Final = 64
"""Services that one application may offer."""

_ACCEPTS_PER_TURN = 64
_OUT_OF_DESCRIPTORS_PAUSE_S = 1.0


class LocalServer:
    """Accepts local applications on one socket; each gets an endpoint."""

    def __init__(
        self,
        listener: LocalListener,
        make: Callable[[Credentials, Callable[[bytes], bool]], Endpoint],
        waiting: Waiting,
        *,
        max_clients: int,
        clock: Callable[[], float],
        tally: Tally,
    ) -> None:
        """Accept from now on.

        Args:
            listener: where they come; is taken over.
            make: makes the endpoint of a client; the function is its connection's `held_elsewhere`.
            waiting: sessions of clients of the process before.
            max_clients: how many at once.
            clock: for the pace of log lines.
        """
        self._listener = listener
        self._tally = tally
        self._make = make
        self._waiting = waiting
        self._places = ClientPlaces(max_clients)
        self._clients: set[Endpoint] = set()
        self._noise = RateLimitedLog(log, clock=clock)
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._loop.add_reader(listener.fileno(), self._accept)

    @property
    def clients(self) -> tuple[Endpoint, ...]:
        """The applications that are connected now."""
        return tuple(self._clients)

    def pause(self) -> None:
        """Accept no more; who connects now waits, and is turned away by `close`."""
        self._loop.remove_reader(self._listener.fileno())
        if self._resume is not None:
            self._resume.cancel()

    def close(self) -> None:
        """Accept no more and drop all clients; those whose session was exported hear nothing."""
        self.pause()
        self._listener.close()
        for client in self.clients:
            client.stop(CloseCode.SHUTDOWN, "the hub stops")
        self._clients.clear()

    def _accept(self) -> None:
        try:
            for _ in range(_ACCEPTS_PER_TURN):
                client = self._listener.accept()
                if client is None:
                    return
                self._admit(*client)
        except OSError as error:  # EMFILE: without a pause this would spin
            self._noise.warning("%s: cannot accept: %s", self._listener.path, error.strerror)
            self._loop.remove_reader(self._listener.fileno())
            self._resume = self._loop.call_later(_OUT_OF_DESCRIPTORS_PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        self._resume = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _admit(self, sock: socket.socket, who: Credentials) -> None:
        if not self._places.enter(who.uid):
            self._tally[Refusal.CLIENT_LIMIT] += 1
            self._noise.warning(
                "%s: %s turned away: %d clients", self._listener.path, who, len(self._clients)
            )
            sock.close()
            return
        try:
            link = SocketLink(sock, f"client {who}")
        except OSError:
            self._places.leave(who.uid)
            sock.close()
            raise
        endpoint = self._make(who, lambda session: self._comes_back(endpoint, session, who))
        self._use(endpoint, link, who)

    def _use(self, endpoint: Endpoint, link: Link, who: Credentials) -> None:
        self._clients.add(endpoint)
        endpoint.use(link).add_done_callback(lambda _: self._leave(endpoint, who))

    def _comes_back(self, fresh: Endpoint, session: bytes, who: Credentials) -> bool:
        """A client names the session that it had with the process before: its own endpoint takes the link."""
        if not self._waiting.has_application(session, who):
            return False
        self._loop.call_soon(self._take_over, fresh, session, who)  # not within the turn that read it
        return True

    def _take_over(self, fresh: Endpoint, session: bytes, who: Credentials) -> None:
        link = fresh.release("the client's session goes on")
        if link is None:
            return  # it hung up at once; it may try again
        waiting = self._waiting.claim_application(session, who)
        if waiting is None:
            link.close()
        else:
            self._clients.discard(fresh)  # its place is the other's now
            self._use(waiting, link, who)

    def _leave(self, endpoint: Endpoint, who: Credentials) -> None:
        if endpoint not in self._clients:
            return
        self._places.leave(who.uid)
        self._clients.discard(endpoint)
        endpoint.stop(CloseCode.PEER_GONE, "the application has disconnected")


class LocalObserver:
    """Routes the channels of one local application; the rest of what it does concerns nobody else."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None:
        """See `Observer`."""

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None:
        """See `Observer`."""

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None:
        """See `Observer`."""

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """See `Observer`."""
        self._router.from_local(endpoint, event)


class HubView(Protocol):
    """What ".hub" needs of the hub."""

    def status(self) -> HubStatus:
        """The hub now."""
        ...

    def watch(self) -> Watch:
        """A new watch."""
        ...


class HubService:
    """Serves ".hub" to local applications: status, watch, offer."""

    def __init__(self, hub: HubView, router: Router, identity: PeerIdentity) -> None:
        self._hub = hub
        self._router = router
        self._info = HubInfo(identity.software, identity.boot_id)
        self._open: Counter[tuple[Endpoint, bool]] = Counter()  # by application, and whether it is an offer
        self._offers: dict[tuple[Endpoint, int], str] = {}  # by channel

    @property
    def offers(self) -> dict[tuple[Endpoint, int], str]:
        """The services that applications offer, by the channel that says so."""
        return self._offers.copy()

    def resume_offer(self, endpoint: Endpoint, channel: int, service: str) -> None:
        """An application offered a service to the process before: it goes on, if it still may."""
        try:
            self._begin_offer(endpoint, channel, service)
        except ChannelError as error:
            log.warning("the offer of %s cannot go on: %s", quoted(service), quoted(str(error)))
            endpoint.close(channel, CloseCode.LIMIT, str(error)[:1000])
        else:
            self._open[endpoint, True] += 1
            endpoint.adopt(channel, _ResumedOffer(lambda: self._end_resumed(endpoint, channel)))

    async def serve(self, channel: Channel) -> None:
        """Answer one query. Ends when the answer is complete or the application closes the channel."""
        query = _query(channel.payload)
        kind = (channel.endpoint, isinstance(query, OfferQuery))
        most = MAX_OFFERS if isinstance(query, OfferQuery) else MAX_QUERIES
        if self._open[kind] >= most:
            raise ServiceRefused(CloseCode.LIMIT, f"{most} queries of this kind are open")
        self._open[kind] += 1
        try:
            await self._answer(channel, query)
        finally:
            self._count_down(kind)

    async def _answer(self, channel: Channel, query: HubQuery) -> None:
        match query:
            case StatusQuery():
                await channel.accept(encode_local(self._info))
                status = self._hub.status()
                for peer in status.peers:
                    await channel.send(encode_local(peer))
                for service in status.services:
                    await channel.send(encode_local(service))
            case WatchQuery():
                await channel.accept(encode_local(self._info))
                await self._watch(channel)
            case OfferQuery():
                await self._offer(channel, query.service)
            case _:
                assert_never(query)

    async def _watch(self, channel: Channel) -> None:
        with self._hub.watch() as events:
            channel.when_closed(events.close)
            async for event in events:
                await channel.send(encode_local(event))

    async def _offer(self, channel: Channel, service: str) -> None:
        self._begin_offer(channel.endpoint, channel.number, service)
        try:
            await channel.accept(encode_local(self._info))
            await channel.wait_closed()
        finally:
            self._end_offer(channel.endpoint, channel.number)

    def _begin_offer(self, endpoint: Endpoint, channel: int, service: str) -> None:
        self._router.add_application(service, endpoint)
        self._offers[endpoint, channel] = service

    def _end_offer(self, endpoint: Endpoint, channel: int) -> None:
        self._router.remove(self._offers.pop((endpoint, channel)))

    def _end_resumed(self, endpoint: Endpoint, channel: int) -> None:
        self._end_offer(endpoint, channel)
        self._count_down((endpoint, True))

    def _count_down(self, kind: tuple[Endpoint, bool]) -> None:
        self._open[kind] -= 1
        if not self._open[kind]:
            del self._open[kind]


class _ResumedOffer:
    """Uses the channel of an offer that an earlier process accepted: waits for its end."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def on_accepted(self, event: ChannelAccepted) -> None:
        """See `ChannelUser`; it was accepted long ago."""

    def on_data(self, event: Data) -> None:
        """See `ChannelUser`; nothing is said on such a channel."""

    def on_granted(self, event: Granted) -> None:
        """See `ChannelUser`."""

    def on_closed(self, event: Closed) -> None:
        """See `ChannelUser`."""
        self._ended()


def _query(payload: bytes) -> HubQuery:
    message = decode_local(payload)
    if not isinstance(message, StatusQuery | WatchQuery | OfferQuery):
        raise RemoteProtocolError("this hub does not know that query")
    return message
