# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every test gets: a failing background task or a leaked task fails the test that caused it.

Without this both pass silently: asyncio reports them to the loop's exception handler, which only logs.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import settings

from tests.counts import OPTION, Count

settings.register_profile("untimed", deadline=None)  # how long an example takes says what else runs here
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Repeat in full what tests repeat."""
    parser.addoption(OPTION, action="store_true", help="the full counts, as `make test-all` wants them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that are marked `slow` come first: a worker takes whole modules, and none shall end last."""
    items.sort(key=lambda item: _module_is_slow(item.getparent(pytest.Module)), reverse=True)


def _module_is_slow(module: pytest.Module | None) -> bool:
    return module is not None and module.get_closest_marker("slow") is not None


@pytest.fixture
def count(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Count:
    """How often to repeat. A test that uses it is marked `counted`."""
    assert request.node.get_closest_marker("counted"), "mark the test `counted`, or it has no row"
    return Count(bool(request.config.getoption(OPTION)), record_property)


@pytest_asyncio.fixture
async def strict_loop() -> AsyncIterator[None]:
    """Fail the test when its loop reports an error, or when it leaves tasks behind."""
    loop = asyncio.get_running_loop()
    reported: list[str] = []

    def remember(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        reported.append(f"{context.get('message')}: {context.get('exception')!r}")

    before = asyncio.all_tasks()
    loop.set_exception_handler(remember)
    yield
    current = asyncio.current_task()
    leaked = [task for task in asyncio.all_tasks() if task not in before and task is not current]
    for task in leaked:
        task.cancel()
    if leaked:
        await asyncio.wait(leaked, timeout=5)
    gc.collect()  # an error that nobody fetched is reported when its task or future is collected
    await asyncio.sleep(0)
    assert not reported, f"background failures: {reported}"
    assert not leaked, f"tasks left behind: {[task.get_name() for task in leaked]}"


@pytest.fixture(autouse=True)
def _no_silent_tasks(request: pytest.FixtureRequest) -> None:  # pyright: ignore[reportUnusedFunction]
    """Use `strict_loop` for every test that is a coroutine; others need no loop."""
    function = getattr(request, "function", None)
    if function is not None and inspect.iscoroutinefunction(function):
        request.getfixturevalue("strict_loop")
