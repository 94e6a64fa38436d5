# SPDX-License-Identifier: LGPL-2.1-or-later
"""The golden vectors are the stable ABI: what was ever released is still written so, and still understood."""

from __future__ import annotations

import random
from typing import get_args
from zlib import crc32

import pytest

from fence_vmchannel.core.connection import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Connection,
    Data,
    Opened,
    PeerIdentity,
    Priority,
    Role,
)
from fence_vmchannel.core.frames import Frame, FrameDecoder, FrameType
from fence_vmchannel.core.greeting import (
    Hello,
    Welcome,
    decode_challenge,
    decode_end,
    decode_hello,
    decode_welcome,
)
from fence_vmchannel.messages import FenceGreeting, FenceMessage, decode_message
from fence_vmchannel.tlv import decode
from tests.unit.channel import golden_vectors as golden


@pytest.mark.parametrize("name", golden.FILES)
def test_what_is_written_is_what_was_always_written(name: str) -> None:
    assert golden.FILES[name]() == golden.read(name)


def test_every_frame_type_has_a_vector() -> None:
    assert set(golden.read("frames-v1.json")) == {kind.name for kind in FrameType}


def test_every_message_has_a_vector() -> None:
    names = {cls.__name__ for cls in get_args(FenceMessage)} | {"FenceGreeting"}
    assert set(golden.read("messages-v1.json")) == names


@pytest.mark.parametrize("kind", FrameType)
def test_every_frame_vector_is_understood(kind: FrameType) -> None:
    (frame,) = FrameDecoder().feed(golden.read("frames-v1.json")[kind.name])
    assert isinstance(frame, Frame)
    assert (frame.type, frame.version, frame.payload) == (kind, 1, golden.PAYLOADS[kind.name])
    if kind not in (FrameType.KNOCK, FrameType.CHALLENGE):
        assert (frame.epoch, frame.ack, frame.ack_check) == (golden.NONCE, 7, 0x0BADF00D)


def test_the_greeting_vectors_say_what_was_meant() -> None:
    assert decode_challenge(golden.PAYLOADS["CHALLENGE"]) == golden.NONCE
    assert decode_hello(golden.PAYLOADS["HELLO"]) == Hello(golden.GUEST_NUMBERS, golden.GUEST_OFFER, (1,))
    assert decode_welcome(golden.PAYLOADS["WELCOME"]) == Welcome(
        1, True, golden.HOST_NUMBERS, golden.HOST_OFFER
    )
    assert decode_end(golden.PAYLOADS["ERROR"]) == (2, "the peer speaks versions [7]")


def test_every_message_vector_is_understood() -> None:
    vectors = golden.read("messages-v1.json")
    for name, message in golden.messages().items():
        assert decode_message(vectors[name]) == message
    assert decode(FenceGreeting, vectors["FenceGreeting"]).tick_ms == golden.TICK


def replay(role: Role, seed: int) -> tuple[Connection, list[object]]:
    """One side against the recording of the other; its own random numbers are those of the recording."""
    connection = Connection(
        role, PeerIdentity(f"{role.value} boot"), random_bytes=random.Random(seed).randbytes
    )
    connection.link_up(86_400.0)
    events: list[object] = []
    opened = False
    for name, data in golden.read("transcript-v1.json").items():
        connection.data_to_send(86_400.0)
        if name.endswith(role.value):
            continue
        connection.receive(data, 86_400.0)
        for event in connection.events():
            events.append(event)
            if isinstance(event, Opened) and role is Role.GUEST and not opened:
                opened = True
                connection.open(
                    "org.vmchannel.fence", window=65_536, priority=Priority.FENCING, payload=b"hello"
                )
            if isinstance(event, ChannelAccepted):
                connection.send(event.channel, b"a request")
            if isinstance(event, ChannelOpened):
                connection.accept(event.channel, window=65_536, payload=b"welcome")
            if isinstance(event, Data) and role is Role.HOST:
                connection.grant(event.channel, event.cost, event.cost + 65_536)
                connection.send(event.channel, b"an answer")
            elif isinstance(event, Data):
                connection.close(event.channel)
    return connection, events


def test_a_host_of_today_serves_a_guest_of_version_1() -> None:
    connection, events = replay(Role.HOST, 1)
    assert [type(event) for event in events] == [Opened, ChannelOpened, Data, Closed]
    assert connection.opened
    assert connection.regreetings == 0


def test_a_guest_of_today_is_welcomed_by_a_host_of_version_1() -> None:
    connection, events = replay(Role.GUEST, 2)
    assert isinstance(events[0], Opened)
    assert Data(1, b"an answer", True, 73, crc32(b"an answer")) in events
    assert connection.regreetings == 0
