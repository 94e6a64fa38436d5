# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that may never return, each in a daemon thread of its own, and not too many of them (S7)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from vmchannel_host.daemon_thread import in_daemon_thread
from vmchannel_host.hypervisors import NotProven

T = TypeVar("T")


class DetachedCalls:
    """Runs blocking calls; at most `limit` at a time, hung ones included. Further ones are refused."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._running = 0

    async def call(
        self,
        name: str,
        function: Callable[[], T],
        *,
        timeout_s: float,
        discard: Callable[[T], None] = lambda _: None,
        on_return: Callable[[], None] = lambda: None,
    ) -> T:
        """Run `function()` in a thread and wait at most `timeout_s` seconds for it.

        Args:
            name: for messages.
            function: may block for ever.
            timeout_s: seconds.
            discard: gives back what a late result holds, when nobody waits for it any more.
            on_return: called in the event loop when `function` has returned, in time or not, or is not run.

        Raises:
            NotProven: it did not return in time (its thread goes on), or `limit` calls are under way.
        """
        if self._running >= self._limit:
            on_return()
            raise NotProven(f"{name}: {self._limit} blocking calls are under way already")

        def returned() -> None:
            self._running -= 1
            on_return()

        self._running += 1
        try:
            answer = in_daemon_thread(f"vmchannel {name}", function, discard=discard, on_return=returned)
        except RuntimeError as error:
            returned()
            raise NotProven(f"{name}: {error}") from error
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                discard(answer.result())  # it came at the moment in which its caller went away
            raise
        except TimeoutError as error:
            if answer.done() and not answer.cancelled():
                return answer.result()
            raise NotProven(f"{name}: no answer in {timeout_s:.3g} s") from error
