# SPDX-License-Identifier: LGPL-2.1-or-later
"""Multiplexing: many channels over one session, with credit, priorities and limits. No I/O, no time.

The session pulls the next frame to send (`next_frame`) and hands over what came, in order and once (`take`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fence_vmchannel.core.channel_state import (
    MAX_OFFSET,
    MIN_WINDOW,
    Channel,
    ChannelInput,
    ChannelState,
    largest_message,
    message_cost,
)
from fence_vmchannel.core.events import (
    ChannelAccepted,
    ChannelOpened,
    Closed,
    Data,
    Event,
    Granted,
    Limits,
    Priority,
    Role,
)
from fence_vmchannel.core.frames import END, FRAME_COST, MAX_FRAGMENT, Frame, FrameType
from fence_vmchannel.core.sending import ACCEPT, CLOSE, CREDIT, OPEN, Outgoing, SendQueues, encode_text
from fence_vmchannel.core.tally import Refusal, Tally
from fence_vmchannel.core.windows import Allowance, largest_window
from fence_vmchannel.errors import (
    ChannelClosed,
    CloseCode,
    CreditExceeded,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    ServiceRefused,
)

if TYPE_CHECKING:
    from fence_vmchannel.core.saved import SavedChannels

RESERVED_CHANNELS: Final = 16
"""Channels that FENCING and CONTROL have beyond the limit of the session."""

MAX_TARGET_BYTES: Final = 1_024
MAX_REASON: Final = 1_000
MAX_CHANNEL: Final = 0xFFFF_FFFE

_FULL: Final = "the windows of the session's channels are at their limit"
_CONTROL: Final = (
    FrameType.OPEN,
    FrameType.ACCEPT,
    FrameType.CREDIT,
    FrameType.CLOSE,
    FrameType.CANCEL,
)
"""What may wait as a control frame."""


class Multiplexer:
    """The channels of one connection."""

    def __init__(self, role: Role, limits: Limits, events: list[Event], tally: Tally) -> None:
        """`events` is the connection's list; what happens is appended to it."""
        self._limits = limits
        self._tally = tally
        self._events = events
        self._channels: dict[int, Channel] = {}
        self._parity = 0 if role is Role.HOST else 1  # of our own channel numbers
        self._next_number = 2 if role is Role.HOST else 1
        self._peer_highest = 0  # highest number that the peer opened: all at or below it are known or gone
        self._promised = Allowance(limits.session_bytes)  # of which each channel holds its `promised`
        self._admitted = Allowance(limits.session_bytes)  # of which each channel holds its `admitted`
        self._waiting = SendQueues(self._channels)
        self.late: set[int] = set()  # channels whose CREDIT waits for more, or for `release_credit`

    def __len__(self) -> int:
        return len(self._channels)

    @property
    def queued_bytes(self) -> int:
        """Payload bytes of DATA that have no sequence number yet."""
        return self._waiting.queued_bytes

    def living(self) -> tuple[int, ...]:
        """The numbers of the channels that our side has not ended."""
        channels = self._channels.values()
        return tuple(each.number for each in channels if each.state is not ChannelState.CLOSING)

    def set_limits(self, limits: Limits) -> None:
        """See `Connection.set_limits`."""
        self._limits = limits
        self._promised.session_bytes = self._admitted.session_bytes = limits.session_bytes

    # --- the application's side ---

    def open(self, target: str, window: int | None, priority: Priority, payload: bytes) -> int:
        """See `Connection.open`."""
        channel = self._new(self._next_number, target, priority, ChannelState.QUEUED)
        window = min(self._window(window), channel.most)
        if len(encode_text(target)) > MAX_TARGET_BYTES or len(payload) > MAX_FRAGMENT:
            raise MessageTooLarge(f"target over {MAX_TARGET_BYTES} bytes, or payload over {MAX_FRAGMENT}")
        if not self._room_for_another(priority) or self._next_number > MAX_CHANNEL:
            raise ServiceRefused(CloseCode.LIMIT, f"{len(self._channels)} channels are open")
        if not (self._promise(channel, window) and self._admit(channel, 0)):  # the payload is queued too
            self._promised.give_back(channel.promised)
            raise ServiceRefused(CloseCode.LIMIT, _FULL)
        channel.receive_limit = window
        channel.open_payload = payload
        self._next_number += 2
        self._channels[channel.number] = channel
        self._waiting.control(FrameType.OPEN, channel)
        return channel.number

    def accept(self, number: int, window: int | None, payload: bytes) -> None:
        """See `Connection.accept`."""
        channel = self._channel(number)
        window = min(self._window(window), channel.most)
        if len(payload) > MAX_FRAGMENT:
            raise MessageTooLarge(f"payload over {MAX_FRAGMENT} bytes")
        if channel.state is ChannelState.OFFERED and not self._promise(channel, window):
            self.close(number, CloseCode.LIMIT, _FULL)
            raise ServiceRefused(CloseCode.LIMIT, _FULL)
        channel.apply(ChannelInput.ACCEPT)
        channel.receive_limit = window
        channel.accept_payload = payload
        self._waiting.control(FrameType.ACCEPT, channel)

    def send(
        self, number: int, data: bytes | bytearray | memoryview, end: bool, crc: int | None = None
    ) -> None:
        """See `Connection.send`."""
        channel = self._channel(number)
        if channel.state is not ChannelState.OPEN:
            raise LocalProtocolError(f"channel {number} is {channel.state.value}, not accepted yet")
        size = len(data)
        cost = message_cost(size)
        if channel.sent + cost > channel.send_limit:
            if cost > channel.largest_window:
                raise MessageTooLarge(f"{size} bytes; the reader's window takes {self.max_message(number)}")
            raise CreditExceeded(f"{size} bytes; the reader has granted {self.credit(number)}")
        if size <= MAX_FRAGMENT:
            channel.queue.append((bytes(data), END if end else 0, crc))
        else:
            view = memoryview(data)
            for at in range(0, size, MAX_FRAGMENT):
                last = at + MAX_FRAGMENT >= size
                fragment = bytes(view[at : at + MAX_FRAGMENT])
                channel.queue.append((fragment, END if end and last else 0, None))
        channel.sent += cost
        self._waiting.queued_bytes += size
        self._waiting.data(channel)

    def credit(self, number: int) -> int:
        """See `Connection.credit`."""
        channel = self._channels.get(number)
        if channel is None or channel.state is not ChannelState.OPEN:
            return 0
        return largest_message(channel.send_limit - channel.sent)

    def max_message(self, number: int) -> int:
        """See `Connection.max_message`."""
        channel = self._channels.get(number)
        return largest_message(channel.largest_window) if channel is not None else 0

    def full(self) -> tuple[int, int]:
        """See `Connection.full_channels`."""
        alive = [one for one in self._channels.values() if one.state is ChannelState.OPEN]
        outward = sum(8 * (one.send_limit - one.sent) < one.largest_window for one in alive)
        inward = sum(8 * (one.receive_limit - one.received) < one.window for one in alive)
        return outward, inward

    def grant(self, number: int, delivered: int, limit: int, *, lazily: bool) -> None:
        """See `Connection.grant`."""
        channel = self._channels.get(number)
        if channel is None or channel.state is not ChannelState.OPEN:
            return
        if delivered > channel.received or limit > MAX_OFFSET:
            raise LocalProtocolError(
                f"channel {number}: {delivered} delivered, limit {limit}, {channel.received} came"
            )
        consumed = max(delivered, channel.consumed)
        if limit > consumed + channel.window:
            room = channel.promised + self._promised.room(channel.priority)
            window = min(limit - consumed, channel.most, room)
            self._promise(channel, window)
            limit = consumed + window
        if consumed == channel.consumed and limit <= channel.receive_limit:
            return
        channel.consumed = consumed
        channel.receive_limit = max(limit, channel.receive_limit)
        if lazily and 2 * (channel.announced - channel.received) > channel.window:
            self.late.add(number)
        else:
            self._queue_credit(channel)

    def release_credit(self) -> None:
        """Send the credit that was granted lazily."""
        for number in tuple(self.late):
            self._queue_credit(self._channels[number])

    def close(self, number: int, code: CloseCode, reason: str) -> None:
        """See `Connection.close`."""
        channel = self._channels.get(number)
        if channel is None or channel.state is ChannelState.CLOSING:
            return
        if self._end(channel, code, reason) and not channel.queue:
            self._waiting.control(FrameType.CLOSE, channel)  # as control: behind an ACCEPT, before data

    def abort(self, number: int, code: CloseCode, reason: str) -> None:
        """See `Connection.abort`."""
        channel = self._channels.get(number)
        if channel is None or (channel.state is ChannelState.CLOSING and not channel.queue):
            return
        self._waiting.drop_data(channel)
        if channel.state is ChannelState.CLOSING or self._end(channel, code, reason):
            self._waiting.control(FrameType.CANCEL, channel)

    def abandon(self, keeps: Callable[[str], bool], code: CloseCode, reason: str) -> dict[int, int]:
        """See `Connection.abandon`."""
        lost: dict[int, int] = {}
        for channel in tuple(self._channels.values()):
            if channel.priority is Priority.NORMAL and not keeps(channel.target):
                lost[channel.number] = channel.sent - channel.delivered
                self.abort(channel.number, code, reason)
        return lost

    def room(self, target: str, window: int) -> tuple[int, int, int]:
        """See `Connection.room`."""
        channels = max(0, self._limits.channels - len(self._channels))
        cost = max(MIN_WINDOW, min(window, largest_window(self._limits, target, Priority.NORMAL)))
        return channels, self._promised.room(Priority.NORMAL), cost

    def promised(self, number: int) -> int:
        """See `Connection.promised`."""
        channel = self._channels.get(number)
        return channel.promised if channel is not None else 0

    # --- the session's side: sending ---

    def next_frame(self, in_flight: int) -> Outgoing | None:
        """The next frame to send, by priority; None: none waits, or `in_flight` bytes are too many."""
        return self._waiting.next_frame(in_flight)

    def confirm(self, number: int) -> None:
        """Our CLOSE or CANCEL of a channel has been acknowledged."""
        channel = self._channels.get(number)
        if channel is not None:  # else the peer's own CLOSE came first
            channel.apply(ChannelInput.CONFIRMED)
            self._forget(channel)

    def reset(self) -> dict[int, int]:
        """The session ends: forget its channels. Returns what each sent that was not confirmed, cost
        units."""
        lost: dict[int, int] = {}
        survivors: dict[int, Channel] = {}
        for number, channel in self._channels.items():
            channel.apply(ChannelInput.RESET)
            if channel.state is ChannelState.QUEUED:
                survivors[number] = channel
            else:
                lost[number] = channel.sent - channel.delivered
                self._give_back(channel)
        self._channels.clear()
        self._channels.update(survivors)
        self._waiting.clear()
        for channel in survivors.values():
            self._waiting.control(FrameType.OPEN, channel)
        self.late.clear()
        self._peer_highest = 0
        return lost

    def _queue_credit(self, channel: Channel) -> None:
        self.late.discard(channel.number)
        if not channel.credit_due:
            channel.credit_due = True
            self._waiting.control(FrameType.CREDIT, channel)

    # --- the session's side: receiving ---

    def take(self, frame: Frame) -> None:
        """Act on a sequenced frame of the peer, each exactly once and in order.

        Raises:
            RemoteProtocolError: the peer broke a rule of the session; it must end.
        """
        match frame.type:
            case FrameType.DATA:
                self._take_data(frame)
            case FrameType.CREDIT:
                self._take_credit(frame)
            case FrameType.OPEN:
                self._take_open(frame)
            case FrameType.ACCEPT:
                self._take_accept(frame)
            case FrameType.CLOSE | FrameType.CANCEL:
                self._take_close(frame)
            case _:
                raise RemoteProtocolError(f"frame type {frame.type} is not of a channel")

    def _take_data(self, frame: Frame) -> None:
        channel = self._known(frame)
        if channel is None or channel.state is ChannelState.CLOSING:
            return  # it crossed our CLOSE
        cost = len(frame.payload) + FRAME_COST
        if channel.state is ChannelState.OPENING:
            raise RemoteProtocolError(f"DATA on channel {frame.channel} before ACCEPT")
        if len(frame.payload) > MAX_FRAGMENT:
            self._break(channel, f"a fragment of {len(frame.payload)} bytes")
        elif channel.received + cost > channel.receive_limit or channel.state is not ChannelState.OPEN:
            self._break(channel, "more data than was granted")
        else:
            channel.received += cost
            end = bool(frame.flags & END)
            self._events.append(Data(frame.channel, frame.payload, end, cost, frame.payload_crc))

    def _take_credit(self, frame: Frame) -> None:
        channel = self._known(frame)
        if channel is None or channel.state is ChannelState.CLOSING:
            return
        delivered, limit = _unpack(CREDIT, frame)
        if (
            channel.state is not ChannelState.OPEN
            or not channel.delivered <= delivered <= channel.scheduled
            or limit < channel.send_limit
        ):
            self._break(channel, f"credit {delivered} to {limit} does not fit")
            return
        if limit > delivered + channel.largest_window:
            room = channel.admitted + self._admitted.room(channel.priority)
            window = min(limit - delivered, channel.most, room)
            self._admit(channel, window)
            limit = delivered + window
        channel.delivered = delivered
        channel.send_limit = limit
        self._events.append(Granted(frame.channel, delivered, limit))

    def _take_open(self, frame: Frame) -> None:
        number = frame.channel
        if number % 2 == self._parity or number <= self._peer_highest:
            raise RemoteProtocolError(f"OPEN with channel number {number}")
        priority, window, length = _unpack(OPEN, frame)
        raw = frame.payload[OPEN.size : OPEN.size + length]
        payload = frame.payload[OPEN.size + length :]
        self._peer_highest = number
        if priority > Priority.NORMAL or len(raw) < length:
            raise RemoteProtocolError(f"OPEN of channel {number} is malformed")
        if length > MAX_TARGET_BYTES or len(payload) > MAX_FRAGMENT:
            self._refuse(number, CloseCode.PROTOCOL, "target or payload is too long")
        elif not self._room_for_another(Priority(priority)):
            self._refuse(number, CloseCode.LIMIT, f"{len(self._channels)} channels are open")
        else:
            target = raw.decode("utf-8", "replace")
            channel = self._new(number, target, Priority(priority), ChannelState.OFFERED)
            window = min(window, channel.most)
            if not self._admit(channel, window):
                self._refuse(number, CloseCode.LIMIT, _FULL)
                return
            channel.send_limit = window
            self._channels[number] = channel
            self._events.append(ChannelOpened(number, channel.target, channel.priority, window, payload))

    def _take_accept(self, frame: Frame) -> None:
        channel = self._known(frame)
        if channel is None or channel.state is ChannelState.CLOSING:
            return
        if channel.state is not ChannelState.OPENING:
            raise RemoteProtocolError(f"ACCEPT of channel {frame.channel}, which is {channel.state.value}")
        (window,) = _unpack(ACCEPT, frame)
        if len(frame.payload) - ACCEPT.size > MAX_FRAGMENT:
            self._break(channel, "the payload of ACCEPT is too long")
            return
        window = min(window, channel.most)
        if not self._admit(channel, window):
            self._break(channel, _FULL, CloseCode.LIMIT)
            return
        channel.apply(ChannelInput.ACCEPTED)
        channel.send_limit = window
        self._events.append(ChannelAccepted(frame.channel, window, frame.payload[ACCEPT.size :]))

    def _take_close(self, frame: Frame) -> None:
        channel = self._known(frame)
        if channel is None:
            return
        (number,) = _unpack(CLOSE, frame)
        try:
            code = CloseCode(number)
        except ValueError:  # of a later version
            code = CloseCode.INTERNAL
        told = channel.state is ChannelState.CLOSING
        channel.apply(ChannelInput.CLOSED)
        self._waiting.drop_data(channel)
        self._forget(channel)
        if not told:
            reason = frame.payload[CLOSE.size :].decode("utf-8", "replace")[:MAX_REASON]
            self._events.append(Closed(frame.channel, code, reason, frame.type == FrameType.CANCEL))

    # --- hand-over ---

    def save(self) -> SavedChannels:
        """All of it, for another process to go on with."""
        from fence_vmchannel.core.saved import (  # here: most processes never need it
            SavedChannels,
            SavedControl,
            SavedRefusal,
        )

        self.release_credit()
        return SavedChannels(
            next_number=self._next_number,
            peer_highest=self._peer_highest,
            channels=tuple(channel.save() for channel in self._channels.values()),
            control=tuple(SavedControl(kind, number) for kind, number in self._waiting.controls()),
            refusals=tuple(SavedRefusal(*refusal) for refusal in self._waiting.refusals),
        )

    def load(self, saved: SavedChannels) -> None:
        """Take over what `save` gave; only right after construction.

        Raises:
            ValueError: values that no `save` gives.
        """
        if saved.next_number % 2 != self._parity or not 0 < saved.next_number <= MAX_CHANNEL + 2:
            raise ValueError("channel numbers of the other role")
        if not 0 <= saved.peer_highest <= MAX_CHANNEL + 1:
            raise ValueError(f"channel number {saved.peer_highest}")
        self._next_number, self._peer_highest = saved.next_number, saved.peer_highest
        for each in saved.channels:
            highest = saved.next_number - 1 if each.number % 2 == self._parity else saved.peer_highest
            if each.number in self._channels or not 0 < each.number <= highest:
                raise ValueError(f"channel number {each.number}")
            channel = self._channels[each.number] = Channel.load(each)
            # What it had under larger limits it keeps: a message of that size may be under way.
            most = largest_window(self._limits, channel.target, channel.priority)
            channel.most = max(most, channel.window, channel.largest_window)
            self._promised.hold(channel.promised)
            self._admitted.hold(channel.admitted)
            self._waiting.queued_bytes += sum(len(payload) for payload, *_ in channel.queue)
            if channel.wants_to_send():
                self._waiting.data(channel)
        for entry in saved.control:
            kind, owner = FrameType(entry.kind), self._channels.get(entry.channel)
            if owner is None:
                continue  # it was gone already when the session was saved
            if kind not in _CONTROL or (kind is FrameType.OPEN) != (owner.state is ChannelState.QUEUED):
                raise ValueError(f"a {kind.name} waits for channel {entry.channel}")
            self._waiting.control(kind, owner)
            if kind is FrameType.CREDIT:
                owner.credit_due = True
        for refusal in saved.refusals:
            if not 0 < refusal.channel <= saved.peer_highest:
                raise ValueError(f"channel number {refusal.channel}")
            self._waiting.refusals.append((refusal.channel, CloseCode(refusal.code), refusal.reason))

    # --- helpers ---

    def _channel(self, number: int) -> Channel:
        """The channel that an application names.

        Raises:
            ChannelClosed: it is gone.
        """
        channel = self._channels.get(number)
        if channel is None or channel.state is ChannelState.CLOSING:
            raise ChannelClosed(CloseCode.NORMAL, f"channel {number} is gone")
        return channel

    def _known(self, frame: Frame) -> Channel | None:
        """The channel of a frame, None if it is gone already.

        No list of tombstones is needed: numbers only rise, so a number that was given out and is not here is
        gone.
        """
        channel = self._channels.get(frame.channel)
        if channel is not None:
            if channel.state is ChannelState.QUEUED:
                raise RemoteProtocolError(f"channel {frame.channel} was never opened")
            return channel
        ours = frame.channel % 2 == self._parity
        if not frame.channel or frame.channel > (self._next_number - 2 if ours else self._peer_highest):
            raise RemoteProtocolError(f"channel {frame.channel} was never opened")
        return None

    def _window(self, window: int | None) -> int:
        """The window that an application asks for, or the default."""
        window = self._limits.window_bytes if window is None else window
        if not 0 <= window <= MAX_OFFSET:
            raise LocalProtocolError(f"window {window}")
        return window

    def _new(self, number: int, target: str, priority: Priority, state: ChannelState) -> Channel:
        """A channel that is not counted yet."""
        channel = Channel(number, target, priority, state)
        channel.most = largest_window(self._limits, target, priority)
        return channel

    def _room_for_another(self, priority: Priority) -> bool:
        """Whether the limits allow a further channel."""
        reserve = 0 if priority is Priority.NORMAL else RESERVED_CHANNELS
        return len(self._channels) < self._limits.channels + reserve

    def _promise(self, channel: Channel, window: int) -> bool:
        """Count a receive window of ours against the session's limit; False: there is no room for it."""
        held = self._promised.take(window, channel.priority, held=channel.promised)
        if held:
            channel.promised = held
            channel.window = max(window, channel.window)
        return bool(held)

    def _admit(self, channel: Channel, window: int) -> bool:
        """The same for a window of the peer: for what we may have to queue."""
        held = self._admitted.take(window, channel.priority, held=channel.admitted)
        if held:
            channel.admitted = held
            channel.largest_window = max(window, channel.largest_window)
        return bool(held)

    def _give_back(self, channel: Channel) -> None:
        self._promised.give_back(channel.promised)
        self._admitted.give_back(channel.admitted)

    def _forget(self, channel: Channel) -> None:
        """The channel is gone."""
        self._give_back(channel)
        self.late.discard(channel.number)
        channel.close_code = None
        del self._channels[channel.number]
        self._waiting.tidy()

    def _end(self, channel: Channel, code: CloseCode, reason: str) -> bool:
        """Our side ends a channel; False if nobody else knows of it, so that nothing is to be sent."""
        channel.apply(ChannelInput.CLOSE)
        if channel.state is ChannelState.GONE:
            self._forget(channel)
            return False
        channel.close_code, channel.close_reason = code, reason[:MAX_REASON]
        return True

    def _break(self, channel: Channel, reason: str, code: CloseCode = CloseCode.PROTOCOL) -> None:
        """The peer broke a rule of this channel, or asks too much: end it on both sides."""
        self._tally[Refusal.CHANNEL_LIMIT if code is CloseCode.LIMIT else Refusal.CHANNEL] += 1
        self.abort(channel.number, code, reason)
        self._events.append(Closed(channel.number, code, reason, True))

    def _refuse(self, number: int, code: CloseCode, reason: str) -> None:
        self._tally[Refusal.CHANNEL_LIMIT if code is CloseCode.LIMIT else Refusal.CHANNEL] += 1
        if len(self._waiting.refusals) >= self._limits.channels:
            raise RemoteProtocolError("too many channels opened beyond the limit")
        self._waiting.refusals.append((number, code, reason))


def _unpack(layout: struct.Struct, frame: Frame) -> tuple[int, ...]:
    if len(frame.payload) < layout.size:
        raise RemoteProtocolError(f"{FrameType(frame.type).name} is too short")
    return layout.unpack_from(frame.payload)
