# SPDX-License-Identifier: LGPL-2.1-or-later
"""The session: greeting, acknowledgement, liveness, resumption, and what resets it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from fence_vmchannel.core.connection import (
    ChannelOpened,
    Closed,
    Connection,
    LinkRefused,
    Opened,
    PeerIdentity,
    Reset,
    Role,
    Unlinked,
)
from fence_vmchannel.core.frames import IGNORABLE, FrameType, encode_frame
from fence_vmchannel.core.greeting import NO_SESSION, EndCode, Numbers, decode_end, decode_welcome
from fence_vmchannel.core.session_state import SessionState
from tests.fakes.conversation import Conversation, seeded_bytes
from tests.fakes.link import GOOD, FaultyLink
from tests.fakes.raw_peer import OFFER, RawPeer


def open_pair() -> Conversation:
    """Two sides, connected, with one channel `work` from the guest."""
    talk = Conversation()
    talk.connect()
    talk.guest.open("work")
    talk.run(1)
    assert talk.guest.by_target["work"].accepted
    return talk


# --- greeting ---


def test_both_sides_learn_who_the_other_is() -> None:
    talk = open_pair()
    assert talk.guest.connection.peer == PeerIdentity("host-boot", "test 1.0")
    assert talk.host.connection.peer == PeerIdentity("guest-boot", "test 1.0")
    assert talk.host.connection.session_id == talk.guest.connection.session_id != NO_SESSION
    assert [type(event) for event in talk.host.events[:1]] == [Opened]


def test_a_guest_knocks_until_it_is_challenged() -> None:
    peer = RawPeer(Role.GUEST)
    peer.connection.link_up(peer.now)
    knocks = len(peer.types())
    for _ in range(60):
        peer.wait(1)
        types = peer.types()
        assert set(types) <= {FrameType.KNOCK}
        knocks += len(types)
    assert 12 <= knocks <= 20


def test_a_host_repeats_its_challenge_with_the_same_nonce_ever_more_slowly() -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    nonces = {peer.take_challenge()}
    count = 1
    for _ in range(120):
        peer.wait(1)
        for frame in peer.receive():
            assert frame.type == FrameType.CHALLENGE
            nonces.add(int.from_bytes(frame.payload, "big"))
            count += 1
    assert len(nonces) == 1
    assert 8 <= count <= 14


def test_the_nonce_differs_on_each_link() -> None:
    peer = RawPeer(Role.HOST)
    nonces: set[int] = set()
    for _ in range(5):
        peer.connection.link_up(peer.now)
        nonces.add(peer.take_challenge())
    assert len(nonces) == 5


def test_a_hello_that_echoes_another_nonce_is_ignored() -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    peer.send_hello(nonce + 1)
    peer.send_hello(0)
    assert peer.connection.state is SessionState.CHALLENGING
    assert peer.receive() == []


def test_megabytes_of_a_dead_client_before_the_hello_are_discarded() -> None:
    """S6: what waited in the port's queues, HELLO and requests included, acts on nothing."""
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    stale = b"half a frame" + b"".join(
        encode_frame(FrameType.DATA, bytes(32_768), channel=1, sequence=number, epoch=12_345)
        + encode_frame(FrameType.HELLO, bytes(120), epoch=12_345)
        + encode_frame(FrameType.KNOCK)
        for number in range(1, 135)
    )
    assert len(stale) > 4_400_000
    for at in range(0, len(stale), 4_096):
        peer.send_raw(stale[at : at + 4_096])
    assert peer.types() in ([], [FrameType.CHALLENGE])  # a KNOCK may have the challenge repeated once
    peer.send_hello(nonce)
    assert peer.types() == [FrameType.WELCOME]
    peer.epoch = nonce
    peer.send_ack()
    assert [type(event) for event in peer.connection.events()] == [Opened]


def half_frame(epoch: int) -> bytes:
    """What a process leaves in the pipe that dies in the middle of a write."""
    return encode_frame(FrameType.DATA, bytes(32_768), channel=1, sequence=1, epoch=epoch)[:10_000]


