# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels: credit, order, priorities, limits, closing; and what a hostile peer can do with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import MappingProxyType
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.core.channel_state import (
    CHANNEL_TRANSITIONS,
    QUANTUM,
    Channel,
    ChannelInput,
    ChannelState,
    RoundRobin,
    largest_message,
    message_cost,
)
from fence_vmchannel.core.connection import (
    FRAME_COST,
    MAX_FRAGMENT,
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Event,
    Granted,
    Limits,
    LinkRefused,
    Opened,
    Priority,
    Reset,
    Role,
)
from fence_vmchannel.core.frames import END, Frame, FrameDecoder, FrameType, frames_only
from fence_vmchannel.core.sending import BULK_IN_FLIGHT, CONTROL_IN_FLIGHT
from fence_vmchannel.core.timers import Timers
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    CreditExceeded,
    LocalProtocolError,
    MessageTooLarge,
    ServiceRefused,
)
from tests.fakes.conversation import Conversation
from tests.fakes.link import GOOD
from tests.fakes.raw_peer import RawPeer

WINDOW = 200_000


def opened_by_peer(window: int = WINDOW, priority: Priority = Priority.NORMAL, channel: int = 1) -> bytes:
    """The payload of an OPEN."""
    return struct.pack(">BQH", priority, window, 4) + b"work"


def raw_host_with_channel(limits: Limits | None = None, window: int = WINDOW) -> RawPeer:
    """A real host side; the raw guest has opened channel 1, the host has accepted it with a window of
    WINDOW."""
    peer = RawPeer(Role.HOST, limits)
    peer.greet()
    peer.send(FrameType.OPEN, opened_by_peer(window), channel=1)
    peer.connection.accept(1, window=WINDOW)
    peer.receive()
    peer.connection.events()
    return peer


def credit(delivered: int, limit: int) -> bytes:
    return struct.pack(">QQ", delivered, limit)


def of_type(frames: list[Frame], kind: FrameType) -> list[Frame]:
    return [frame for frame in frames if frame.type == kind]


# --- opening ---


def test_open_and_accept_carry_window_priority_and_payload() -> None:
    talk = Conversation()
    guest, host = talk.guest.connection, talk.host.connection
    talk.connect()
    number = guest.open("org.vmchannel.x", window=5_000, priority=Priority.FENCING, payload=b"please")
    talk.host.window = 7_000
    talk.run(1)
    opened = [event for event in talk.host.events if isinstance(event, ChannelOpened)]
    assert opened == [ChannelOpened(number, "org.vmchannel.x", Priority.FENCING, 5_000, b"please")]
    accepted = [event for event in talk.guest.events if isinstance(event, ChannelAccepted)]
    assert accepted == [ChannelAccepted(number, 7_000, b"")]
    assert guest.credit(number) == guest.max_message(number) == 7_000 - FRAME_COST
    assert host.credit(number) == 5_000 - FRAME_COST


def test_channels_may_be_opened_before_there_is_a_link() -> None:
    talk = Conversation()
    talk.guest.open("a")
    talk.host.open("b")
    talk.connect()
    talk.run(1)
    assert talk.host.by_target["a"].accepted
    assert talk.host.by_target["b"].accepted


def test_hosts_use_even_numbers_guests_odd_ones_and_none_comes_twice() -> None:
    talk = Conversation()
    host = [talk.host.connection.open("x") for _ in range(5)]
    talk.host.connection.close(host[0])
    host.append(talk.host.connection.open("x"))
    assert host == [2, 4, 6, 8, 10, 12]
    assert [talk.guest.connection.open("x") for _ in range(3)] == [1, 3, 5]


def test_a_refusal_is_told_with_its_code_and_reason() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    number = peer.connection.open("nobody")
    peer.receive()
    peer.connection.events()
    peer.send(FrameType.CLOSE, b"\0\1nobody offers it", channel=number)
    assert peer.connection.events() == [Closed(number, CloseCode.UNKNOWN_SERVICE, "nobody offers it", False)]
    assert peer.connection.channels == 0


