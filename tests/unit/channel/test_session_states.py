# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every transition of both session tables, driven by real frames and real time; the tests come from the
tables."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

import pytest

from fence_vmchannel.core.connection import LinkRefused, Role
from fence_vmchannel.core.frames import FrameType
from fence_vmchannel.core.greeting import NO_SESSION, Numbers
from fence_vmchannel.core.session_state import SESSION_TRANSITIONS, SessionInput, SessionState, next_state
from fence_vmchannel.errors import LocalProtocolError
from tests.fakes.raw_peer import RawPeer

S = SessionState
I = SessionInput  # noqa: E741 (read beside S in the tables below)
NEW: Final = Numbers(b"another session.", 0, 0, 0, 0, 0)
NOTHING: Final = Numbers(NO_SESSION, 0, 0, 0, 0, 0)


def reach_host(state: SessionState) -> RawPeer:
    """A host's connection in a state, with the peer that brought it there."""
    peer = RawPeer(Role.HOST)
    if state in (S.CHALLENGING, S.WELCOMING):
        peer.connection.link_up(peer.now)
        peer.epoch = peer.take_challenge()
    if state is S.WELCOMING:
        peer.send_hello(peer.epoch, NOTHING)
        peer.receive()
    if state in (S.OPEN, S.REFUSED):
        peer.greet()
    if state is S.REFUSED:
        peer.send(FrameType.OPEN, b"", channel=1)
    return peer


def reach_guest(state: SessionState) -> RawPeer:
    """A guest's connection in a state."""
    peer = RawPeer(Role.GUEST)
    if state in (S.KNOCKING, S.ANSWERED):
        peer.connection.link_up(peer.now)
        peer.receive()
    if state is S.ANSWERED:
        peer.epoch = 5
        peer.send_challenge(5)
        peer.receive()
    if state in (S.OPEN, S.REFUSED):
        peer.greet()
    if state is S.REFUSED:
        peer.send(FrameType.OPEN, b"", channel=2)
    return peer


def refuse(peer: RawPeer) -> None:
    """Do what makes the real side refuse the link, in any linked state."""
    peer.send_raw(b"\xf5VMC" * 1_100 + bytes(60))


def disturb(peer: RawPeer) -> None:
    """An anomaly: a gap if there is an epoch, else time that passes."""
    if peer.connection.opened:
        peer.send(FrameType.DATA, b"", channel=1, sequence=99)
    else:
        peer.wait(40)


REACH: Final = MappingProxyType({Role.HOST: reach_host, Role.GUEST: reach_guest})
APPLY: Final[MappingProxyType[SessionInput, Callable[[RawPeer], object]]] = MappingProxyType(
    {
        I.LINK_UP: lambda peer: peer.connection.link_up(peer.now),
        I.LINK_DOWN: lambda peer: peer.connection.link_down(peer.now),
        I.KNOCK: lambda peer: peer.send(FrameType.KNOCK, epoch=0),
        I.CHALLENGE: lambda peer: peer.send_challenge(6),
        I.HELLO: lambda peer: peer.send_hello(peer.epoch, NOTHING),
        I.WELCOME: lambda peer: peer.send_welcome(peer.epoch, NEW),
        I.CONFIRMED: lambda peer: peer.send_ack(),
        I.ANOMALY: disturb,
        I.REFUSE: refuse,
        I.EXPORT: lambda peer: peer.connection.export_state(),
    }
)
ROWS: Final = [(role, *row, to) for role, table in SESSION_TRANSITIONS.items() for row, to in table.items()]


@pytest.mark.parametrize(("role", "state", "what", "to"), ROWS)
def test_each_transition_happens(role: Role, state: S, what: I, to: S) -> None:
    peer = REACH[role](state)
    assert peer.connection.state is state
    peer.connection.events()
    APPLY[what](peer)
    assert peer.connection.state is to


@pytest.mark.parametrize("role", Role)
def test_every_state_of_a_role_can_be_reached_and_left_except_the_last(role: Role) -> None:
    table = SESSION_TRANSITIONS[role]
    other = {S.KNOCKING, S.ANSWERED} if role is Role.HOST else {S.CHALLENGING, S.WELCOMING}
    assert set(table.values()) == set(S) - other
    assert {state for state, _ in table} == set(S) - other - {S.EXPORTED}


def test_every_input_is_in_a_table() -> None:
    assert {what for table in SESSION_TRANSITIONS.values() for _, what in table} == set(I)


def test_what_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(LocalProtocolError, match="unlinked"):
        next_state(Role.HOST, S.UNLINKED, I.HELLO)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", S)
def test_a_link_that_ends_is_harmless_in_every_state_and_a_new_one_begins_anew(role: Role, state: S) -> None:
    if (role, state) not in {(row[0], row[1]) for row in ROWS}:
        return  # not a state of this role, or EXPORTED
    peer = REACH[role](state)
    peer.connection.link_down(peer.now)
    peer.connection.link_down(peer.now)
    peer.connection.link_up(peer.now)
    peer.connection.link_up(peer.now)
    assert peer.connection.state is (S.CHALLENGING if role is Role.HOST else S.KNOCKING)


@pytest.mark.parametrize("role", Role)
def test_an_exported_connection_is_dead(role: Role) -> None:
    peer = REACH[role](S.UNLINKED)
    peer.connection.export_state()
    peer.connection.receive(b"anything", peer.now)
    peer.connection.handle_time(peer.now)
    assert peer.connection.data_to_send(peer.now) == b""
    assert peer.connection.next_deadline() is None
    with pytest.raises(LocalProtocolError):
        peer.connection.link_up(peer.now)
    with pytest.raises(LocalProtocolError):
        peer.connection.export_state()


@pytest.mark.parametrize("role", Role)
def test_a_refused_link_gives_its_error_once_and_then_hears_nothing(role: Role) -> None:
    peer = REACH[role](S.REFUSED)
    assert sum(isinstance(event, LinkRefused) for event in peer.connection.events()) == 1
    assert peer.types() == [FrameType.ERROR]
    peer.send_raw(b"more")
    peer.wait(100)
    assert peer.receive() == []
    assert peer.connection.events() == []
