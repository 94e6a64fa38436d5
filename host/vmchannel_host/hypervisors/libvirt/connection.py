# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to libvirt: opened again when it is lost; every call in a thread, with a deadline."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls
from vmchannel_host.hypervisors.libvirt.link import Closed, LibvirtEvent, Link, OpenLink
from vmchannel_host.hypervisors.monitors import MonitorClosed, MonitorMute

log = logging.getLogger(__name__)

MAX_CALLS: Final = 8
"""Calls under way at one time, those that hang included: each holds one of libvirtd's twenty workers."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds."""

    open_s: float = 10.0
    command_s: float = 2.0
    ask_s: float = 1.0  # how long a look waits for an answer
    poll_s: float = 60.0  # everything is asked anew, though no event came
    first_retry_s: float = 0.2
    last_retry_s: float = 5.0


class Connection:
    """One URI. While it is lost, calls fail at once."""

    def __init__(
        self,
        uri: str,
        open_link: OpenLink,
        on_event: Callable[[LibvirtEvent], None],
        wall_clock: Callable[[], float],
    ) -> None:
        """`on_event` gets the events of the open link, but `Closed`: in the event loop, in order."""
        self.uri = uri
        self.problem = "it has not been reached yet"  # why there is no link; "" when there is
        self.attempted = asyncio.Event()  # it was tried; of a link that is open `session` sets it
        self.since = wall_clock()  # when the problem began, seconds
        self._wall_clock = wall_clock
        self._open_link = open_link
        self._on_event = on_event
        self._opening = DetachedCalls(1)  # one that hangs is waited for: a second one would hang beside it
        self._calls = DetachedCalls(MAX_CALLS)
        self._link: Link | None = None
        self._lost = asyncio.Event()
        self._number = 0  # of the link; what an earlier one still tells is old

    @property
    def open(self) -> bool:
        """Whether there is a link; it may be mute."""
        return self._link is not None

    async def run(self, session: Callable[[], Awaitable[None]], patience: Patience) -> None:
        """Keep the connection until cancelled; `session` runs, and is cancelled, with each link."""
        pause_s = patience.first_retry_s
        while True:
            try:
                link = await self._connect(patience.open_s)
            except HypervisorError as error:
                self._report(f"{error}")
                self.attempted.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, patience.last_retry_s)
                continue
            pause_s = patience.first_retry_s
            try:
                await self._hold(link, session)
            finally:
                self._link, self._number = None, self._number + 1
                self._drop(link)
            await asyncio.sleep(pause_s)

    async def call(
        self,
        name: str,
        function: Callable[[Link], T],
        *,
        timeout_s: float,
        on_return: Callable[[], None] = lambda: None,
    ) -> T:
        """Run `function(link)` in a thread; see `DetachedCalls.call`.

        Raises:
            MonitorClosed: there is no link.
            MonitorMute: no return in time; the call goes on.
            LibvirtError: it failed.
        """
        link = self._link
        if link is None:
            on_return()
            raise MonitorClosed(f"{self.uri}: {self.problem}")
        try:
            return await self._calls.call(
                name, lambda: function(link), timeout_s=timeout_s, on_return=on_return
            )
        except NotProven as error:
            raise MonitorMute(f"{self.uri}: {error}") from error

    async def _connect(self, timeout_s: float) -> Link:
        loop, number = asyncio.get_running_loop(), self._number
        self._lost.clear()

        def sink(event: LibvirtEvent) -> None:
            try:
                loop.call_soon_threadsafe(self._take, number, event)
            except RuntimeError:
                return  # the loop has closed: nobody listens any more

        try:
            return await self._opening.call(
                "open libvirt",
                lambda: self._open_link(self.uri, sink),
                timeout_s=timeout_s,
                discard=self._drop,
            )
        except HypervisorError:
            raise
        except Exception as error:
            log.exception("opening libvirt failed uri=%s", self.uri)
            raise MonitorClosed(f"{self.uri}: {error}") from error

    async def _hold(self, link: Link, session: Callable[[], Awaitable[None]]) -> None:
        self._link, self.problem = link, ""
        log.info("libvirt is connected uri=%s", self.uri)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(_contained(session), name=f"libvirt {self.uri}")
            await self._lost.wait()
            self._link = None
            running.cancel()

    def _take(self, number: int, event: LibvirtEvent) -> None:
        if number != self._number:
            return
        if isinstance(event, Closed):
            self._report(event.reason)
            self._lost.set()
        elif self._link is not None:
            self._on_event(event)

    def _drop(self, link: Link) -> None:
        """Close it without waiting: to take leave of a libvirtd that hangs may take for ever.

        As long as that takes the next one cannot be opened either, so these threads are few.
        """
        threading.Thread(target=link.close, name="vmchannel close libvirt", daemon=True).start()

    def _report(self, problem: str) -> None:
        """One line when the problem changes, not one for each attempt."""
        if problem != self.problem:
            log.warning("libvirt is not usable: %s", problem[:500])
        if not self.problem:
            self.since = self._wall_clock()
        self.problem = problem


async def _contained(session: Callable[[], Awaitable[None]]) -> None:
    try:
        await session()
    except HypervisorError as error:
        log.warning("following libvirt failed: %s", error)
    except Exception:
        log.exception("following libvirt failed")
