# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a channel goes: to a service of this process, to a local application, or on to a peer.

A peer reaches the services that this hub's process and its local applications offer, nothing else: never
another peer. A local application reaches the peers' services as the access rules allow, and ".hub".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fence_vmchannel.access import AccessRules, Credentials
from fence_vmchannel.addresses import HUB_SERVICE, Address, check_service, parse_address
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import ChannelOpened, Priority
from fence_vmchannel.core.tally import Refusal, Tally
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import ChannelError, CloseCode, LocalProtocolError, ServiceRefused
from fence_vmchannel.hub.events import HubEvent, ServiceOffered, ServiceWithdrawn
from fence_vmchannel.hub.local_protocol import Origin, encode_local
from fence_vmchannel.hub.relay import relay, relayed
from fence_vmchannel.hub.serving import Handler, serve_channel
from fence_vmchannel.hub.shares import may_take, owner
from fence_vmchannel.logs import RateLimitedLog, quoted
from fence_vmchannel.pace import Pace

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class OwnService:
    """A service of this process."""

    handler: Handler
    to_local: bool  # local applications may open it too
    owner: str = "hub"


@dataclass(frozen=True, slots=True)
class AppService:
    """A service that a local application offers."""

    endpoint: Endpoint
    owner: str


Service = OwnService | AppService


class PeerFinder(Protocol):
    """Where the router looks peers up."""

    def find(self, address: Address) -> Endpoint:
        """The endpoint that the address names. Raises ServiceRefused: none, several, or it is away."""
        ...


