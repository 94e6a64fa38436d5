# SPDX-License-Identifier: LGPL-2.1-or-later
"""One look for all who ask meanwhile: a look costs a scan of /proc and a word with every monitor.

Any guest may ask for the states of VMs as often as it likes. At most one of these looks runs at a time; an
asker gets the result of one that began after he asked. Operations take looks of their own and wait for none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.run import MAX_LOOK_S
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.model import Look

Seen = tuple[float, Look]


class SharedLook:
    """Looks on behalf of many."""

    def __init__(self, instances: Instances, tasks: Tasks, clock: Callable[[], float]) -> None:
        self._instances = instances
        self._tasks = tasks
        self._clock = clock
        self._running: asyncio.Future[Seen] | None = None

    async def look(self, *, timeout_s: float) -> Seen:
        """When a fresh look was asked for (CLOCK_BOOTTIME, seconds), and what was seen.

        Raises:
            HypervisorError: the hypervisor could not look, or the daemon stops.
            JournalError: what was learnt could not be made durable.
            TimeoutError: not within `timeout_s` seconds, or the look took too long.
        """
        async with asyncio.timeout(timeout_s):
            if self._running is not None:
                await asyncio.wait((self._running,))  # it began before we asked
            running = self._running or self._start()
            return await asyncio.shield(running)

    def _start(self) -> asyncio.Future[Seen]:
        result: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
        result.add_done_callback(_fetch)
        self._running = result
        try:
            self._tasks.spawn(self._run(result), "look for those who ask")
        except RuntimeError:
            self._end(result)
        return result

    async def _run(self, result: asyncio.Future[Seen]) -> None:
        try:
            result.set_result(await self._instances.look(timeout_s=MAX_LOOK_S))
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            result.set_exception(error)
        finally:
            self._end(result)

    def _end(self, result: asyncio.Future[Seen]) -> None:
        if not result.done():
            result.set_exception(HypervisorError("the daemon stops"))
        if self._running is result:
            self._running = None


def _fetch(result: asyncio.Future[Seen]) -> None:
    """All who waited may have left: nobody then misses the error."""
    if not result.cancelled():
        result.exception()
