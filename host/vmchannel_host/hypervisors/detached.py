# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that may never return, each in a daemon thread of its own.

`asyncio.to_thread` shares a small pool: a few reads of /proc or of a dead NFS server that hang would stop all
others (S7), and the interpreter would wait for them at exit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from vmchannel_host.hypervisors import NotProven

T = TypeVar("T")


class DetachedCalls:
    """Runs blocking calls; at most `limit` at a time, hung ones included. Further ones are refused."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._running = 0

    async def call(self, name: str, function: Callable[[], T], *, timeout_s: float) -> T:
        """Run `function()` in a thread and wait at most `timeout_s` seconds for it.

        Raises:
            NotProven: it did not return in time (the thread goes on by itself, its result is dropped), or
                `limit` calls are under way.
        """
        if self._running >= self._limit:
            raise NotProven(f"{name}: {self._limit} blocking calls are under way already")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            self._running -= 1
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]  # None only when T is None

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
        threading.Thread(target=work, name=f"vmchannel {name}", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            if answer.done() and not answer.cancelled():
                return answer.result()
            raise NotProven(f"{name}: no answer in {timeout_s:.3g} s") from error
