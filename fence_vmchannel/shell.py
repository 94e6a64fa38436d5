# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell around one `Connection`, without an event loop: feed, handle events, transmit.

`Endpoint` drives it from asyncio, `BlockingClient` from poll. Nothing that the peer sends, and no failure of
a channel's user, leaves it; the worst is the end of that link or channel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final, Protocol, TypeVar, assert_never

from fence_vmchannel.core.connection import Connection
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Event,
    Granted,
    LinkRefused,
    Opened,
    Priority,
    Reset,
    Unlinked,
)
from fence_vmchannel.errors import CloseCode, LinkError
from fence_vmchannel.links.base import Link
from fence_vmchannel.peers import PeerInfo

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

_E = TypeVar("_E", ChannelOpened, ChannelAccepted, Data, Granted, Closed)

_NEVER_HELD_BACK: Final = 196_608
"""The session sends so much without an acknowledgement (256 KiB less one frame, rounded down)."""

READ_BUDGET: Final = 262_144
"""Bytes read in one turn, so that a peer that floods leaves the loop to the others."""

READ_S: Final = 0.002
"""After so long no more is handled in one turn: as smallest frames, 256 KiB take 0.1 to 0.3 s (measured)."""

_CHUNK: Final = 65_536
"""Bytes taken from the link at once; a port gives no more than 4,096 in one read."""

_LEAST: Final = 4_096
"""Bytes handled at once, at the least: where the smallest frames come, a millisecond or two."""


class ChannelUser(Protocol):
    """What consumes one channel: a channel object of this process, or the other leg of a relay."""

    def on_accepted(self, event: ChannelAccepted) -> None:
        """The peer accepted it."""
        ...

    def on_data(self, event: Data) -> None:
        """A fragment came."""
        ...

    def on_granted(self, event: Granted) -> None:
        """The peer took data and gives credit."""
        ...

    def on_closed(self, event: Closed) -> None:
        """It is gone. The last call."""
        ...


