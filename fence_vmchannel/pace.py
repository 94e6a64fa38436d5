# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast each of many may ask: so many a second, and a burst before; who is faster waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Final

BURST_S: Final = 4.0
"""What may come at once where nobody says otherwise."""

_FORGET_OVER: Final = 1_024
"""With more askers than this, those who could ask their burst again are forgotten."""


class Pace:
    """The pace of each asker. He who waits does not slow down the others."""

    def __init__(self, per_s: float, clock: Callable[[], float], *, burst_s: float = BURST_S) -> None:
        """`burst_s` seconds' worth may come at once."""
        self._step_s = 1.0 / per_s
        self._burst_s = burst_s
        self._clock = clock
        self._paid_until: dict[Hashable, float] = {}  # when all that he asked is worth its time

    @property
    def known(self) -> int:
        """How many askers are remembered."""
        return len(self._paid_until)

    def wait_s(self, who: Hashable) -> float:
        """Count one more of `who`, and tell how many seconds it has to wait; those before it included."""
        now = self._clock()
        if len(self._paid_until) > _FORGET_OVER:
            self._paid_until = {one: until for one, until in self._paid_until.items() if until > now}
        until = max(now, self._paid_until.get(who, now)) + self._step_s
        self._paid_until[who] = until
        return max(0.0, until - now - self._burst_s)

    def take(self, who: Hashable) -> float:
        """Count one more of `who` if he need not wait and return 0, else how long he would, seconds."""
        before = self._paid_until.get(who)
        wait_s = self.wait_s(who)
        if wait_s and before is not None:
            self._paid_until[who] = before
        return wait_s

    async def turn(self, who: Hashable) -> None:
        """Wait until `who` may go on. Who gives up is not counted."""
        wait_s = self.wait_s(who)
        if not wait_s:
            return
        try:
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            if who in self._paid_until:
                self._paid_until[who] -= self._step_s
            raise
