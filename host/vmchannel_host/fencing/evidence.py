# SPDX-License-Identifier: LGPL-2.1-or-later
"""What proves what: the only place that says when a VM counts as off, and why not.

Pure functions over the hosts' reports. They answer with a `Doubt` (a reason against the claim) or None;
whatever they are not told is a doubt, never a proof (S1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from fence_vmchannel.messages import FenceCode
from vmchannel_host.fencing.ordered import LookReport, Process
from vmchannel_host.model import (
    NIL_UUID,
    EndCause,
    EndProof,
    Instance,
    InstanceEnded,
    InstanceReset,
    IoState,
    Look,
    Migration,
    RunState,
    VmUuid,
)

MAX_TEXT: Final = 200
"""Longest piece of untrusted text (a name, a hypervisor's words) in a line for people, characters."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The parts of host.yaml that decide what counts."""

    settle: bool = True  # fencing.after_kill: settle: unproven I/O is a doubt (S1)
    standalone: bool = True  # cluster.standalone: an end that nobody watched is no departure (S1)


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a claim cannot be made."""

    code: FenceCode
    reason: str


@dataclass(frozen=True, slots=True)
class Claim:
    """All that is known of one VM when somebody wants to call it off."""

    vm: VmUuid
    name: str
    recognised: bool  # seen once, or its UUID is named by the policy
    ended: tuple[InstanceEnded, ...]  # proofs of this operation
    owed: frozenset[Process]  # processes without a proof
    reports: tuple[LookReport, ...]  # one fresh look of every host, asked for after the last proof


def off_doubt(claim: Claim, rules: Rules) -> Doubt | None:
    """Why the VM does not count as off; None: every execution of it is proven to have ended (S0, S1, S2)."""
    return (
        _identity_doubt(claim)
        or _look_doubt(claim)
        or _alive_doubt(claim)
        or _departure_doubt(claim, rules)
        or _io_doubt(claim, rules)
        or _stranger_doubt(claim, rules)
        or _objection_doubt(claim)
    )


def confirm_doubt(claim: Claim) -> Doubt | None:
    """Why an operator's word that the VM is off is not taken: it replaces no proof that can be had (S1)."""
    unknown = Doubt(FenceCode.UNKNOWN_PLUG, "this VM was never seen here: there is nothing to confirm")
    return (
        _identity_doubt(claim)
        or (None if claim.recognised else unknown)
        or _look_doubt(claim)
        or _alive_doubt(claim)
    )


def conflict(reports: Iterable[LookReport], vm: VmUuid, name: str) -> Doubt | None:
    """Doubt about whose instance is whose (S9), with those concerned named."""
    for report in reports:
        text = report.conflict or _conflict_in(report.look, vm, name)
        if text:
            reason = f"{cut(text)} (host {report.look.host}): give each VM its own UUID and name"
            return Doubt(FenceCode.AMBIGUOUS, reason)
    return None


def silence(reports: Iterable[LookReport], vm: VmUuid) -> str:
    """Why a look proves nothing about the VM; "" when every look counts."""
    for report in reports:
        if report.look.at_boottime < report.asked_at:
            return f"host {report.look.host} answered a look from memory"
        for reason in silent_reasons(report.look, vm):
            return f"host {report.look.host} cannot tell: {cut(reason)}"
    return ""


def silent_reasons(look: Look, vm: VmUuid) -> list[str]:
    """Why one look proves nothing about the VM; untrusted text."""
    named = [reason for silent_vm, reason in look.silent if silent_vm == vm]
    return named + [process.reason for process in look.unknown if vm not in process.not_of]


def instances_of(reports: Iterable[LookReport], vm: VmUuid) -> dict[Process, Instance]:
    """Every instance of the VM that the looks found."""
    return {
        Process(report.look.host, instance.identity): instance
        for report in reports
        for instance in report.look.instances
        if instance.vm_uuid == vm
    }


def unproven_of(reports: Iterable[LookReport]) -> set[Process]:
    """Recorded processes of the VM whose end is not proven: instances until it is (S1)."""
    return {Process(report.look.host, identity) for report in reports for identity in report.unproven}


def may_reset(instances: dict[Process, Instance], others: set[Process]) -> Process | None:
    """The one instance that `system_reset` may reboot (S8); None when the VM must be destroyed instead."""
    if len(instances) != 1 or others - instances.keys():
        return None
    ((process, instance),) = instances.items()
    quiet = instance.run_state is RunState.RUNNING and instance.migration is Migration.NONE
    return process if quiet and instance.resettable else None


def still_runs(instances: dict[Process, Instance], others: set[Process], reset: Process) -> bool:
    """Whether after a reset exactly the instance that was reset exists and runs, without a migration (S8)."""
    if set(instances) != {reset} or others - {reset}:
        return False
    instance = instances[reset]
    return instance.run_state is RunState.RUNNING and instance.migration is Migration.NONE


def unwatched(end: InstanceEnded) -> bool:
    """Whether the process ended while nobody held it and not by our hand."""
    return end.cause is EndCause.NONE and end.proof is not EndProof.PIDFD


def merge(recorded: InstanceEnded | None, fresh: InstanceEnded) -> InstanceEnded:
    """Two proofs of one end: the first one tells how it ended, a later one only what became of its I/O.

    Otherwise a second request would find "it was gone" and forget that we killed it, or that it had departed.
    A proof by one who watched tells more than one by nobody, whichever came first.
    """
    if recorded is None or recorded.identity != fresh.identity:
        return fresh
    departed = recorded.departed or fresh.departed
    if unwatched(recorded) and not unwatched(fresh):
        return replace(fresh, departed=departed)
    io = fresh.io if recorded.io is IoState.UNPROVEN else recorded.io
    return replace(recorded, io=io, departed=departed)


def end_line(end: InstanceEnded) -> str:
    """One line for people: how we know that a process has ended."""
    who = f"pid {end.identity.pid} on {end.host}"
    io = {
        IoState.DRAINED: "I/O drained",
        IoState.NONE: "no I/O open",
        IoState.SETTLED: "I/O settled: no image lock left",
        IoState.UNPROVEN: "I/O unproven",
    }[end.io]
    away = ", in a migration when last watched" if end.departed else ""
    if unwatched(end):
        how = "another boot of the host" if end.proof is EndProof.OTHER_BOOT else "no such process"
        return f"{who} gone before we acted: {how}, {io}{away}"
    if end.proof is not EndProof.PIDFD:
        return f"{who} killed before a restart of the daemon, its end unseen: no such process, {io}{away}"
    by = {
        EndCause.QUIT: "by quit",
        EndCause.TERM: "by SIGTERM",
        EndCause.KILL: "by SIGKILL",
        EndCause.NONE: "by itself",
    }[end.cause]
    return f"{who} gone after {end.elapsed_ms} ms: {end.proof.value}, {by}, {io}{away}"


def unsettled(ends: Iterable[InstanceEnded], rules: Rules) -> tuple[InstanceEnded, ...]:
    """The ends whose last writes stand against an off (S1, *gone is not written*; decision 0007)."""
    # `after_kill` is about our own act. An end without us counts by the rule of *already off*: nobody
    # held a list of its files, and a crashed QEMU that could never be called off would help nobody.
    if not rules.settle:
        return ()
    return tuple(end for end in ends if end.io is IoState.UNPROVEN and end.cause is not EndCause.NONE)


def confirmed_lines(report: LookReport) -> list[str]:
    """Lines for people: which ends count by an operator's word, and whose."""
    return [f"confirmed off by {cut(by)!r}: {end_line(end)}" for end, by in report.confirmed]


def reset_line(reset: InstanceReset) -> str:
    """One line for people: how we know that a VM was reset."""
    return f"pid {reset.identity.pid} on {reset.host} reset after {reset.elapsed_ms} ms: RESET event"


def look_line(report: LookReport, vm: VmUuid) -> str:
    """One line for people: what a look found of the VM."""
    found = [
        f"pid {instance.identity.pid} {instance.run_state.value}"
        for instance in report.look.instances
        if instance.vm_uuid == vm
    ]
    count = len(report.look.instances)
    return f"look by {report.look.host}: {', '.join(found) or 'no instance'} ({count} of all VMs)"


def cut(text: str) -> str:
    """Untrusted text as one printable line of bounded length."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def _conflict_in(look: Look, vm: VmUuid, name: str) -> str:
    for instance in look.instances:
        if instance.vm_uuid == NIL_UUID and name and instance.name == name:
            return f"{instance.identity} is called {instance.name!r} and has no UUID"
    return next((text for text in look.conflicts if _mentions(text, vm) or _mentions(text, name)), "")


def _mentions(text: str, word: str) -> bool:
    return bool(word) and re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def _identity_doubt(claim: Claim) -> Doubt | None:
    return conflict(claim.reports, claim.vm, claim.name)


def _look_doubt(claim: Claim) -> Doubt | None:
    if not claim.reports:
        return Doubt(FenceCode.FAILED, "no host has looked")
    text = silence(claim.reports, claim.vm)
    return Doubt(FenceCode.FAILED, text) if text else None


def _alive_doubt(claim: Claim) -> Doubt | None:
    alive = set(claim.owed) | unproven_of(claim.reports) | instances_of(claim.reports, claim.vm).keys()
    if not alive:
        return None
    return Doubt(FenceCode.FAILED, f"not proven to have ended: {', '.join(map(str, sorted(alive)))}")


def _departure_doubt(claim: Claim, rules: Rules) -> Doubt | None:
    for report in claim.reports:
        if report.departed:
            return _away(f"host {report.look.host}: {cut(report.departed)}")
    for end in _ends(claim):
        if end.departed:
            return _away(f"pid {end.identity.pid} was in a migration when it ended on {end.host}")
        if end.proof is not EndProof.PIDFD and not rules.standalone:
            return _away(
                f"nobody watched the end of pid {end.identity.pid} on {end.host}, and another host could run "
                "the VM (cluster.standalone is false)"
            )
    return None


def _away(text: str) -> Doubt:
    return Doubt(FenceCode.MIGRATED_AWAY, f"migrated away, where it runs is unknown here: {text}")


def _io_doubt(claim: Claim, rules: Rules) -> Doubt | None:
    for end in unsettled(_ends(claim), rules):
        return Doubt(
            FenceCode.FAILED,
            f"pid {end.identity.pid} has ended, but its last writes are not proven to have settled: see "
            "`vmchannelctl confirm-off`; `fencing.after_kill: accept` takes that risk for all VMs",
        )
    return None


def _stranger_doubt(claim: Claim, rules: Rules) -> Doubt | None:
    if _ends(claim):
        return None
    if claim.recognised:
        elsewhere = "it was never seen here, and another host could run it (cluster.standalone is false)"
        return None if rules.standalone else _away(elsewhere)
    return Doubt(
        FenceCode.UNKNOWN_PLUG,
        "this VM was never seen here: name its UUID in a policy group, or check the spelling",
    )


def _objection_doubt(claim: Claim) -> Doubt | None:
    for report in claim.reports:
        for text in report.objections:
            return Doubt(FenceCode.FAILED, f"host {report.look.host}: {cut(text)}")
    return None


def _ends(claim: Claim) -> tuple[InstanceEnded, ...]:
    recorded = {Process(end.host, end.identity): end for report in claim.reports for end in report.ends}
    proven = {Process(end.host, end.identity): end for end in claim.ended}
    merged = {process: merge(recorded.get(process), end) for process, end in proven.items()}
    return tuple((recorded | merged).values())
