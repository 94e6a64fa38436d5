# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two ends of reliable delivery: what we sent and may have to send again, and what we have received.

Each sequenced frame extends a running CRC-32 over the frames' identities. Both sides state it with their
numbers, so that equal numbers with other frames behind them (a guest restored from a snapshot) are noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

from fence_vmchannel.core.frames import HEADER_BYTES, Frame, FrameType, pack_identity, unpack_identity
from fence_vmchannel.core.greeting import Numbers


class Sent(NamedTuple):
    """A sequenced frame that the peer has not acknowledged."""

    sequence: int
    kind: int
    channel: int
    identity: bytes
    payload: bytes
    check: int  # running checksum up to and with this frame


class Outbox:
    """Sequenced frames from their number to their acknowledgement.

    `transmitted` of them have gone out on the present link; the rest waits for it.
    """

    def __init__(self, acknowledged: int = 0, check: int = 0) -> None:
        self.acknowledged = acknowledged
        self.acknowledged_check = check
        self.sent = acknowledged  # the last sequence given out
        self.sent_check = check  # the running checksum there
        self.in_flight = 0  # bytes of all frames held here
        self._frames: deque[Sent] = deque()
        self._transmitted = 0  # how many of `_frames` have gone out on this link

    @property
    def transmitted(self) -> int:
        """The last sequence that went out on this link (or was acknowledged before)."""
        return self.acknowledged + self._transmitted

    @property
    def waiting(self) -> bool:
        """Whether frames are out and not acknowledged."""
        return self._transmitted > 0

    def frames(self) -> Iterable[Sent]:
        """All frames held, in order."""
        return self._frames

    def add(
        self, version: int, kind: int, flags: int, channel: int, payload: bytes, crc: int | None = None
    ) -> Sent:
        """Give a frame its sequence number. `crc`: of its payload, if it is known."""
        self.sent += 1
        identity = pack_identity(version, kind, flags, channel, self.sent, payload, crc)
        self.sent_check = crc32(identity, self.sent_check)
        sent = Sent(self.sent, kind, channel, identity, payload, self.sent_check)
        self._frames.append(sent)
        self.in_flight += HEADER_BYTES + len(payload)
        return sent

    def load(self, identity: bytes, payload: bytes) -> None:
        """Add a frame that another process sent and saw no acknowledgement of.

        Raises:
            ValueError: it is not the next one, or its payload is not that of its identity.
        """
        version, kind, flags, channel, _length, sequence, _crc = unpack_identity(identity)
        if (
            sequence != self.sent + 1
            or pack_identity(version, kind, flags, channel, sequence, payload) != identity
        ):
            raise ValueError(f"frame {sequence} does not follow {self.sent}, or is damaged")
        self.add(version, kind, flags, channel, payload)

    def next(self) -> Sent | None:
        """The next frame for this link; None if all have gone out."""
        return self._frames[self._transmitted] if self._transmitted < len(self._frames) else None

    def advance(self) -> None:
        """The frame that `next` gave has gone out."""
        self._transmitted += 1

    def check_at(self, sequence: int) -> int | None:
        """The running checksum at `sequence`; None if it is acknowledged beyond, or not given out yet."""
        if sequence == self.acknowledged:
            return self.acknowledged_check
        index = sequence - self.acknowledged - 1
        return self._frames[index].check if 0 <= index < len(self._frames) else None

    def acknowledge(self, sequence: int) -> list[int]:
        """Forget all frames up to `sequence`, which `check_at` has been asked about.

        Returns:
            the channels whose CLOSE or CANCEL was among them.
        """
        closed: list[int] = []
        frames = self._frames
        while frames and frames[0].sequence <= sequence:
            frame = frames.popleft()
            self.in_flight -= HEADER_BYTES + len(frame.payload)
            self._transmitted -= 1
            self.acknowledged, self.acknowledged_check = frame.sequence, frame.check
            if frame.kind in (FrameType.CLOSE, FrameType.CANCEL):
                closed.append(frame.channel)
        self._transmitted = max(0, self._transmitted)
        return closed

    def rewind(self) -> None:
        """A new link: nothing of what is held has gone out on it."""
        self._transmitted = 0


class Inbox:
    """How far the peer's frames have come, in order."""

    def __init__(self, received: int = 0, check: int = 0) -> None:
        self.received = received
        self.check = check

    def take(self, frame: Frame) -> bool:
        """Count a frame if it is the next one; False (and no change) if not."""
        if frame.sequence != self.received + 1:
            return False
        self.received = frame.sequence
        self.check = crc32(frame.identity, self.check)
        return True


def why_numbers_do_not_fit(outbox: Outbox, inbox: Inbox, theirs: Numbers) -> str:
    """Why the two sides of a session cannot be reconciled; empty if they can.

    Both must be able to send again all that the other has not received, and both running checksums must agree
    wherever both sides know them.
    """
    if outbox.check_at(theirs.received) != theirs.received_check:
        return "what the peer has received is not what was sent"
    if not theirs.acknowledged <= inbox.received <= theirs.sent:
        return "what the peer has sent is not what was received"
    if theirs.sent == inbox.received and theirs.sent_check != inbox.check:
        return "what the peer has sent is other than what was received"
    return ""
