# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hub: owns the connections to peers and to local applications, and joins them by channels.

The same class serves a guest (its ports lead to the one peer "host") and a host (each VM's chardev is a
peer). Peers cannot hurt one another: each has its own endpoint and task; what fails there is logged and stays
there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Final

from fence_vmchannel.access import AccessRules, Credentials
from fence_vmchannel.addresses import HUB_SERVICE, PORT_PREFIX, Address, check_service
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import Limits, PeerIdentity, Priority, Role
from fence_vmchannel.core.tally import Tally
from fence_vmchannel.discovery import SYSTEM_PATHS, PortPaths
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import ChannelError, CloseCode, LocalProtocolError
from fence_vmchannel.hub import resume
from fence_vmchannel.hub.applications import HubService, LocalObserver, LocalServer
from fence_vmchannel.hub.events import HubEvent, HubStatus
from fence_vmchannel.hub.peer_table import (
    Connector,
    Load,
    Peer,
    PeerObserver,
    PeerTable,
    keep_linked,
    measure,
    peer_status,
)
from fence_vmchannel.hub.ports import MAX_PORTS, PortConnector, follow_ports
from fence_vmchannel.hub.router import OwnService, Router
from fence_vmchannel.hub.saved_hub import pack, unpack, within
from fence_vmchannel.hub.serving import Handler
from fence_vmchannel.hub.session_file import SessionFile
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.hub.turns import FairTurns
from fence_vmchannel.hub.waiting import CLAIM_S, Resumable, Waiting
from fence_vmchannel.hub.watch import Watch, WatchList
from fence_vmchannel.links.local import BACKLOG, LocalListener
from fence_vmchannel.messages import FENCE_SERVICE
from fence_vmchannel.pace import Pace
from fence_vmchannel.peers import HOST_PEER, PeerInfo, PeerKind
from fence_vmchannel.supervisor import Supervisor

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

DEFAULT_PRIORITIES: Final[Mapping[str, Priority]] = MappingProxyType({FENCE_SERVICE: Priority.FENCING})

DEFAULT_ACCESS: Final = AccessRules()
DEFAULT_TERMS: Final = PeerTerms()
"""Of one peer."""

LOCAL_LIMITS: Final = Limits(channels=256, session_bytes=33_554_432)
"""Of one local application."""

OPENS_PER_S: Final = 1_000.0
"""Channels that one VM, or one user, may open a second: about as many as a program gets that waits for
each."""

OPENS_BURST_S: Final = 1.0
"""So many seconds' worth of them may come at once."""

_DRAIN_S = 0.5