class Shell:
    """One peer: its connection, its present link, and who uses its channels."""

    def __init__(self, peer: PeerInfo, connection: Connection, clock: Callable[[], float]) -> None:
        self.peer = peer
        self.connection = connection
        self.received_bytes = 0
        self.sent_bytes = 0
        self.detail = "not connected yet"  # why there is no session now, for status
        self._clock = clock
        self._users: dict[int, ChannelUser] = {}
        self._link: Link | None = None
        self._up = False  # the connection has been told that its link is up
        self._unsent = memoryview(b"")
        self._refused = ""
        self._broken: LinkError | None = None  # nothing can be written any more; what came before is read
        self._unread = b""  # read from the link, not handled yet
        self._end: LinkError | None = None  # how the link has ended, told when all is handled
        self._slice = _LEAST  # bytes handled at once
        self._handling = False
        self._alarm = 0.0  # when the time is to be looked at, as of the last `next_alarm`

    # --- for who drives it ---

    def kick(self) -> None:
        """Something was queued or granted: `flush` is due. A shell with an event loop overrides this."""

    def kick_after(self, source: Shell) -> None:
        """As `kick`, because of what `source` handles now. One with an event loop may wait for its end."""
        self.kick()

    def begin(self, link: Link) -> None:
        """Talk over `link` from now on; a turn is due."""
        self._link, self._refused, self._broken = link, "", None
        self._unread, self._end = b"", None

    def finish(self, reason: str) -> None:
        """Close the link, if there is one. The session and its channels wait for the next."""
        link = self.part(reason)
        if link is not None:
            link.close()

    def part(self, reason: str) -> Link | None:
        """Talk over the link no more, and give it back, if there is one."""
        link, self._link = self._link, None
        if link is not None:
            self.detail = reason
            self._lower()
            self._handle_events()
        return link

    def turn(self) -> bool:
        """Feed, handle events, transmit. True: more may wait to be read.

        Raises:
            LinkError: the link has ended, or the peer on it cannot be talked to: call `finish`.
        """
        now = self._clock()
        more, ended = self._feed(now)
        if now >= self._alarm:
            self.connection.handle_time(now)
        self._handle_events()
        ended = ended or (None if more else self._broken)
        if ended is not None:
            raise ended
        broken = self._transmit(now)
        if self._refused:
            raise LinkError(self._refused)
        return more or broken

    def flush(self) -> bool:
        """Transmit what is queued and read nothing: all that is due after `kick`. True: a turn is due."""
        return self._transmit(self._clock())

    def next_alarm(self) -> float:
        """When a turn is due even if nothing comes, on the clock given; infinite: never. Ask after each turn
        and flush.
        """
        due = self.connection.next_deadline()
        self._alarm = math.inf if due is None else due
        return self._alarm

    @property
    def linked(self) -> bool:
        """Whether a link is in use."""
        return self._link is not None

    @property
    def drained(self) -> bool:
        """Whether all that was queued has been written to the link, as of the last turn."""
        waiting = self.connection.unsent_bytes
        return not self._unsent and (not waiting or (self.connection.opened and waiting <= _NEVER_HELD_BACK))

    # --- channels ---

    def open(
        self, target: str, user: ChannelUser, *, window: int | None, priority: Priority, payload: bytes
    ) -> int:
        """Open a channel for `user`; raises as `Connection.open`."""
        channel = self.connection.open(target, window=window, priority=priority, payload=payload)
        self._users[channel] = user
        self.kick()
        return channel

    def adopt(self, channel: int, user: ChannelUser) -> None:
        """Give a channel that the peer opened to `user`."""
        self._users[channel] = user

    def close(self, channel: int, code: CloseCode, reason: str, *, abort: bool = False) -> None:
        """End a channel from our side; its user hears no more. A gone channel is ignored."""
        self._users.pop(channel, None)
        (self.connection.abort if abort else self.connection.close)(channel, code, reason)
        self.kick()

    def end(self, channel: int, code: CloseCode, reason: str) -> None:
        """End a channel from our side and tell its user, as if the peer had ended it."""
        user = self._users.get(channel)
        self.close(channel, code, reason)
        if user is not None:
            self._tell(channel, user.on_closed, Closed(channel, code, reason, aborted=False))

    @property
    def users(self) -> dict[int, ChannelUser]:
        """Who uses which channel now."""
        return self._users.copy()

    def drop_users(self, code: CloseCode, reason: str) -> None:
        """Tell all users of channels that it is over."""
        users, self._users = self._users, {}
        for channel, user in users.items():
            self._tell(channel, user.on_closed, Closed(channel, code, reason, aborted=False))

    def abandon(self, keeps: Callable[[str], bool]) -> None:
        """The peer is away: end the NORMAL channels to services that `keeps` does not name, and tell their
        users. What they have received before is theirs.
        """
        why = "the peer is away, and nothing is kept for it"
        for channel, lost in self.connection.abandon(keeps, CloseCode.PEER_GONE, why).items():
            if user := self._users.pop(channel, None):
                reason = f"{why}: {lost} bytes that were sent are not confirmed"
                self._tell(channel, user.on_closed, Closed(channel, CloseCode.PEER_GONE, reason, False))

    # --- what concerns the whole connection, for a subclass ---

    def connected(self, event: Opened) -> None:
        """The greeting is done."""

    def disconnected(self, reason: str) -> None:
        """The peer cannot be reached now."""

    def was_reset(self, event: Reset) -> None:
        """The session began anew; the channels' users know already."""

    def channel_opened(self, event: ChannelOpened) -> None:
        """The peer opened a channel: adopt and accept it, or close it."""
        self.close(event.channel, CloseCode.UNKNOWN_SERVICE, "nothing is offered here")

    # --- inside ---

    def _feed(self, now: float) -> tuple[bool, LinkError | None]:
        link = self._link
        if link is None:
            return False, None
        link.refresh()
        if link.present and not self._up:
            self._up = True
            self.connection.link_up(now)
        more, size, until = True, 0, now + READ_S
        while size < READ_BUDGET and (not size or self._clock() < until):
            if not self._unread:
                if not more or self._end is not None:
                    break
                self._unread, more, self._end = self._read(link)
                if not self._unread:
                    break
            size += self._take_in(now)
            if self._link is not link:
                break  # somebody has let it go because of what came
        self.received_bytes += size
        if self._link is not link:
            return False, None
        if self._unread:
            return True, None
        if self._up and not link.present:
            self.detail = "the other end of the link is not connected"
            self._lower()
        return more, self._end

    def _take_in(self, now: float) -> int:
        """Handle the next of what was read; as much as takes about half a turn's time. Returns its size."""
        data, self._unread = self._unread, b""
        if len(data) > self._slice:
            data, self._unread = data[: self._slice], data[self._slice :]
        began = self._clock()
        self.connection.receive(data, now)
        self._handle_events()  # now: what comes of it is part of what it costs
        took = self._clock() - began
        if took > READ_S / 2:
            self._slice = max(_LEAST, self._slice // 4)
        elif took < READ_S / 8 and len(data) >= _LEAST:
            self._slice = min(_CHUNK, 2 * self._slice)
        return len(data)

    def _read(self, link: Link) -> tuple[bytes, bool, LinkError | None]:
        """What there is, at most about one chunk; whether more may wait; and how the link has ended."""
        pieces: list[bytes] = []
        size = 0
        try:
            while size < _CHUNK:
                piece = link.receive()
                if not piece:
                    return b"".join(pieces), False, None
                pieces.append(piece)
                size += len(piece)
        except LinkError as error:
            return b"".join(pieces), False, error
        return b"".join(pieces), True, None

    def _transmit(self, now: float) -> bool:
        """Write what is queued, as far as the link takes it; True if nothing can be written any more."""
        link, more = self._link, True
        while link is not None and self._up and self._broken is None:
            if not self._unsent:
                if not more:
                    break
                self._unsent = memoryview(self.connection.data_to_send(now))
                more = self.connection.more_to_send
                if not self._unsent:
                    break
            try:
                taken = link.send(self._unsent)
            except LinkError as error:  # the other end has gone: first to the end of what it wrote
                self._broken = error
                break
            if not taken:
                break  # the link wakes us when it can take more
            self.sent_bytes += taken
            self._unsent = self._unsent[taken:]
        return self._broken is not None

    def _lower(self) -> None:
        self._unsent = memoryview(b"")  # the session sends again what was not acknowledged
        self._unread = b""
        if self._up:
            self._up = False
            self.connection.link_down(self._clock())

    def _handle_events(self) -> None:
        if self._handling:
            return  # called from one of the calls below, whose loop comes to the new events in their order
        self._handling = True
        try:
            while events := self.connection.events():
                for event in events:
                    self._handle(event)
        finally:
            self._handling = False

    def _handle(self, event: Event) -> None:
        match event:
            case Data():  # first, because most events are this
                if user := self._users.get(event.channel):
                    self._tell(event.channel, user.on_data, event)
            case Granted():
                if user := self._users.get(event.channel):
                    self._tell(event.channel, user.on_granted, event)
            case ChannelAccepted():
                if user := self._users.get(event.channel):
                    self._tell(event.channel, user.on_accepted, event)
            case Closed():
                if user := self._users.pop(event.channel, None):
                    self._tell(event.channel, user.on_closed, event)
            case ChannelOpened():
                self._tell(event.channel, self.channel_opened, event)
            case Opened() | Unlinked() | Reset() | LinkRefused():
                try:
                    self._handle_session(event)
                except Exception:
                    log.exception("peer %s: internal error on %s", self.peer, type(event).__name__)
            case _:
                assert_never(event)

    def _handle_session(self, event: Opened | Unlinked | Reset | LinkRefused) -> None:
        match event:
            case Opened():
                self.detail = ""
                self.connected(event)
            case Unlinked():
                self.detail = self.detail or event.reason
                self.disconnected(self.detail)
            case Reset():
                for channel in event.lost:
                    if user := self._users.pop(channel, None):
                        closed = Closed(channel, CloseCode.SESSION_RESET, event.reason, aborted=False)
                        self._tell(channel, user.on_closed, closed)
                self.was_reset(event)
            case LinkRefused():
                self._refused = event.reason or "refused"
            case _:
                assert_never(event)

    def _tell(self, channel: int, call: Callable[[_E], None], event: _E) -> None:
        try:
            call(event)
        except Exception:
            log.exception("peer %s: internal error in channel %d, it is closed", self.peer, channel)
            self.close(channel, CloseCode.INTERNAL, "internal error", abort=True)
