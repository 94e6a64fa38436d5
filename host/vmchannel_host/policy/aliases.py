# SPDX-License-Identifier: LGPL-2.1-or-later
"""Node names that guests announce: which VM holds which name, and which claims were refused.

Pure. A name belongs to the VM that announced it first and stays with it while the guest is hung, off or
moving, until that VM announces another. A VM that announces a name which another VM of its groups holds is
refused. The refused claim is remembered, and while it stands the name resolves to nobody; nor does the name
that the claimant held before, since it says itself that it is called otherwise (DESIGN section 4, Aliases).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from vmchannel_host.journal.types import StoredAlias
from vmchannel_host.model import VmUuid


@dataclass(frozen=True, slots=True)
class Announced:
    """What an announcement led to."""

    accepted: bool
    reason: str  # one line; names the holder and the remedy when refused
    records: tuple[StoredAlias, ...]  # to be remembered before the guest is answered, also when it is no news


class AliasTable:
    """Who holds and who claims which node name.

    For each VM at most two records stand: the name it holds and, announced later, the name it was refused. An
    accepted record replaces both, a refused one replaces a refused one. Bounded by two names a VM.
    """

    def __init__(self) -> None:
        self._held = _Names()
        self._claimed = _Names()

    def restore(self, records: Iterable[StoredAlias]) -> None:
        """Take the records that stand, once, before anything else."""
        for record in records:
            (self._claimed if record.refused else self._held).put(record)

    def announce(
        self, vm: VmUuid, node_name: str, source: str, *, now: float, rivals: Collection[VmUuid]
    ) -> Announced:
        """A VM tells its node name.

        Args:
            vm: whose socket it came through.
            node_name: untrusted text, at most `MAX_PLUG` characters.
            source: "corosync" or "hostname".
            now: wall clock, seconds; for people only.
            rivals: the VMs that share a group with `vm` (`Policy.rivals`). Names of others never collide: two
                clusters on one host may both have a node1, and a VM cannot block a cluster it is not in.
        """
        record = StoredAlias(vm, node_name, source, now, refused=False)
        held_by_rivals = sorted(self._held.vms(node_name) & set(rivals) - {vm})
        if held_by_rivals:
            return self._refuse(replace(record, refused=True), held_by_rivals[0])
        held, claimed = self._held.get(vm), self._claimed.get(vm)
        if claimed is None and held is not None and (held.node_name, held.source) == (node_name, source):
            # Told again all the same: the journal may have failed to keep it the first time.
            return Announced(True, "recorded already", (held,))
        self._held.put(record)
        self._claimed.drop(vm)
        return Announced(True, "recorded", (record,))

    def name_of(self, vm: VmUuid) -> str | None:
        """The node name that the VM holds."""
        record = self._held.get(vm)
        return None if record is None else record.node_name

    def holders(self, node_name: str) -> frozenset[VmUuid]:
        """VMs that hold the name; in one group at most one, unless groups were changed since."""
        return self._held.vms(node_name)

    def claimants(self, node_name: str) -> frozenset[VmUuid]:
        """VMs to which the name was refused and that claim it still."""
        return self._claimed.vms(node_name)

    def claim_of(self, vm: VmUuid) -> str | None:
        """The node name that was refused to the VM and that it claims still."""
        record = self._claimed.get(vm)
        return None if record is None else record.node_name

    def records(self) -> tuple[StoredAlias, ...]:
        """All that stands now: held names and refused claims, for `doctor` and status."""
        return (*self._held.records(), *self._claimed.records())

    def _refuse(self, record: StoredAlias, holder: VmUuid) -> Announced:
        reason = (
            f"VM {holder} holds the node name {record.node_name!r}; until this VM announces another, fencing"
            " by that name fails: rename the node, or pin the name in `aliases` of host.yaml"
        )
        self._claimed.put(record)
        return Announced(False, reason, (record,))


class _Names:
    """One record a VM, found by VM and by name."""

    def __init__(self) -> None:
        self._by_vm: dict[VmUuid, StoredAlias] = {}
        self._by_name: dict[str, set[VmUuid]] = {}

    def put(self, record: StoredAlias) -> None:
        self.drop(record.vm_uuid)
        self._by_vm[record.vm_uuid] = record
        self._by_name.setdefault(record.node_name, set()).add(record.vm_uuid)

    def drop(self, vm: VmUuid) -> None:
        record = self._by_vm.pop(vm, None)
        if record is None:
            return
        bearers = self._by_name[record.node_name]
        bearers.discard(vm)
        if not bearers:
            del self._by_name[record.node_name]

    def get(self, vm: VmUuid) -> StoredAlias | None:
        return self._by_vm.get(vm)

    def vms(self, name: str) -> frozenset[VmUuid]:
        return frozenset(self._by_name.get(name, ()))

    def records(self) -> tuple[StoredAlias, ...]:
        return tuple(self._by_vm.values())
