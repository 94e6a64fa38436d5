# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens, for live views: one publisher, any number of readers that may be slow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from vmchannel_host.admin.view import AdminEvent

MAX_WAITING: Final = 1000
"""Events that wait for one reader; then the oldest is dropped: a view needs the latest."""


class Feed:
    """Copies each event to every reader. Belongs to one event loop; `publish` never blocks."""

    def __init__(self) -> None:
        self._readers: set[_Reader] = set()

    def publish(self, event: AdminEvent) -> None:
        """Tell all readers."""
        for reader in self._readers:
            reader.put(event)

    async def read(self) -> AsyncIterator[AdminEvent]:
        """Events from the first step of this iterator on, until the reader stops."""
        reader = _Reader()
        self._readers.add(reader)
        try:
            while True:
                yield await reader.get()
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self) -> None:
        self._waiting: deque[AdminEvent] = deque(maxlen=MAX_WAITING)
        self._arrived = asyncio.Event()

    def put(self, event: AdminEvent) -> None:
        self._waiting.append(event)
        self._arrived.set()

    async def get(self) -> AdminEvent:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()
