# SPDX-License-Identifier: LGPL-2.1-or-later
"""A peer that cannot be linked, for ever new reasons: the log bears it, and counts what it leaves out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from fence_vmchannel.endpoint import Endpoint
from fence_vmchannel.errors import LinkError
from fence_vmchannel.hub.events import HubEvent
from fence_vmchannel.hub.peer_table import Peer, PeerTable, keep_linked
from fence_vmchannel.hub.terms import PeerTerms
from fence_vmchannel.links.base import Link
from fence_vmchannel.logs import RateLimitedLog
from tests.fakes.conversation import Conversation
from tests.fakes.virtual_time import virtual_time
from tests.unit.channel_api.test_waiting import VM, Nobody

ATTEMPTS = 100
LOG = logging.getLogger("fence_vmchannel.hub.peer_table")


class Failing:
    """A connector that fails each time for another reason."""

    def __init__(self, failure: Callable[[int], Exception]) -> None:
        self._failure = failure
        self.attempts = 0
        self.enough = asyncio.Event()

    async def connect(self) -> Link:
        self.attempts += 1
        if self.attempts > ATTEMPTS:
            self.enough.set()
        raise self._failure(self.attempts)


def a_new_reason(number: int) -> Exception:
    return LinkError(f"pid {number} listens there")


def a_defect(number: int) -> Exception:
    return RuntimeError(f"defect {number}")


@pytest.mark.parametrize(("failure", "told"), [(a_new_reason, ATTEMPTS), (a_defect, 1)])
@virtual_time
async def test_a_link_that_fails_in_ever_new_ways_does_not_fill_the_log(
    failure: Callable[[int], Exception], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[HubEvent] = []
    table, failing = PeerTable("", events.append), Failing(failure)
    endpoint = Endpoint(VM, Conversation().host.connection, Nobody(), clock=lambda: 0.0)
    now = [0.0]
    peer = Peer(VM, endpoint, failing, PeerTerms(), noise=RateLimitedLog(LOG, clock=lambda: now[0]))
    table.add(peer)
    linking = asyncio.create_task(keep_linked(peer, table))
    await failing.enough.wait()
    assert len(caplog.records) == 10
    assert len([one for one in events if type(one).__name__ == "PortUnusable"]) >= told
    now[0] = 11.0
    caplog.clear()
    before = failing.attempts
    while failing.attempts < before + 2:
        await asyncio.sleep(1)
    assert "earlier lines left out" in caplog.records[0].getMessage()
    linking.cancel()
    await asyncio.wait([linking])
