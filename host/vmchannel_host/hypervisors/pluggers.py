# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who plugs a port into a VM: whatever its process is of, else whatever defines it.

A QEMU of libvirt's is never plugged into by QMP, also where a monitor of ours leads to it: libvirt would not
know of the port, and so lose it with the next migration, save or start.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Protocol

from vmchannel_host.hypervisors import Definitions, PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.instances import InstanceTable, Watched
from vmchannel_host.model import PortName, ProcessIdentity, VmUuid


class Plugger(Protocol):
    """Plugs ports into VMs and out of them."""

    async def attach(self, vm: VmUuid, port: PortName, *, timeout_s: float) -> Plugged:
        """See `Hypervisor.attach_port`."""
        ...

    async def detach(self, vm: VmUuid, port: PortName | None, *, force: bool, timeout_s: float) -> Plugged:
        """See `Hypervisor.detach_port`."""
        ...


class Definer(Plugger, Protocol):
    """What keeps definitions of VMs, and runs them: a libvirt. Its text is its name for people."""

    @property
    def problem(self) -> str:
        """Why it may define VMs that are not known; "" when it has told all."""
        ...

    def defined(self) -> Mapping[VmUuid, str]:
        """The VMs that it defines or runs, with their names; the same object while true. Does not wait."""
        ...

    def follows(self, identity: ProcessIdentity) -> bool:
        """Whether it tells of that process."""
        ...


class Pluggers:
    """Finds the one for a VM. A VM is its UUID: what two define is nobody's."""

    def __init__(self, table: InstanceTable, bare: Plugger, definers: Sequence[Definer]) -> None:
        """
        Args:
            table: the instances.
            bare: for QEMUs that no libvirt has started.
            definers: the libvirts.
        """
        self._table = table
        self._bare = bare
        self._definers = tuple(definers)
        self._merged: tuple[Sequence[Mapping[VmUuid, str]], Mapping[VmUuid, str]] = ((), {})

    def definitions(self) -> Definitions:
        """See `Hypervisor.definitions`."""
        told = tuple(one.defined() for one in self._definers)
        if not all(map(operator.is_, told, self._merged[0])) or len(told) != len(self._merged[0]):
            self._merged = (told, {vm: name for names in told for vm, name in names.items()})
        return Definitions(self._merged[1], tuple(one.problem for one in self._definers if one.problem))

    def of(self, vm: VmUuid) -> Plugger:
        """The one for that VM; a VM that is nowhere is the bare one's to refuse.

        Raises:
            PlugError: which one it is cannot be said, or it does not answer.
        """
        live = [one for one in self._table.all() if one.identity.vm_uuid == vm and not one.process.ended()]
        if len(live) > 1 or (live and live[0].process.command.domain_id is None):
            return self._bare
        defining = [one for one in self._definers if vm in one.defined()]
        if len(defining) > 1:
            reason = f"it is defined in {' and in '.join(map(str, defining))}"
            raise PlugError(PlugProblem.AMBIGUOUS, reason, "undefine it in one of them")
        if defining:
            return _telling(defining[0], live)
        problems = [one.problem for one in self._definers if one.problem]
        if problems:
            reason = f"whether libvirt has it is not known: {'; '.join(problems)}"
            raise PlugError(PlugProblem.NO_MONITOR, reason, "see `vmchannelctl doctor`")
        if live:
            reason = "a libvirt runs it that is not among the daemon's `hypervisors`"
            remedy = "add that libvirt to host.yaml, or use `virsh attach-device` or `detach-device`"
            raise PlugError(PlugProblem.UNSUPPORTED, reason, remedy)
        return self._bare


def _telling(definer: Definer, live: Sequence[Watched]) -> Definer:
    """It, when it tells of the VM's process too."""
    if any(not definer.follows(one.identity) for one in live):
        reason = f"{definer} does not tell of its process {live[0].identity}"
        remedy = (
            "do it again; if that does not help, keep `sockets` in host.yaml from leading to libvirt's VMs"
        )
        raise PlugError(PlugProblem.NO_MONITOR, reason, remedy)
    return definer
