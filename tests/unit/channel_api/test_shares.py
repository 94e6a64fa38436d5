# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares: nobody takes all of what many need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fence_vmchannel.access import Credentials
from fence_vmchannel.hub.shares import ROOT_RESERVE, ClientPlaces, may_take, owner
from fence_vmchannel.peers import PeerInfo, PeerKind

USER, OTHER = 1_000, 1_001


def taken(places: ClientPlaces, uid: int) -> int:
    """How many places a user gets who takes all he can."""
    count = 0
    while places.enter(uid):
        count += 1
    return count


def local(uid: int) -> PeerInfo:
    return PeerInfo(f"local:{uid}", PeerKind.LOCAL, credentials=Credentials(1, uid, uid))


def test_a_user_gets_half_the_next_half_of_the_rest_and_root_is_always_let_in() -> None:
    places = ClientPlaces(256)
    assert [taken(places, uid) for uid in (USER, OTHER, 1_002)] == [124, 62, 31]
    assert taken(places, 0) == 256 - 124 - 62 - 31
    assert not places.enter(1_003)


def test_who_leaves_makes_room() -> None:
    places = ClientPlaces(32)
    most = taken(places, USER)
    places.leave(USER)
    assert taken(places, USER) == 1
    for _ in range(most):
        places.leave(USER)
    assert taken(places, OTHER) == most


@given(total=st.integers(0, 300), greedy=st.integers(1, 5))
def test_whoever_holds_nothing_yet_is_let_in_while_a_place_is_free(total: int, greedy: int) -> None:
    places = ClientPlaces(total)
    held = [taken(places, uid) for uid in range(1, greedy + 1)]
    free = total - sum(held) - min(ROOT_RESERVE, total // 2)
    assert places.enter(USER) == (free > 0)
    assert all(one <= max(total // 2, 1) for one in held)


@given(total=st.integers(1, 1_000), wishes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 100))))
def test_nobody_holds_more_than_half_and_a_newcomer_gets_what_is_free(
    total: int, wishes: list[tuple[int, int]]
) -> None:
    held: Counter[int] = Counter()
    for who, more in wishes:
        if may_take(more, held=held[who], free=total - held.total()):
            held[who] += more
    free = total - held.total()
    largest = max((more for _, more in wishes), default=0)
    assert all(one <= max(total // 2, largest) for one in held.values())
    assert may_take(free, held=0, free=free)


def test_one_of_many_is_a_user_with_all_his_programs_or_a_vm_with_all_its_ports() -> None:
    assert owner(local(USER)) == owner(local(USER)) != owner(local(OTHER))
    assert owner(local(0)) is None
    first = PeerInfo("vm1", PeerKind.VM, "org.vmchannel.0", "uuid")
    assert owner(first) == owner(PeerInfo("vm1", PeerKind.VM, "org.vmchannel.1", "uuid"))
    assert owner(PeerInfo("host", PeerKind.HOST)) is None
    assert owner(PeerInfo("local:1", PeerKind.LOCAL)) is not None, "who is not known is not root"
