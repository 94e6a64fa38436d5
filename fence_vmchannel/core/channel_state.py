# SPDX-License-Identifier: LGPL-2.1-or-later
"""One channel: its states, its offsets, what it has queued; and the round robin among channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from fence_vmchannel.core.events import Priority
from fence_vmchannel.core.frames import FRAME_COST, MAX_FRAGMENT, FrameType
from fence_vmchannel.errors import CloseCode, LocalProtocolError

if TYPE_CHECKING:
    from fence_vmchannel.core.saved import SavedChannel


class ChannelState(Enum):
    """Where a channel is in its life, seen from one side."""

    QUEUED = "queued"  # we open it; OPEN has no sequence number yet, so no session knows it
    OPENING = "opening"  # we open it; OPEN is in the session
    OFFERED = "offered"  # the peer opens it; our application has not answered
    OPEN = "open"  # accepted; data flows
    CLOSING = "closing"  # our side ended it; CLOSE waits behind data, or is not yet acknowledged
    GONE = "gone"  # forgotten; its number is never used again in this session


class ChannelInput(Enum):
    """What moves a channel from state to state."""

    OPEN_SENT = "OPEN gets its sequence number"
    ACCEPT = "we accept"
    ACCEPTED = "ACCEPT arrives"
    CLOSE = "we close, abort or refuse"
    CLOSED = "CLOSE or CANCEL arrives"
    CONFIRMED = "our CLOSE or CANCEL is acknowledged"
    RESET = "the session ends"


_S = ChannelState
_I = ChannelInput

CHANNEL_TRANSITIONS: Final[Mapping[tuple[ChannelState, ChannelInput], ChannelState]] = MappingProxyType(
    {
        (_S.QUEUED, _I.OPEN_SENT): _S.OPENING,
        (_S.QUEUED, _I.CLOSE): _S.GONE,  # nobody else knows it: nothing to send
        (_S.QUEUED, _I.RESET): _S.QUEUED,  # it opens in the next session
        (_S.OPENING, _I.ACCEPTED): _S.OPEN,
        (_S.OPENING, _I.CLOSE): _S.CLOSING,
        (_S.OPENING, _I.CLOSED): _S.GONE,  # refused
        (_S.OPENING, _I.RESET): _S.GONE,
        (_S.OFFERED, _I.ACCEPT): _S.OPEN,
        (_S.OFFERED, _I.CLOSE): _S.CLOSING,
        (_S.OFFERED, _I.CLOSED): _S.GONE,
        (_S.OFFERED, _I.RESET): _S.GONE,
        (_S.OPEN, _I.CLOSE): _S.CLOSING,
        (_S.OPEN, _I.CLOSED): _S.GONE,
        (_S.OPEN, _I.RESET): _S.GONE,
        (_S.CLOSING, _I.CLOSED): _S.GONE,  # both sides closed at once
        (_S.CLOSING, _I.CONFIRMED): _S.GONE,
        (_S.CLOSING, _I.RESET): _S.GONE,
    }
)

QUANTUM: Final = MAX_FRAGMENT + FRAME_COST
"""What a channel may send in one round, cost units: the largest frame, so that each round serves one."""

MIN_WINDOW: Final = QUANTUM
"""Cost units of the largest frame. No limit cuts a window below it: whatever the limit, a fragment passes."""

MAX_OFFSET: Final = 2**62
"""No window, limit or offset is larger: 4 EiB are never sent."""


def message_cost(size: int) -> int:
    """What a message of `size` bytes, sent in one call, takes from a window: bytes plus FRAME_COST a
    frame."""
    return size + FRAME_COST * (-(-size // MAX_FRAGMENT) or 1)


def largest_message(available: int) -> int:
    """The largest message, in bytes, whose cost is at most `available`; 0 if not even an empty one fits."""
    frames, rest = divmod(available, MAX_FRAGMENT + FRAME_COST)
    return max(0, frames * MAX_FRAGMENT + max(0, rest - FRAME_COST))


class Channel:
    """What one side knows of one channel. Offsets count from 0 at its beginning, in cost units."""

    __slots__ = (
        "accept_payload",
        "admitted",
        "announced",
        "close_code",
        "close_reason",
        "consumed",
        "credit_due",
        "deficit",
        "delivered",
        "largest_window",
        "most",
        "number",
        "open_payload",
        "priority",
        "promised",
        "queue",
        "receive_limit",
        "received",
        "scheduled",
        "send_limit",
        "sent",
        "state",
        "target",
        "window",
    )

    def __init__(self, number: int, target: str, priority: Priority, state: ChannelState) -> None:
        self.number = number
        self.target = target
        self.priority = priority
        self.state = state
        self.open_payload = b""  # until OPEN is sent
        self.accept_payload = b""  # until ACCEPT is sent
        self.window = 0  # the largest window that we have promised
        self.most = MAX_OFFSET  # no window of it is larger, in either direction
        self.promised = 0  # of the session's bytes, for what may come
        self.admitted = 0  # of the session's bytes, for what we may send
        self.sent = 0  # taken from our application
        self.scheduled = 0  # of this, given to the session
        self.delivered = 0  # of this, taken by the peer's consumer
        self.send_limit = 0  # how far the peer's consumer lets us send
        self.largest_window = 0  # the largest window the peer has shown
        self.received = 0  # come from the peer
        self.consumed = 0  # of this, taken by our consumer
        self.receive_limit = 0  # how far our consumer lets the peer send
        self.announced = 0  # of this, what OPEN, ACCEPT or CREDIT has told the peer
        self.credit_due = False  # a CREDIT waits in the control queue
        # DATA not yet scheduled: payload, flags, CRC of the payload if it is known
        self.queue: deque[tuple[bytes, int, int | None]] = deque()
        self.deficit = 0
        self.close_code: CloseCode | None = None  # set: CLOSE follows the queue
        self.close_reason = ""

    def apply(self, what: ChannelInput) -> None:
        """Move to the next state.

        Raises:
            LocalProtocolError: the table has no such transition. What the peer sends is checked before.
        """
        following = CHANNEL_TRANSITIONS.get((self.state, what))
        if following is None:
            raise LocalProtocolError(f"channel {self.number} is {self.state.value}: no {what.name} now")
        self.state = following

    def wants_to_send(self) -> bool:
        """Whether data, or the CLOSE behind it, waits to be scheduled."""
        return bool(self.queue) or self.close_code is not None

    def head_cost(self) -> int:
        """What the next frame of the queue costs; for CLOSE the least."""
        return len(self.queue[0][0]) + FRAME_COST if self.queue else FRAME_COST

    def pop(self) -> tuple[int, int, bytes, int | None]:
        """Take the next frame off the queue: type, flags, payload (of CLOSE: empty, the caller fills it), CRC
        of the payload if it is known.
        """
        if self.queue:
            payload, flags, crc = self.queue.popleft()
            self.scheduled += len(payload) + FRAME_COST
            return FrameType.DATA, flags, payload, crc
        return FrameType.CLOSE, 0, b"", None

    def save(self) -> SavedChannel:
        """All of it, for another process to go on with."""
        from fence_vmchannel.core.saved import (  # here: most processes never need it
            SavedChannel,
            SavedFragment,
        )

        return SavedChannel(
            number=self.number,
            target=self.target,
            priority=self.priority,
            state=self.state.value,
            open_payload=self.open_payload,
            accept_payload=self.accept_payload,
            window=self.window,
            sent=self.sent,
            scheduled=self.scheduled,
            delivered=self.delivered,
            send_limit=self.send_limit,
            largest_window=self.largest_window,
            received=self.received,
            consumed=self.consumed,
            receive_limit=self.receive_limit,
            queue=tuple(SavedFragment(payload, flags) for payload, flags, _ in self.queue),
            close_code=self.close_code,
            close_reason=self.close_reason,
        )

    @classmethod
    def load(cls, saved: SavedChannel) -> Channel:
        """What `save` gave, again.

        Raises:
            ValueError: a value that no channel has.
        """
        channel = cls(saved.number, saved.target, Priority(saved.priority), ChannelState(saved.state))
        channel.open_payload, channel.accept_payload = saved.open_payload, saved.accept_payload
        channel.window, channel.largest_window = saved.window, saved.largest_window
        channel.sent, channel.scheduled, channel.delivered = saved.sent, saved.scheduled, saved.delivered
        channel.send_limit = saved.send_limit
        channel.received, channel.consumed = saved.received, saved.consumed
        channel.receive_limit = saved.receive_limit
        if channel.state is not ChannelState.OFFERED:
            channel.promised = max(saved.window, MIN_WINDOW)
        channel.admitted = max(saved.largest_window, MIN_WINDOW)
        channel.queue.extend((fragment.payload, fragment.flags, None) for fragment in saved.queue)
        if saved.close_code is not None:
            channel.close_code = CloseCode(saved.close_code)
        channel.close_reason = saved.close_reason
        queued = sum(message_cost(len(fragment.payload)) for fragment in saved.queue)
        if not 0 <= saved.delivered <= saved.scheduled <= saved.sent <= saved.send_limit <= MAX_OFFSET:
            raise ValueError(f"channel {saved.number}: what was sent is out of order")
        if not 0 <= saved.consumed <= saved.received <= saved.receive_limit <= MAX_OFFSET:
            raise ValueError(f"channel {saved.number}: what was received is out of order")
        if not 0 <= saved.window <= MAX_OFFSET or not 0 <= saved.largest_window <= MAX_OFFSET:
            raise ValueError(f"channel {saved.number}: a window out of range")
        if any(not 0 <= each.flags <= 0xFFFF or len(each.payload) > MAX_FRAGMENT for each in saved.queue):
            raise ValueError(f"channel {saved.number}: a fragment that no frame can carry")
        if channel.state is ChannelState.GONE or (queued and saved.scheduled + queued != saved.sent):
            raise ValueError(f"channel {saved.number}: its queue does not fit its state")
        return channel


class RoundRobin:
    """Deficit round robin among channels of one priority: each gets the same bytes, not the same frames."""

    def __init__(self) -> None:
        self.ring: deque[Channel] = deque()  # those that take part; the first one's turn is next
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self.ring)

    def __iter__(self) -> Iterator[Channel]:
        return iter(self.ring)

    def add(self, channel: Channel) -> None:
        """Let a channel take part; one that does already keeps its place."""
        if channel.number not in self._members:
            self._members.add(channel.number)
            channel.deficit = 0
            self.ring.append(channel)

    def retain(self, alive: Container[int]) -> None:
        """Forget the channels whose numbers are not among `alive`."""
        self.ring = deque(channel for channel in self.ring if channel.number in alive)
        self._members = {channel.number for channel in self.ring}

    def clear(self) -> None:
        """Forget all channels."""
        self.ring.clear()
        self._members.clear()

    def next(self) -> Channel | None:
        """The channel whose turn it is, charged for its next frame; None if none has anything to send."""
        ring = self.ring
        while ring:
            channel = ring[0]
            if not channel.queue and channel.close_code is None:  # nothing more to send
                ring.popleft()
                self._members.discard(channel.number)
                continue
            cost = channel.head_cost()
            if channel.deficit >= cost:
                channel.deficit -= cost
                return channel
            channel.deficit += QUANTUM  # enough for any frame: the next visit serves it
            ring.rotate(-1)
        return None
