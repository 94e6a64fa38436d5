# SPDX-License-Identifier: LGPL-2.1-or-later
"""How large windows may be: of one channel, and of all channels of a session in one direction."""

from __future__ import annotations

from typing import Final

from fence_vmchannel.core.channel_state import MAX_OFFSET, MIN_WINDOW
from fence_vmchannel.core.events import Limits, Priority

RESERVED_BYTES: Final = 4_194_304
"""Bytes of windows, in each direction, that FENCING and CONTROL channels have beyond the session's limit: no
flood of others, and no small limit, keeps a fence from being opened."""

RESERVED_WINDOW: Final = 262_144
"""No limit cuts a window of a FENCING or CONTROL channel below this."""


def largest_window(limits: Limits, target: str, priority: Priority) -> int:
    """The largest window of a channel to `target`, in either direction, cost units."""
    most = min(limits.max_window_bytes, limits.target_bytes.get(target, MAX_OFFSET))
    return max(most, MIN_WINDOW if priority is Priority.NORMAL else RESERVED_WINDOW)


class Allowance:
    """What the windows of all channels of a session may hold together in one direction."""

    def __init__(self, session_bytes: int) -> None:
        self.session_bytes = session_bytes
        self._taken = 0

    def room(self, priority: Priority) -> int:
        """What is left for a channel of this priority."""
        reserve = 0 if priority is Priority.NORMAL else RESERVED_BYTES
        return max(0, self.session_bytes + reserve - self._taken)

    def take(self, window: int, priority: Priority, *, held: int) -> int:
        """What a channel that holds `held` holds for a window of this size; 0: there is no room for it.

        One fragment is taken even for a smaller window, so that a later grant of so much never fails.
        """
        more = max(window, MIN_WINDOW) - held
        if more <= 0:
            return held
        if more > self.room(priority):
            return 0
        self._taken += more
        return held + more

    def hold(self, held: int) -> None:
        """Count what a channel of another process's session held, room or not."""
        self._taken += held

    def give_back(self, held: int) -> None:
        """The channel that held so much is gone."""
        self._taken -= held
