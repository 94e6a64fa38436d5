# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to libvirt as the rest of this package needs it: plain data, blocking calls, events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmchannel_host.hypervisors.libvirt.words import DomainRecord
from vmchannel_host.hypervisors.monitors import MonitorError
from vmchannel_host.model import VmUuid


class LibvirtError(MonitorError):
    """libvirt refused a call, or is not reached."""


class NoSuchDomain(LibvirtError):
    """libvirt knows no domain of that UUID."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """A domain was defined, started, stopped, ... (virDomainEventType)."""

    vm_uuid: VmUuid
    domain_id: int  # -1 when it does not run any more
    event: int
    detail: int


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """An event of a domain's QEMU, as QMP has it."""

    vm_uuid: VmUuid
    domain_id: int
    name: str
    data: Mapping[str, object]
    at: float  # when QEMU sent it, wall clock, seconds


@dataclass(frozen=True, slots=True)
class DomainChanged:
    """A device came or went."""

    vm_uuid: VmUuid


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is of no use any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class DomainTexts:
    """A domain's XML, of what runs and of its definition."""

    live: str | None  # None: it does not run
    config: str | None  # None: it is transient
    managed_save: bool  # libvirt would continue it from saved memory


LibvirtEvent = Lifecycle | MonitorEvent | DomainChanged | Closed
Sink = Callable[[LibvirtEvent], None]


class Link(Protocol):
    """An open connection. Every method blocks, maybe for ever, and may be called from any thread.

    All raise LibvirtError, NoSuchDomain among them.
    """

    def domains(self) -> Sequence[DomainRecord]:
        """All domains that are defined or run. Asks no QEMU."""
        ...

    def domain(self, vm: VmUuid) -> DomainRecord:
        """One of them. Asks no QEMU."""
        ...

    def xml(self, vm: VmUuid) -> str:
        """Its live XML. Asks no QEMU."""
        ...

    def probe(self, vm: VmUuid) -> int | None:
        """Have its QEMU answer something; return what job is under way (virDomainJobOperation), if any.

        A QEMU that hangs holds this call, and a worker of libvirt's, for as long.
        """
        ...

    def settle(self) -> None:
        """Return when every event that libvirt had before this call has been given to the sink."""
        ...

    def remove_managed_save(self, vm: VmUuid) -> bool:
        """Remove the memory that libvirt keeps of it. Returns whether there was any."""
        ...

    def create(self, vm: VmUuid) -> None:
        """Boot it. Never continues saved memory."""
        ...

    def reset(self, vm: VmUuid) -> None:
        """`system_reset`."""
        ...

    def definitions(self, vm: VmUuid) -> DomainTexts:
        """Its XML, of what runs and of what is defined. Asks no QEMU."""
        ...

    def attach_device(self, vm: VmUuid, xml: str, *, live: bool, config: bool) -> None:
        """Add a device to what runs, to the definition, or to both."""
        ...

    def detach_device(self, vm: VmUuid, xml: str, *, live: bool) -> None:
        """Take a device out of what runs, or out of the definition. QEMU may let it go only afterwards."""
        ...

    def close(self) -> None:
        """Close the connection. Raises nothing."""
        ...


class OpenLink(Protocol):
    """Opens connections. Tests compose another one."""

    def __call__(self, uri: str, sink: Sink) -> Link:
        """Connect; give events to `sink`, from any thread, until the link is closed. Blocks.

        Raises:
            LibvirtError: not reached, not permitted, or libvirt's Python module is not installed.
        """
        ...
