# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the limits of a connection bound, in both directions, and what passes whatever they are."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.core.channel_state import MIN_WINDOW, message_cost
from fence_vmchannel.core.connection import (
    FRAME_COST,
    MAX_FRAGMENT,
    ChannelOpened,
    Closed,
    Granted,
    Limits,
    Priority,
    Role,
)
from fence_vmchannel.core.frames import Frame, FrameType
from fence_vmchannel.core.windows import RESERVED_BYTES, RESERVED_WINDOW
from fence_vmchannel.errors import ChannelClosed, CloseCode, ServiceRefused
from tests.fakes.conversation import Conversation
from tests.fakes.raw_peer import RawPeer

KIB = 1024
ENDLESS = 2**62


def opening(
    window: int = ENDLESS, priority: Priority = Priority.NORMAL, target: str = "org.example.x"
) -> bytes:
    """The payload of an OPEN."""
    return struct.pack(">BQH", priority, window, len(target)) + target.encode()


def credit(delivered: int, limit: int) -> bytes:
    return struct.pack(">QQ", delivered, limit)


def greeted(limits: Limits, role: Role = Role.HOST) -> RawPeer:
    """A connection with these limits, whose peer is raw."""
    peer = RawPeer(role, limits)
    peer.greet()
    peer.connection.events()
    return peer


def window_in(frame: Frame) -> int:
    """What an OPEN or ACCEPT promises."""
    where = 1 if frame.type == FrameType.OPEN else 0
    window: int = struct.unpack_from(">Q", frame.payload, where)[0]
    return window


def limit_in(frame: Frame) -> int:
    """How far a CREDIT lets the peer send."""
    limit: int = struct.unpack(">QQ", frame.payload)[1]
    return limit


# --- one channel ---


def test_a_window_is_cut_to_the_limit_in_both_directions() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB))
    peer.send(FrameType.OPEN, opening(), channel=1)
    peer.connection.accept(1, window=ENDLESS)
    peer.connection.open("org.example.y", window=ENDLESS)
    promised = [window_in(frame) for frame in peer.receive()]
    peer.send(FrameType.ACCEPT, struct.pack(">Q", ENDLESS), channel=2)
    assert promised == [100 * KIB, 100 * KIB]
    assert message_cost(peer.connection.credit(1)) == 100 * KIB
    assert message_cost(peer.connection.credit(2)) == 100 * KIB


def test_a_grant_is_cut_to_the_limit_and_so_is_the_peers() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB))
    peer.send(FrameType.OPEN, opening(1_000), channel=1)
    peer.connection.accept(1, window=1_000)
    peer.receive()
    peer.connection.grant(1, 0, ENDLESS)
    assert [limit_in(frame) for frame in peer.receive()] == [100 * KIB]
    peer.connection.events()
    peer.send(FrameType.CREDIT, credit(0, ENDLESS), channel=1)
    assert peer.connection.events() == [Granted(1, 0, 100 * KIB)]


@given(limit=st.integers(0, MIN_WINDOW), wanted=st.integers(MIN_WINDOW, ENDLESS))
def test_whatever_the_limit_the_largest_fragment_passes_both_ways(limit: int, wanted: int) -> None:
    limits = Limits(max_window_bytes=limit, session_bytes=MIN_WINDOW, target_bytes={"org.example.x": limit})
    peer = greeted(limits)
    peer.send(FrameType.OPEN, opening(wanted), channel=1)
    peer.connection.accept(1, window=wanted)
    assert [window_in(frame) for frame in peer.receive()] == [MIN_WINDOW]
    assert peer.connection.credit(1) == peer.connection.max_message(1) == MAX_FRAGMENT


def test_a_channel_that_began_without_a_window_may_be_granted_a_fragment_in_a_full_session() -> None:
    peer = greeted(Limits(session_bytes=2 * MIN_WINDOW))
    for number in (1, 3):
        peer.send(FrameType.OPEN, opening(0), channel=number)
        peer.connection.accept(number, window=0)
    peer.receive()
    peer.connection.events()
    for number in (1, 3):
        peer.connection.grant(number, 0, ENDLESS)
        peer.send(FrameType.CREDIT, credit(0, ENDLESS), channel=number)
    assert [limit_in(frame) for frame in peer.receive()] == [MIN_WINDOW, MIN_WINDOW]
    assert peer.connection.events() == [Granted(1, 0, MIN_WINDOW), Granted(3, 0, MIN_WINDOW)]


