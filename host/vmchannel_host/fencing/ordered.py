# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the hosts tell one another about a fence operation, in agreed order: intent, reports, outcome.

Plain frozen data. A report is about the host that sent it and no other; a bus with a network checks that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fence_vmchannel.messages import FenceAction, FenceCode, PowerState
from vmchannel_host.model import (
    BootId,
    HostName,
    InstanceEnded,
    InstanceReset,
    Look,
    OperationId,
    ProcessIdentity,
    VmUuid,
)


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """A process of a VM, on its host."""

    host: HostName
    identity: ProcessIdentity

    def __str__(self) -> str:
        return f"{self.identity} on {self.host}"


class Phase(Enum):
    """How far an operation had got.

    Durable before the phase begins, so that a restart knows what may have run.
    """

    BEGUN = "begun"  # nothing that acts
    DESTROYING = "destroying"  # instances are being destroyed
    RESETTING = "resetting"  # system_reset may have been sent
    STARTING = "starting"  # off is proven; the start command may have run


@dataclass(frozen=True, slots=True)
class Intent:
    """An accepted fence operation (S2). Durable before it is published."""

    operation: OperationId
    action: FenceAction  # OFF, ON or REBOOT
    vm: VmUuid
    name: str  # untrusted text
    requester: VmUuid | None  # None: the operator; each host checks its own policy with it (S10)
    requested_at: float  # CLOCK_BOOTTIME of the coordinator at the request's tick, seconds
    coordinator: HostName
    boot_id: BootId  # of the coordinator's kernel: the domain of its times
    begun_at: float  # CLOCK_BOOTTIME of the coordinator, seconds
    end: float  # CLOCK_BOOTTIME of the coordinator, seconds: no outcome counts after it
    hosts: tuple[HostName, ...]  # every host that could hold an instance (S3)
    named: tuple[Process, ...]  # every incarnation found: alive, or recorded without a proven end
    recognised: bool  # the VM was seen once, or the policy names its UUID (S1, *a VM never seen*)
    request_id: bytes
    resumed: Phase | None = None  # taken up again after a restart: the last phase that was durable


class Part(Enum):
    """A step that a host carries out."""

    DESTROY = "destroy"
    RESET = "reset"
    LOOK = "look"
    RECORD = "record"  # making something durable


@dataclass(frozen=True, slots=True)
class EndReport:
    """A process has ended, with proof."""

    operation: OperationId
    evidence: InstanceEnded


@dataclass(frozen=True, slots=True)
class ResetReport:
    """`system_reset` took effect on the one running instance."""

    operation: OperationId
    evidence: InstanceReset


@dataclass(frozen=True, slots=True)
class LookReport:
    """A fresh look of one host, and what that host's records add to it."""

    operation: OperationId
    round: int  # of the command that asked for it
    asked_at: float  # CLOCK_BOOTTIME of that host when it asked its hypervisor, seconds
    look: Look
    unproven: tuple[ProcessIdentity, ...] = ()  # recorded processes of the VM whose end is not proven
    ends: tuple[
        InstanceEnded, ...
    ] = ()  # how the VM's latest recorded processes ended, this operation's included
    confirmed: tuple[tuple[InstanceEnded, str], ...] = ()
    """Ends behind which an operator's word stands, with who gave it: no doubt any more, and told as such."""
    departed: str = ""  # why this host must take the VM for departed; "" when not (S1)
    conflict: str = ""  # doubt about the VM's identity (S9); "" when none
    objections: tuple[str, ...] = ()  # what else this host's registry holds against calling the VM off
    can_start: bool = False  # this host has a way to start the VM
    removed: tuple[str, ...] = ()  # saved memory of the VM that was removed before the look, for people
    overtaken: bool = False  # an end was learnt meanwhile: silent for that reason, and looking again helps


@dataclass(frozen=True, slots=True)
class StartReport:
    """The start command has returned. That proves nothing, but nothing more comes of it."""

    operation: OperationId
    host: HostName
    error: str = ""  # "" when it said that it worked


@dataclass(frozen=True, slots=True)
class FailureReport:
    """A host could not carry out a part; nothing is proven by it."""

    operation: OperationId
    host: HostName
    part: Part
    reason: str
    round: int = 0  # LOOK
    identity: ProcessIdentity | None = None  # DESTROY, RESET


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation ended. It counts only when delivered in a valid view before the intent's end (S2)."""

    operation: OperationId
    ok: bool
    code: FenceCode
    state: PowerState
    reason: str  # one line for people
    evidence: tuple[str, ...] = ()  # lines for people


Report = EndReport | ResetReport | LookReport | StartReport | FailureReport
Ordered = Intent | Report | Outcome
