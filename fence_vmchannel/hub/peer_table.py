# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peers of a hub: one endpoint each, and a task that keeps its link up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from fence_vmchannel.addresses import DEFAULT_PORT, Address
from fence_vmchannel.core.events import ChannelOpened, Opened, Reset
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import CloseCode, LinkError, ServiceRefused
from fence_vmchannel.hub.events import (
    HubEvent,
    PeerConnected,
    PeerDisconnected,
    PeerStatus,
    PortAdded,
    PortRemoved,
    PortUnusable,
    SessionWasReset,
)
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.links.base import Link
from fence_vmchannel.logs import RateLimitedLog, quoted
from fence_vmchannel.peers import PeerInfo

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

FIRST_RETRY_S: Final = 0.05
LAST_RETRY_S: Final = 1.0
_STABLE_S = 1.0
"""A link that lasted so long was good: the next attempt comes soon again."""

MUTE_S: Final = 10.0
"""A link to a guest over which no byte has come for so long is made anew: its port may be stuck.

QEMU (7.2) stops taking from a port when its socket is full, and again when the socket closes in the middle of
a write; the second stop outlives the reconnection, and only the next one ends it (measured: `info qtree` says
"host on, throttle on" with an empty socket). A guest that has anything to say says it within 4 s (KNOCK).
"""

MAX_MUTE_ROUNDS: Final = 32
"""Each link over which nothing came is waited for twice as long as the one before, at most so often MUTE_S: a
VM without a hub of ours is left in peace."""


class Connector(Protocol):
    """How to get a link to a peer."""

    async def connect(self) -> Link:
        """Connect once. Raises LinkError; the hub calls again later."""
        ...


@dataclass(slots=True, eq=False)
class Peer:
    """One attached peer."""

    info: PeerInfo
    endpoint: Endpoint
    connector: Connector
    terms: PeerTerms
    owner: str = ""  # whose session it is, beyond the peer's name
    present: bool = True  # the port is there; whether it can be opened shows later
    connected: PeerConnected | None = None  # the last greeting on the present link
    trouble: str = ""  # why there is no link, as last told
    task: asyncio.Task[None] | None = None
    mute_rounds: int = 0  # how often MUTE_S a link may be mute; 0: for ever
    hurry: asyncio.Event = field(default_factory=asyncio.Event)  # try again now
    noise: RateLimitedLog = field(default_factory=lambda: RateLimitedLog(log, clock=time.monotonic))
    """For what the peer, or who listens in its place, can cause as often as it likes: it may greet anew twice
    a second, and refuse links for two reasons in turn."""


