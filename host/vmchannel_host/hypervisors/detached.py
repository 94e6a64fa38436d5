# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that may never return, each in a daemon thread of its own.

`asyncio.to_thread` shares a small pool: a few reads of /proc or of a dead NFS server that hang would stop all
others (S7), and the interpreter would wait for them at exit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar, cast

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
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            self._running -= 1
            on_return()
            value = cast(T, result)  # None only when T is None, or with an error
            if not answer.done():
                answer.set_result(value) if error is None else answer.set_exception(error)
            elif error is None:
                discard(value)

        def work() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:  # noqa: BLE001 - carried to the caller
                error = caught
            try:
                loop.call_soon_threadsafe(deliver, result, error)
            except RuntimeError:
                return  # the loop has closed: nobody waits any more

        self._running += 1
        try:
            threading.Thread(target=work, name=f"vmchannel {name}", daemon=True).start()
        except RuntimeError as error:
            self._running -= 1
            on_return()
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
