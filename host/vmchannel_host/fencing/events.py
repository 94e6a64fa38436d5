# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes into a fence operation (events) and what comes out (commands), beside the ordered reports.

Times are CLOCK_BOOTTIME of the coordinator's host, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fence_vmchannel.messages import FenceCode
from vmchannel_host.fencing.ordered import (
    EndReport,
    FailureReport,
    LookReport,
    Outcome,
    Phase,
    Process,
    ResetReport,
    StartReport,
)
from vmchannel_host.model import HostName, OperationId


@dataclass(frozen=True, slots=True)
class Begun:
    """The intent was delivered."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """An outcome came back in the agreed order."""

    outcome: Outcome
    valid: bool  # in a quorate, synced view


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`next_deadline` may be over."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The same action was asked again; its asker shares the outcome (S12)."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """An `off` of the same VM was ordered."""

    by: OperationId


@dataclass(frozen=True, slots=True)
class Broken:
    """The coordinator cannot go on: the journal or the bus failed."""

    code: FenceCode
    reason: str


Event = (
    Begun
    | EndReport
    | ResetReport
    | LookReport
    | StartReport
    | FailureReport
    | Delivered
    | TimePassed
    | Joined
    | TakenOver
    | Broken
)


@dataclass(frozen=True, slots=True)
class Enter:
    """Make the phase durable before carrying out the commands after this one."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Destroy:
    """End one process, with proof; answered by an `EndReport` or a `FailureReport`."""

    process: Process
    until: float


@dataclass(frozen=True, slots=True)
class Reset:
    """`system_reset` one instance; answered by a `ResetReport` or a `FailureReport`."""

    process: Process
    until: float


@dataclass(frozen=True, slots=True)
class TakeLook:
    """Look afresh; answered by a `LookReport` or a `FailureReport` of that round."""

    host: HostName
    round: int
    delay_s: float  # wait first; news of the VM ends the wait
    until: float
    monitors: bool = True  # False: which instances there are is all that matters (`Hypervisor.look`)
    discard: bool = False  # the VM is being fenced off: first remove its saved memory (S0)


@dataclass(frozen=True, slots=True)
class StartVm:
    """Run the start command, once; answered by a `StartReport`.

    Never cancelled: it would not be known what ran.
    """

    host: HostName
    until: float


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the outcome; the coordinator does."""

    outcome: Outcome


Command = Enter | Destroy | Reset | TakeLook | StartVm | Publish
