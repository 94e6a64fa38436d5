# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that may never return, each in a thread of its own for which nobody waits at the exit.

`asyncio.to_thread` shares a small pool: a few calls that hang (a dead disk, a dead NFS server, /proc) would
stop all others, and both `asyncio.run` and the interpreter wait for the pool's threads when the daemon ends.
A daemon thread ends with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def in_daemon_thread(
    name: str,
    function: Callable[[], T],
    *,
    discard: Callable[[T], None] = lambda _: None,
    on_return: Callable[[], None] = lambda: None,
) -> asyncio.Future[T]:
    """Run `function()` in a new thread; the future gets what comes of it. Does not block.

    Args:
        name: of the thread.
        function: may block for ever; its thread goes on when the future is cancelled.
        discard: gives back what a late result holds, when the future has been cancelled.
        on_return: called in the event loop when `function` has returned, in time or not.

    Raises:
        RuntimeError: there can be no further thread.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
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

    threading.Thread(target=work, name=name, daemon=True).start()
    return answer