class PeerTable:
    """All peers of one hub, by who they are."""

    def __init__(self, default_peer: str, publish: Callable[[HubEvent], None]) -> None:
        self._default_peer = default_peer
        self._publish = publish
        self._peers: dict[PeerInfo, Peer] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(tuple(self._peers.values()))

    def get(self, info: PeerInfo) -> Peer | None:
        """The peer, if it is attached."""
        return self._peers.get(info)

    def add(self, peer: Peer) -> None:
        """Add a peer that is not there yet."""
        self._peers[peer.info] = peer
        if peer.present:
            self._publish(PortAdded(peer.info.port, peer.info.name, peer.info.key))

    def remove(self, info: PeerInfo) -> Peer | None:
        """Take a peer out."""
        peer = self._peers.pop(info, None)
        if peer is not None:
            self.set_present(peer, False)
        return peer

    def set_present(self, peer: Peer, present: bool) -> None:
        """The peer's port has gone, or is back."""
        if peer.present == present:
            return
        peer.present = present
        peer.trouble = ""
        event = PortAdded if present else PortRemoved
        self._publish(event(peer.info.port, peer.info.name, peer.info.key))
        peer.hurry.set()

    def find(self, address: Address) -> Endpoint:
        """The endpoint that the address names.

        Raises:
            ServiceRefused: PEER_GONE if there is none, its port is away, or it is and nothing is kept for it;
                UNKNOWN_SERVICE if several fit.
        """
        name = address.peer or self._default_peer
        port = address.port or DEFAULT_PORT
        if not name:
            raise ServiceRefused(
                CloseCode.UNKNOWN_SERVICE,
                f"nobody offers {address.service} here; a VM's is VM/{address.service}",
            )
        named = [peer for peer in self._peers.values() if name in (peer.info.name, peer.info.key)]
        fitting = [peer for peer in named if peer.info.port == port]
        if not fitting:
            raise ServiceRefused(CloseCode.PEER_GONE, self._nobody(name, port, named))
        if len(fitting) > 1:
            keys = ", ".join(peer.info.key for peer in fitting[:5])
            raise ServiceRefused(
                CloseCode.UNKNOWN_SERVICE, f"{quoted(name)} names several peers; use one of the keys {keys}"
            )
        if not fitting[0].present:
            raise ServiceRefused(
                CloseCode.PEER_GONE, f"port {quoted(port)} of {quoted(name)} is not there now"
            )
        if fitting[0].connected is None and not fitting[0].terms.keeps(address.service):
            raise ServiceRefused(
                CloseCode.PEER_GONE, f"{quoted(name)} is away, and nothing is kept for it (cache_buffers)"
            )
        return fitting[0].endpoint

    def _nobody(self, name: str, port: str, named: list[Peer]) -> str:
        if named:
            ports = ", ".join(quoted(peer.info.port) for peer in named[:5])
            return f"{quoted(name)} has no port {quoted(port)}; it has {ports}"
        if name == self._default_peer:
            return f"this machine has no port {quoted(port)}"
        return f"no peer {quoted(name)} with a port {quoted(port)} is known"

    def snapshot(self) -> Iterator[HubEvent]:
        """What is there, as events."""
        for peer in self._peers.values():
            info = peer.info
            if peer.present:
                yield PortAdded(info.port, info.name, info.key)
            if peer.trouble:
                yield PortUnusable(info.port, info.name, peer.trouble, info.key)
            if peer.connected is not None:
                yield peer.connected

    def connected(self, event: PeerConnected, info: PeerInfo) -> None:
        """A peer has greeted. A greeting repeated within a session on one link is no event."""
        peer = self._peers.get(info)
        if peer is None:
            return
        again = peer.connected is not None and peer.connected.session == event.session
        peer.connected = event
        if not again:
            peer.noise.info("peer %s: session %s%s", info, event.session, " resumed" if event.resumed else "")
            self._publish(event)

    def disconnected(self, info: PeerInfo, reason: str) -> None:
        """A peer cannot be reached now."""
        peer = self._peers.get(info)
        if peer is not None and peer.connected is not None:
            peer.connected = None
            peer.noise.info("peer %s: disconnected: %s", info, quoted(reason))
            self._publish(PeerDisconnected(info.name, info.port, reason, info.key))
            peer.endpoint.abandon(peer.terms.keeps)

    def was_reset(self, info: PeerInfo, reason: str) -> None:
        """A peer's session began anew."""
        peer = self._peers.get(info)
        if peer is not None:
            peer.noise.warning("peer %s: session reset: %s", info, quoted(reason))
        self._publish(SessionWasReset(info.name, info.port, reason, info.key))
        self.disconnected(info, reason)  # until the next session has begun

    def trouble(self, peer: Peer, reason: str) -> None:
        """A link could not be had: log and tell it, once for each reason."""
        peer.endpoint.detail = reason
        if peer.trouble != reason and peer.present:
            peer.trouble = reason
            peer.noise.warning("peer %s: no link: %s", peer.info, quoted(reason))
            self._publish(PortUnusable(peer.info.port, peer.info.name, reason, peer.info.key))