def test_a_close_code_of_a_later_version_is_an_internal_error() -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.CLOSE, b"\x7f\x7f", channel=1)
    assert peer.connection.events() == [Closed(1, CloseCode.INTERNAL, "", False)]


def test_what_is_too_long_for_an_open_is_refused_here() -> None:
    talk = Conversation()
    with pytest.raises(MessageTooLarge):
        talk.guest.connection.open("x" * 1_025)
    with pytest.raises(MessageTooLarge):
        talk.guest.connection.open("x", payload=bytes(MAX_FRAGMENT + 1))
    with pytest.raises(LocalProtocolError):
        talk.guest.connection.open("x", window=-1)
    assert talk.guest.connection.channels == 0


def test_accepting_twice_or_what_is_ours_is_a_mistake() -> None:
    peer = raw_host_with_channel()
    ours = peer.connection.open("x")
    for number in (1, ours):
        with pytest.raises(LocalProtocolError):
            peer.connection.accept(number)
    with pytest.raises(ChannelClosed):
        peer.connection.accept(99)


# --- credit ---


def test_a_writer_stops_at_the_credit_and_goes_on_with_more() -> None:
    peer = raw_host_with_channel(window=1_000)
    assert peer.connection.credit(1) == 936
    peer.connection.send(1, bytes(900))
    assert peer.connection.credit(1) == 0
    with pytest.raises(CreditExceeded):
        peer.connection.send(1, b"x")
    peer.receive()
    peer.send(FrameType.CREDIT, credit(964, 1_964), channel=1)
    assert peer.connection.events() == [Granted(1, 964, 1_964)]
    peer.connection.send(1, bytes(936))


def test_a_message_that_no_window_could_take_is_too_large() -> None:
    peer = raw_host_with_channel(window=1_000)
    with pytest.raises(MessageTooLarge, match="936"):
        peer.connection.send(1, bytes(937))


def test_sending_needs_an_accepted_channel() -> None:
    talk = Conversation()
    number = talk.guest.connection.open("x")
    with pytest.raises(LocalProtocolError, match="not accepted"):
        talk.guest.connection.send(number, b"x")
    talk.guest.connection.close(number)
    with pytest.raises(ChannelClosed):
        talk.guest.connection.send(number, b"x")


def test_large_messages_are_cut_and_the_last_fragment_says_so() -> None:
    peer = raw_host_with_channel()
    message = bytes(range(256)) * 300
    peer.connection.send(1, memoryview(message))
    frames = of_type(peer.receive(), FrameType.DATA)
    assert b"".join(frame.payload for frame in frames) == message
    assert [len(frame.payload) for frame in frames] == [32_768, 32_768, 11_264]
    assert [frame.flags & END for frame in frames] == [0, 0, END]


def test_a_fragment_without_end_does_not_end_its_message() -> None:
    peer = raw_host_with_channel()
    peer.connection.send(1, b"begin", end=False)
    peer.connection.send(1, b"")
    first, last = of_type(peer.receive(), FrameType.DATA)
    assert (first.flags & END, last.flags & END, last.payload) == (0, END, b"")


@given(st.integers(0, 10 * MAX_FRAGMENT))
def test_cost_and_largest_message_fit_together(size: int) -> None:
    assert largest_message(message_cost(size)) >= size
    assert message_cost(largest_message(size + FRAME_COST)) <= size + FRAME_COST


def test_empty_messages_are_bounded_too() -> None:
    peer = raw_host_with_channel()
    for _ in range(WINDOW // FRAME_COST):
        peer.send(FrameType.DATA, b"", flags=END, channel=1)
    assert len(peer.connection.events()) == WINDOW // FRAME_COST
    peer.send(FrameType.DATA, b"", flags=END, channel=1)
    (event,) = peer.connection.events()
    assert isinstance(event, Closed)


def test_grants_are_merged_and_never_go_back() -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.DATA, bytes(1_000), channel=1)
    peer.connection.grant(1, 500, WINDOW + 500)
    peer.connection.grant(1, 1_064, WINDOW + 1_064)
    peer.connection.grant(1, 3, 4)
    (frame,) = of_type(peer.receive(), FrameType.CREDIT)
    assert frame.payload == credit(1_064, WINDOW + 1_064)
    peer.connection.grant(99, 0, 5)  # gone: ignored
    with pytest.raises(LocalProtocolError):
        peer.connection.grant(1, 1_065, WINDOW)


