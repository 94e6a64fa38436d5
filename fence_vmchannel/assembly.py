# SPDX-License-Identifier: LGPL-2.1-or-later
"""Putting the messages of one channel together again, and counting what their reader may be sent."""

from __future__ import annotations

from collections import deque

from fence_vmchannel.core.events import Data


class Assembly:
    """The incoming half of a channel. What it holds is bounded by the channel's window."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._fragments: list[bytes] = []
        self._cost = 0
        self._messages: deque[tuple[bytes, int]] = deque()  # each with its cost
        self._delivered = 0

    def __len__(self) -> int:
        """How many whole messages wait."""
        return len(self._messages)

    def add(self, event: Data) -> bool:
        """Take a fragment; True if it completes a message."""
        self._fragments.append(event.data)
        self._cost += event.cost
        if not event.end:
            return False
        self._messages.append((b"".join(self._fragments), self._cost))
        self._fragments, self._cost = [], 0
        return True

    def take(self) -> tuple[bytes, int, int]:
        """The next message, with the offsets (delivered, limit) to grant for it."""
        message, cost = self._messages.popleft()
        self._delivered += cost
        return message, self._delivered, self._delivered + self._window
