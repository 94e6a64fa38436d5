# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a hypervisor is made of beside the host's processes: sources that tell of them, starters of VMs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.model import NIL_UUID, ProcessIdentity, UnknownProcess, VmUuid


class Conflict(HypervisorError):
    """A source contradicts a process, itself or another source: neither is believed.

    Attributes:
        vm_uuids: the VMs whose state cannot be said.
    """

    def __init__(self, reason: str, *vm_uuids: VmUuid) -> None:
        super().__init__(reason)
        self.vm_uuids = tuple(vm_uuid for vm_uuid in vm_uuids if vm_uuid != NIL_UUID)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a look has to say beside the instances that it found."""

    silent: tuple[tuple[VmUuid, str], ...] = ()  # see `Look.silent`
    unknown: tuple[UnknownProcess, ...] = ()  # what may be of any VM


@dataclass(frozen=True, slots=True)
class LibvirtState:
    """A configured libvirt, for the operator. Texts are libvirt's, untrusted."""

    uri: str
    problem: str = ""  # why it is not used; "" while it answers, or was not tried yet
    since: float = 0.0  # of the problem: wall clock, seconds
    autostart: tuple[tuple[VmUuid, str], ...] = ()  # domains that it starts by itself, with their names


class Source(Protocol):
    """Tells what the QEMU processes of this host do: QMP sockets, a connection to libvirt.

    It attaches a monitor to the processes that are its own (`Watched.attach`) and keeps it up to date. It
    neither finds nor ends a process.
    """

    def leads_to(self, pid: int, sockets: tuple[str, ...]) -> bool:
        """Whether the configuration leads to that process (decision 0006). May read /proc; does not wait.

        Args:
            pid: of the process; 0 when it is of no use.
            sockets: paths of unix sockets on its command line.
        """
        ...

    async def find(self, *, timeout_s: float) -> None:
        """Processes have just been scanned: see what there is to follow.

        Raises:
            HypervisorError: not in time.
        """
        ...

    def look_at_ports(self, identity: ProcessIdentity) -> None:
        """See `Hypervisor.look_at_ports`."""
        ...

    async def ask(self, vm: VmUuid | None, *, deadline: float) -> Answer:
        """Ask the VM's monitors (None: all) afresh; at the loop's time `deadline` it must have returned."""
        ...

    def conflicts(self) -> Iterable[Conflict]:
        """Doubts about identities; the VMs concerned are silent."""
        ...

    async def discard_memory(self, vm: VmUuid, *, timeout_s: float) -> tuple[str, ...]:
        """See `Hypervisor.discard_memory`."""
        ...


class Starter(Protocol):
    """Starts VMs."""

    def can_start(self, vm: VmUuid, name: str) -> bool:
        """Whether it has a way to start that VM."""
        ...

    def running(self) -> frozenset[VmUuid]:
        """VMs whose start has not returned: it may bring an instance at any time."""
        ...

    async def start(self, vm: VmUuid, name: str, *, timeout_s: float) -> None:
        """See `Hypervisor.start`."""
        ...