def test_credit_that_was_granted_lazily_waits_a_moment_for_more() -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.DATA, bytes(1_000), channel=1)
    peer.connection.grant(1, 500, WINDOW + 500, lazily=True)
    assert not of_type(peer.receive(), FrameType.CREDIT)
    peer.connection.grant(1, 1_064, WINDOW + 1_064, lazily=True)
    peer.now += Timers.CREDIT_DELAY_S
    peer.connection.handle_time(peer.now)
    (frame,) = of_type(peer.receive(), FrameType.CREDIT)
    assert frame.payload == credit(1_064, WINDOW + 1_064)


def test_credit_goes_out_at_once_when_half_of_the_window_is_used() -> None:
    peer = raw_host_with_channel()
    piece = WINDOW // 8 - FRAME_COST
    for number in range(1, 5):
        peer.send(FrameType.DATA, bytes(piece), channel=1)
        taken = number * (piece + FRAME_COST)
        peer.connection.grant(1, taken, WINDOW + taken, lazily=True)
        assert len(of_type(peer.receive(), FrameType.CREDIT)) == (number == 4)


def test_a_peer_that_was_promised_nothing_gets_its_first_credit_at_once() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, opened_by_peer(), channel=1)
    peer.connection.accept(1, window=0)
    peer.receive()
    peer.connection.grant(1, 0, 500, lazily=True)
    assert len(of_type(peer.receive(), FrameType.CREDIT)) == 1


# --- priorities ---


def test_control_and_fencing_overtake_bulk() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for number, priority in ((1, Priority.NORMAL), (3, Priority.FENCING), (5, Priority.CONTROL)):
        peer.send(FrameType.OPEN, opened_by_peer(WINDOW, priority), channel=number)
        peer.connection.accept(number)
    peer.receive()
    for number in (1, 3, 5):
        peer.connection.send(number, bytes(10))
    peer.connection.open("new")
    order = [(frame.type, frame.channel) for frame in peer.receive()]
    assert order == [(FrameType.DATA, 5), (FrameType.DATA, 3), (FrameType.OPEN, 2), (FrameType.DATA, 1)]


def test_bulk_stops_at_256_kib_in_flight_and_fencing_goes_on() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for number, priority in ((1, Priority.NORMAL), (3, Priority.FENCING)):
        peer.send(FrameType.OPEN, opened_by_peer(2_000_000, priority), channel=number)
        peer.connection.accept(number)
    peer.send(FrameType.OPEN, opened_by_peer(1_000, Priority.FENCING), channel=5)
    peer.receive()
    peer.send_ack()
    peer.connection.send(1, bytes(1_000_000))
    sent = sum(len(frame.payload) for frame in peer.receive())
    assert BULK_IN_FLIGHT - 2 * MAX_FRAGMENT < sent <= BULK_IN_FLIGHT
    peer.connection.send(3, b"fence")
    assert [frame.channel for frame in peer.receive()] == [3]
    peer.connection.send(3, bytes(1_000_000))
    peer.receive()
    assert peer.connection.unsent_bytes > 1_000_000
    peer.connection.accept(5)
    assert [(frame.type, frame.channel) for frame in peer.receive()] == [(FrameType.ACCEPT, 5)]
    peer.send_ack()
    assert of_type(peer.receive(), FrameType.DATA)