class Router:
    """The services of one hub, and the way of each new channel."""

    def __init__(
        self,
        peers: PeerFinder,
        access: AccessRules,
        priorities: Mapping[str, Priority],
        *,
        start: Callable[[Coroutine[object, object, None], str], object],
        publish: Callable[[HubEvent], None],
        clock: Callable[[], float],
        tally: Tally,
        opening: Pace,
    ) -> None:
        """`opening` is how fast each may open channels: who is faster is read later."""
        self._peers = peers
        self._opening = opening
        self._tally = tally
        self._access = access
        self._priorities = priorities
        self._start = start
        self._publish = publish
        self._services: dict[str, Service] = {}
        self._noise = RateLimitedLog(log, clock=clock)

    # --- services ---

    def add(self, name: str, service: Service) -> None:
        """Offer a service.

        Raises:
            LocalProtocolError: `name` is no service name.
            ServiceRefused: somebody offers it already.
        """
        check_service(name)
        if name in self._services:
            raise ServiceRefused(
                CloseCode.LIMIT, f"{name} is offered already, by {self._services[name].owner}"
            )
        self._services[name] = service
        if name != HUB_SERVICE:
            self._publish(ServiceOffered(name, service.owner))

    def remove(self, name: str) -> None:
        """Offer the service no more; its open channels go on."""
        if self._services.pop(name, None) is not None:
            self._publish(ServiceWithdrawn(name))

    def add_application(self, name: str, endpoint: Endpoint) -> None:
        """A local application offers a service; raises as `add`, and ServiceRefused if it may not."""
        if name.startswith("."):
            raise LocalProtocolError(f"{quoted(name)} is a name of the hub itself")
        who = endpoint.peer.credentials
        if who is None or not self._access.may_offer(name, who):
            raise ServiceRefused(CloseCode.NOT_PERMITTED, f"{who} may not offer {quoted(name)}")
        self.add(name, AppService(endpoint, str(who)))

    def offered(self) -> Iterator[ServiceOffered]:
        """All services but the hub's own."""
        for name, service in self._services.items():
            if name != HUB_SERVICE:
                yield ServiceOffered(name, service.owner)

    def priority(self, service: str) -> Priority:
        """How the channels of a service are scheduled; an application cannot choose."""
        return self._priorities.get(service, Priority.NORMAL)

    # --- channels ---

    def from_peer(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """A peer opened a channel."""
        self._slow_down(endpoint)
        service = None if event.target.startswith(".") else self._services.get(event.target)
        if service is None:
            reason = f"nobody offers {quoted(event.target)} here"
            self._refuse(endpoint, event, CloseCode.UNKNOWN_SERVICE, reason)
        else:
            self._hand_over(endpoint, event, service)

    def from_local(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """A local application opened a channel."""
        self._slow_down(endpoint)
        try:
            self._route_local(endpoint, event)
        except ServiceRefused as error:
            self._refuse(endpoint, event, error.code, error.reason)
        except ChannelError as error:
            self._refuse(endpoint, event, CloseCode.PROTOCOL, str(error))

    def _slow_down(self, endpoint: Endpoint) -> None:
        """Count a channel. Each costs a task here or work of an application that others use too, so one who
        opens and closes them as fast as he can waits, though he never holds more than his share (S7).
        """
        who = owner(endpoint.peer)
        if who is not None:
            endpoint.rest(self._opening.wait_s(who))

    def _route_local(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        service = self._services.get(event.target)
        if isinstance(service, OwnService) and service.to_local:
            self._hand_over(endpoint, event, service)
            return
        address = parse_address(event.target)
        if address.service.startswith("."):
            raise ServiceRefused(CloseCode.UNKNOWN_SERVICE, f"the hub has no {quoted(address.service)}")
        who = endpoint.peer.credentials
        if who is None or not self._access.may_open(address.service, who):
            raise ServiceRefused(CloseCode.NOT_PERMITTED, _not_permitted(address.service, who))
        target = self._peers.find(address)
        self._pass_on(endpoint, event, target, address.service, event.payload)

    def _hand_over(self, endpoint: Endpoint, event: ChannelOpened, service: Service) -> None:
        if isinstance(service, OwnService):
            channel = Channel.incoming(endpoint, endpoint.peer, event)
            self._start(serve_channel(service.handler, channel), f"{event.target} for {endpoint.peer}")
            return
        peer = endpoint.peer
        origin = Origin(peer.name, peer.port, peer.kind.value, event.payload, peer.key)
        try:
            self._pass_on(endpoint, event, service.endpoint, event.target, encode_local(origin))
        except ChannelError as error:
            self._refuse(endpoint, event, CloseCode.LIMIT, str(error))

    def _pass_on(
        self, source: Endpoint, event: ChannelOpened, target: Endpoint, service: str, payload: bytes
    ) -> None:
        """Relay the channel, unless its opener holds his share of the target already. Fences have no shares.

        Raises:
            ChannelError: it cannot be opened there.
        """
        priority = self.priority(service)
        who = owner(source.peer)
        if priority is Priority.NORMAL and who is not None:
            held = [channel for channel, other in relayed(target) if owner(other.peer) == who]
            size = sum(map(target.connection.promised, held))
            channels, room, cost = target.connection.room(service, event.window)
            if not may_take(1, held=len(held), free=channels) or not may_take(cost, held=size, free=room):
                share = f"{len(held)} channels with windows of {size} bytes"
                raise ServiceRefused(
                    CloseCode.LIMIT, f"{source.peer} holds {share} there, which is his share"
                )
        relay(source, event, target, service, payload=payload, priority=priority)

    def _refuse(self, endpoint: Endpoint, event: ChannelOpened, code: CloseCode, reason: str) -> None:
        self._tally[Refusal.CHANNEL_LIMIT if code is CloseCode.LIMIT else Refusal.SERVICE] += 1
        self._noise.warning(
            "peer %s: channel to %s refused: %s", endpoint.peer, quoted(event.target), quoted(reason)
        )
        endpoint.close(event.channel, code, reason[:1000])


def _not_permitted(service: str, who: Credentials | None) -> str:
    return (
        f"{who} may not open {quoted(service)}: the hub's access rules name neither this user nor his groups"
    )
