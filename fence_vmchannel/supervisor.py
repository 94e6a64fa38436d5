# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that live no longer than their scope and cannot hurt one another.

A TaskGroup ends all its tasks when one fails, and wraps the body's error in an ExceptionGroup. Here a failing
task is logged and contained, the body's error leaves as it is, and no task outlives the scope.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())


class Supervisor:
    """A scope for background tasks: `async with Supervisor() as tasks: tasks.start(...)`."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Supervisor:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        # The group hears nothing of the body's error: it would wrap it, and its tasks are cancelled already.
        await self._group.__aexit__(None, None, None)

    def start(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run `work` as a task. If it fails, that is logged, and nothing else stops."""
        task = self._group.create_task(_contain(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # a task that is cancelled at once never awaits it
        return task


async def _contain(work: Coroutine[object, object, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("task %s failed", name)