def test_with_ten_bulk_channels_waiting_a_fence_is_the_next_frame_to_get_a_number() -> None:
    """Whether the link takes more at the moment, or bulk waits for acknowledgements."""
    peer = RawPeer(Role.HOST)
    peer.greet()
    for number in range(1, 21, 2):
        peer.send(FrameType.OPEN, opened_by_peer(2_000_000), channel=number)
        peer.connection.accept(number)
    peer.send(FrameType.OPEN, opened_by_peer(WINDOW, Priority.FENCING), channel=21)
    peer.connection.accept(21)
    peer.receive()
    peer.send_ack()
    for number in range(1, 21, 2):
        peer.connection.send(number, bytes(1_000_000))
    assert peer.connection.data_to_send(peer.now, 65_536)  # what the link took last
    peer.connection.send(21, b"off")
    frames = frames_only(FrameDecoder().feed(peer.connection.data_to_send(peer.now, 65_536)))
    # One frame did not fit into what the link took: it has its number, and goes first.
    assert [frame.payload for frame in frames].index(b"off") <= 1
    while peer.connection.data_to_send(peer.now):
        pass  # 256 KiB are in flight
    peer.connection.send(21, b"off again")
    assert [frame.payload for frame in peer.receive()] == [b"off again"]


def test_even_control_frames_stop_somewhere() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for _ in range(40):
        peer.connection.open("x", payload=bytes(MAX_FRAGMENT))
    sent = sum(len(frame.payload) for frame in peer.receive())
    assert sent <= CONTROL_IN_FLIGHT + MAX_FRAGMENT + 100


def test_bulk_channels_share_by_bytes_not_by_messages() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for number in (1, 3):
        peer.send(FrameType.OPEN, opened_by_peer(4_000_000), channel=number)
        peer.connection.accept(number)
    peer.receive()
    peer.connection.send(1, bytes(1_000_000))
    for _ in range(1_000):
        peer.connection.send(3, bytes(936))
    sent = {1: 0, 3: 0}
    for _ in range(4):
        for frame in of_type(peer.receive(), FrameType.DATA):
            sent[frame.channel] += len(frame.payload) + FRAME_COST
        peer.send_ack()
    assert sent[1] > 300_000
    assert abs(sent[1] - sent[3]) <= 2 * (MAX_FRAGMENT + FRAME_COST)


@given(st.lists(st.lists(st.integers(0, MAX_FRAGMENT), min_size=1, max_size=40), min_size=2, max_size=6))
def test_no_channel_that_has_something_to_send_falls_behind_another(sizes: list[list[int]]) -> None:
    """Whatever the sizes: of any two that have some left, none is more than two largest frames ahead."""
    ring = RoundRobin()
    for number, messages in enumerate(sizes):
        channel = Channel(number, "x", Priority.NORMAL, ChannelState.OPEN)
        channel.queue.extend((bytes(size), END, None) for size in messages)
        ring.add(channel)
    members = list(ring)
    while (served := ring.next()) is not None:
        served.pop()
        waiting = [channel.scheduled for channel in members if channel.queue]
        assert not waiting or max(waiting) - min(waiting) <= 2 * QUANTUM


def test_a_channel_whose_reader_stalls_stops_only_its_own_writer() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for number in (1, 3):
        peer.send(FrameType.OPEN, opened_by_peer(100_000), channel=number)
        peer.connection.accept(number)
    peer.connection.send(1, bytes(99_000))  # all that the stalled reader takes
    peer.receive()
    peer.send_ack()
    delivered = 0
    for _ in range(100):
        assert peer.connection.credit(1) < 1_000
        peer.connection.send(3, bytes(50_000))
        frames = peer.receive()
        assert {frame.channel for frame in frames} == {3}
        delivered += message_cost(50_000)
        peer.send(FrameType.CREDIT, credit(delivered, delivered + 100_000), channel=3)
    assert peer.connection.opened


# --- closing ---


def test_close_follows_the_data_and_abort_overtakes_it() -> None:
    for abort in (False, True):
        peer = raw_host_with_channel()
        peer.send_ack()
        peer.connection.send(1, bytes(100_000))
        (peer.connection.abort if abort else peer.connection.close)(1, CloseCode.SHUTDOWN, "bye")
        frames = peer.receive()
        kinds = [frame.type for frame in frames]
        expected = [FrameType.CANCEL] if abort else [*[FrameType.DATA] * 4, FrameType.CLOSE]
        assert kinds == expected
        assert frames[-1].payload == b"\0\7bye"
        assert peer.connection.unsent_bytes == sum(60 + len(frame.payload) for frame in frames)
        peer.send_ack()
        assert peer.connection.channels == 0


