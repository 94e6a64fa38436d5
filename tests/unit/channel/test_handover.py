# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session leaves one process and goes on in another: at any moment, and nothing is lost or doubled."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fence_vmchannel.core import saved
from fence_vmchannel.core.connection import Connection, PeerIdentity, Role
from fence_vmchannel.core.frames import FrameType
from fence_vmchannel.core.saved import SavedControl, SavedRefusal, SavedSession
from fence_vmchannel.core.timers import Timers
from fence_vmchannel.errors import LocalProtocolError, RemoteProtocolError
from tests.fakes.conversation import Application, Conversation, seeded_bytes
from tests.fakes.link import GOOD, Faults, FaultyLink
from tests.unit.channel.test_faulty_links import FAULTS, act_at_random, assert_all_arrived


def hand_over(talk: Conversation, side: Application) -> None:
    """One side's process ends in order; the next one goes on. The link ends with it."""
    if talk.link is not None:
        talk.link.cut()
        talk.link = None
    for each in talk.applications:
        each.connection.link_down(talk.now)
        each.handle_events()
    role = Role.HOST if side is talk.host else Role.GUEST
    side.connection = talk.import_connection(role, side.connection.export_state())


def busy_state() -> tuple[Conversation, bytes]:
    """The host's exported state in the middle of things: all kinds of channels, data queued and
    unacknowledged."""
    talk = Conversation()
    talk.connect()
    for number in range(4):
        talk.guest.open(f"g{number}")
        talk.host.open(f"h{number}")
    talk.run(1)
    host = talk.host.connection
    talk.host.try_send("h0", 60_000)
    talk.host.try_send("h1", 30_000)
    talk.host.close("h1")
    host.data_to_send(talk.now, 10_000)
    host.open("never sent", payload=b"payload")
    talk.host.handle_events()
    return talk, host.export_state()


@settings(max_examples=25, deadline=None)
@given(faults=FAULTS, seed=st.integers(0, 2**32))
def test_a_hand_over_at_any_moment_loses_and_doubles_nothing(faults: Faults, seed: int) -> None:
    talk = Conversation(faults, seed)
    rng = random.Random(seed)
    talk.connect()
    for _ in range(5):
        act_at_random(talk, rng, rng.randrange(8))
        hand_over(talk, rng.choice(talk.applications))
        if rng.random() < 0.7:
            talk.connect()
    talk.settle()
    assert not talk.host.resets
    assert not talk.guest.resets
    assert_all_arrived(talk)


def test_what_is_imported_is_what_was_exported() -> None:
    talk, state = busy_state()
    again = talk.import_connection(Role.HOST, state)
    assert again.channels == 9
    assert again.unsent_bytes > 30_000
    assert again.peer == PeerIdentity("guest-boot", "test 1.0")
    assert again.export_state() == state


def test_an_imported_session_resumes_and_tells_nobody() -> None:
    talk = Conversation()
    talk.connect()
    talk.guest.open("work")
    talk.run(1)
    session_id = talk.host.connection.session_id
    hand_over(talk, talk.host)
    talk.connect(GOOD)
    talk.run(1)
    assert talk.host.connection.session_id == session_id
    assert talk.guest.try_send("work", 10)
    talk.run(1)
    assert talk.host.by_target["work"].got == 1


def test_credit_that_was_granted_lazily_is_not_forgotten() -> None:
    talk = Conversation()
    talk.connect()
    work = talk.guest.open("work")
    talk.run(1)
    whole = talk.guest.connection.credit(work.number)
    assert talk.guest.try_send("work", 10)
    talk.run(Timers.CREDIT_DELAY_S / 2)  # it has come and was granted, which nobody has told the guest
    assert talk.host.by_target["work"].got == 1
    assert talk.guest.connection.credit(work.number) < whole
    hand_over(talk, talk.host)
    talk.connect(GOOD)
    talk.run(1)
    assert talk.guest.connection.credit(work.number) == whole


