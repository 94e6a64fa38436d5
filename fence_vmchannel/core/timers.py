# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a session has to do something unasked: its timers, and how often it may greet."""

from __future__ import annotations

import math
from typing import Final

NEVER: Final = math.inf
"""When a timer that is not armed fires."""

ACK_AFTER_BYTES: Final = 65_536
"""Received bytes after which an acknowledgement goes out at once; a quarter of what may be in flight."""


class Timers:
    """Points in time, seconds on the caller's clock; NEVER: not armed."""

    ACK_DELAY_S: Final = 0.02
    """How long an acknowledgement waits for data to travel with."""
    CREDIT_DELAY_S: Final = 0.02
    """How long credit that was granted lazily waits for more."""
    HEARTBEAT_S: Final = 15.0
    """An idle side sends an ACK this long after its last frame."""
    SILENCE_S: Final = 45.0
    """A peer that has sent nothing for so long (three heartbeats) cannot be reached."""
    PROBE_S: Final = 1.0
    """After so long without an acknowledgement an ACK says what was sent, so that a lost tail shows."""
    PARTIAL_S: Final = 1.0
    """The rest of a frame is awaited so long: its writer may have died in the middle of it."""
    STALL_S: Final = 5.0
    """After so long without an acknowledgement the greeting begins anew; doubled each time, at most
    MAX_STALL_S."""
    MAX_STALL_S: Final = 60.0

    def __init__(self) -> None:
        self.greet_at = NEVER
        self.ack_at = NEVER
        self.credit_at = NEVER
        self.heartbeat_at = NEVER
        self.silent_at = NEVER
        self.partial_at = NEVER
        self.probe_at = NEVER
        self.stall_at = NEVER
        self._stall_s = self.STALL_S

    @staticmethod
    def due(at: float, now: float) -> bool:
        """Whether an armed timer's time has come."""
        return now >= at

    def next(self) -> float | None:
        """The earliest timer; None: none is armed. Asked after every message, so it is one call."""
        first = min(
            self.silent_at,
            self.greet_at,
            self.ack_at,
            self.credit_at,
            self.heartbeat_at,
            self.partial_at,
            self.probe_at,
            self.stall_at,
        )
        return None if first == NEVER else first

    def heard(self, now: float) -> None:
        """A frame that counts has come from the peer."""
        self.silent_at = now + self.SILENCE_S

    def sent(self, now: float) -> None:
        """Something goes out."""
        if self.heartbeat_at != NEVER:
            self.heartbeat_at = now + self.HEARTBEAT_S

    def transmitted(self, now: float) -> None:
        """Sequenced frames go out: an acknowledgement is to be expected."""
        if self.stall_at == NEVER:
            self.stall_at = now + self._stall_s
            self.probe_at = now + self.PROBE_S

    def progressed(self, now: float, waiting: bool) -> None:
        """The peer acknowledged something; `waiting`: there is more to acknowledge."""
        self._stall_s = self.STALL_S
        self.stall_at = now + self._stall_s if waiting else NEVER
        self.probe_at = now + self.PROBE_S if waiting else NEVER

    def stalled(self) -> None:
        """Nothing was acknowledged in time: be more patient next time."""
        self.stall_at = self.probe_at = NEVER
        self._stall_s = min(self._stall_s * 2, self.MAX_STALL_S)

    def probed(self, now: float) -> None:
        """An ACK is about to go out as heartbeat or probe."""
        self.heartbeat_at = now + self.HEARTBEAT_S
        if self.probe_at != NEVER:
            self.probe_at = now + self.PROBE_S

    def opened(self, now: float) -> None:
        """The greeting is done."""
        self.greet_at = NEVER
        self.heard(now)
        self.heartbeat_at = now + self.HEARTBEAT_S

    def closed(self) -> None:
        """The epoch is over; only greeting and silence count now."""
        self.greet_at = self.ack_at = self.credit_at = NEVER
        self.heartbeat_at = self.probe_at = self.stall_at = NEVER

    def stop(self) -> None:
        """The link is over: nothing is timed."""
        self.closed()
        self.silent_at = self.partial_at = NEVER


class GreetingPace:
    """How often one link may be greeted: no peer can make us do it faster, none can make us stop."""

    BURST: Final = 8
    PER_SECOND: Final = 2.0
    FIRST_PATIENCE_S: Final = 1.0
    MAX_PATIENCE_S: Final = 16.0
    KNOCK_S: Final = 4.0
    """A guest knocks at least this often, because it may be the host's only sign of it. The host need not
    hurry: what it writes to a closed port piles up there."""
    REPEAT_S: Final = 0.25
    """A CHALLENGE is repeated for a further KNOCK at most this often."""

    def __init__(self) -> None:
        self._tokens = float(self.BURST)
        self._tokens_at: float | None = None
        self._patience_s = self.FIRST_PATIENCE_S
        self._repeated_at: float | None = None

    def begin(self, now: float) -> float:
        """When the next greeting may begin, which is counted now."""
        if self._tokens_at is not None:
            self._tokens = min(self.BURST, self._tokens + (now - self._tokens_at) * self.PER_SECOND)
        self._tokens_at = now
        self._repeated_at = now
        self._tokens -= 1
        return now if self._tokens >= 0 else now - self._tokens / self.PER_SECOND

    def may_repeat(self, now: float) -> bool:
        """Whether the same CHALLENGE may go out again."""
        if self._repeated_at is not None and now - self._repeated_at < self.REPEAT_S:
            return False
        self._repeated_at = now
        return True

    def patience(self) -> float:
        """How long to wait for an answer, seconds; longer each time until `succeeded`."""
        wait = self._patience_s
        self._patience_s = min(wait * 2, self.MAX_PATIENCE_S)
        return wait

    def succeeded(self) -> None:
        """A greeting came to its end."""
        self._patience_s = self.FIRST_PATIENCE_S
