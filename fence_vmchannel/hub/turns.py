# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose turn it is to be read: of all peers that have sent something, the one that would end first in fair
shares of the loop's time.

Self-clocked fair queueing (Golestani 1994) over the time that turns take, which is known of past ones only.
Peers that keep the loop busy wait for one another; one that speaks now and then, and briefly, is read in the
round of the loop in which it spoke.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Final, Protocol

ROUND_S: Final = 0.002
"""After so much reading in one round of the loop the rest waits for the next: answers go out in between."""

_PAUSE_S: Final = 0.0005
"""A turn that begins so long after the one before is in another round: a quiet hub counts no rounds."""


class Reader(Protocol):
    """Who takes turns."""

    had: float  # virtual time at which its last turn ended; only `FairTurns` writes it
    took: float  # seconds of its last turn; only `FairTurns` writes it
    waits: bool  # for its turn; only `FairTurns` writes it

    def take_turn(self) -> None:
        """Read and handle some of what there is; must not raise."""
        ...


class FairTurns:
    """The turns of all peers of one hub. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds."""
        self._clock = clock
        self._now = 0.0  # virtual time: when the turn taken last began
        self._left_s = ROUND_S  # of this round of the loop
        self._ended = 0.0  # the turn before, on the clock
        self._waiting: list[tuple[float, int, Reader]] = []  # when it would end, order of arrival
        self._arrivals = 0
        self._round: asyncio.Handle | None = None

    def ready(self, reader: Reader) -> None:
        """It has something to read: its turn is now, or comes in a later round. Again is harmless."""
        if reader.waits:
            return
        ends = max(self._now, reader.had) + reader.took
        if not self._waiting and self._clock() - self._ended > _PAUSE_S:
            self._left_s = ROUND_S
        if self._left_s > 0 and (not self._waiting or ends <= self._waiting[0][0]):
            self._take(reader)
            return
        reader.waits = True
        self._arrivals += 1
        heapq.heappush(self._waiting, (ends, self._arrivals, reader))
        self._arm()

    def _take(self, reader: Reader) -> None:
        self._now = max(self._now, reader.had)
        began = self._clock()
        reader.take_turn()
        self._ended = self._clock()
        reader.took = self._ended - began
        reader.had = self._now + reader.took
        self._left_s -= reader.took

    def _arm(self) -> None:
        if self._round is None:
            self._round = asyncio.get_running_loop().call_soon(self._next_round)

    def _next_round(self) -> None:
        self._round = None
        self._left_s = ROUND_S
        while self._waiting and self._left_s > 0:
            _, _, reader = heapq.heappop(self._waiting)
            reader.waits = False
            self._take(reader)
        if self._waiting:
            self._arm()
