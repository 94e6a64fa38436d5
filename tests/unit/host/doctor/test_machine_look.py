# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine that hangs costs doctor its findings, and one thread, never more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from vmchannel_host.doctor.daemon_facts import MachineLook
from vmchannel_host.doctor.facts import MachineFacts


class Machine:
    """Answers when it is let."""

    def __init__(self, error: OSError | None = None) -> None:
        self.go = threading.Event()
        self.looks = 0
        self._error = error

    def look(self, paths: Sequence[str], timeout_s: float) -> MachineFacts:
        self.looks += 1
        assert self.go.wait(20)
        if self._error is not None:
            raise self._error
        return MachineFacts(config=tuple(paths))


async def test_a_look_that_hangs_is_late_and_no_second_one_begins_beside_it() -> None:
    machine = Machine()
    look = MachineLook(machine.look, slack_s=0.01)
    try:
        for _ in range(3):
            assert await look.facts((), timeout_s=0) == MachineFacts(late=True)
        assert machine.looks == 1
    finally:
        machine.go.set()
    assert not (await look.facts((), timeout_s=20)).late


async def test_who_asks_at_once_shares_one_look_and_who_asks_later_gets_a_new_one() -> None:
    machine = Machine()
    look = MachineLook(machine.look)
    first, second = (asyncio.ensure_future(look.facts(("a",), timeout_s=20)) for _ in range(2))
    await asyncio.sleep(0)
    machine.go.set()
    assert await first == await second == MachineFacts(config=("a",))
    assert (await look.facts(("b",), timeout_s=20)).config == ("b",)
    assert machine.looks == 2


async def test_a_machine_that_cannot_be_looked_at_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(OSError("disk broken"))
    machine.go.set()
    assert await MachineLook(machine.look).facts((), timeout_s=20) == MachineFacts(late=True)
    assert "disk broken" in caplog.text