def test_abort_after_close_drops_what_is_still_queued() -> None:
    peer = raw_host_with_channel()
    peer.connection.send(1, bytes(100_000))
    peer.connection.close(1)
    peer.connection.abort(1, CloseCode.INTERNAL)
    assert [frame.type for frame in peer.receive()] == [FrameType.CANCEL]
    peer.connection.abort(1)
    peer.connection.close(1)
    assert peer.receive() == []


def test_both_sides_may_close_at_once() -> None:
    talk = Conversation()
    talk.connect()
    talk.guest.open("work")
    talk.run(1)
    number = talk.guest.by_target["work"].number
    talk.guest.connection.close(number)
    talk.host.connection.close(number)
    for side in talk.applications:
        side.streams.clear()
    talk.run(1)
    assert talk.host.connection.channels == talk.guest.connection.channels == 0
    assert not talk.host.count(Closed)
    assert talk.host.connection.opened


def test_frames_that_crossed_our_close_are_ignored() -> None:
    peer = raw_host_with_channel()
    peer.connection.close(1)
    peer.send(FrameType.DATA, b"late", flags=END, channel=1)
    peer.send(FrameType.CREDIT, credit(0, WINDOW), channel=1)
    peer.receive()
    peer.send(FrameType.DATA, b"later", flags=END, channel=1)
    assert peer.connection.channels == 0
    peer.send(FrameType.DATA, b"latest", flags=END, channel=1)
    peer.send(FrameType.CANCEL, b"\0\0", channel=1)
    assert peer.connection.opened
    assert peer.connection.events() == []


def test_cancelling_an_open_that_was_not_sent_sends_nothing() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.abort(peer.connection.open("x"))
    assert peer.receive() == []
    assert peer.connection.channels == 0


def test_an_aborted_channel_tells_that_it_was() -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.CANCEL, b"\0\x08" + b"r" * 5_000, channel=1)
    assert peer.connection.events() == [Closed(1, CloseCode.INTERNAL, "r" * 1_000, True)]


# --- limits ---


def test_our_own_limits_refuse_further_channels() -> None:
    talk = Conversation(limits=Limits(channels=2))
    connection = talk.guest.connection
    connection.open("a")
    connection.open("b")
    with pytest.raises(ServiceRefused) as caught:
        connection.open("c")
    assert caught.value.code is CloseCode.LIMIT
    tight = Conversation(limits=Limits(session_bytes=300_000)).guest.connection
    tight.open("a", window=200_000)
    with pytest.raises(ServiceRefused):
        tight.open("b", window=200_000)
    tight.open("b", window=100_000)


def test_channels_of_the_peer_beyond_the_limit_are_refused_one_by_one() -> None:
    peer = RawPeer(Role.HOST, Limits(channels=2))
    peer.greet()
    peer.connection.events()
    for number in (1, 3, 5, 7):
        peer.send(FrameType.OPEN, opened_by_peer(), channel=number)
    assert [type(event) for event in peer.connection.events()] == [ChannelOpened] * 2
    refusals = of_type(peer.receive(), FrameType.CLOSE)
    assert [(frame.channel, frame.payload[:2]) for frame in refusals] == [(5, b"\0\3"), (7, b"\0\3")]


def test_a_flood_of_opens_beyond_the_limit_ends_the_session() -> None:
    peer = RawPeer(Role.HOST, Limits(channels=2))
    peer.greet()
    peer.connection.events()
    number = 1
    while peer.connection.opened:
        peer.send(FrameType.OPEN, opened_by_peer(), channel=number)
        number += 2
    assert number < 20


