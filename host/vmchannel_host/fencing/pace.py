# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often a VM may do what costs the host something lasting; each waits its own turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmchannel_host.model import VmUuid


class Pace:
    """`burst` turns of one VM at once, then one per `period_s` seconds."""

    def __init__(self, clock: Callable[[], float], *, burst: int, period_s: float) -> None:
        self._clock = clock
        self._burst = burst
        self._period_s = period_s
        self._tokens: dict[VmUuid, tuple[float, float]] = {}  # as many as VMs with a port: tokens, when
        self._locks: dict[VmUuid, asyncio.Lock] = {}

    async def turn(self, vm: VmUuid) -> None:
        """Wait for the VM's next turn; turns come in the order of the calls. May be cancelled."""
        async with self._locks.setdefault(vm, asyncio.Lock()):
            tokens = self._refill(vm)
            if tokens < 1:
                await asyncio.sleep((1 - tokens) * self._period_s)
                tokens = max(1.0, self._refill(vm))
            self._tokens[vm] = (tokens - 1, self._clock())

    def take(self, vm: VmUuid) -> float:
        """Take a turn if there is one now and return 0; else how long until the next, seconds."""
        tokens = self._refill(vm)
        if tokens < 1:
            return (1 - tokens) * self._period_s
        self._tokens[vm] = (tokens - 1, self._clock())
        return 0.0

    def _refill(self, vm: VmUuid) -> float:
        now = self._clock()
        tokens, at = self._tokens.get(vm, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - at) / self._period_s)
        self._tokens[vm] = (tokens, now)
        return tokens
