# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose request is begun next: of all that wait, one of the VM that had the least (S7).

Start-time fair queueing (Goyal, Vin, Cheng 1996) with requests of equal cost. A VM that asks now and then
has its turn at once, however many requests others keep waiting; a request that takes long holds nobody up,
since a turn is the beginning only.
"""

from __future__ import annotations

import asyncio
import heapq

from vmchannel_host.model import VmUuid

_Waiting = tuple[int, int, int, asyncio.Future[None]]
"""Start tag; the finish tag before it, so that of equals the one goes first that asked for nothing lately;
order of arrival."""


class Turns:
    """One turn in each round of the event loop, so that what has just arrived is looked at in between.

    Belongs to one event loop. What may wait is bounded by who calls: a few requests of each channel.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._finish: dict[VmUuid | None, int] = {}  # finish tag of each VM's last request
        self._now = 0  # virtual time: start tag of the request begun last
        self._arrivals = 0
        self._taken = False  # this round's turn

    async def turn(self, vm: VmUuid | None) -> None:
        """Wait for a turn of that VM. Cancelling gives it up."""
        before = self._finish.get(vm, 0)
        start = max(self._now, before)
        self._finish[vm] = start + 1
        if not self._taken:
            self._begin(start)
            return
        self._arrivals += 1
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start, before, self._arrivals, mine))
        await mine

    def _begin(self, start: int) -> None:
        self._taken = True
        self._now = start
        asyncio.get_running_loop().call_soon(self._next_round)

    def _next_round(self) -> None:
        self._taken = False
        while self._waiting:
            start, _, _, mine = heapq.heappop(self._waiting)
            if not mine.done():  # not cancelled
                mine.set_result(None)
                self._begin(start)
                return
        self._finish.clear()  # nobody waits: all are equal again
        self._now = 0
