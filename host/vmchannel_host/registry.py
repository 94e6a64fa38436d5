# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which instances of which VMs exist, existed, or left (S1, S9): the daemon's knowledge, without I/O.

Fed with hypervisor events, looks and the durable records; emits what is to be remembered. A process that was once
recorded stays an instance until its end is proven, whatever looks and monitors say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from vmchannel_host.hypervisors import HypervisorEvent
from vmchannel_host.instance_state import InstanceState
from vmchannel_host.journal_types import KnownInstance
from vmchannel_host.model import HostName, Instance, InstanceEnded, Look, Migration, ProcessIdentity, VmUuid
from vmchannel_host.policy import VmDirectory


@dataclass(frozen=True, slots=True)
class RememberInstance:
    """To be kept durably (`remember_instance`): a process is new, or its name or migration changed."""

    identity: ProcessIdentity
    name: str  # the VM's name; "" when never told
    host: HostName
    migration: Migration  # as last watched


@dataclass(frozen=True, slots=True)
class RememberEnd:
    """To be kept durably (`remember_end`): the end of a process is proven."""

    evidence: InstanceEnded  # `departed` is set when what was last watched says so


RegistryRecord = RememberInstance | RememberEnd
"""Kept, in order, before anything that relies on it is told to anybody."""


@dataclass(frozen=True, slots=True)
class TrackedInstance:
    """What is known of one process whose end is not proven."""

    host: HostName
    identity: ProcessIdentity
    name: str  # "" when never told
    state: InstanceState
    instance: Instance | None  # last report; None: known from the records, not seen since the daemon began
    arrived: bool = False  # watched as the destination of a migration


class ConflictKind(Enum):
    """What is doubtful about the identity of a VM (S9)."""

    NIL_UUID = "nil-uuid"  # QEMU without -uuid
    TWO_NAMES = "two-names"  # one UUID, two names, no watched migration that joins them
    TWO_INSTANCES = "two-instances"  # two processes of one VM, no migration
    CONTRADICTION = "contradiction"  # a report that no sequence of states explains
    LOOK = "look"  # told by the hypervisor's look


@dataclass(frozen=True, slots=True)
class Conflict:
    """One doubt about identity."""

    kind: ConflictKind
    vm_uuid: VmUuid | None  # None: told by a look, of no single VM
    text: str  # a sentence for people, names all concerned

    @property
    def refuses(self) -> bool:
        """Whether no fence of the VM may be tried. Two instances of one name are both fenced instead (S2)."""
        return self.kind in (ConflictKind.NIL_UUID, ConflictKind.TWO_NAMES)


class VmRegistry:
    """What this host knows of its VMs. Methods that change it return what is to be remembered."""

    def __init__(self, host: HostName, *, standalone: bool) -> None:
        raise NotImplementedError

    def set_standalone(self, standalone: bool) -> None:
        """Whether no other host could run these VMs, so that an end that nobody watched is no departure (S1)."""
        raise NotImplementedError

    def restore(self, rows: Iterable[KnownInstance]) -> None:
        """Take all remembered processes, oldest first; once, before anything else."""
        raise NotImplementedError

    def apply(self, event: HypervisorEvent) -> tuple[RegistryRecord, ...]:
        """A hypervisor saw an instance, or proved its end. Evidence of `Hypervisor.off` comes as `Ended` too."""
        raise NotImplementedError

    def apply_look(self, look: Look) -> tuple[RegistryRecord, ...]:
        """Take a look. It adds and updates; what it does not show is not ended by that."""
        raise NotImplementedError

    def confirm_off(self, vm: VmUuid) -> None:
        """The operator's word that a departed VM is off. It ends departures, never a process that is unproven.

        The caller journals who said so, and says it again after `restore`.
        """
        raise NotImplementedError

    def vms(self) -> frozenset[VmUuid]:
        """Every VM ever seen; never the nil UUID."""
        raise NotImplementedError

    def knows(self, vm: VmUuid) -> bool:
        """Whether any process of the VM was ever recorded."""
        raise NotImplementedError

    def name(self, vm: VmUuid) -> str:
        """The VM's latest name, for people; "" when unknown."""
        raise NotImplementedError

    def names(self, vm: VmUuid) -> frozenset[str]:
        """The names of all its unproven processes, or of the last one that ended."""
        raise NotImplementedError

    def directory(self) -> VmDirectory:
        """All VMs with their names, for the policy. The same object until a name changes."""
        raise NotImplementedError

    def instances(self, vm: VmUuid) -> tuple[Instance, ...]:
        """The last report of each instance seen since the daemon began whose end is not proven."""
        raise NotImplementedError

    def unproven(self, vm: VmUuid) -> tuple[TrackedInstance, ...]:
        """Every recorded process whose end is not proven, seen or not: what `off` must end or prove ended."""
        raise NotImplementedError

    def ended(self, vm: VmUuid) -> tuple[InstanceEnded, ...]:
        """Proofs of the ends of its last processes, oldest first."""
        raise NotImplementedError

    def departed(self, vm: VmUuid) -> str | None:
        """Why the VM may live elsewhere (S1, *departure*), or None."""
        raise NotImplementedError

    def conflicts(self, vm: VmUuid) -> tuple[Conflict, ...]:
        """What is doubtful about the VM's identity now (S9)."""
        raise NotImplementedError

    def all_conflicts(self) -> tuple[Conflict, ...]:
        """Conflicts of all VMs and of the last look."""
        raise NotImplementedError

    def objections(self, vm: VmUuid) -> tuple[str, ...]:
        """All that stands against calling the VM off; empty is necessary for that claim, a fresh look also is."""
        raise NotImplementedError