def test_accepting_beyond_the_memory_limit_refuses_the_channel() -> None:
    peer = RawPeer(Role.HOST, Limits(session_bytes=100_000))
    peer.greet()
    peer.send(FrameType.OPEN, opened_by_peer(1_000), channel=1)
    with pytest.raises(ServiceRefused):
        peer.connection.accept(1, window=100_001)
    assert [frame.type for frame in peer.receive()] == [FrameType.CLOSE]


def test_a_window_of_the_peer_is_cut_to_our_limit() -> None:
    """What we queue is bounded by what we accept to be granted, not by what the peer says."""
    limits = Limits(max_window_bytes=50_000)
    peer = raw_host_with_channel(limits, window=2**63)
    assert peer.connection.credit(1) == 50_000 - 2 * FRAME_COST
    peer.send(FrameType.CREDIT, credit(0, 2**64 - 1), channel=1)
    assert peer.connection.events() == [Granted(1, 0, 50_000)]


# --- a peer that breaks the rules ---


def broken_channel(peer: RawPeer) -> Closed:
    """The channel, and only it, has been ended with PROTOCOL on both sides."""
    (event,) = peer.connection.events()
    assert isinstance(event, Closed)
    assert event.code is CloseCode.PROTOCOL
    (frame,) = peer.receive()
    assert (frame.type, frame.payload[:2]) == (FrameType.CANCEL, b"\0\6")
    assert peer.connection.opened
    peer.send_ack()
    assert peer.connection.channels == 0
    return event


def test_more_data_than_was_granted_ends_the_channel() -> None:
    peer = raw_host_with_channel()
    for _ in range(6):
        peer.send(FrameType.DATA, bytes(32_768), channel=1)
    assert len(peer.connection.events()) == 6
    peer.send(FrameType.DATA, bytes(32_768), channel=1)
    peer.send(FrameType.DATA, bytes(32_768), channel=1)
    assert "granted" in broken_channel(peer).reason


def test_a_fragment_over_32_kib_ends_the_channel() -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.DATA, bytes(MAX_FRAGMENT + 1), channel=1)
    assert "fragment" in broken_channel(peer).reason


@pytest.mark.parametrize(("delivered", "limit"), [(1, WINDOW), (0, WINDOW - 1), (2**64 - 1, 2**64 - 1)])
def test_credit_that_does_not_fit_ends_the_channel(delivered: int, limit: int) -> None:
    peer = raw_host_with_channel()
    peer.send(FrameType.CREDIT, credit(delivered, limit), channel=1)
    broken_channel(peer)


def test_data_before_we_accepted_ends_the_channel() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, opened_by_peer(), channel=1)
    peer.receive()
    peer.connection.events()
    peer.send(FrameType.DATA, b"x", channel=1)
    broken_channel(peer)


@pytest.mark.parametrize(
    ("kind", "channel", "payload"),
    [
        (FrameType.OPEN, 2, opened_by_peer()),  # our numbers
        (FrameType.OPEN, 1, opened_by_peer()),  # twice
        (FrameType.OPEN, 0, opened_by_peer()),
        (FrameType.OPEN, 3, b"short"),
        (FrameType.OPEN, 3, b"\x03" + opened_by_peer()[1:]),  # unknown priority
        (FrameType.OPEN, 3, opened_by_peer()[:-1]),  # half a target
        (FrameType.ACCEPT, 1, bytes(8)),  # theirs
        (FrameType.ACCEPT, 99, bytes(8)),
        (FrameType.DATA, 99, b""),  # never opened
        (FrameType.DATA, 0, b""),
        (FrameType.CREDIT, 1, b"short"),
        (FrameType.CLOSE, 1, b"x"),
        (FrameType.CLOSE, 4, b"\0\0"),
    ],
)
def test_a_broken_rule_of_the_session_ends_it(kind: FrameType, channel: int, payload: bytes) -> None:
    peer = raw_host_with_channel()
    peer.send(kind, payload, channel=channel)
    reset, refused = peer.connection.events()
    assert isinstance(reset, Reset)
    assert set(reset.lost) == {1}
    assert isinstance(refused, LinkRefused)
    assert [frame.type for frame in peer.receive()] == [FrameType.ERROR]


