# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which instances of which VMs exist, existed, or left (S1, S9): the daemon's knowledge, without I/O.

Fed with hypervisor events, looks and the durable records; emits what is to be remembered. A process that was
once recorded stays an instance until its end is proven, whatever looks and monitors say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, assert_never

from vmchannel_host.hypervisors import Ended, HypervisorEvent, Seen
from vmchannel_host.journal.types import KnownInstance
from vmchannel_host.model import (
    NIL_UUID,
    HostName,
    Instance,
    InstanceEnded,
    Look,
    Migration,
    ProcessIdentity,
    VmUuid,
)
from vmchannel_host.policy.vm_directory import VmDirectory
from vmchannel_host.registry.conflicts import Conflict, ConflictKind, find_conflicts
from vmchannel_host.registry.instance_state import InstanceState, to_migration
from vmchannel_host.registry.vm_history import VmHistory

__all__ = [
    "Conflict",
    "ConflictKind",
    "RegistryRecord",
    "RememberEnd",
    "RememberInstance",
    "TrackedInstance",
    "VmRegistry",
]


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


_NOTHING: Final[Mapping[VmUuid, str]] = MappingProxyType({})


class VmRegistry:
    """What this host knows of its VMs. Methods that change it return what is to be remembered."""

    def __init__(
        self,
        host: HostName,
        *,
        standalone: bool,
        defined: Callable[[], Mapping[VmUuid, str]] = lambda: _NOTHING,
    ) -> None:
        """
        Args:
            host: this host.
            standalone: see `set_standalone`.
            defined: the names of the VMs that are defined here, running or not; the same object while it is
                true. A definition gives a VM a name, no more: whether it ever ran is not told by it.
        """
        self._host = host
        self._standalone = standalone
        self._defined = defined
        self._named = _NOTHING  # the definitions that `_directory` was made of
        self._vms: dict[VmUuid, VmHistory] = {}
        self._directory: VmDirectory | None = None
        self._look_conflicts: tuple[Conflict, ...] = ()
        self._expected: frozenset[VmUuid] = frozenset()

    def set_standalone(self, standalone: bool) -> None:
        """Whether no other host could run these VMs: then an end that nobody watched is no departure (S1)."""
        self._standalone = standalone

    def expect(self, vms: Iterable[VmUuid]) -> None:
        """The VMs that the policy names by UUID: a QEMU that no configured socket leads to may be one."""
        self._expected = frozenset(vms)

    # --- what happens

    def restore(self, rows: Iterable[KnownInstance]) -> None:
        """Take all remembered processes, oldest first; once, before anything else."""
        by_vm: dict[VmUuid, list[KnownInstance]] = {}
        for row in rows:
            by_vm.setdefault(row.identity.vm_uuid, []).append(row)
        for vm, known in by_vm.items():
            self._history(vm).restore(known)
        self._directory = None

    def apply(self, event: HypervisorEvent) -> tuple[RegistryRecord, ...]:
        """A hypervisor saw an instance, or proved its end. Evidence of `Hypervisor.off` comes as `Ended`."""
        match event:
            case Seen(instance):
                return self._seen(self._host, instance)
            case Ended(evidence):
                self._directory = None
                kept = self._history(evidence.identity.vm_uuid).end(evidence)
                return () if kept is None else (RememberEnd(kept),)
            case _:
                assert_never(event)

    def apply_look(self, look: Look) -> tuple[RegistryRecord, ...]:
        """Take a look. It adds and updates; what it does not show is not ended by that."""
        self._look_conflicts = tuple(Conflict(ConflictKind.LOOK, None, text) for text in look.conflicts)
        return tuple(record for instance in look.instances for record in self._seen(look.host, instance))

    def confirm_off(self, vm: VmUuid, by: str, covered: frozenset[ProcessIdentity]) -> None:
        """The operator's word that a VM is off. It covers ends that are proven, never an unproven process.

        Args:
            by: who said so; not empty. The caller has made it durable.
            covered: the processes whose ends were known when it was said.
        """
        if vm in self._vms:
            self._vms[vm].confirm_off(by, covered)

    # --- what is known

    def vms(self) -> frozenset[VmUuid]:
        """Every VM ever seen; never the nil UUID."""
        return frozenset(vm for vm in self._vms if vm != NIL_UUID)

    def knows(self, vm: VmUuid) -> bool:
        """Whether any process of the VM was ever recorded."""
        return vm in self._vms and vm != NIL_UUID

    def name(self, vm: VmUuid) -> str:
        """The VM's latest name, for people; "" when unknown."""
        return self._vms[vm].name() if vm in self._vms else ""

    def names(self, vm: VmUuid) -> frozenset[str]:
        """The names of all its unproven processes, or of the last one that told a name."""
        return self._vms[vm].names() if vm in self._vms else frozenset()

    def directory(self) -> VmDirectory:
        """All VMs seen or defined with their names, for the policy: the same until a name may have changed.

        A VM that is defined under another name than its processes told bears both: each may be another VM's.
        """
        defined = self._defined()
        if self._directory is None or defined is not self._named:
            vms = self.vms() | defined.keys()
            self._directory = VmDirectory({vm: {*self.names(vm), defined.get(vm, "")} for vm in vms})
            self._named = defined
        return self._directory

    def instances(self, vm: VmUuid) -> tuple[Instance, ...]:
        """The last report of each instance seen since the daemon began whose end is not proven."""
        return tuple(one.instance for one in self.unproven(vm) if one.instance is not None)

    def unproven(self, vm: VmUuid) -> tuple[TrackedInstance, ...]:
        """Every recorded process whose end is not proven, seen or not: what `off` must end or prove ended."""
        return tuple(
            TrackedInstance(one.host, one.identity, one.name, one.state, one.instance)
            for one in (self._vms[vm].unproven() if vm in self._vms else ())
        )

    def ended(self, vm: VmUuid) -> tuple[InstanceEnded, ...]:
        """Proofs of the ends of its processes since the VM was last seen to live in another, oldest first."""
        return self._vms[vm].ends() if vm in self._vms else ()

    def confirmed(self, vm: VmUuid) -> tuple[tuple[InstanceEnded, str], ...]:
        """Ends that the operator's word covers, with who gave it, since the VM was last seen to live."""
        return self._vms[vm].confirmed() if vm in self._vms else ()

    def departed(self, vm: VmUuid) -> str | None:
        """Why the VM may live elsewhere (S1, *departure*), or None."""
        return self._vms[vm].departure(standalone=self._standalone) if vm in self._vms else None

    def conflicts(self, vm: VmUuid) -> tuple[Conflict, ...]:
        """What is doubtful about the VM's identity now (S9)."""
        return tuple(find_conflicts(vm, self._vms[vm])) if vm in self._vms else ()

    def all_conflicts(self) -> tuple[Conflict, ...]:
        """Conflicts of all VMs and of the last look."""
        of_vms = (conflict for vm in sorted(self._vms) for conflict in self.conflicts(vm))
        return (*of_vms, *self._look_conflicts)

    def objections(self, vm: VmUuid) -> tuple[str, ...]:
        """All that stands against calling the VM off.

        An empty answer is necessary for that claim, not enough: a fresh look must find nothing either. A VM
        that was never seen has no objections here.
        """
        found = [
            f"{one.identity} on {one.host} is not proven to have ended (last seen {one.state.value})"
            for one in self.unproven(vm)
        ]
        departure = self.departed(vm)
        if departure is not None:
            found.append(departure)
        found += (conflict.text for conflict in self.conflicts(vm) if conflict.refuses)
        return tuple(found)

    # --- helpers

    def _seen(self, host: HostName, instance: Instance) -> tuple[RegistryRecord, ...]:
        vm = instance.vm_uuid
        if not instance.configured and vm not in self._vms and vm not in self._expected:
            return ()  # somebody else's VM
        history = self._history(instance.vm_uuid)
        names = history.names()
        changed = history.see(host, instance)
        if history.names() != names:
            self._directory = None
        if changed is None:
            return ()
        migration = to_migration(changed.state)
        return (RememberInstance(changed.identity, changed.name, changed.host, migration),)

    def _history(self, vm: VmUuid) -> VmHistory:
        if vm not in self._vms:
            self._vms[vm] = VmHistory()
            self._directory = None
        return self._vms[vm]
