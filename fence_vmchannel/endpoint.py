# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `Shell` driven by asyncio: one peer of a hub, or the hub of a client.

It outlives its links, as its connection does. It runs in callbacks of the event loop, not in a task: a
request passes through without a task switch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Opened, Reset
from fence_vmchannel.errors import CloseCode, LinkError
from fence_vmchannel.links.base import Link
from fence_vmchannel.logs import RateLimitedLog, quoted
from fence_vmchannel.peers import PeerInfo
from fence_vmchannel.shell import Shell

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())


class Observer(Protocol):
    """Who hears what concerns the whole endpoint."""

    def on_connected(self, endpoint: Endpoint, event: Opened) -> None:
        """The greeting is done."""
        ...

    def on_disconnected(self, endpoint: Endpoint, reason: str) -> None:
        """The peer cannot be reached now."""
        ...

    def on_reset(self, endpoint: Endpoint, event: Reset) -> None:
        """The session began anew; the channels' users know already."""
        ...

    def on_channel(self, endpoint: Endpoint, event: ChannelOpened) -> None:
        """The peer opened a channel: adopt and accept it, or close it."""
        ...


class Endpoint(Shell):
    """One peer: its connection, its present link, and who uses its channels. Belongs to one event loop."""

    def __init__(
        self, peer: PeerInfo, connection: Connection, observer: Observer, *, clock: Callable[[], float]
    ) -> None:
        super().__init__(peer, connection, clock)
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._noise = RateLimitedLog(log, clock=clock)
        self._ended: asyncio.Future[str] | None = None
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._moved = asyncio.Event()

    def use(self, link: Link) -> asyncio.Future[str]:
        """Talk over `link` from now on, which is taken over; the future gets the reason when it has ended."""
        self.drop_link("another link took its place")
        self.begin(link)
        self._ended = self._loop.create_future()
        self._loop.add_reader(link.fileno(), self._run)
        self.kick()
        return self._ended

    def drop_link(self, reason: str) -> None:
        """Close the link, if there is one. The session and its channels wait for the next."""
        link = self.release(reason)
        if link is not None:
            link.close()

    def release(self, reason: str) -> Link | None:
        """Stop using the link and give it back open, if there is one; its future gets the reason."""
        link, ended = self._link, self._ended
        if link is None or ended is None:
            return None
        self._ended = None
        self._loop.remove_reader(link.fileno())
        self.part(reason)
        self._arm()
        self._moved.set()
        if not ended.done():
            ended.set_result(reason)
        return link

    def belong(self, peer: PeerInfo, observer: Observer) -> None:
        """The endpoint goes on for `peer`: it was made from what an earlier process has saved."""
        self.peer, self._observer = peer, observer

    def relink(self) -> None:
        """Greet anew on the same link: its other end is known to have gone (a guest closed the port)."""
        self._lower()
        self._handle_events()
        self.kick()

    def stop(self, code: CloseCode, reason: str) -> None:
        """End the link and tell all users of channels. The endpoint is dead afterwards."""
        self.drop_link(reason)
        self.drop_users(code, reason)
        self._rest()

    def export(self) -> bytes:
        """End the link and take the session out, with its channels, whose users hear nothing. The endpoint
        is dead afterwards.

        Raises:
            LocalProtocolError: it holds more than can be saved.
        """
        self.drop_link("the session is saved")
        self._handle_events()
        self._users.clear()
        self._rest()
        return self.connection.export_state()

    def _rest(self) -> None:
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._turn = self._timer = None

    async def drain(self, timeout_s: float) -> None:
        """Wait until all that is queued has been written to the link, at most `timeout_s` seconds."""
        deadline = self._loop.time() + timeout_s
        while self._link is not None and (self._turn is not None or not self.drained):
            self._moved.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._moved.wait()
            except TimeoutError:
                return

    # --- see `Shell` ---

    def kick(self) -> None:
        """Take a turn soon, together with what else comes in this turn of the loop."""
        if self._turn is None:
            self._turn = self._loop.call_soon(self._run)

    def connected(self, event: Opened) -> None:
        """See `Shell`."""
        self._observer.on_connected(self, event)

    def disconnected(self, reason: str) -> None:
        """See `Shell`."""
        self._observer.on_disconnected(self, reason)

    def was_reset(self, event: Reset) -> None:
        """See `Shell`."""
        self._observer.on_reset(self, event)

    def channel_opened(self, event: ChannelOpened) -> None:
        """See `Shell`."""
        self._observer.on_channel(self, event)

    # --- the event loop ---

    def _run(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        try:
            more = self.turn()
        except LinkError as error:
            if self._refused:
                self._noise.warning("peer %s: link refused: %s", self.peer, quoted(self._refused))
            self.drop_link(str(error))
        except Exception:
            log.exception("peer %s: internal error, its link is closed", self.peer)
            self.drop_link("internal error")
        else:
            if more:
                self.kick()  # the other links come first
            self._arm()
        self._moved.set()

    def _arm(self) -> None:
        due = self.connection.next_deadline()
        if due is None:
            return  # a timer that is set already fires for nothing, which is harmless
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0.0, due - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._run()
