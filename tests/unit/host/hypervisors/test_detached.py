# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that hang cost their caller its deadline and nobody else anything."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vmchannel_host.hypervisors import NotProven
from vmchannel_host.hypervisors.detached import DetachedCalls


async def test_a_result_and_an_error_come_back() -> None:
    calls = DetachedCalls()
    assert await calls.call("two", lambda: 2, timeout_s=10) == 2
    with pytest.raises(ZeroDivisionError):
        await calls.call("bad", lambda: 1 // 0, timeout_s=10)


async def test_none_is_a_result() -> None:
    nothing: object = None
    assert await DetachedCalls().call("none", lambda: nothing, timeout_s=10) is None


async def test_a_call_that_hangs_is_left_behind_and_others_go_on() -> None:
    calls, release = DetachedCalls(), threading.Event()
    with pytest.raises(NotProven, match="hung: no answer"):
        await calls.call("hung", release.wait, timeout_s=0.05)
    assert await calls.call("other", lambda: 1, timeout_s=10) == 1
    release.set()


async def test_too_many_hung_calls_refuse_further_ones_until_some_return() -> None:
    calls, release = DetachedCalls(limit=2), threading.Event()
    for _ in range(2):
        with pytest.raises(NotProven):
            await calls.call("hung", release.wait, timeout_s=0.02)
    with pytest.raises(NotProven, match="2 blocking calls"):
        await calls.call("third", lambda: 1, timeout_s=10)
    release.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await calls.call("third", lambda: 1, timeout_s=10) == 1
            except NotProven:
                await asyncio.sleep(0.01)
            else:
                return


async def test_what_a_late_result_holds_is_given_back() -> None:
    release, given_back = threading.Event(), asyncio.Event()

    def late() -> str:
        release.wait(10)
        return "descriptor"

    def discard(result: str) -> None:
        assert result == "descriptor"
        given_back.set()

    with pytest.raises(NotProven):
        await DetachedCalls().call("late", late, timeout_s=0.02, discard=discard)
    release.set()
    async with asyncio.timeout(10):
        await given_back.wait()


def test_a_hung_call_does_not_keep_the_program_from_ending() -> None:
    release = threading.Event()

    async def leave() -> None:
        with pytest.raises(NotProven):
            await DetachedCalls().call("hung", release.wait, timeout_s=0.02)

    asyncio.run(leave())
    hung = [thread for thread in threading.enumerate() if thread.name == "vmchannel hung"]
    assert hung
    assert all(thread.daemon for thread in hung)
    release.set()
    for thread in hung:
        thread.join(10)  # its loop has closed: it ends without a word