def test_the_limit_of_a_target_only_narrows_and_only_its_own_channels() -> None:
    peer = greeted(Limits(max_window_bytes=200 * KIB, target_bytes={"small": 64 * KIB, "large": 900 * KIB}))
    for target in ("small", "large", "other"):
        peer.connection.open(target, window=ENDLESS)
    assert [window_in(frame) for frame in peer.receive()] == [64 * KIB, 200 * KIB, 200 * KIB]
    peer.send(FrameType.OPEN, opening(ENDLESS, target="small"), channel=1)
    (opened,) = peer.connection.events()
    assert isinstance(opened, ChannelOpened)
    assert opened.window == 64 * KIB


@pytest.mark.parametrize("priority", [Priority.CONTROL, Priority.FENCING])
def test_no_limit_takes_the_reserved_window_from_fencing(priority: Priority) -> None:
    peer = greeted(Limits(max_window_bytes=0, session_bytes=0, channels=0, target_bytes={"fence": 0}))
    with pytest.raises(ServiceRefused):
        peer.connection.open("fence", window=1)
    peer.connection.open("fence", window=ENDLESS, priority=priority)
    assert [window_in(frame) for frame in peer.receive()] == [RESERVED_WINDOW]
    peer.send(FrameType.OPEN, opening(ENDLESS, priority, "fence"), channel=1)
    peer.connection.accept(1, window=ENDLESS)
    assert message_cost(peer.connection.credit(1)) == RESERVED_WINDOW


# --- all channels of a session ---


def test_what_the_peer_lets_us_send_is_bounded_over_all_channels() -> None:
    """A peer with many channels and endless windows makes us queue so much and no more."""
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=350 * KIB))
    for number in (1, 3, 5, 7):
        peer.send(FrameType.OPEN, opening(), channel=number)
        if number < 7:
            peer.connection.accept(number, window=0)
    refused = [frame for frame in peer.receive() if frame.type == FrameType.CLOSE]
    assert [(frame.channel, frame.payload[:2]) for frame in refused] == [(7, b"\0\3")]
    for number in (1, 3, 5):
        peer.send(FrameType.CREDIT, credit(0, ENDLESS), channel=number)
        peer.connection.send(number, bytes(peer.connection.credit(number)))
    assert peer.connection.unsent_bytes <= 350 * KIB


def test_what_we_open_counts_with_what_we_may_send() -> None:
    """Its payload waits with all else for a peer that is away."""
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=150 * KIB))
    peer.send(FrameType.OPEN, opening(), channel=1)
    first = peer.connection.open("a", window=0, payload=bytes(MAX_FRAGMENT))
    for _ in range(5):
        with pytest.raises(ServiceRefused) as refused:
            peer.connection.open("b", window=0, payload=bytes(MAX_FRAGMENT))
        assert refused.value.code is CloseCode.LIMIT
    peer.receive()
    for number in (1, first):
        peer.send(FrameType.CLOSE, b"\0\0", channel=number)
    for _ in range(150 * KIB // MIN_WINDOW):  # the refused ones have left nothing behind
        peer.connection.open("b", window=0, payload=bytes(MAX_FRAGMENT))


def test_a_peer_that_accepts_with_more_than_there_is_room_for_ends_that_channel_only() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=150 * KIB))
    first = peer.connection.open("a", window=0)
    second = peer.connection.open("b", window=0)
    peer.receive()
    for number in (first, second):
        peer.send(FrameType.ACCEPT, struct.pack(">Q", ENDLESS), channel=number)
    closed = [event for event in peer.connection.events() if isinstance(event, Closed)]
    assert [(event.channel, event.code) for event in closed] == [(second, CloseCode.LIMIT)]
    assert [(frame.type, frame.channel) for frame in peer.receive()] == [(FrameType.CANCEL, second)]
    assert peer.connection.credit(first) > 0
    with pytest.raises(ChannelClosed):
        peer.connection.send(second, b"x")


