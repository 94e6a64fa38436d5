# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a hostile peer, or a hostile user of the same session, can do to a connection."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from fence_vmchannel.core.channels import RESERVED_CHANNELS
from fence_vmchannel.core.connection import MAX_FRAGMENT, ChannelAccepted, Closed, Limits, Priority, Role
from fence_vmchannel.core.frames import FrameType
from fence_vmchannel.core.sending import CONTROL_IN_FLIGHT
from fence_vmchannel.core.windows import RESERVED_BYTES
from fence_vmchannel.errors import CloseCode, ServiceRefused
from tests.fakes.raw_peer import RawPeer

LIMITS = Limits()
CLOSE = struct.pack(">H", CloseCode.NORMAL)


def opening(priority: Priority = Priority.NORMAL, window: int = 200_000) -> bytes:
    """The payload of an OPEN."""
    return struct.pack(">BQH", priority, window, 1) + b"x"


class Miser(RawPeer):
    """A guest that never acknowledges anything."""

    def receive_without_thanks(self) -> None:
        ack, check = self.ack, self.ack_check
        self.receive()
        self.ack, self.ack_check = ack, check


def miser_who_stopped_the_host() -> tuple[Miser, int]:
    """As much as may be in flight is; also the next free channel number."""
    peer = Miser(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, opening(Priority.FENCING, 2_000_000), channel=1)
    peer.connection.accept(1)
    peer.connection.send(1, bytes(500_000))
    peer.receive_without_thanks()
    for number in range(3, 203, 2):
        peer.send(FrameType.OPEN, opening(Priority.FENCING), channel=number)
        peer.connection.close(number, CloseCode.LIMIT, "r" * 1_000)
    peer.receive_without_thanks()
    return peer, 203


def grown_bytes(peer: Miser, first: int, rounds: int, answer: bytes, priority: Priority) -> int:
    """How much memory channels that are opened and closed again leave behind."""

    def once(number: int) -> None:
        peer.send(FrameType.OPEN, opening(priority), channel=number)
        if answer:
            peer.connection.accept(number)
            peer.connection.send(number, answer)
        else:
            peer.connection.close(number, CloseCode.UNKNOWN_SERVICE, "no")
        peer.send(FrameType.CLOSE, CLOSE, channel=number)
        peer.connection.events()
        peer.receive_without_thanks()

    for number in range(first, first + 4_000, 2):  # to where it levels off
        once(number)
    tracemalloc.start()
    for number in range(first + 4_000, first + 4_000 + 2 * rounds, 2):
        once(number)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert peer.connection.opened
    return grown


@pytest.mark.parametrize("priority", [Priority.FENCING, Priority.NORMAL])
@pytest.mark.parametrize("answer", [b"", b"answer"])
def test_channels_opened_and_closed_without_an_acknowledgement_leave_nothing_behind(
    answer: bytes, priority: Priority
) -> None:
    peer, first = miser_who_stopped_the_host()
    rounds = 8_000
    assert grown_bytes(peer, first, rounds, answer, priority) < 40 * rounds


def test_an_accept_with_too_much_payload_ends_its_channel_only() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    number = peer.connection.open("x")
    peer.receive()
    peer.connection.events()
    peer.send(FrameType.ACCEPT, struct.pack(">Q", 1_000) + bytes(MAX_FRAGMENT + 1), channel=number)
    (event,) = peer.connection.events()
    assert isinstance(event, Closed)
    assert event.code is CloseCode.PROTOCOL
    assert peer.connection.opened
    other = peer.connection.open("y")
    peer.receive()
    peer.send(FrameType.ACCEPT, struct.pack(">Q", 1_000) + bytes(MAX_FRAGMENT), channel=other)
    assert [type(event) for event in peer.connection.events()] == [ChannelAccepted]


def test_any_number_of_normal_channels_leaves_room_for_a_fence() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    for _ in range(LIMITS.channels):
        peer.connection.open("x", window=0)
    with pytest.raises(ServiceRefused):
        peer.connection.open("x", window=0)
    for _ in range(RESERVED_CHANNELS):
        peer.connection.open("fence", priority=Priority.FENCING)
    with pytest.raises(ServiceRefused):
        peer.connection.open("fence", priority=Priority.FENCING)


def test_any_windows_of_normal_channels_leave_room_for_a_fence() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    for _ in range(LIMITS.session_bytes // LIMITS.max_window_bytes):
        peer.connection.open("x", window=LIMITS.max_window_bytes)
    with pytest.raises(ServiceRefused):
        peer.connection.open("x", window=1)
    peer.connection.open("fence", window=RESERVED_BYTES, priority=Priority.FENCING)
    with pytest.raises(ServiceRefused):
        peer.connection.open("fence", window=RESERVED_BYTES, priority=Priority.FENCING)


def test_what_a_peer_opens_leaves_room_for_its_fence_too() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    last = 2 * LIMITS.channels + 3
    for number in range(1, last, 2):
        peer.send(FrameType.OPEN, opening(window=1_000), channel=number)
    assert peer.connection.channels == LIMITS.channels
    peer.send(FrameType.OPEN, opening(Priority.FENCING), channel=last)
    assert peer.connection.channels == LIMITS.channels + 1


def test_room_comes_back_when_channels_end() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    for _ in range(3):
        numbers = [peer.connection.open("x", window=LIMITS.max_window_bytes) for _ in range(32)]
        with pytest.raises(ServiceRefused):
            peer.connection.open("x", window=LIMITS.max_window_bytes)
        peer.receive()
        for number in numbers:
            peer.send(FrameType.ACCEPT, struct.pack(">Q", 1_000), channel=number)
            peer.send(FrameType.CLOSE, CLOSE, channel=number)
    assert peer.connection.channels == 0


def test_a_flood_of_opens_does_not_stop_fencing_data() -> None:
    """The opener never stops, and the peer acknowledges all the time: the fence's turn comes at once."""
    peer = RawPeer(Role.GUEST)
    peer.greet()
    fence = peer.connection.open("fence", priority=Priority.FENCING)
    peer.receive()
    peer.send(FrameType.ACCEPT, struct.pack(">Q", 100_000), channel=fence)

    def flood() -> None:
        for _ in range(20):
            peer.connection.open("x", window=0, payload=bytes(MAX_FRAGMENT))

    flood()
    first = peer.receive()
    assert sum(len(frame.payload) for frame in first) < CONTROL_IN_FLIGHT
    peer.connection.send(fence, b"off")
    flood()
    peer.send_ack()
    assert next((frame.type, frame.channel) for frame in peer.receive()) == (FrameType.DATA, fence)
