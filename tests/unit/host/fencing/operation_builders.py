# SPDX-License-Identifier: LGPL-2.1-or-later
"""Short ways to write down intents, reports and proofs for tests of the operation's machine."""

from __future__ import annotations

from collections.abc import Iterable

from fence_vmchannel.messages import FenceAction
from vmchannel_host.fencing.events import Begun, Command, Delivered, Event, Publish, TakeLook
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.operation import Operation
from vmchannel_host.fencing.ordered import EndReport, Intent, LookReport, Phase, Process, ResetReport
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    Instance,
    InstanceEnded,
    InstanceReset,
    IoState,
    Look,
    Migration,
    OperationId,
    ProcessIdentity,
    RunState,
    VmUuid,
)

VM = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
HV1 = HostName("hv1")
HV2 = HostName("hv2")
BOOT = BootId("boot-1")
OP = OperationId("op-1")
OTHER_OP = OperationId("op-0")
BEGIN = 100.0
END = 140.0


def process(pid: int = 100, host: HostName = HV1) -> Process:
    """A process of the VM."""
    return Process(host, ProcessIdentity(pid, pid * 10, "/usr/bin/qemu-system-x86_64", VM, BOOT))


def intent(
    action: FenceAction = FenceAction.OFF,
    *,
    named: Iterable[Process] = (),
    hosts: tuple[HostName, ...] = (HV1,),
    recognised: bool = True,
    resumed: Phase | None = None,
) -> Intent:
    """An intent of 40 s."""
    return Intent(
        OP,
        action,
        VM,
        "vm1",
        None,
        BEGIN,
        HV1,
        BOOT,
        BEGIN,
        END,
        hosts,
        tuple(named),
        recognised,
        b"",
        resumed,
    )


def ended(
    one: Process,
    *,
    proof: EndProof = EndProof.PIDFD,
    cause: EndCause = EndCause.QUIT,
    io: IoState = IoState.DRAINED,
    departed: bool = False,
) -> InstanceEnded:
    """The proof of its end."""
    return InstanceEnded(one.host, one.identity, proof, cause, io, departed, elapsed_ms=13)


def gone(one: Process) -> EndReport:
    """The report of its end."""
    return EndReport(OP, ended(one))


def was_reset(one: Process) -> ResetReport:
    """The report of its reset."""
    return ResetReport(OP, InstanceReset(one.host, one.identity, elapsed_ms=4))


def instance(
    one: Process,
    run_state: RunState = RunState.RUNNING,
    migration: Migration = Migration.NONE,
    *,
    resettable: bool = True,
) -> Instance:
    """What a look shows of it."""
    return Instance(one.identity, "vm1", run_state, migration, resettable=resettable)


def looked(
    number: int,
    *instances: Instance,
    host: HostName = HV1,
    at: float = BEGIN + 1,
    asked_at: float = BEGIN + 1,
    silent: str = "",
    conflicts: tuple[str, ...] = (),
    unproven: Iterable[Process] = (),
    ends: tuple[InstanceEnded, ...] = (),
    departed: str = "",
    conflict: str = "",
    objections: tuple[str, ...] = (),
    can_start: bool = False,
) -> LookReport:
    """The report of a look of one round."""
    return LookReport(
        operation=OP,
        round=number,
        asked_at=asked_at,
        look=Look(host, at, instances, ((VM, silent),) if silent else (), conflicts),
        unproven=tuple(one.identity for one in unproven),
        ends=ends,
        departed=departed,
        conflict=conflict,
        objections=objections,
        can_start=can_start,
    )


class Driven:
    """An operation with the clock and the bus beside it: what it publishes is delivered by `deliver`."""

    def __init__(
        self,
        one: Intent,
        rules: Rules | None = None,
        start_pending: Iterable[OperationId] = (),
        *,
        surveyed: bool = True,
    ) -> None:
        """With `surveyed` an `off` has found what its intent names, and nothing else."""
        self.operation = Operation(one, rules or Rules(), start_pending)
        self.now = BEGIN
        self.round = 0
        self.published: Publish | None = None
        self.begun = self.apply(Begun())
        if surveyed and one.action is FenceAction.OFF:
            for host in one.hosts:
                named = [process for process in one.named if process.host == host]
                self.begun = self.apply(looked(self.round, host=host, unproven=named))

    def apply(self, event: Event, now: float | None = None) -> tuple[Command, ...]:
        """Feed it; remember the round of looks and the outcome that it asks for."""
        self.now = now if now is not None else self.now
        commands = self.operation.apply(event, self.now)
        for command in commands:
            if isinstance(command, TakeLook):
                self.round = command.round
            if isinstance(command, Publish):
                self.published = command
        return commands

    def look(self, *instances: Instance, **how: object) -> tuple[Command, ...]:
        """A report of the present round."""
        return self.apply(looked(self.round, *instances, **how))  # type: ignore[arg-type]

    def deliver(self, *, valid: bool = True, now: float | None = None) -> None:
        """Deliver what it published."""
        assert self.published is not None
        self.apply(Delivered(self.published.outcome, valid), now)