def test_growing_grants_do_not_pass_the_limit_of_the_session() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=150 * KIB))
    for number in (1, 3):
        peer.send(FrameType.OPEN, opening(0), channel=number)
        peer.connection.accept(number, window=0)
    peer.receive()
    for number in (1, 3):
        peer.connection.grant(number, 0, ENDLESS)
    assert [limit_in(frame) for frame in peer.receive()] == [100 * KIB, 50 * KIB]


def test_channels_that_end_give_their_room_back() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=100 * KIB))
    for number in range(1, 41, 2):
        peer.send(FrameType.OPEN, opening(), channel=number)
        peer.connection.accept(number, window=ENDLESS)
        peer.send(FrameType.CLOSE, b"\0\0", channel=number)
    ours = peer.connection.open("x", window=ENDLESS)
    peer.receive()
    peer.send(FrameType.ACCEPT, struct.pack(">Q", ENDLESS), channel=ours)
    assert message_cost(peer.connection.credit(ours)) == 100 * KIB


def test_a_reset_gives_the_room_back() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=100 * KIB))
    for nonce in range(5):
        peer.send(FrameType.OPEN, opening(), channel=1)
        peer.connection.accept(1, window=ENDLESS)
        peer.connection.link_down(peer.now)
        peer.now += 60
        peer.greet(nonce + 1)
    peer.send(FrameType.OPEN, opening(), channel=1)
    peer.connection.accept(1, window=ENDLESS)
    assert message_cost(peer.connection.credit(1)) == 100 * KIB


def test_fences_have_their_bytes_beyond_a_full_session() -> None:
    peer = greeted(Limits(max_window_bytes=100 * KIB, session_bytes=100 * KIB))
    peer.send(FrameType.OPEN, opening(), channel=1)
    peer.connection.accept(1, window=ENDLESS)
    fences = RESERVED_BYTES // RESERVED_WINDOW
    for number in range(3, 3 + 2 * fences, 2):
        peer.send(FrameType.OPEN, opening(ENDLESS, Priority.FENCING), channel=number)
        peer.connection.accept(number, window=ENDLESS)
    assert peer.connection.channels == 1 + fences


# --- a session that goes on in another process, with other limits ---


def test_a_session_that_goes_on_under_smaller_limits_keeps_its_windows_and_delivers() -> None:
    talk = Conversation()
    talk.connect()
    stream = talk.guest.open("bulk")
    talk.run(1)
    size = talk.guest.window - 2 * FRAME_COST
    assert talk.guest.try_send("bulk", size)
    talk.run(1)
    state = talk.host.connection.export_state()
    talk.cut()
    talk.limits = Limits(max_window_bytes=MIN_WINDOW, session_bytes=MIN_WINDOW)
    talk.host.connection = talk.import_connection(Role.HOST, state)
    talk.host.window *= 2  # the readers want more than they had, and get what they had
    talk.guest.window *= 2
    talk.connect()
    talk.run(1)
    for _ in range(20):
        assert talk.guest.try_send("bulk", size)
        assert talk.host.try_send("bulk", size)
        talk.run(1)
    assert not stream.ended
    assert talk.host.by_target["bulk"].got == 21


# --- a peer that is away, and nothing is kept for it ---


def test_what_is_abandoned_leaves_the_queue_and_ends_with_its_session_going_on() -> None:
    talk = Conversation()
    talk.connect()
    fence = talk.guest.open("fence", Priority.FENCING)
    bulk, kept = talk.guest.open("bulk"), talk.guest.open("kept")
    talk.run(1)
    talk.cut()
    for target in ("fence", "bulk", "kept"):
        assert talk.guest.try_send(target, 1_000)
    lost = talk.guest.connection.abandon(lambda target: target == "kept", CloseCode.PEER_GONE, "away")
    assert lost == {bulk.number: message_cost(1_000)}
    assert talk.guest.connection.unsent_bytes < 2_100
    talk.guest.streams.pop(bulk.number)
    talk.connect()
    talk.run(1)
    assert [talk.host.by_target[target].got for target in ("fence", "bulk", "kept")] == [1, 0, 1]
    closed = [event for event in talk.host.events if isinstance(event, Closed)]
    assert closed == [Closed(bulk.number, CloseCode.PEER_GONE, "away", True)]
    assert not fence.ended
    assert not kept.ended