def test_a_half_frame_of_a_dead_guest_does_not_swallow_the_next_ones_greeting() -> None:
    """The host's socket stays connected while guest processes come and go."""
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.receive()
    peer.send_raw(half_frame(peer.epoch))
    peer.send(FrameType.KNOCK, epoch=0)
    assert peer.connection.opened
    deadline = peer.connection.next_deadline()
    assert deadline is not None
    peer.wait(deadline - peer.now)
    assert peer.types() == [FrameType.CHALLENGE]


def test_a_half_frame_of_a_dead_host_does_not_swallow_the_next_ones_greeting() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    peer.send_raw(half_frame(peer.epoch))
    peer.send_challenge(99)
    peer.wait(1.1)
    assert peer.types() == [FrameType.HELLO]


def test_a_frame_that_comes_in_pieces_is_awaited() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    frame = encode_frame(
        FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1, sequence=1, epoch=peer.epoch
    )
    for byte in frame:
        peer.send_raw(bytes((byte,)))
        peer.wait(0.005)
    assert peer.connection.opened
    assert isinstance(peer.connection.events()[-1], ChannelOpened)


def test_frames_of_another_epoch_are_ignored_in_an_open_session() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    peer.send(FrameType.OPEN, b"\x02" + bytes(10), channel=1, epoch=peer.epoch + 1, sequence=1)
    peer.send(FrameType.ERROR, b"\0\1bad", epoch=peer.epoch + 1)
    assert peer.connection.opened
    assert peer.connection.events() == []


@pytest.mark.parametrize("versions", [(1,), (1, 2, 250), (250, 1)])
def test_a_newer_guest_gets_the_highest_common_version(versions: tuple[int, ...]) -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    peer.send_hello(peer.take_challenge(), versions=versions)
    (frame,) = peer.receive()
    assert decode_welcome(frame.payload).version == 1


@pytest.mark.parametrize("versions", [(), (2,), (0, 7)])
def test_a_guest_without_a_common_version_is_refused_and_told_why(versions: tuple[int, ...]) -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    peer.send_hello(nonce, versions=versions)
    (event,) = peer.connection.events()
    assert isinstance(event, LinkRefused)
    (frame,) = peer.receive()
    assert (frame.type, frame.epoch) == (FrameType.ERROR, nonce)
    assert decode_end(frame.payload)[0] == EndCode.NO_COMMON_VERSION


def test_a_guest_that_is_refused_says_so_and_keeps_its_session() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    peer.connection.events()
    peer.send_challenge(88)
    peer.receive()
    peer.send(FrameType.ERROR, b"\0\2no common version", epoch=88)
    unlinked, refused = peer.connection.events()
    assert isinstance(unlinked, Unlinked)
    assert isinstance(refused, LinkRefused)
    assert "no common version" in refused.reason
    assert peer.connection.session_id == peer.session_id


@pytest.mark.parametrize("role", Role)
def test_a_feature_that_only_one_side_has_is_not_used(role: Role) -> None:
    peer = RawPeer(role)
    assert OFFER.features == 0xFF00
    peer.greet()
    assert peer.connection.features == 0


def test_the_host_tick_reaches_the_guest_with_every_frame() -> None:
    talk = open_pair()
    talk.run(20)
    assert abs(talk.guest.connection.tick - talk.now * 1000) < 16_000
    before = talk.guest.connection.tick
    talk.run(20)
    assert talk.guest.connection.tick > before


# --- liveness ---


def test_an_idle_session_lives_on_heartbeats_alone() -> None:
    talk = open_pair()
    assert talk.link is not None
    before = talk.link.to_host.written_bytes
    talk.run(600)
    assert talk.host.connection.opened
    assert talk.host.connection.regreetings == talk.guest.connection.regreetings == 0
    assert 0 < talk.link.to_host.written_bytes - before <= 41 * 72
    assert not talk.host.count(Unlinked)