def test_events_must_be_handled_before_the_export() -> None:
    talk = Conversation()
    link = FaultyLink()
    talk.host.connection.link_up(0)
    talk.guest.connection.link_up(0)
    for _ in range(4):
        link.to_guest.write(talk.host.connection.data_to_send(0), 0)
        link.to_host.write(talk.guest.connection.data_to_send(0), 0)
        talk.guest.connection.receive(link.to_guest.read(0), 0)
        talk.host.connection.receive(link.to_host.read(0), 0)
    assert talk.guest.connection.opened
    with pytest.raises(LocalProtocolError, match="events"):
        talk.guest.connection.export_state()
    talk.guest.connection.events()
    assert talk.guest.connection.export_state()


def load(state: bytes, role: Role = Role.HOST) -> Connection:
    return Connection.import_state(state, role, PeerIdentity("x"), random_bytes=seeded_bytes(1))


def test_a_state_of_the_other_role_is_refused() -> None:
    _, state = busy_state()
    with pytest.raises(RemoteProtocolError, match="role"):
        load(state, Role.GUEST)


def test_every_kind_of_damage_is_refused() -> None:
    _, state = busy_state()
    for at in [*range(40), *range(40, len(state), 501)]:
        with pytest.raises(RemoteProtocolError):
            load(state[:at])
        with pytest.raises(RemoteProtocolError):
            load(state[:at] + bytes((state[at] ^ 0x40,)) + state[at + 1 :])
    with pytest.raises(RemoteProtocolError):
        load(state + b"x")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        load(garbage)


def test_another_format_version_is_refused() -> None:
    _, state = busy_state()
    with pytest.raises(RemoteProtocolError, match="format"):
        load(state[:4] + b"\0\2" + state[6:])


def first_channel(session: SavedSession, **changes: Any) -> SavedSession:
    """The session with changes in its first channel."""
    first, *others = session.channels.channels
    channels = (replace(first, **changes), *others)
    return replace(session, channels=replace(session.channels, channels=channels))


def waiting(session: SavedSession, control: SavedControl) -> SavedSession:
    """The session with a control frame that waits."""
    return replace(session, channels=replace(session.channels, control=(control,)))


CHANGES: list[Callable[[SavedSession], SavedSession]] = [
    lambda s: replace(s, session_id=b"short"),
    lambda s: replace(s, version=9),
    lambda s: replace(s, acknowledged=s.acknowledged + 1),
    lambda s: replace(s, frames=s.frames[1:]),
    lambda s: replace(s, frames=(replace(s.frames[0], identity=b"x"), *s.frames[1:])),
    lambda s: replace(s, frames=(replace(s.frames[0], payload=b"other"), *s.frames[1:])),
    lambda s: replace(s, channels=replace(s.channels, next_number=7)),
    lambda s: replace(s, channels=replace(s.channels, next_number=2)),
    lambda s: replace(s, channels=replace(s.channels, peer_highest=0)),
    lambda s: replace(s, channels=replace(s.channels, channels=s.channels.channels[:1] * 2)),
    lambda s: first_channel(s, state="nonsense"),
    lambda s: first_channel(s, state="gone"),
    lambda s: first_channel(s, priority=7),
    lambda s: first_channel(s, close_code=77),
    lambda s: first_channel(s, delivered=2**50),
    lambda s: first_channel(s, consumed=2**50),
    lambda s: first_channel(s, send_limit=-1),
    lambda s: first_channel(s, queue=(saved.SavedFragment(b"x", 0),)),
    lambda s: first_channel(s, queue=(saved.SavedFragment(b"x", 65_536),)),
    lambda s: first_channel(s, window=-1),
    lambda s: first_channel(s, largest_window=2**62 + 1),
    lambda s: replace(s, received=-1),
    lambda s: replace(s, received_check=2**32),
    lambda s: replace(s, tick=-1),
    lambda s: replace(s, channels=replace(s.channels, peer_highest=2**32)),
    lambda s: waiting(s, SavedControl(FrameType.DATA, s.channels.channels[0].number)),
    lambda s: waiting(s, SavedControl(FrameType.OPEN, s.channels.channels[0].number)),
    lambda s: replace(s, channels=replace(s.channels, refusals=(SavedRefusal(2**32, 1, ""),))),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_values_that_no_export_gives_are_refused(number: int) -> None:
    _, state = busy_state()
    with pytest.raises(RemoteProtocolError):
        load(saved.pack(CHANGES[number](saved.unpack(state))))
