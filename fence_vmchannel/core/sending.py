# SPDX-License-Identifier: LGPL-2.1-or-later
"""What waits to be sent on the channels of one connection, and whose turn it is: priorities, fairness, and
how much may be on the way. No I/O, no time.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from fence_vmchannel.core.channel_state import Channel, ChannelInput, ChannelState, RoundRobin
from fence_vmchannel.core.events import Priority
from fence_vmchannel.core.frames import HEADER_BYTES, MAX_FRAGMENT, FrameType
from fence_vmchannel.errors import CloseCode

BULK_IN_FLIGHT: Final = 262_144
"""Unacknowledged bytes on a link beyond which NORMAL data waits: what a fence may have to wait behind."""

FENCING_IN_FLIGHT: Final = BULK_IN_FLIGHT + 65_536
"""The same for data of FENCING and CONTROL channels: a reserve that bulk cannot take."""

CONTROL_IN_FLIGHT: Final = FENCING_IN_FLIGHT + 65_536
"""The same for refusals, and for ACCEPT, CREDIT, CLOSE and CANCEL of FENCING and CONTROL channels. All other
control frames wait behind fencing data: an OPEN may be large, and a flood of them must not stop a fence."""

OPEN = struct.Struct(">BQH")  # priority, window, length of the target
ACCEPT = struct.Struct(">Q")  # window
CREDIT = struct.Struct(">QQ")  # delivered, limit
CLOSE = struct.Struct(">H")  # code
"""The payloads of the frames of these types, up to what has no fixed length."""


Outgoing = tuple[int, int, int, bytes, int | None]
"""A frame without its numbers: type, flags, channel, payload, CRC of the payload if it is known."""


class SendQueues:
    """What waits to be sent. `channels` are those of the connection, which changes them."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self._channels = channels
        self._urgent: deque[tuple[FrameType, int]] = deque()  # control frames that may overtake the others
        self._control: deque[tuple[FrameType, int]] = deque()
        self.refusals: deque[tuple[int, CloseCode, str]] = deque()
        self._rings = tuple(RoundRobin() for _ in Priority)  # by priority
        self.queued_bytes = 0  # of DATA that has no sequence number yet

    def next_frame(self, in_flight: int) -> Outgoing | None:
        """The next frame to send, by priority; None: none waits, or `in_flight` bytes are too many."""
        if in_flight >= CONTROL_IN_FLIGHT:
            return None
        if self.refusals:
            number, code, reason = self.refusals.popleft()
            return FrameType.CLOSE, 0, number, close_payload(code, reason), None
        frame = self._next_control(self._urgent) if self._urgent else None
        if frame is not None or in_flight >= FENCING_IN_FLIGHT:
            return frame
        control, fencing, normal = self._rings
        frame = (self._next_data(control) if control.ring else None) or (
            self._next_data(fencing) if fencing.ring else None
        )
        if frame is None and self._control:
            frame = self._next_control(self._control)
        if frame is not None or in_flight > BULK_IN_FLIGHT - HEADER_BYTES - MAX_FRAGMENT:
            return frame
        return self._next_data(normal) if normal.ring else None

    def control(self, kind: FrameType, channel: Channel) -> None:
        """Let a control frame of a channel wait. What it holds is read when its turn comes."""
        # No OPEN overtakes another: their numbers rise.
        normal = kind is FrameType.OPEN or channel.priority is Priority.NORMAL
        (self._control if normal else self._urgent).append((kind, channel.number))

    def data(self, channel: Channel) -> None:
        """The channel has data queued, or a CLOSE behind it."""
        self._rings[channel.priority].add(channel)

    def drop_data(self, channel: Channel) -> None:
        """Forget what a channel has queued."""
        self.queued_bytes -= sum(len(payload) for payload, *_ in channel.queue)
        channel.queue.clear()

    def controls(self) -> Iterator[tuple[FrameType, int]]:
        """The control frames that wait, those that may overtake others first."""
        yield from self._urgent
        yield from self._control

    def tidy(self) -> None:
        """Forget now and then what waits for channels that are gone: a peer that opens and closes without
        ever acknowledging would make the queues grow without end.
        """
        enough = 64 + 8 * len(self._channels)  # a channel has at most four control frames waiting
        for queue in (self._urgent, self._control):
            if len(queue) > enough:
                alive = [entry for entry in queue if entry[1] in self._channels]
                queue.clear()
                queue.extend(alive)
        for ring in self._rings:
            if len(ring) > 64 + 2 * len(self._channels):
                ring.retain(self._channels)

    def clear(self) -> None:
        """Forget all that waits."""
        self._urgent.clear()
        self._control.clear()
        self.refusals.clear()
        self.queued_bytes = 0
        for ring in self._rings:
            ring.clear()

    def _next_control(self, queue: deque[tuple[FrameType, int]]) -> Outgoing | None:
        while queue:
            kind, number = queue.popleft()
            channel = self._channels.get(number)
            if channel is not None:
                payload = self._control_payload(kind, channel)
                if payload is not None:
                    return kind, 0, number, payload, None
        return None

    def _control_payload(self, kind: FrameType, channel: Channel) -> bytes | None:
        """The payload of a control frame whose turn has come; None if it has become needless."""
        match kind:
            case FrameType.OPEN:
                channel.apply(ChannelInput.OPEN_SENT)
                target = encode_text(channel.target)
                payload, channel.open_payload = channel.open_payload, b""
                channel.announced = channel.window
                return OPEN.pack(channel.priority, channel.window, len(target)) + target + payload
            case FrameType.ACCEPT:
                payload, channel.accept_payload = channel.accept_payload, b""
                channel.announced = channel.window
                return ACCEPT.pack(channel.window) + payload
            case FrameType.CREDIT:
                channel.credit_due = False
                if channel.state is not ChannelState.OPEN:
                    return None
                channel.announced = channel.receive_limit
                return CREDIT.pack(channel.consumed, channel.receive_limit)
            case _:  # CLOSE, CANCEL
                if channel.close_code is None:
                    return None
                code, channel.close_code = channel.close_code, None
                return close_payload(code, channel.close_reason)

    def _next_data(self, ring: RoundRobin) -> Outgoing | None:
        channel = ring.next()
        if channel is None:
            return None
        kind, flags, payload, crc = channel.pop()
        if kind == FrameType.DATA:
            self.queued_bytes -= len(payload)
        elif channel.close_code is not None:
            payload = close_payload(channel.close_code, channel.close_reason)
            channel.close_code = None
        return kind, flags, channel.number, payload, crc


def close_payload(code: CloseCode, reason: str) -> bytes:
    """The payload of CLOSE and CANCEL."""
    return CLOSE.pack(code) + encode_text(reason)


def encode_text(text: str) -> bytes:
    """Text as it goes on the wire."""
    return text.encode("utf-8", "replace")
