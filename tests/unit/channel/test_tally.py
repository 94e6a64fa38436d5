# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each kind of refused input is counted where it is refused; what is right costs no count."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest

from fence_vmchannel.core.connection import Connection, Limits, PeerIdentity, Role
from fence_vmchannel.core.frames import MAGIC, MAX_BAD_HEADERS, FrameType
from fence_vmchannel.core.greeting import NO_SESSION, Numbers
from fence_vmchannel.core.session_state import SessionState
from fence_vmchannel.core.tally import Refusal, Tally
from tests.fakes.conversation import seeded_bytes
from tests.fakes.raw_peer import RawPeer

LIMITS = Limits(channels=4)


def opening(window: int = 200_000) -> bytes:
    """The payload of an OPEN."""
    return struct.pack(">BQH", 2, window, 1) + b"x"


def garbage(peer: RawPeer) -> None:
    peer.send_raw(b"\0nothing\0")


def misfit(peer: RawPeer) -> None:
    peer.send(FrameType.ACK, bytes(12), ack=7, ack_check=7)


def broken_rule(peer: RawPeer) -> None:
    peer.send(FrameType.DATA, b"x", channel=99)


def unknown_frame(peer: RawPeer) -> None:
    peer.send(31)


def too_much_data(peer: RawPeer) -> None:
    peer.send(FrameType.OPEN, opening(), channel=1)
    peer.connection.accept(1, window=1_000)
    peer.send(FrameType.DATA, bytes(2_000), channel=1)


def one_channel_too_many(peer: RawPeer) -> None:
    for number in range(1, 2 * LIMITS.channels + 2, 2):
        peer.send(FrameType.OPEN, opening(), channel=number)


def no_common_version(peer: RawPeer) -> None:
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    peer.send_hello(nonce, Numbers(NO_SESSION, 0, 0, 0, 0, 0), versions=(99,))


CASES: Mapping[Refusal, Callable[[RawPeer], None]] = MappingProxyType(
    {
        Refusal.GARBAGE: garbage,
        Refusal.MISFIT: misfit,
        Refusal.PROTOCOL: broken_rule,
        Refusal.VERSION: no_common_version,
        Refusal.UNKNOWN_FRAME: unknown_frame,
        Refusal.CHANNEL: too_much_data,
        Refusal.CHANNEL_LIMIT: one_channel_too_many,
    }
)

OF_THE_HUB = {Refusal.SERVICE, Refusal.CLIENT_LIMIT}
"""Counted by the hub: integration/channel/test_refused.py."""


def test_every_kind_has_a_case() -> None:
    assert CASES.keys() | OF_THE_HUB == set(Refusal)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.value)
def test_what_is_refused_is_counted_once_as_what_it_is(kind: Refusal) -> None:
    peer = RawPeer(Role.HOST, LIMITS)
    peer.greet()
    assert not peer.connection.tally
    CASES[kind](peer)
    assert peer.connection.tally == {kind: 1}


def test_garbage_before_the_greeting_is_expected_until_it_is_too_much() -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    peer.send_raw(bytes(100_000))
    assert not peer.connection.tally
    assert peer.types() == [FrameType.CHALLENGE]
    peer.send_raw((MAGIC + bytes(60)) * MAX_BAD_HEADERS)
    assert peer.connection.state is SessionState.REFUSED
    assert peer.connection.tally == {Refusal.GARBAGE: 1}


def test_connections_may_share_a_tally() -> None:
    tally = Tally()
    for seed in (1, 2):
        one = Connection(
            Role.HOST, PeerIdentity("b", "s"), random_bytes=seeded_bytes(seed), limits=LIMITS, tally=tally
        )
        peer = RawPeer(Role.HOST, connection=one)
        peer.greet()
        garbage(peer)
    assert tally == {Refusal.GARBAGE: 2}


def test_whatever_a_peer_sends_only_known_kinds_are_counted() -> None:
    chance = random.Random(7)
    for _ in range(50):
        peer = RawPeer(Role.HOST, LIMITS)
        peer.greet()
        for _ in range(20):
            if peer.connection.opened:
                peer.send(chance.randrange(256), chance.randbytes(30), channel=chance.randrange(6))
        assert set(peer.connection.tally) <= set(Refusal)


def test_a_channel_whose_window_is_used_up_is_full_until_its_reader_takes() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, opening(window=500), channel=1)
    peer.connection.accept(1, window=1_000)
    assert peer.connection.full_channels == (0, 0)
    peer.connection.send(1, bytes(peer.connection.credit(1)))
    assert peer.connection.full_channels == (1, 0)
    peer.send(FrameType.DATA, bytes(900), channel=1)
    assert peer.connection.tally == {}
    assert peer.connection.full_channels == (1, 1)
    peer.connection.grant(1, 964, 1_964)
    assert peer.connection.full_channels == (1, 0)
    peer.send(FrameType.CLOSE, struct.pack(">H", 0), channel=1)
    assert peer.connection.full_channels == (0, 0)
