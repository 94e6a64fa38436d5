# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refused requests in the journal, at a bounded rate: one that asks in a loop must not fill the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fence_vmchannel.messages import FenceCode, FenceRequest
from vmchannel_host.fencing import codec
from vmchannel_host.fencing.evidence import cut
from vmchannel_host.fencing.records import OperationLog
from vmchannel_host.journal.types import JournalError
from vmchannel_host.model import OperationId, VmUuid

BURST: Final = 10
"""Refusals of one requester that are recorded at once."""

PERIOD_S: Final = 10.0
"""After the burst, one is recorded per this many seconds; the next record tells how many were left out."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    left_out: int = 0


class RefusalLog:
    """Records refusals."""

    def __init__(self, journal: OperationLog, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        self._buckets: dict[VmUuid | None, _Bucket] = {}  # as many as VMs with a port

    async def note(
        self, request: FenceRequest, requester: VmUuid | None, code: FenceCode, reason: str
    ) -> None:
        """Record a refusal, or count it. A journal that fails changes nothing: a refusal claims nothing."""
        bucket = self._refill(requester)
        if bucket.tokens < 1:
            bucket.left_out += 1
            return
        bucket.tokens -= 1
        left_out, bucket.left_out = bucket.left_out, 0
        body: codec.Body = {
            "requester": requester,
            "action": request.action.name.lower(),
            "plug": cut(request.plug),
            "code": code.name.lower(),
            "reason": cut(reason),
            "left_out": left_out,
        }
        try:
            await self._journal.append(codec.REFUSED, OperationId(""), body, if_room=True)
        except JournalError as error:
            _log.error("a refusal was not recorded: %s", error)

    def _refill(self, requester: VmUuid | None) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(requester, _Bucket(BURST, now))
        bucket.tokens = min(float(BURST), bucket.tokens + (now - bucket.at) / PERIOD_S)
        bucket.at = now
        return bucket
