# SPDX-License-Identifier: LGPL-2.1-or-later
"""One destructive operation per VM (S12): what becomes of an intent at its place in the agreed order.

Pure. Every host comes to the same placement, as it sees the same intents and outcomes in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fence_vmchannel.messages import FenceAction
from vmchannel_host.fencing.ordered import Intent
from vmchannel_host.model import OperationId, VmUuid

REMEMBERED_S: Final = 3600.0
"""How long the end of an operation is remembered, seconds: no request is valid for longer."""


@dataclass(frozen=True, slots=True)
class Begin:
    """It is the VM's operation now."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """It is the VM's operation now; the one that ran ends, and starts nothing afterwards."""

    operation: OperationId


@dataclass(frozen=True, slots=True)
class Join:
    """The same action runs: share its outcome."""

    operation: OperationId


@dataclass(frozen=True, slots=True)
class Busy:
    """Another action runs."""

    operation: OperationId
    action: FenceAction


@dataclass(frozen=True, slots=True)
class Void:
    """The requester is itself the target of an earlier intent."""

    operation: OperationId


Placement = Begin | TakeOver | Join | Busy | Void


class Schedule:
    """Which operation runs on which VM, and when the last one ended."""

    def __init__(self) -> None:
        self._running: dict[VmUuid, Intent] = {}
        self._ended: dict[VmUuid, tuple[float, OperationId]] = {}

    def place(self, intent: Intent) -> Placement:
        """What becomes of an intent that was just delivered; `Begin` and `TakeOver` make it the VM's."""
        void = self._void(intent)
        if void is not None:
            return Void(void)
        running = self._running.get(intent.vm)
        if running is None:
            self._running[intent.vm] = intent
            return Begin()
        if running.action is intent.action:
            return Join(running.operation)
        if intent.action is FenceAction.OFF:
            self._running[intent.vm] = intent
            return TakeOver(running.operation)
        return Busy(running.operation, running.action)

    def end(self, operation: OperationId, vm: VmUuid, now: float) -> None:
        """An operation on `vm` has ended, whatever its outcome."""
        running = self._running.get(vm)
        if running is not None and running.operation == operation:
            del self._running[vm]
        self._ended[vm] = (now, operation)
        self._ended = {one: end for one, end in self._ended.items() if now - end[0] < REMEMBERED_S}

    def running(self, vm: VmUuid) -> Intent | None:
        """The VM's operation."""
        return self._running.get(vm)

    def _void(self, intent: Intent) -> OperationId | None:
        if intent.requester is None:
            return None
        running = self._running.get(intent.requester)
        if running is not None:
            return running.operation
        ended_at, operation = self._ended.get(intent.requester, (float("-inf"), OperationId("")))
        return operation if ended_at >= intent.requested_at else None
