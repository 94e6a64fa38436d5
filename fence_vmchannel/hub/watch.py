# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches: what happens in the hub, for whoever wants to know, in bounded memory.

Each watcher has a queue of its own. When it is full the watcher has been too slow: it gets `Overflow`, then a
new snapshot. Nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final

from fence_vmchannel.hub.events import HubEvent, Overflow, Synced

QUEUE_SIZE: Final = 256
"""Events that wait for one watcher, beside a snapshot."""


class Watch:
    """One watcher: `with hub.watch() as events: async for event in events: ...`. Ends when the hub stops."""

    def __init__(
        self, snapshot: Callable[[], Iterable[HubEvent]], forget: Callable[[Watch], None], size: int
    ) -> None:
        self._snapshot = snapshot
        self._forget = forget
        self._size = size
        self._bound = size
        self._queue: deque[HubEvent] = deque()
        self._arrived = asyncio.Event()
        self._missed = 0
        self._ended = False
        self._fill()

    def push(self, event: HubEvent) -> None:
        """Add an event; if the watcher is too slow, all that waits is dropped in favour of a new snapshot."""
        if self._missed or len(self._queue) >= self._bound:
            self._missed += 1 + len(self._queue)
            self._queue.clear()
        else:
            self._queue.append(event)
        self._arrived.set()

    def end(self) -> None:
        """The hub stops: what waits is still delivered, then the iteration ends."""
        self._ended = True
        self._arrived.set()

    def close(self) -> None:
        """Watch no more. May be called twice."""
        self._forget(self)
        self.end()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> HubEvent:
        while not self._queue:
            if self._missed:
                missed, self._missed = self._missed, 0
                self._fill()
                return Overflow(missed)
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._queue.popleft()

    def _fill(self) -> None:
        self._queue.extend(self._snapshot())
        self._queue.append(Synced())
        self._bound = self._size + len(self._queue)  # a large snapshot alone is no sign of slowness


class WatchList:
    """All watchers of one hub."""

    def __init__(self, snapshot: Callable[[], Iterable[HubEvent]], *, size: int = QUEUE_SIZE) -> None:
        self._snapshot = snapshot
        self._size = size
        self._watches: set[Watch] = set()

    def add(self) -> Watch:
        """A new watcher, which begins with a snapshot."""
        watch = Watch(self._snapshot, self._watches.discard, self._size)
        self._watches.add(watch)
        return watch

    def publish(self, event: HubEvent) -> None:
        """Tell all watchers."""
        for watch in tuple(self._watches):
            watch.push(event)

    def end(self) -> None:
        """End all watches."""
        for watch in tuple(self._watches):
            watch.end()
        self._watches.clear()
