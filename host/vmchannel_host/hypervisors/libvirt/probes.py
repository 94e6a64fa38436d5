# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions that a domain's QEMU must answer, rationed: one that hangs holds a worker of libvirt's as long.

libvirtd has twenty workers for all its clients: QEMUs that hang must not take them all (S7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from vmchannel_host.hypervisors.libvirt.connection import Connection
from vmchannel_host.hypervisors.monitors import MonitorError, MonitorMute
from vmchannel_host.model import VmUuid

MAX_PROBES: Final = 3
"""Probes under way at one time, those that hang included."""


class NoPlace(MonitorError):
    """Others hang: this one cannot be asked now, which says nothing of it."""


class Probes:
    """Asks at most MAX_PROBES questions at a time, and no further one of a QEMU that owes an answer."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_PROBES)
        self._late: set[VmUuid] = set()  # nobody waits for these any more

    async def probe(
        self, connection: Connection, vm: VmUuid, *, timeout_s: float, late: Callable[[VmUuid], None]
    ) -> int | None:
        """See `Link.probe`.

        Args:
            connection: to libvirt.
            vm: whose QEMU is asked.
            timeout_s: seconds.
            late: called when it returns after nobody waited for it any more: it answers again, or is gone.

        Raises:
            NoPlace: others hang.
            MonitorError: no answer in time, or an earlier question of it is not answered yet.
        """
        if vm in self._late:
            raise MonitorMute(f"VM {vm} has not answered the last question yet")
        if len(self._late) >= MAX_PROBES:
            raise NoPlace(f"{MAX_PROBES} other VMs do not answer")
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError as error:
            raise NoPlace(f"{MAX_PROBES} other VMs do not answer in time") from error

        def returned() -> None:
            self._places.release()
            if vm in self._late:
                self._late.discard(vm)
                late(vm)

        left_s = deadline - asyncio.get_running_loop().time()
        try:
            return await connection.call(
                "probe", lambda link: link.probe(vm), timeout_s=left_s, on_return=returned
            )
        except MonitorMute:
            if connection.open:
                self._late.add(vm)
            raise
