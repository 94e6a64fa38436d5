# SPDX-License-Identifier: LGPL-2.1-or-later
"""Short ways to write down instances, ends and records for tests of the registry."""

from __future__ import annotations

from vmchannel_host.hypervisors import Ended, Seen
from vmchannel_host.journal.types import KnownInstance
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    HostName,
    Instance,
    InstanceEnded,
    IoState,
    Look,
    Migration,
    ProcessIdentity,
    RunState,
    VmUuid,
)

HOST = HostName("hv1")
VM1 = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
VM2 = VmUuid("0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")
VM3 = VmUuid("ab2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d33")


def process(pid: int = 100, vm: VmUuid = VM1, *, boot: str = "boot-1") -> ProcessIdentity:
    """A process; its start time follows its pid, so that pids are unique here."""
    return ProcessIdentity(pid, pid * 10, "/usr/bin/qemu-system-x86_64", vm, BootId(boot))


def instance(
    pid: int = 100,
    vm: VmUuid = VM1,
    *,
    name: str = "vm1",
    run_state: RunState = RunState.RUNNING,
    migration: Migration = Migration.NONE,
) -> Instance:
    """What a hypervisor reports of a process."""
    return Instance(process(pid, vm), name, run_state, migration)


def seen(
    pid: int = 100,
    vm: VmUuid = VM1,
    *,
    name: str = "vm1",
    run_state: RunState = RunState.RUNNING,
    migration: Migration = Migration.NONE,
) -> Seen:
    """The event of such a report."""
    return Seen(instance(pid, vm, name=name, run_state=run_state, migration=migration))


def mute(pid: int = 100, vm: VmUuid = VM1) -> Seen:
    """The process is there, its monitor does not answer."""
    return seen(pid, vm, name="", run_state=RunState.UNKNOWN, migration=Migration.UNKNOWN)


def end(
    pid: int = 100,
    vm: VmUuid = VM1,
    *,
    proof: EndProof = EndProof.PIDFD,
    cause: EndCause = EndCause.KILL,
    io: IoState = IoState.SETTLED,
    departed: bool = False,
) -> InstanceEnded:
    """Proof that a process has ended."""
    return InstanceEnded(HOST, process(pid, vm), proof, cause, io, departed, 12)


def ended(pid: int = 100, vm: VmUuid = VM1) -> Ended:
    """The event that we ended a process and watched it."""
    return Ended(end(pid, vm))


def vanished(pid: int = 100, vm: VmUuid = VM1) -> Ended:
    """The event that a process is found not to exist any more; nobody watched it go."""
    return Ended(end(pid, vm, proof=EndProof.ABSENT, cause=EndCause.NONE, io=IoState.UNPROVEN))


def known(
    pid: int = 100,
    vm: VmUuid = VM1,
    *,
    name: str = "vm1",
    migration: Migration = Migration.NONE,
    first_seen: float = 1000.0,
    ended_at: float | None = None,
    proof: InstanceEnded | None = None,
) -> KnownInstance:
    """A record of the journal; `ended_at` without `proof` makes a plain one."""
    if ended_at is not None and proof is None:
        proof = end(pid, vm)
    return KnownInstance(HOST, process(pid, vm), name, migration, first_seen, proof, ended_at)


def look(*instances: Instance, conflicts: tuple[str, ...] = ()) -> Look:
    """A look by this host."""
    return Look(HOST, 5.0, instances, conflicts=conflicts)