@pytest.mark.parametrize("kind", [FrameType.DATA, FrameType.CREDIT, FrameType.CLOSE, FrameType.ACCEPT])
def test_naming_a_channel_that_we_have_not_opened_yet_ends_the_session(kind: FrameType) -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    number = peer.connection.open("x")  # OPEN is not sent yet
    peer.send(kind, bytes(16), channel=number)
    assert peer.types() == [FrameType.ERROR]


def test_data_before_their_accept_ends_the_session() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    number = peer.connection.open("x")
    peer.receive()
    peer.send(FrameType.DATA, b"x", channel=number)
    assert peer.types() == [FrameType.ERROR]


def test_a_target_that_is_too_long_or_no_text_is_refused_or_made_readable() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    peer.send(FrameType.OPEN, struct.pack(">BQH", 2, 5, 1_025) + bytes(1_025), channel=1)
    peer.send(FrameType.OPEN, struct.pack(">BQH", 2, 5, 2) + b"\xff\xff", channel=3)
    (event,) = peer.connection.events()
    assert isinstance(event, ChannelOpened)
    assert event.target == "\ufffd\ufffd"
    assert of_type(peer.receive(), FrameType.CLOSE)[0].channel == 1


FRAMES = st.tuples(
    st.sampled_from([*FrameType, 31, 200]),
    st.one_of(
        st.binary(max_size=40),
        st.just(opened_by_peer()),
        st.builds(credit, st.integers(0, 300), st.integers(0, 2**64 - 1)),
        st.just(bytes(8)),
    ),
    st.integers(0, 6),
    st.sampled_from([0, 1, 2, 3]),
)


@given(st.lists(FRAMES, max_size=30), st.sampled_from(Role))
def test_no_frame_of_a_peer_that_speaks_the_epoch_makes_anything_raise(
    frames: list[tuple[int, bytes, int, int]], role: Role
) -> None:
    peer = RawPeer(role, Limits(channels=4))
    peer.greet()
    peer.connection.open("ours")
    known: tuple[type[Event], ...] = (
        ChannelAccepted,
        ChannelOpened,
        Closed,
        Data,
        Granted,
        LinkRefused,
        Opened,
        Reset,
    )
    for kind, payload, channel, flags in frames:
        peer.send(kind, payload, channel=channel, flags=flags)
        peer.receive()
        for event in peer.connection.events():
            assert isinstance(event, known) or type(event).__name__ == "Unlinked"
        assert peer.connection.channels <= 4
        peer.wait(0.1)


# --- the table ---

C = ChannelState


def raw_channel(state: ChannelState, *, confirming: bool) -> tuple[RawPeer, int]:
    """A host's connection with one channel in a state, reached by real frames."""
    peer = RawPeer(Role.HOST)
    peer.greet()
    if state is C.OFFERED:
        peer.send(FrameType.OPEN, opened_by_peer(), channel=1)
        return peer, 1
    number = peer.connection.open("x")
    if state is not C.QUEUED:
        peer.receive()
    if state in (C.OPEN, C.CLOSING):
        peer.send(FrameType.ACCEPT, bytes(8), channel=number)
    if state is C.CLOSING:
        peer.connection.close(number)
        before = peer.ack, peer.ack_check
        peer.receive()
        if not confirming:  # the peer's next frame does not acknowledge the CLOSE
            peer.ack, peer.ack_check = before
    return peer, number


def reset_session(peer: RawPeer) -> None:
    """The peer comes back without a memory."""
    peer.connection.link_up(peer.now)
    peer.session_id = bytes(16)
    nonce = peer.take_challenge()
    peer.ack = peer.ack_check = peer.sequence = peer.check = 0
    peer.send_hello(nonce)
    peer.connection.data_to_send(peer.now)
    peer.epoch = nonce
    peer.send_ack()