def test_data_makes_heartbeats_needless() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    for _ in range(100):
        peer.wait(1)
        peer.connection.open("x")
        assert FrameType.ACK not in peer.types()
        peer.send_ack()


def test_a_peer_that_falls_silent_is_told_within_45_seconds_and_may_come_back() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    for _ in range(44):
        peer.wait(1)
    assert peer.connection.events() == []
    peer.wait(2)
    (event,) = peer.connection.events()
    assert event == Unlinked("silent")
    assert not peer.connection.opened
    peer.epoch = peer.take_challenge()
    peer.send_hello(peer.epoch)
    peer.send_ack()
    assert peer.connection.events() == [Opened(True, PeerIdentity("raw-boot", "raw peer"))]


def test_a_frame_that_is_never_acknowledged_leads_to_a_new_greeting() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.open("x")
    assert peer.types() == [FrameType.OPEN]
    seen: list[FrameType] = []
    for _ in range(6):
        peer.wait(1)
        seen += peer.types()
    assert seen[:4] == [FrameType.ACK] * 4  # probes, so that the peer sees what it misses
    assert FrameType.CHALLENGE in seen


def test_a_frame_behind_an_acknowledged_one_is_not_forgotten() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.open("x")
    peer.receive()
    first = peer.ack, peer.ack_check
    peer.connection.open("y")
    peer.receive()
    peer.send(FrameType.ACK, bytes(12), ack=first[0], ack_check=first[1])
    assert peer.connection.opened
    seen: list[FrameType] = []
    for _ in range(6):
        peer.wait(1)
        seen += peer.types()
    assert FrameType.CHALLENGE in seen


def test_a_lost_tail_is_asked_for_within_two_seconds() -> None:
    talk = open_pair()
    link = talk.link
    assert link is not None
    talk.guest.try_send("work", 500)
    lost = talk.guest.connection.data_to_send(talk.now)
    assert lost  # and nobody gets it
    talk.run(2)
    assert talk.host.by_target["work"].got == 1


def test_acknowledgements_travel_with_data_or_soon_after() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1)
    assert peer.receive() == []
    peer.wait(0.03)
    assert peer.types() == [FrameType.ACK]
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=3)
    peer.connection.close(1)
    (frame,) = peer.receive()
    assert (frame.type, frame.ack) == (FrameType.CLOSE, 2)
    peer.wait(1)
    assert FrameType.ACK not in peer.types()[1:]


# --- anomalies ---


@pytest.mark.parametrize("sequence", [1, 3, 2**63, 2**64 - 1])
def test_a_sequence_number_that_does_not_follow_leads_to_a_new_greeting(sequence: int) -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1)
    peer.receive()
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=3, sequence=sequence)
    assert peer.connection.state is SessionState.CHALLENGING
    assert peer.types() == [FrameType.CHALLENGE]


@pytest.mark.parametrize(("ack", "check"), [(0, 1), (1, 0), (5, 5), (2**64 - 1, 0)])
def test_a_forged_acknowledgement_leads_to_a_new_greeting(ack: int, check: int) -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.open("x")
    peer.receive()
    peer.send(FrameType.ACK, bytes(12), ack=ack, ack_check=check)
    assert peer.connection.state is SessionState.CHALLENGING


def test_an_acknowledgement_that_goes_back_leads_to_a_new_greeting() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.open("x")
    peer.receive()
    peer.send_ack()
    assert peer.connection.opened
    peer.send(FrameType.ACK, bytes(12), ack=0, ack_check=0)
    assert peer.connection.state is SessionState.CHALLENGING


def test_damage_in_an_open_session_leads_to_a_new_greeting_and_nothing_is_lost() -> None:
    talk = open_pair()
    talk.guest.try_send("work", 500)
    talk.host.connection.receive(b"\0garbage\0", talk.now)
    assert talk.host.connection.state is SessionState.CHALLENGING
    talk.run(5)
    assert talk.host.by_target["work"].got == 1
    assert not talk.guest.count(Unlinked)  # a greeting that succeeds at once is nobody's business


