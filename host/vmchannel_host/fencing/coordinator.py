# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell around fence operations: it runs what `operation.py` decides, on this host's hypervisor, journal and bus.

One destructive operation per VM (S12); an intent is durable before anything acts, and its outcome before anybody is
told; every wait ends with the intent (CLOCK_BOOTTIME).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fence_vmchannel.messages import FenceAction
from vmchannel_host.fencing.ordered import Outcome
from vmchannel_host.model import OperationId, VmUuid

Progress = Callable[[OperationId, str, int], None]
"""Called with (operation, a line for people, milliseconds since the intent). Must not block or raise."""


@dataclass(frozen=True, slots=True)
class FenceSettings:
    """The `fencing` and `cluster` parts of host.yaml that decide what counts."""

    quit_timeout_s: float = 1.0
    timeout_s: float = 40.0  # no operation lasts longer
    settle: bool = True  # after_kill: settle (True) or accept (False), S1
    standalone: bool = True  # no other host could run these VMs: an unwatched end counts (S1)


@dataclass(frozen=True, slots=True)
class Order:
    """What the service asks of the coordinator: a destructive action on a VM that the policy has resolved."""

    action: FenceAction  # OFF, ON or REBOOT
    vm: VmUuid
    name: str  # for people and for start commands; untrusted text
    named: bool  # the policy names this UUID: a VM never seen may be proven off by fresh looks (S1)
    requester: VmUuid | None  # None: the operator
    requested_at: float  # CLOCK_BOOTTIME of the request's tick, seconds
    end: float  # CLOCK_BOOTTIME, seconds: nothing is done and no outcome counts after it
    request_id: bytes


@dataclass(frozen=True, slots=True)
class RunningOperation:
    """An operation that has not ended, for the admin API."""

    operation: OperationId
    action: FenceAction
    vm: VmUuid
    name: str
    requester: VmUuid | None
    phase: str  # OperationState in lower case
    begun_at: float  # CLOCK_BOOTTIME, seconds
    end: float


class Coordinator:
    """Runs fence operations. `run()` must be running; `resume()` comes first, before the service takes requests."""

    async def run(self) -> None:
        """Own the tasks of all operations, until cancelled."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Take up what the journal holds without an outcome, after a restart: finish it or record its failure.

        An `off` (or the off part of a reboot) is run again until its end; an `on` whose start was journaled is
        looked at, and never started a second time. Returns when each is taken up, not when it is finished.

        Raises:
            JournalError: the journal cannot be read; serve no requests.
        """
        raise NotImplementedError

    async def execute(self, order: Order, operation: OperationId, progress: Progress) -> Outcome:
        """Carry out an order, or join the same action on the same VM (S12); returns by `order.end`, never raises for failure.

        Cancelling it means that nobody waits any more; the intent goes on.
        """
        raise NotImplementedError

    def running(self) -> tuple[RunningOperation, ...]:
        """All operations that have not ended."""
        raise NotImplementedError