APPLY: Final[MappingProxyType[ChannelInput, Callable[[RawPeer, int], object]]] = MappingProxyType(
    {
        ChannelInput.OPEN_SENT: lambda peer, _: peer.receive(),
        ChannelInput.ACCEPT: lambda peer, number: peer.connection.accept(number),
        ChannelInput.ACCEPTED: lambda peer, number: peer.send(FrameType.ACCEPT, bytes(8), channel=number),
        ChannelInput.CLOSE: lambda peer, number: peer.connection.close(number),
        ChannelInput.CLOSED: lambda peer, number: peer.send(FrameType.CLOSE, bytes(2), channel=number),
        ChannelInput.CONFIRMED: lambda peer, _: peer.send_ack(),
        ChannelInput.RESET: lambda peer, _: reset_session(peer),
    }
)


def state_of(peer: RawPeer, number: int) -> ChannelState:
    """Looks inside: the state of a channel is not public."""
    channels = peer.connection._channels._channels  # pyright: ignore[reportPrivateUsage]
    return channels[number].state if number in channels else C.GONE


@pytest.mark.parametrize(("state", "what", "to"), [(*row, to) for row, to in CHANNEL_TRANSITIONS.items()])
def test_each_transition_of_a_channel_happens(
    state: ChannelState, what: ChannelInput, to: ChannelState
) -> None:
    peer, number = raw_channel(state, confirming=what is ChannelInput.CONFIRMED)
    assert state_of(peer, number) is state
    APPLY[what](peer, number)
    assert state_of(peer, number) is to


def test_nothing_of_the_old_session_is_said_in_the_new_one() -> None:
    """A refusal, a credit or a close of an old channel would name one that the new session never had."""
    peer = RawPeer(Role.HOST, Limits(channels=2))
    peer.greet()
    for number in (1, 3, 5):
        peer.send(FrameType.OPEN, opened_by_peer(), channel=number)
        if number < 5:
            peer.connection.accept(number)
    peer.send(FrameType.DATA, bytes(100), channel=1)
    peer.connection.grant(1, 164, WINDOW)
    peer.connection.close(3)
    reset_session(peer)
    assert peer.connection.opened
    assert [FrameType(frame.type) for frame in peer.receive() if frame.sequence] == []


def test_every_state_and_input_of_a_channel_is_in_the_table() -> None:
    assert {state for state, _ in CHANNEL_TRANSITIONS} | set(CHANNEL_TRANSITIONS.values()) == set(
        ChannelState
    )
    assert {what for _, what in CHANNEL_TRANSITIONS} == set(ChannelInput)


@pytest.mark.parametrize("state", ChannelState)
@pytest.mark.parametrize("what", ChannelInput)
def test_what_is_not_in_the_channel_table_is_an_error(state: ChannelState, what: ChannelInput) -> None:
    channel = Channel(1, "x", Priority.NORMAL, state)
    if (state, what) in CHANNEL_TRANSITIONS:
        channel.apply(what)
        assert channel.state is CHANNEL_TRANSITIONS[state, what]
    else:
        with pytest.raises(LocalProtocolError):
            channel.apply(what)
        assert channel.state is state


def test_data_survives_a_cut_in_its_middle() -> None:
    talk = Conversation()
    talk.connect()
    talk.guest.window = talk.host.window = 3_000_000
    talk.guest.open("big")
    talk.run(1)
    message = bytes(range(256)) * 8_000
    number = talk.guest.by_target["big"].number
    talk.guest.connection.send(number, message)
    for _ in range(20):
        data = talk.guest.connection.data_to_send(talk.now, 10_000)
        talk.host.connection.receive(data, talk.now)
    got = b"".join(event.data for event in talk.host.connection.events() if isinstance(event, Data))
    talk.cut()
    talk.connect(GOOD)
    for _ in range(200):
        talk.now += 0.03
        for source, target in ((talk.guest, talk.host), (talk.host, talk.guest)):
            while data := source.connection.data_to_send(talk.now):
                target.connection.receive(data, talk.now)
            target.connection.handle_time(talk.now)
        got += b"".join(event.data for event in talk.host.connection.events() if isinstance(event, Data))
    assert got == message
