# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking all sessions of a hub out of one process, and going on with them in the next.

What joins two channels holds nothing itself: all data, and all credit, is in the two sessions. So a relay is
saved as four numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from fence_vmchannel.core.events import Role
from fence_vmchannel.core.greeting import NO_SESSION
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import ChannelError, CloseCode
from fence_vmchannel.hub.relay import joined_to, rejoin
from fence_vmchannel.hub.saved_hub import (
    SavedEndpoint,
    SavedHub,
    SavedOffer,
    SavedRelay,
    saved_endpoint,
)
from fence_vmchannel.hub.waiting import Resumable
from fence_vmchannel.peers import PeerInfo
from fence_vmchannel.shell import Shell

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

RESTARTS: Final = "the hub restarts; ask again"


class MakeEndpoint(Protocol):
    """Makes an endpoint that goes on with a session; `Hub` knows identity, limits and observers."""

    def __call__(self, peer: PeerInfo, role: Role, session: bytes) -> Endpoint:
        """Raises RemoteProtocolError: the session is damaged."""
        ...


Offers = Mapping[tuple[Endpoint, int], str]


def end_own_channels(endpoints: Iterable[Endpoint], offers: Offers) -> None:
    """End the channels that this process itself uses: what serves them ends with it."""
    for endpoint in endpoints:
        for channel, user in endpoint.users.items():
            if joined_to(user) is None and (endpoint, channel) not in offers:
                endpoint.end(channel, CloseCode.SHUTDOWN, RESTARTS)


def save(live: Iterable[Resumable], offers: Offers, *, boot_id: str, now: float) -> SavedHub:
    """Take everything out. The endpoints, which have no links any more, are dead afterwards."""
    resumables = [each for each in live if _worth_saving(each.endpoint)]
    places: dict[Shell, int] = {each.endpoint: place for place, each in enumerate(resumables)}
    relays = _relays(places)
    saved_offers = (
        SavedOffer(places[endpoint], channel, service)
        for (endpoint, channel), service in offers.items()
        if endpoint in places
    )
    return SavedHub(
        boot_id=boot_id,
        saved_at_ms=int(now * 1000),
        relays=tuple(relays),
        offers=tuple(saved_offers),
        endpoints=tuple(_export(each) for each in resumables),
    )


def load(saved: SavedHub, make: MakeEndpoint, offer: Callable[[Endpoint, int, str], None]) -> list[Resumable]:
    """Go on with what `save` took. A session that cannot be used is left out, and what hung on it is told.

    Args:
        saved: what the process before left.
        make: makes the endpoints.
        offer: goes on with an offer of an application.
    """
    found: dict[int, Resumable] = {}
    for place, each in enumerate(saved.endpoints):
        try:
            found[place] = Resumable(make(each.peer(), Role(each.role), each.session), each.owner)
        except (ChannelError, ValueError) as error:
            log.warning("the saved session of %r cannot be resumed: %s", each.name[:64], error)
    living = {place: set(each.endpoint.connection.living_channels) for place, each in found.items()}
    for relay in saved.relays:
        if relay.channel in living.get(relay.endpoint, ()) and relay.other_channel in living.get(
            relay.other_endpoint, ()
        ):
            inward, outward = found[relay.endpoint].endpoint, found[relay.other_endpoint].endpoint
            rejoin(inward, relay.channel, outward, relay.other_channel)
    for one in saved.offers:
        if one.channel in living.get(one.endpoint, ()):
            offer(found[one.endpoint].endpoint, one.channel, one.service)
    for place, resumed in found.items():
        _end_orphans(resumed.endpoint, living[place])
    return list(found.values())


def _worth_saving(endpoint: Endpoint) -> bool:
    return endpoint.connection.session_id != NO_SESSION or endpoint.connection.channels > 0


def _export(each: Resumable) -> SavedEndpoint:
    endpoint = each.endpoint
    try:
        session = endpoint.export()
    except ChannelError as error:
        log.warning("the session of %s cannot be saved: %s", endpoint.peer, error)
        session = b""
    return saved_endpoint(endpoint.peer, each.owner, endpoint.connection.role, session)


def _relays(places: Mapping[Shell, int]) -> Iterable[SavedRelay]:
    relays: list[SavedRelay] = []
    for endpoint, place in places.items():
        for channel, user in endpoint.users.items():
            joined = joined_to(user)
            if joined is None or joined[0] not in places:
                continue
            relay = SavedRelay(place, channel, places[joined[0]], joined[1])
            if (place, channel) < (relay.other_endpoint, relay.other_channel):  # each is met twice
                relays.append(relay)
    return relays


def _end_orphans(endpoint: Endpoint, living: Iterable[int]) -> None:
    """What the other end of a channel's relay was is not here: never let it wait in silence."""
    used = endpoint.users
    for channel in living:
        if channel not in used:
            endpoint.close(channel, CloseCode.SESSION_RESET, "its other half was not saved")
