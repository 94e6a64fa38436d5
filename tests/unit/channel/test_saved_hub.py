# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a stopping hub leaves: read back as it was, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.access import Credentials
from fence_vmchannel.core.events import Role
from fence_vmchannel.errors import RemoteProtocolError
from fence_vmchannel.hub.saved_hub import (
    MAX_AGE_S,
    SavedHub,
    SavedOffer,
    SavedRelay,
    pack,
    saved_endpoint,
    unpack,
    within,
)
from fence_vmchannel.peers import PeerInfo, PeerKind

NUMBERS = st.integers(0, 2**32)
PEERS = st.builds(
    PeerInfo,
    name=st.text(max_size=40),
    kind=st.sampled_from((PeerKind.HOST, PeerKind.VM)),
    port=st.text(max_size=40),
    key=st.text(max_size=36),
)
WHO = st.builds(Credentials, NUMBERS, NUMBERS, NUMBERS, st.frozensets(NUMBERS, max_size=5))
APPLICATIONS = st.builds(PeerInfo, name=st.text(max_size=20), kind=st.just(PeerKind.LOCAL), credentials=WHO)
HUBS = st.builds(
    SavedHub,
    boot_id=st.just("boot"),
    saved_at_ms=st.just(1_000_000),
    endpoints=st.lists(
        st.builds(
            saved_endpoint,
            PEERS | APPLICATIONS,
            st.text(max_size=100),
            st.sampled_from(Role),
            st.binary(max_size=200),
        ),
        max_size=4,
    ).map(tuple),
    relays=st.lists(st.builds(SavedRelay, NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=4).map(tuple),
    offers=st.lists(st.builds(SavedOffer, NUMBERS, NUMBERS, st.text(max_size=20)), max_size=4).map(tuple),
)
EMPTY = SavedHub("boot", 1_000_000)


@given(HUBS)
def test_what_is_read_is_what_was_saved(saved: SavedHub) -> None:
    assert unpack(pack(saved), boot_id="boot", now=1_000.5) == saved


@given(PEERS | APPLICATIONS)
def test_a_peer_is_who_it_was(peer: PeerInfo) -> None:
    assert saved_endpoint(peer, "", Role.HOST, b"").peer() == peer


@given(HUBS, st.data())
def test_every_damage_is_refused(saved: SavedHub, data: st.DataObject) -> None:
    packed = bytearray(pack(saved))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RemoteProtocolError):
        unpack(bytes(packed), boot_id="boot", now=1_000.5)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack(garbage, boot_id="boot", now=1_000.5)


def test_another_boot_an_old_time_and_a_time_to_come_are_refused() -> None:
    packed = pack(EMPTY)
    assert unpack(packed, boot_id="boot", now=1_000 + MAX_AGE_S) == EMPTY
    with pytest.raises(RemoteProtocolError, match="booted"):
        unpack(packed, boot_id="another", now=1_000)
    for now in (1_000.1 + MAX_AGE_S, 999.9):
        with pytest.raises(RemoteProtocolError, match="ago"):
            unpack(packed, boot_id="boot", now=now)


@given(st.lists(st.integers(0, 1_000), max_size=20), st.integers(0, 5_000))
def test_the_largest_sessions_are_left_out_until_the_rest_fits(sizes: list[int], most: int) -> None:
    peer = PeerInfo("vm", PeerKind.VM)
    before = replace(
        EMPTY, endpoints=tuple(saved_endpoint(peer, "", Role.HOST, bytes(size)) for size in sizes)
    )
    left = [len(each.session) for each in within(before, most).endpoints]
    assert sum(left) <= most
    dropped = [size for size, now in zip(sizes, left, strict=True) if now != size]
    kept = [size for size, now in zip(sizes, left, strict=True) if now == size]
    assert min(dropped, default=10_000) >= max(kept, default=0)
    if dropped:
        assert sum(left) + min(dropped) > most