def boot_clock() -> float:
    """Seconds since the kernel booted, suspension included: deadlines hold across a suspended host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Hub:
    """A running hub: `async with Hub(identity) as hub: ...`. Belongs to one event loop; nothing here blocks
    it.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        *,
        access: AccessRules = DEFAULT_ACCESS,
        terms: PeerTerms = DEFAULT_TERMS,
        local_limits: Limits = LOCAL_LIMITS,
        max_clients: int = 256,
        default_peer: str = "",
        priorities: Mapping[str, Priority] = DEFAULT_PRIORITIES,
        sessions: str = "",
        clock: Callable[[], float] = boot_clock,
        random_bytes: Callable[[int], bytes] = os.urandom,
        opening: Pace | None = None,
    ) -> None:
        """Make a hub; it runs inside `async with`.

        Args:
            identity: what it says of itself: the kernel's boot id, and its software's name and version.
            access: which local users may open and offer what.
            terms: of each peer that is attached without its own.
            local_limits: of each local application's connection.
            max_clients: local applications at once; some places are root's, and no other user gets the rest.
            default_peer: where an address without a peer leads; "host" in a guest, nowhere on a host.
            priorities: of services, by name; all others are NORMAL.
            sessions: file, on a tmpfs, in which `stop` leaves the sessions to the next process; "": none.
            clock: seconds; what the sessions' ticks and deadlines mean.
            random_bytes: unguessable bytes.
            opening: how fast each VM, and each user but root, may open channels; None: OPENS_PER_S.
        """
        self._identity = identity
        self._terms = terms
        self._local_limits = local_limits
        self._max_clients = max_clients
        self._clock = clock
        self._random_bytes = random_bytes
        self.refused: Final = Tally()  # by all peers and local applications, since the hub was made
        self._tasks = Supervisor()
        self._turns = FairTurns(clock)
        self._watches = WatchList(self._snapshot)
        self._peers = PeerTable(default_peer, self._watches.publish)
        self._router = Router(
            self._peers,
            access,
            priorities,
            start=self._tasks.start,
            publish=self._watches.publish,
            clock=clock,
            tally=self.refused,
            opening=opening or Pace(OPENS_PER_S, clock, burst_s=OPENS_BURST_S),
        )
        self._servers: list[LocalServer] = []
        self._waiting = Waiting()
        self._sessions_path = sessions
        self._sessions: SessionFile | None = None
        self._service = HubService(self, self._router, identity)
        self._router.add(HUB_SERVICE, OwnService(self._service.serve, to_local=True))

    async def __aenter__(self) -> Hub:
        """Run, and go on with the sessions that the process before has left.

        Raises:
            LinkError: another hub uses the file of sessions, or it cannot be used.
        """
        if self._sessions_path:
            self._sessions = SessionFile(self._sessions_path)
        await self._tasks.__aenter__()
        if self._sessions is not None:
            self._resume(self._sessions)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        finally:
            await self._tasks.__aexit__(kind, error, traceback)

    async def stop(self) -> None:
        """Stop in order, in about half a second: end the channels of this process, then save the sessions for
        the next one, or end them, and close all links.
        """
        servers, self._servers = self._servers, []
        for server in servers:
            server.pause()
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            await self._save(sessions, servers)
        else:
            await _drain(client for server in servers for client in server.clients)
        for server in servers:
            server.close()
        if sessions is not None:
            sessions.close()  # last: now the next process may have everything
        else:
            await _drain(peer.endpoint for peer in self._peers)  # the ends of the clients' channels
        for peer in self._peers:
            self.detach(peer.info)
        self._watches.end()

    # --- services and channels of this process ---

    def offer(self, service: str, handler: Handler, *, to_local: bool = False) -> None:
        """Offer a service to all peers; each channel runs `handler` as a task of its own.

        Args:
            service: its name.
            handler: serves one `Channel`; accepting is implied by its first `send` or `receive`.
            to_local: local applications may open it as well, whoever may connect to the hub's socket.

        Raises:
            LocalProtocolError: `service` cannot be a name, or begins with ".".
            ServiceRefused: it is offered already.
        """
        if service.startswith("."):
            raise LocalProtocolError(f"{service} is a name of the hub itself")
        self._router.add(service, OwnService(handler, to_local))

    def withdraw(self, service: str) -> None:
        """Offer a service no more; its open channels go on."""
        if not service.startswith("."):
            self._router.remove(service)

    async def open(self, peer: str, service: str, *, payload: bytes = b"", port: str = "") -> Channel:
        """Open a channel to a peer's service; waits until it is accepted: give a time-out.

        Args:
            peer: name or key (a VM's UUID); "" is the default peer.
            port: the port that leads to it; "" is org.vmchannel.0.

        Raises:
            ServiceRefused: no such peer (PEER_GONE), or the peer refuses.
            ChannelClosed: the session was reset meanwhile.
        """
        check_service(service)
        endpoint = self._peers.find(Address(service, peer, port))
        priority = self._router.priority(service)
        return await Channel.opened(endpoint, endpoint.peer, service, payload=payload, priority=priority)

    # --- peers ---

    def attach(
        self,
        peer: PeerInfo,
        connector: Connector,
        *,
        role: Role = Role.HOST,
        terms: PeerTerms | None = None,
        owner: str = "",
        remake: bool = True,
    ) -> None:
        """Keep a session with `peer` over links that `connector` makes, until `detach`.

        Args:
            peer: who it is.
            connector: makes the links.
            role: ours in the greeting.
            terms: what it may have; None: the hub's.
            owner: says whose session it is, beyond the peer's name: one that an earlier process has left is
                resumed only if it was the same one's.
            remake: close a link to a guest over which nothing comes, for another one (MUTE_S); False where no
                other would come.

        Raises:
            LocalProtocolError: it is attached already.
        """
        if self._peers.get(peer) is not None:
            raise LocalProtocolError(f"peer {peer} is attached already")
        terms = self._terms if terms is None else terms
        observer = PeerObserver(peer, self._peers, self._router.from_peer)
        endpoint = self._waiting.claim_peer(peer, owner)
        if endpoint is None:
            connection = Connection(
                role,
                self._identity,
                random_bytes=self._random_bytes,
                limits=terms.limits,
                tally=self.refused,
            )
            endpoint = Endpoint(peer, connection, observer, clock=self._clock, turns=self._turns)
        else:
            endpoint.connection.set_limits(terms.limits)
            endpoint.belong(peer, observer)
            endpoint.abandon(terms.keeps)  # the peer is away until it has greeted this process
        mute_rounds = 1 if role is Role.HOST and remake else 0
        entry = Peer(peer, endpoint, connector, terms, owner, mute_rounds=mute_rounds)
        self._peers.add(entry)
        entry.task = self._tasks.start(keep_linked(entry, self._peers), f"link to {peer}")

    def detach(self, peer: PeerInfo) -> None:
        """Let a peer go: its link, its session and its channels end. Unknown peers are ignored."""
        entry = self._peers.get(peer)
        if entry is None:
            return
        if entry.task is not None:
            entry.task.cancel()
        entry.endpoint.stop(CloseCode.PEER_GONE, "the peer has been detached")
        self._peers.remove(peer)

    def guest_closed(self, peer: PeerInfo) -> None:
        """The guest has closed its end of the port (QMP VSERPORT_CHANGE), which the socket does not show."""
        entry = self._peers.get(peer)
        if entry is not None:
            entry.endpoint.detail = "the guest has closed the port"
            entry.endpoint.relink()

    def guest_opened(self, peer: PeerInfo) -> None:
        """The guest has opened its end of the port: if it stays mute now, the port is stuck."""
        entry = self._peers.get(peer)
        if entry is not None:
            entry.mute_rounds = min(1, entry.mute_rounds)

    def serve_ports(
        self, prefix: str = PORT_PREFIX, paths: PortPaths = SYSTEM_PATHS, *, rescan_s: float | None = None
    ) -> None:
        """Guest: keep every port whose name begins with `prefix` open, as the peer "host", while it is there.

        `rescan_s`: seconds between scans without an event; None: 30, or 1 where there are no kernel uevents.
        """
        follow = follow_ports(prefix, paths, lambda names: self._ports_changed(names, paths), rescan_s)
        self._tasks.start(follow, "ports of this machine")

    def end_waiting(self) -> None:
        """End the saved sessions whose peer or application has not come back by now."""
        self._waiting.end()

    # --- local applications ---

    def serve(self, path: str, *, mode: int = 0o660, gid: int | None = None, backlog: int = BACKLOG) -> None:
        """Serve local applications on the unix socket `path`.

        Raises:
            LinkError: another hub serves it, or it cannot be made.
        """
        listener = LocalListener(path, mode=mode, gid=gid, backlog=backlog)
        server = LocalServer(
            listener,
            self._make_client,
            self._waiting,
            max_clients=self._max_clients,
            clock=self._clock,
            tally=self.refused,
        )
        self._servers.append(server)

    # --- seeing ---

    def watch(self) -> Watch:
        """Watch what happens: a snapshot, `Synced`, then changes. `with hub.watch() as events: async for
        ...`.
        """
        return self._watches.add()

    def status(self) -> HubStatus:
        """The hub now."""
        return HubStatus(
            self._identity.software,
            self._identity.boot_id,
            tuple(peer_status(peer) for peer in self._peers),
            tuple(self._router.offered()),
        )

    def load(self) -> Load:
        """How full the peers' queues are now."""
        return measure(self._peers)

    @property
    def clients(self) -> int:
        """How many local applications are connected."""
        return sum(len(server.clients) for server in self._servers)

    @property
    def peers(self) -> PeerTable:
        """The peers, with their connections; for tests and diagnosis."""
        return self._peers

    # --- for the parts of the hub ---

    def _snapshot(self) -> list[HubEvent]:
        return [*self._peers.snapshot(), *self._router.offered()]

    def _ports_changed(self, names: frozenset[str], paths: PortPaths) -> None:
        ours = [peer for peer in self._peers if isinstance(peer.connector, PortConnector)]
        for peer in ours:
            self._peers.set_present(peer, peer.info.port in names)
        absent = [peer for peer in ours if not peer.present]
        for peer in absent[: max(0, len(absent) - MAX_PORTS)]:
            self.detach(peer.info)  # a session waits for its port's return, but not for any number of ports
        for name in sorted(names):
            info = PeerInfo(HOST_PEER, PeerKind.HOST, name)
            if self._peers.get(info) is None:
                self.attach(info, PortConnector(name, paths), role=Role.GUEST)

    def _make_client(self, who: Credentials, held_elsewhere: Callable[[bytes], bool]) -> Endpoint:
        peer = PeerInfo(f"local:{who.pid}", PeerKind.LOCAL, credentials=who)
        connection = Connection(
            Role.HOST,
            self._identity,
            random_bytes=self._random_bytes,
            limits=self._local_limits,
            tally=self.refused,
            held_elsewhere=held_elsewhere,
        )
        return Endpoint(peer, connection, LocalObserver(self._router), clock=self._clock, turns=self._turns)

    # --- the process before, and the next one ---

    def _resume(self, sessions: SessionFile) -> None:
        try:
            data = sessions.take()
            if data is None:
                return
            saved = unpack(data, boot_id=self._identity.boot_id, now=self._clock())
        except (ChannelError, OSError) as error:
            log.warning("saved sessions are not resumed: %s", error)
            return
        found = resume.load(saved, self._make_resumed, self._service.resume_offer)
        for each in found:
            self._waiting.add(each)
        log.info("%d sessions of the process before go on", len(found))
        self._tasks.start(self._wait_for_others(), "sessions that nobody comes back for")

    def _make_resumed(self, peer: PeerInfo, role: Role, session: bytes) -> Endpoint:
        local = peer.kind is PeerKind.LOCAL
        connection = Connection.import_state(
            session,
            role,
            self._identity,
            random_bytes=self._random_bytes,
            limits=self._local_limits if local else self._terms.limits,
            tally=self.refused,
        )
        return Endpoint(peer, connection, LocalObserver(self._router), clock=self._clock, turns=self._turns)

    async def _wait_for_others(self) -> None:
        await asyncio.sleep(CLAIM_S)
        self.end_waiting()

    def _live(self, servers: Iterable[LocalServer]) -> list[Resumable]:
        peers = [Resumable(peer.endpoint, peer.owner) for peer in self._peers]
        clients = [Resumable(client) for server in servers for client in server.clients]
        return [*peers, *clients, *self._waiting.all()]

    async def _save(self, sessions: SessionFile, servers: list[LocalServer]) -> None:
        """Freeze everything at one moment and leave it to the next process."""
        endpoints = [each.endpoint for each in self._live(servers)]
        resume.end_own_channels(endpoints, self._service.offers)
        await _drain(endpoints)
        for peer in self._peers:
            if peer.task is not None:
                peer.task.cancel()  # no link comes any more
        live = self._live(servers)
        self._waiting.take()
        for each in live:
            each.endpoint.drop_link("the hub restarts")
        # Again, for what was opened meanwhile.
        resume.end_own_channels((each.endpoint for each in live), self._service.offers)
        try:
            saved = resume.save(live, self._service.offers, boot_id=self._identity.boot_id, now=self._clock())
            sessions.put(pack(within(saved)))
            log.info("%d sessions are left to the next process", len(saved.endpoints))
        except OSError as error:
            log.error("sessions are lost: %s cannot be written: %s", sessions.path, error.strerror)
        except Exception:
            log.exception("sessions are lost: internal error")


async def _drain(endpoints: Iterable[Endpoint]) -> None:
    async with asyncio.TaskGroup() as group:
        for endpoint in endpoints:
            group.create_task(endpoint.drain(_DRAIN_S), name=f"drain {endpoint.peer}")