def test_no_peer_can_make_the_host_challenge_without_end() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    challenges = 0
    for _ in range(2_000):  # in ten seconds: knock, answer, knock again
        peer.now += 0.005
        peer.connection.handle_time(peer.now)
        for frame in peer.receive():
            if frame.type == FrameType.CHALLENGE:
                challenges += 1
                peer.send_hello(int.from_bytes(frame.payload, "big"))
        peer.send(FrameType.KNOCK, epoch=0)
    assert 20 <= challenges <= 8 + 10 * 2 + 10 * 4


def test_an_unknown_frame_that_is_ignorable_is_skipped() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    peer.send(31, b"news", flags=IGNORABLE)
    peer.send(200, b"numbered news", flags=IGNORABLE)
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1)
    assert peer.connection.opened
    (event,) = peer.connection.events()
    assert isinstance(event, ChannelOpened)


@pytest.mark.parametrize("kind", [31, 200])
def test_an_unknown_frame_that_is_not_ignorable_ends_the_session_with_an_error(kind: int) -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    peer.send(kind, b"", sequence=1 if kind > 32 else 0)
    reset, refused = peer.connection.events()
    assert isinstance(reset, Reset)
    assert isinstance(refused, LinkRefused)
    (frame,) = peer.receive()
    assert decode_end(frame.payload)[0] == EndCode.UNKNOWN_FRAME
    assert peer.connection.session_id == NO_SESSION


def test_a_frame_of_a_version_that_was_not_agreed_ends_the_session() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1, version=2)
    assert peer.types() == [FrameType.ERROR]


def test_an_error_frame_of_the_epoch_ends_the_session_on_the_other_side_too() -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    peer.connection.events()
    peer.send(FrameType.ERROR, b"\0\1you broke a rule")
    reset, refused = peer.connection.events()
    assert isinstance(reset, Reset)
    assert isinstance(refused, LinkRefused)
    assert peer.receive() == []


# --- resumption and reset ---


def test_a_session_outlives_its_links() -> None:
    talk = open_pair()
    session_id = talk.host.connection.session_id
    for number in range(1, 6):
        talk.cut()
        talk.guest.try_send("work", 100)
        assert talk.host.events[-1] == Unlinked("link down")
        talk.connect(GOOD)
        talk.run(5)
        assert talk.host.by_target["work"].got == number
    assert talk.host.connection.session_id == session_id
    opened = [event.resumed for event in talk.host.events if isinstance(event, Opened)]
    assert opened == [False, True, True, True, True, True]


def test_a_host_that_lost_its_memory_begins_a_new_session_and_the_guest_is_told() -> None:
    talk = open_pair()
    talk.host.paused = True
    assert talk.guest.try_send("work", 1_000)
    talk.run(1)
    talk.cut()
    talk.host.connection = talk.new_connection(Role.HOST)
    talk.connect(GOOD)
    talk.run(5)
    (reset,) = talk.guest.resets
    stream = talk.guest.by_target["work"]
    assert reset.lost == {stream.number: stream.sent_cost}
    assert stream.ended
    assert talk.guest.connection.channels == 0
    assert isinstance(talk.guest.events[-1], Opened)


def test_a_guest_that_booted_anew_begins_a_new_session_and_the_host_is_told() -> None:
    talk = open_pair()
    talk.cut()
    talk.guest.connection = talk.new_connection(Role.GUEST, boot_id="second boot")
    talk.connect(GOOD)
    talk.run(5)
    assert len(talk.host.resets) == 1
    assert talk.host.resets[0].lost == {talk.host.by_target["work"].number: 0}
    assert talk.host.connection.peer == PeerIdentity("second boot", "test 1.0")


