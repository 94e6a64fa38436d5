# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions, relays and offers of a hub: taken out, written, read, and gone on with, at any moment."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fence_vmchannel.access import Credentials
from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.hub import resume
from fence_vmchannel.hub.relay import joined_to, rejoin
from fence_vmchannel.hub.saved_hub import SavedHub, pack, unpack
from fence_vmchannel.hub.waiting import Resumable
from fence_vmchannel.peers import PeerInfo, PeerKind
from tests.fakes.conversation import Conversation, seeded_bytes
from tests.unit.channel_api.test_waiting import VM, Nobody

APPLICATION = PeerInfo("local:1", PeerKind.LOCAL, credentials=Credentials(1, 1000, 1000))


def busy_endpoint(peer: PeerInfo, channels: int, rng: random.Random) -> tuple[Endpoint, list[int]]:
    """An endpoint in the middle of things, its link gone: data is queued, and data is unacknowledged."""
    talk = Conversation(seed=rng.randrange(1_000))
    talk.connect()
    for number in range(channels):
        rng.choice(talk.applications).open(f"channel {number}")
    talk.run(1)
    for number in range(channels):
        for side in talk.applications:
            while rng.random() < 0.6:
                side.try_send(f"channel {number}", rng.randrange(30_000))
        if rng.random() < 0.1:
            talk.host.close(f"channel {number}")
    talk.host.connection.data_to_send(talk.now, rng.randrange(1, 50_000))
    talk.cut()
    endpoint = Endpoint(peer, talk.host.connection, Nobody(), clock=lambda: 0.0)
    return endpoint, list(talk.host.connection.living_channels)


def make(peer: PeerInfo, role: Role, session: bytes) -> Endpoint:
    connection = Connection.import_state(
        session, role, PeerIdentity("host-boot"), random_bytes=seeded_bytes(1)
    )
    return Endpoint(peer, connection, Nobody(), clock=lambda: 0.0)


class Offers(dict[tuple[Endpoint, int], str]):
    """Offers, as `resume.load` gives them back; whoever uses the channel is nobody here."""

    def go_on(self, endpoint: Endpoint, channel: int, service: str) -> None:
        self[endpoint, channel] = service
        endpoint.adopt(channel, object())  # type: ignore[arg-type]


def busy_hub(rng: random.Random) -> tuple[list[Resumable], Offers]:
    """Two peers and two applications; some of their channels are joined, one stands for an offer."""
    vms = [replace(VM, name=f"vm{number}") for number in range(2)]
    applications = [replace(APPLICATION, name=f"local:{number}") for number in range(2)]
    live, free = list[Resumable](), list[tuple[Endpoint, int]]()
    for peer in (*vms, *applications):
        endpoint, channels = busy_endpoint(peer, rng.randrange(5), rng)
        live.append(Resumable(endpoint, "pid 1" if peer.kind is PeerKind.VM else ""))
        free += [(endpoint, channel) for channel in channels]
    offers = Offers()
    rng.shuffle(free)
    if free:
        offers.go_on(*free.pop(), "org.example.offered")
    while len(free) > 1:
        one, other = free.pop(), free.pop()
        if one[0] is not other[0]:
            rejoin(*one, *other)
    return live, offers


def taken(live: list[Resumable], offers: Offers) -> SavedHub:
    resume.end_own_channels((each.endpoint for each in live), offers)
    return resume.save(live, offers, boot_id="boot", now=1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_what_goes_on_is_what_was_taken(seed: int) -> None:
    async def check() -> None:
        saved = taken(*busy_hub(random.Random(seed)))
        again = Offers()
        read = unpack(pack(saved), boot_id="boot", now=1.0)
        found = resume.load(read, make, again.go_on)
        relays = {(one.endpoint, one.channel) for one in saved.relays}
        relays |= {(one.other_endpoint, one.other_channel) for one in saved.relays}
        for place, each in enumerate(found):
            for channel, user in each.endpoint.users.items():
                assert (joined_to(user) is not None) == ((place, channel) in relays)
            # Whatever is used by nobody has been ended, so that no peer waits for it.
            assert set(each.endpoint.connection.living_channels) == set(each.endpoint.users)
        assert len(again) == len(saved.offers)

    asyncio.run(check())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_a_session_that_is_missing_ends_only_what_hung_on_it(seed: int) -> None:
    async def check() -> None:
        rng = random.Random(seed)
        saved = taken(*busy_hub(rng))
        if not saved.endpoints:
            return
        missing = rng.randrange(len(saved.endpoints))
        endpoints = list(saved.endpoints)
        endpoints[missing] = replace(endpoints[missing], session=b"")
        again = Offers()
        found = resume.load(replace(saved, endpoints=tuple(endpoints)), make, again.go_on)
        assert len(found) == len(endpoints) - 1
        whole = [one for one in saved.relays if missing not in (one.endpoint, one.other_endpoint)]
        assert sum(len(each.endpoint.users) for each in found) == 2 * len(whole) + len(again)
        for each in found:
            assert set(each.endpoint.connection.living_channels) == set(each.endpoint.users)

    asyncio.run(check())
