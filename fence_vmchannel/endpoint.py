# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `Shell` driven by asyncio: one peer of a hub, or the hub of a client.

It outlives its links, as its connection does. It runs in callbacks of the event loop, not in a task: a
request passes through without a task switch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import ChannelOpened, Opened, Reset
from fence_vmchannel.errors import CloseCode, LinkError
from fence_vmchannel.links.base import Link
from fence_vmchannel.logs import RateLimitedLog, quoted
from fence_vmchannel.peers import PeerInfo
from fence_vmchannel.shell import Shell

_FAR_S = 5.0
_GRID_S = 0.25
"""What is due later than `_FAR_S` waits for the next multiple of this, seconds: the heartbeats of a thousand
sessions then wake the process four times a second instead of seventy."""

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


class Turns(Protocol):
    """Who gives turns: `hub.turns.FairTurns`."""

    def ready(self, reader: Endpoint) -> None:
        """It has something to read; call its `take_turn` now or soon."""
        ...


class Endpoint(Shell):
    """One peer: its connection, its present link, and who uses its channels. Belongs to one event loop."""

    def __init__(
        self,
        peer: PeerInfo,
        connection: Connection,
        observer: Observer,
        *,
        clock: Callable[[], float],
        turns: Turns | None = None,
    ) -> None:
        """`turns` gives it its turns to read, among others; None: whenever there is something to read."""
        super().__init__(peer, connection, clock)
        self.had = self.took = 0.0
        self.waits = False
        self._turns = turns
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._noise = RateLimitedLog(log, clock=clock)
        self._ended: asyncio.Future[str] | None = None
        self._turn: asyncio.Handle | None = None
        self._more = False  # there may be more to read than the link shows: the next turn reads
        self._running = False
        self._followers: dict[Endpoint, None] = {}  # have something to send after this turn, in this order
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._moved: asyncio.Event | None = None  # somebody waits in `drain`
        self._rest: asyncio.TimerHandle | None = None  # nothing is read until then

    def use(self, link: Link) -> asyncio.Future[str]:
        """Talk over `link` from now on, which is taken over; the future gets the reason when it has ended."""
        self.drop_link("another link took its place")
        self.begin(link)
        self._ended = self._loop.create_future()
        self._loop.add_reader(link.fileno(), self._wake)
        self._run_soon()
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
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        self.part(reason)
        self._arm()
        if self._moved is not None:
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
        self._run_soon()

    def rest(self, seconds: float) -> None:
        """Read no more for so long, after what has been read already: the peer asks too fast."""
        if self._link is None or seconds <= 0:
            return
        if self._rest is None:
            self._loop.remove_reader(self._link.fileno())
        else:
            self._rest.cancel()
        self._rest = self._loop.call_later(seconds, self._read_again)

    def stop(self, code: CloseCode, reason: str) -> None:
        """End the link and tell all users of channels. The endpoint is dead afterwards."""
        self.drop_link(reason)
        self.drop_users(code, reason)
        self._cancel_all()

    def export(self) -> bytes:
        """End the link and take the session out, with its channels, whose users hear nothing. The endpoint
        is dead afterwards.

        Raises:
            LocalProtocolError: it holds more than can be saved.
        """
        self.drop_link("the session is saved")
        self._handle_events()
        self._users.clear()
        self._cancel_all()
        return self.connection.export_state()

    def _cancel_all(self) -> None:
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._turn = self._timer = None

    async def drain(self, timeout_s: float) -> None:
        """Wait until all that is queued has been written to the link, at most `timeout_s` seconds."""
        deadline = self._loop.time() + timeout_s
        while self._link is not None and (self._turn is not None or not self.drained):
            self._moved = self._moved or asyncio.Event()
            self._moved.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._moved.wait()
            except TimeoutError:
                return

    # --- see `Shell` ---

    def kick(self) -> None:
        """Send soon, together with what else comes in this turn of the loop."""
        if self._turn is None:
            self._turn = self._loop.call_soon(self._send)

    def kick_after(self, source: Shell) -> None:
        """See `Shell`: as soon as the turn of `source` ends, in the same turn of the loop."""
        if isinstance(source, Endpoint) and source._running:
            source._followers[self] = None
        else:
            self.kick()

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

    def _run_soon(self) -> None:
        self._more = True
        self.kick()

    def _run(self) -> None:
        """Take a turn, and let those send who have something to send because of it."""
        self._running, self._more = True, False
        self._step(self.turn)
        self._running = False
        if self._followers:
            followers, self._followers = self._followers, {}
            for follower in followers:
                follower._step(follower.flush)

    def _read_again(self) -> None:
        self._rest = None
        if self._link is not None:
            self._loop.add_reader(self._link.fileno(), self._wake)
            self._run_soon()

    def _wake(self) -> None:
        """There is something to read."""
        if self._turns is None:
            self._run()
        else:
            self._turns.ready(self)

    def take_turn(self) -> None:
        """For `FairTurns`."""
        if self._rest is None:
            self._run()

    def _send(self) -> None:
        self._turn = None
        if self._more and self._rest is None:
            self._wake()
        else:
            self._step(self.flush)

    def _step(self, step: Callable[[], bool]) -> None:
        """`turn` or `flush`. Either sends all that was queued, so nothing more is due unless it says so."""
        if self._turn is not None and not self._more:
            self._turn.cancel()
            self._turn = None
        try:
            more = step()
        except LinkError as error:
            if self._refused:
                self._noise.warning("peer %s: link refused: %s", self.peer, quoted(self._refused))
            self.drop_link(str(error))
        except Exception:
            log.exception("peer %s: internal error, its link is closed", self.peer)
            self.drop_link("internal error")
        else:
            if more:
                self._run_soon()  # the other links come first
            self._arm()
        if self._moved is not None:
            self._moved.set()

    def _arm(self) -> None:
        due = self.next_alarm()
        if self._timer is not None:
            if self._timer_due <= due:
                return  # it fires early, and is set anew then
            self._timer.cancel()
        if due == math.inf:
            return
        left_s = due - self._clock()
        if left_s > _FAR_S:
            due = math.ceil(due / _GRID_S) * _GRID_S
            left_s = due - self._clock()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0.0, left_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._rest is not None:
            return  # the next turn comes with its end
        if self.next_alarm() <= self._clock():
            self._run()
        else:
            self._arm()