class PeerObserver:
    """Turns what happens on one peer's endpoint into events of the hub."""

    def __init__(
        self, info: PeerInfo, table: PeerTable, on_channel: Callable[[Endpoint, ChannelOpened], None]
    ) -> None:
        self._info = info
        self._table = table
        self._on_channel = on_channel

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None:
        """See `Observer`."""
        info = self._info
        session = endpoint.connection.session_id.hex()
        self._table.connected(
            PeerConnected(info.name, info.port, session, event.resumed, event.peer.software, info.key), info
        )

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None:
        """See `Observer`."""
        self._table.disconnected(self._info, reason)

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None:
        """See `Observer`."""
        self._table.was_reset(self._info, event.reason)

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """See `Observer`."""
        self._on_channel(endpoint, event)


async def keep_linked(peer: Peer, table: PeerTable) -> None:
    """Keep `peer` linked as long as this task lives, with a pause of 0.05 to 1 s after each failure."""
    loop = asyncio.get_running_loop()
    pause_s = FIRST_RETRY_S
    while True:
        began = loop.time()
        try:
            link = await peer.connector.connect()
        except LinkError as error:
            table.trouble(peer, str(error))
        except Exception:  # noqa: BLE001 - it is logged, as often as the log can bear
            peer.noise.exception("peer %s: cannot connect", peer.info)
            table.trouble(peer, "internal error; the log says more")
        else:
            peer.trouble = ""
            reason = await _use(peer, link)
            if not reason:
                continue
            peer.noise.info("peer %s: link ended: %s", peer.info, quoted(reason))
        pause_s = FIRST_RETRY_S if loop.time() - began > _STABLE_S else min(pause_s * 2, LAST_RETRY_S)
        await _pause(peer.hurry, pause_s)


async def _use(peer: Peer, link: Link) -> str:
    """Talk over a link until it ends; returns why, or nothing if it was mute."""
    before = peer.endpoint.received_bytes
    ended = peer.endpoint.use(link)
    rounds = 0
    while not ended.done() and peer.mute_rounds and peer.endpoint.received_bytes == before:
        if rounds >= peer.mute_rounds:
            peer.mute_rounds = min(2 * peer.mute_rounds, MAX_MUTE_ROUNDS)
            peer.endpoint.drop_link("the guest says nothing")
            return ""
        await asyncio.wait((ended,), timeout=MUTE_S)
        rounds += 1
    reason = await ended
    peer.mute_rounds = min(1, peer.mute_rounds)
    return reason


async def _pause(hurry: asyncio.Event, pause_s: float) -> None:
    try:
        async with asyncio.timeout(pause_s):
            await hurry.wait()
    except TimeoutError:
        pass
    hurry.clear()


@dataclass(frozen=True, slots=True)
class Load:
    """How full the queues of all peers are."""

    full_out: int  # channels whose reader at the peer has no room left: our writers wait
    full_in: int  # channels whose reader here has no room left: the peer's writers wait
    unsent_bytes: int  # queued for the peers, or sent and not yet acknowledged


def measure(peers: Iterable[Peer]) -> Load:
    """The load now. Looks at every channel: for a scrape, not for each frame."""
    connections = [peer.endpoint.connection for peer in peers]
    full = [one.full_channels for one in connections]
    return Load(
        sum(out for out, _ in full),
        sum(into for _, into in full),
        sum(one.unsent_bytes for one in connections),
    )


def peer_status(peer: Peer) -> PeerStatus:
    """The peer now."""
    connection = peer.endpoint.connection
    said = connection.peer
    return PeerStatus(
        peer=peer.info.name,
        port=peer.info.port,
        kind=peer.info.kind.value,
        present=peer.present,
        connected=connection.opened,
        session=connection.session_id.hex(),
        software=said.software if said is not None else "",
        boot_id=said.boot_id if said is not None else "",
        channels=connection.channels,
        received_bytes=peer.endpoint.received_bytes,
        sent_bytes=peer.endpoint.sent_bytes,
        detail=peer.endpoint.detail,
        key=peer.info.key,
    )
