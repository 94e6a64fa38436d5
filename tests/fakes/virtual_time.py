# SPDX-License-Identifier: LGPL-2.1-or-later
"""An event loop whose clock jumps to the next timer: hours of waiting take no time, in the right order."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")

START_S = 1000.0
"""What the clock shows at first, seconds."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits for a timer; remembers how long it should have."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for something that will never happen")
        if not ready and timeout is not None:
            self.slept += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For work in memory only: no sockets, no threads."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return START_S + self._jumping.slept

    def freeze(self, seconds: float) -> None:
        """Let time pass in which nothing runs, as when the process is stopped and goes on."""
        self._jumping.slept += seconds


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a coroutine test on a virtual clock; failing background tasks and leaked tasks fail it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        reported: list[str] = []
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.get_loop().set_exception_handler(
                lambda _, context: reported.append(f"{context.get('message')}: {context.get('exception')!r}")
            )
            runner.run(_checked(test(*args, **kwargs)))
            gc.collect()
        assert not reported, f"background failures: {reported}"

    assert inspect.iscoroutinefunction(test)
    return run


async def _checked(test: Coroutine[Any, Any, None]) -> None:
    await test
    current = asyncio.current_task()
    leaked = [task.get_name() for task in asyncio.all_tasks() if task is not current]
    assert not leaked, f"tasks left behind: {leaked}"
