# SPDX-License-Identifier: LGPL-2.1-or-later
"""The VMs that are known and the names they bear, indexed both ways. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmchannel_host.model import NIL_UUID, VmUuid


class VmDirectory:
    """The VMs that are known and their names. Immutable; `VmRegistry.directory()` gives the present one."""

    def __init__(self, names: Mapping[VmUuid, Iterable[str]]) -> None:
        self._names = {vm: frozenset(filter(None, texts)) for vm, texts in names.items() if vm != NIL_UUID}
        self._bearers: dict[str, set[VmUuid]] = {}
        for vm, texts in self._names.items():
            for text in texts:
                self._bearers.setdefault(text, set()).add(vm)

    def __contains__(self, vm: VmUuid) -> bool:
        return vm in self._names

    def vms(self) -> frozenset[VmUuid]:
        """All known VMs."""
        return frozenset(self._names)

    def names(self, vm: VmUuid) -> frozenset[str]:
        """The names a VM bears; empty when it is not known."""
        return self._names.get(vm, frozenset())

    def bearers(self, name: str) -> frozenset[VmUuid]:
        """The VMs that bear a name."""
        return frozenset(self._bearers.get(name, ()))

    def name(self, vm: VmUuid) -> str:
        """One name of the VM, for people; "" when there is none."""
        return min(self.names(vm), default="")