def test_a_session_whose_guest_shows_another_boot_id_is_not_resumed() -> None:
    """Memory come back in another boot cannot be; but who copies a session id gets no session."""
    peer = RawPeer(Role.HOST)
    peer.greet()
    session_id = peer.connection.session_id
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    numbers = Numbers(session_id, 0, 0, 0, 0, 0)
    peer.send_hello(nonce, numbers)
    (frame,) = peer.receive()
    assert decode_welcome(frame.payload).resumed  # the same boot id: fine
    peer.connection._session.peer = PeerIdentity("yet another")  # pyright: ignore[reportPrivateUsage]
    peer.connection.link_up(peer.now)
    peer.send_hello(peer.take_challenge(), numbers)
    (frame,) = peer.receive()
    assert not decode_welcome(frame.payload).resumed


def test_a_channel_whose_open_was_never_sent_survives_a_reset() -> None:
    talk = open_pair()
    talk.cut()
    talk.guest.open("later")
    talk.host.connection = talk.new_connection(Role.HOST)
    talk.connect(GOOD)
    talk.run(5)
    assert talk.guest.by_target["work"].ended
    assert talk.guest.by_target["later"].accepted
    assert talk.guest.by_target["later"].number not in talk.guest.resets[0].lost


def test_a_welcome_that_the_guest_never_saw_resets_nothing() -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.events()
    session_id = peer.connection.session_id
    peer.connection.link_up(peer.now)
    peer.send_hello(peer.take_challenge(), Numbers(b"an unknown one..", 5, 5, 5, 5, 5))
    assert peer.types() == [FrameType.WELCOME]  # offers a new session
    peer.connection.link_down(peer.now)
    assert peer.connection.session_id == session_id
    assert [type(event) for event in peer.connection.events()] == [Unlinked]


def test_a_new_session_whose_confirmation_was_lost_is_gone_on_with() -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    peer.send_hello(peer.take_challenge())
    (frame,) = peer.receive()
    offered = decode_welcome(frame.payload).numbers.session_id
    peer.connection.link_up(peer.now)
    peer.epoch = peer.take_challenge()
    peer.send_hello(peer.epoch, Numbers(offered, 0, 0, 0, 0, 0))
    (frame,) = peer.receive()
    assert decode_welcome(frame.payload).resumed
    peer.send_ack()
    assert peer.connection.session_id == offered


@pytest.mark.parametrize(
    "change",
    [
        {"received": 5},
        {"received": 0, "received_check": 0},
        {"received_check": 1},
        {"sent": 0, "sent_check": 0},
        {"sent_check": 1},
        {"acknowledged": 2},
    ],
)
def test_numbers_that_cannot_be_reconciled_reset_the_session(change: dict[str, Any]) -> None:
    peer = RawPeer(Role.HOST)
    peer.greet()
    peer.connection.open("x")
    peer.receive()
    peer.send(FrameType.OPEN, b"\x02" + bytes(8) + b"\0\1x", channel=1)  # acknowledges ours, so 0 goes back
    peer.connection.link_up(peer.now)
    nonce = peer.take_challenge()
    true = peer.numbers()
    peer.send_hello(nonce, replace(true, **change))
    (frame,) = peer.receive()
    assert not decode_welcome(frame.payload).resumed
    peer.epoch, peer.ack, peer.ack_check, peer.sequence, peer.check = nonce, 0, 0, 0, 0
    peer.connection.events()
    peer.send_ack()
    assert [type(event) for event in peer.connection.events()] == [Reset, Opened]


@pytest.mark.parametrize(("ack", "check"), [(1, 0), (0, 1)])
def test_a_first_frame_that_does_not_acknowledge_what_hello_said_confirms_nothing(
    ack: int, check: int
) -> None:
    peer = RawPeer(Role.HOST)
    peer.connection.link_up(peer.now)
    peer.epoch = peer.take_challenge()
    peer.send_hello(peer.epoch)
    peer.receive()
    peer.send(FrameType.ACK, bytes(12), ack=ack, ack_check=check)
    assert peer.connection.state is SessionState.CHALLENGING
    assert peer.connection.events() == []


