# SPDX-License-Identifier: LGPL-2.1-or-later
"""A peer of version 1 as it was when version 1 was frozen, against the code of today."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fence_vmchannel.core.connection import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Connection,
    Data,
    Event,
    LinkRefused,
    Opened,
    PeerIdentity,
    Role,
)
from fence_vmchannel.core.frames import FrameDecoder, FrameType, encode_frame, frames_only
from fence_vmchannel.core.greeting import VERSIONS, EndCode, common_version
from fence_vmchannel.errors import CloseCode
from tests.data import peer_v1
from tests.data.peer_v1 import PeerV1
from tests.fakes.conversation import seeded_bytes

FROZEN = "858d92c73ecfc726553beecd11e7015a3106d0c25270b087fcaa7b159ee070c1"


class Meeting:
    """Today's code in `role`, linked to the frozen peer."""

    def __init__(self, role: Role, peer: PeerV1) -> None:
        self.today = Connection(role, PeerIdentity("boot", "today"), random_bytes=seeded_bytes(1))
        self.peer = peer
        self.now = 1_000.0
        self.today.link_up(self.now)

    def talk(self, seconds: float = 0.0) -> list[Event]:
        """Let time pass, then everything that was said arrive; returns what today's side was told."""
        self.now += seconds
        self.today.handle_time(self.now)
        events: list[Event] = []
        while True:
            ours, theirs = self.today.data_to_send(self.now), self.peer.take_output()
            if not ours and not theirs:
                return events
            self.peer.receive(ours)
            self.today.receive(theirs, self.now)
            events += self.today.events()


def test_the_frozen_peer_was_not_changed() -> None:
    source = Path(peer_v1.__file__).read_bytes()
    assert hashlib.sha256(source).hexdigest() == FROZEN, "what is out there does not change either"
    assert b"fence_vmchannel" not in source


@pytest.mark.parametrize("more", [b"", b"fields of version 2"])
def test_a_host_of_today_serves_a_guest_of_version_1(more: bytes) -> None:
    meeting = Meeting(Role.HOST, PeerV1(host=False, features=2**64 - 1, more=more))
    today, peer = meeting.today, meeting.peer
    assert Opened(False, PeerIdentity("frozen boot", "frozen 1")) in meeting.talk()
    assert (peer.agreed, peer.session) == (1, today.session_id)
    assert today.features == 0, "features are those that both have"
    peer.open(1, b"org.vmchannel.fence", b"hello", priority=1)
    (opened,) = [event for event in meeting.talk() if isinstance(event, ChannelOpened)]
    assert (opened.target, opened.payload) == ("org.vmchannel.fence", b"hello")
    today.accept(1, payload=b"greeting")
    peer.send(1, b"a request")
    (request,) = [event for event in meeting.talk() if isinstance(event, Data)]
    assert request.data == b"a request"
    today.grant(1, request.cost, request.cost + 1_000)
    today.send(1, b"an answer")
    meeting.talk(1)
    assert (peer.accepted, peer.messages) == (b"greeting", [b"an answer"])
    peer.close(1, 0, b"done")
    assert Closed(1, CloseCode.NORMAL, "done", False) in meeting.talk(20)
    assert today.unsent_bytes == today.regreetings == 0


@pytest.mark.parametrize("more", [b"", b"fields of version 2"])
def test_a_guest_of_today_is_served_by_a_host_of_version_1(more: bytes) -> None:
    meeting = Meeting(Role.GUEST, PeerV1(host=True, features=2**64 - 1, more=more))
    today, peer = meeting.today, meeting.peer
    channel = today.open("org.vmchannel.fence", payload=b"hello")
    assert Opened(False, PeerIdentity("frozen boot", "frozen 1")) in meeting.talk()
    assert peer.opened == (channel, "org.vmchannel.fence", b"hello")
    meeting.talk(1)
    today.send(channel, b"a request")
    meeting.talk(1)
    assert peer.messages == [b"a request"]
    peer.send(channel, b"an answer")
    (answer,) = [event for event in meeting.talk() if isinstance(event, Data)]
    assert answer.data == b"an answer"
    today.close(channel)
    meeting.talk(1)
    peer.acknowledge()
    meeting.talk()
    meeting.talk(20)
    assert peer.closed == 0
    assert today.channels == today.unsent_bytes == today.regreetings == 0


def test_a_host_of_today_tells_its_events_in_order_to_a_guest_that_accepts() -> None:
    meeting = Meeting(Role.HOST, PeerV1(host=False))
    channel = meeting.today.open("org.example.clipboard")
    events = meeting.talk()
    assert [type(event) for event in events] == [Opened, ChannelAccepted]
    assert meeting.peer.opened == (channel, "org.example.clipboard", b"")


@pytest.mark.parametrize("versions", [(2, 1), (1, 2, 3, 200)])
def test_a_newer_guest_is_answered_with_the_highest_version_that_both_speak(
    versions: tuple[int, ...],
) -> None:
    meeting = Meeting(Role.HOST, PeerV1(host=False, versions=versions))
    meeting.talk()
    assert meeting.today.opened
    assert meeting.peer.agreed == 1


def test_only_a_guest_without_a_common_version_is_refused_and_its_port_stays_good_for_another() -> None:
    meeting = Meeting(Role.HOST, PeerV1(host=False, versions=(2, 3)))
    events = meeting.talk()
    assert [event for event in events if isinstance(event, LinkRefused)]
    assert meeting.peer.refused is not None
    assert meeting.peer.refused[0] == EndCode.NO_COMMON_VERSION
    assert "[2, 3]" in meeting.peer.refused[1]
    meeting.today.link_down(meeting.now)
    meeting.peer = PeerV1(host=False)
    meeting.today.link_up(meeting.now)
    meeting.talk()
    assert meeting.today.opened


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [((1,), (1,), 1), ((2, 1), (1,), 1), ((2, 1), (1, 2, 3), 2), ((3, 2), (1,), 0), ((1,), (), 0)],
)
def test_the_version_is_the_highest_that_both_speak(
    ours: tuple[int, ...], theirs: tuple[int, ...], agreed: int
) -> None:
    assert common_version(theirs, ours) == agreed


def test_version_1_is_spoken_for_ever() -> None:
    assert 1 in VERSIONS


def test_the_frozen_peer_notices_another_version() -> None:
    peer = PeerV1(host=False)
    with pytest.raises(peer_v1.Broken):
        peer.receive(encode_frame(FrameType.CHALLENGE, bytes(8), version=2))
    assert [frame.type for frame in frames_only(FrameDecoder().feed(peer.take_output()))] == [FrameType.KNOCK]
