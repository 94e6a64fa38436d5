# SPDX-License-Identifier: LGPL-2.1-or-later
"""Background tasks that are contained, and log lines that are bounded."""

from __future__ import annotations

import asyncio
import logging

import pytest

from fence_vmchannel.logs import RateLimitedLog, quoted
from fence_vmchannel.supervisor import Supervisor


async def test_a_failing_task_is_logged_and_hurts_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("a bug")

    async def work() -> None:
        await asyncio.sleep(0)
        done.set()

    done = asyncio.Event()
    async with Supervisor() as tasks:
        tasks.start(fail(), "failing")
        tasks.start(work(), "working")
        await done.wait()
    assert "task failing failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_no_task_outlives_its_scope() -> None:
    async with Supervisor() as tasks:
        task = tasks.start(asyncio.sleep(100), "sleeper")
    assert task.cancelled()


async def test_the_bodys_error_leaves_as_it_is() -> None:
    async def body() -> None:
        async with Supervisor() as tasks:
            tasks.start(asyncio.sleep(100), "sleeper")
            raise KeyError

    with pytest.raises(KeyError):
        await body()


async def test_cancelling_the_body_cancels_its_tasks() -> None:
    entered = asyncio.Event()
    inner: list[asyncio.Task[None]] = []

    async def body() -> None:
        async with Supervisor() as tasks:
            inner.append(tasks.start(asyncio.sleep(100), "sleeper"))
            entered.set()
            await asyncio.sleep(100)

    outer = asyncio.ensure_future(body())
    await entered.wait()
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    assert inner[0].cancelled()


def test_untrusted_text_is_quoted_and_cut() -> None:
    assert quoted("a\nb") == "'a\\nb'"
    assert len(quoted("x" * 10_000)) < 250


def test_a_flood_of_log_lines_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = RateLimitedLog(logging.getLogger("test"), clock=lambda: now[0], burst=3, period_s=10)
    for number in range(100):
        log.warning("line %d", number)
    assert len(caplog.records) == 3
    now[0] = 11
    log.warning("later")
    assert caplog.records[-1].getMessage() == "later (97 earlier lines left out)"