@pytest.mark.parametrize("change", [{"session_id": b"not this session"}, {"received": 9}, {"sent_check": 9}])
def test_a_guest_does_not_go_on_with_a_welcome_that_does_not_fit(change: dict[str, Any]) -> None:
    peer = RawPeer(Role.GUEST)
    peer.greet()
    peer.connection.events()
    peer.send_challenge(99)
    peer.receive()
    peer.send_welcome(99, replace(peer.numbers(), **change), resumed=True)
    assert [type(event) for event in peer.connection.events()] == [Reset]
    assert peer.connection.state is SessionState.KNOCKING
    assert peer.connection.session_id == NO_SESSION


def restore_guest(talk: Conversation, saved: tuple[Connection, dict[str, int]]) -> None:
    """The guest's memory goes back; neither socket notices (loadvm)."""
    talk.guest.connection = copy.deepcopy(saved[0])
    for target, sent in saved[1].items():
        talk.guest.by_target[target].sent = sent


def test_a_guest_restored_from_a_snapshot_is_noticed_and_both_sides_are_told() -> None:
    talk = open_pair()
    talk.guest.try_send("work", 100)
    talk.run(1)
    saved = copy.deepcopy(talk.guest.connection), {"work": talk.guest.by_target["work"].sent}
    for _ in range(5):
        talk.guest.try_send("work", 100)
    talk.run(1)
    assert talk.host.by_target["work"].got == 6
    restore_guest(talk, saved)
    talk.guest.try_send("work", 333)  # an old number, other bytes
    talk.run(30)
    assert len(talk.host.resets) == 1
    assert len(talk.guest.resets) == 1
    assert talk.host.by_target["work"].got == 6
    assert talk.host.connection.opened


def test_a_restored_guest_that_says_nothing_is_noticed_by_its_heartbeat() -> None:
    talk = open_pair()
    saved = copy.deepcopy(talk.guest.connection), {"work": 0}
    talk.guest.try_send("work", 100)
    talk.run(1)
    restore_guest(talk, saved)
    talk.run(30)
    assert talk.host.resets


def test_a_restored_guest_that_catches_up_with_other_bytes_is_noticed() -> None:
    """Same numbers, other frames behind them: only the running checksum shows it."""
    talk = open_pair()
    saved = copy.deepcopy(talk.guest.connection), {"work": 0}
    talk.guest.try_send("work", 100)
    talk.run(1)
    talk.cut()
    restore_guest(talk, saved)
    talk.guest.connection.link_down(talk.now)
    talk.guest.try_send("work", 200)
    talk.guest.connection.data_to_send(talk.now)
    talk.connect(GOOD)
    talk.run(30)
    assert talk.host.resets
    assert talk.host.by_target["work"].got == 1


def test_closed_is_not_sent_for_channels_of_a_reset_session() -> None:
    talk = open_pair()
    talk.cut()
    talk.host.connection = talk.new_connection(Role.HOST)
    talk.connect(GOOD)
    talk.run(5)
    assert not talk.guest.count(Closed)


def test_a_local_link_opens_in_two_round_trips() -> None:
    host = Connection(Role.HOST, PeerIdentity("a"), random_bytes=seeded_bytes(1))
    guest = Connection(Role.GUEST, PeerIdentity("b"), random_bytes=seeded_bytes(2))
    link = FaultyLink()
    host.link_up(0)
    guest.link_up(0)
    trips = 0
    while not (host.opened and guest.opened):
        trips += 1
        link.to_guest.write(host.data_to_send(0), 0)
        link.to_host.write(guest.data_to_send(0), 0)
        while data := link.to_guest.read(0):
            guest.receive(data, 0)
        while data := link.to_host.read(0):
            host.receive(data, 0)
    assert trips <= 4
    assert link.to_guest.written_bytes + link.to_host.written_bytes < 700
