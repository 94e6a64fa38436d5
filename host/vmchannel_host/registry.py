# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which instances of which VMs exist, existed, or left (S1, S9): the daemon's knowledge, without I/O.

Fed with hypervisor events, looks and the durable records; emits rows to be remembered. A process that was once
recorded stays an instance until its end is proven, whatever looks and monitors say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vmchannel_host.hypervisors import HypervisorEvent
from vmchannel_host.instance_state import InstanceState
from vmchannel_host.model import HostName, Instance, InstanceEnded, Look, ProcessIdentity, VmUuid
from vmchannel_host.policy import VmDirectory


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One process as it is remembered durably: a row that replaces the earlier row of the same identity."""

    host: HostName
    identity: ProcessIdentity
    name: str  # the VM's name; "" when never told
    state: InstanceState  # when last watched
    arrived: bool = False  # it was seen as the destination of a migration
    ended: InstanceEnded | None = None  # proof of its end
    departed: str = (
        ""  # why its VM may live elsewhere since; "" when it does not, was seen again or confirmed off
    )


class InstanceStore(Protocol):
    """What keeps the rows. Rows that the registry returns are kept before anything that relies on them is told."""

    async def remember_instances(self, rows: Iterable[StoredInstance]) -> None:
        """Insert or replace by identity; durable when it returns."""

    async def known_instances(self) -> list[StoredInstance]:
        """All rows, in the order in which their identities were first remembered."""


@dataclass(frozen=True, slots=True)
class TrackedInstance:
    """What is known of one process whose end is not proven."""

    row: StoredInstance
    instance: (
        Instance | None
    )  # the last report of it; None: known from the records, not seen since the daemon began

    @property
    def identity(self) -> ProcessIdentity:
        return self.row.identity


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
    """What this host knows of its VMs. Methods that change it return the rows to be remembered."""

    def __init__(self, host: HostName, *, standalone: bool) -> None:
        """`standalone`: no other host could run these VMs, so that an end that nobody watched is no departure."""
        raise NotImplementedError

    def restore(self, rows: Iterable[StoredInstance]) -> None:
        """Take the remembered rows, once, before anything else."""
        raise NotImplementedError

    def apply(self, event: HypervisorEvent) -> tuple[StoredInstance, ...]:
        """A hypervisor saw an instance, or proved its end. Evidence of `Hypervisor.off` comes as `Ended` too."""
        raise NotImplementedError

    def apply_look(self, look: Look) -> tuple[StoredInstance, ...]:
        """Take a look. It adds and updates; what it does not show is not ended by that."""
        raise NotImplementedError

    def confirm_off(self, vm: VmUuid, by: str) -> tuple[StoredInstance, ...]:
        """The operator's word that a departed VM is off. It ends departures, never a process that is unproven."""
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
