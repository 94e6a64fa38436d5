# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose turn it is to be read (S7), on a clock that only turns move."""

from __future__ import annotations

import asyncio
from collections import Counter

from fence_vmchannel.hub.turns import ROUND_S, FairTurns


class Loop:
    """Time that passes in turns only."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns = FairTurns(lambda: self.now)
        self.order: list[str] = []

    async def rounds(self, count: int = 1) -> None:
        for _ in range(count):
            await asyncio.sleep(0)


class Peer:
    """Something to read, so many turns' worth; each takes `cost_s`."""

    def __init__(self, loop: Loop, name: str, cost_s: float, count: int) -> None:
        self.had = self.took = 0.0
        self.waits = False
        self._loop = loop
        self._name = name
        self._cost_s = cost_s
        self._left = count

    def speak(self, count: int = 1) -> None:
        self._left += count
        self._loop.turns.ready(self)

    def take_turn(self) -> None:
        self._loop.now += self._cost_s
        self._loop.order.append(self._name)
        self._left -= 1
        if self._left > 0:
            asyncio.get_running_loop().call_soon(self._loop.turns.ready, self)


async def flooded(loop: Loop, count: int = 100) -> list[Peer]:
    """So many peers have had a turn each and want more."""
    peers = [Peer(loop, f"flood{number}", 0.001, 1_000) for number in range(count)]
    for peer in peers:
        loop.turns.ready(peer)
    await loop.rounds(count)
    return peers


async def test_a_peer_that_is_alone_has_its_turn_at_once() -> None:
    loop = Loop()
    Peer(loop, "vm1", 0.001, 1).speak(0)
    assert loop.order == ["vm1"]


async def test_a_peer_that_speaks_now_and_then_is_read_next_however_many_flood() -> None:
    loop = Loop()
    await flooded(loop)
    light = Peer(loop, "light", 0.0001, 0)
    for _ in range(20):
        before = len(loop.order)
        light.speak()
        while "light" not in loop.order[before:]:
            await loop.rounds()
        assert loop.order[before:].index("light") <= ROUND_S / 0.001
        await loop.rounds(7)


async def test_peers_that_flood_have_the_same_time_whatever_a_turn_of_theirs_takes() -> None:
    loop = Loop()
    await flooded(loop, 20)
    dear = Peer(loop, "dear", 0.005, 1_000)
    dear.speak(0)
    before = len(loop.order)
    await loop.rounds(500)
    turns = Counter(loop.order[before:])
    assert len(turns) == 21
    shares = {name: count * (0.005 if name == "dear" else 0.001) for name, count in turns.items()}
    assert max(shares.values()) <= 2 * min(shares.values())


async def test_in_one_round_of_the_loop_no_more_is_read_than_takes_its_time() -> None:
    loop = Loop()
    await flooded(loop)
    for _ in range(50):
        before = loop.now
        await loop.rounds()
        assert loop.now - before <= ROUND_S + 0.001


async def test_a_peer_that_was_quiet_saves_no_turns_up() -> None:
    loop = Loop()
    Peer(loop, "busy", 0.001, 100_000).speak(0)
    await loop.rounds(300)
    late = Peer(loop, "late", 0.001, 100_000)
    before = len(loop.order)
    late.speak(0)
    await loop.rounds(100)
    busy = loop.order[before:].count("busy")
    assert abs(busy - loop.order[before:].count("late")) <= 3
