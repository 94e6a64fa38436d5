# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the tasks of fencing live: one task group, which a single task's mistake does not end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

_log = logging.getLogger(__name__)


class Tasks:
    """A task group that is open while `run` runs."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._open = asyncio.Event()

    async def run(self) -> None:
        """Keep the group open until cancelled; then all its tasks are cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._open.set()
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None
                self._open.clear()

    async def opened(self) -> None:
        """Wait until `run` runs."""
        await self._open.wait()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Start a task. What it raises is logged and goes no further: it must report its own failure.

        Raises:
            RuntimeError: `run` does not run; the work was not begun.
        """
        if self._group is None:
            work.close()
            raise RuntimeError(f"cannot start {name}: the daemon is not running, or stops")
        task = self._group.create_task(_contained(work), name=name)
        task.add_done_callback(lambda _: work.close())  # if it is cancelled before it begins
        return task


async def _contained(work: Coroutine[object, object, None]) -> None:
    try:
        await work
    except Exception:  # noqa: BLE001 - the top of a task: one operation's mistake must not end the others
        _log.exception("a fencing task failed")
