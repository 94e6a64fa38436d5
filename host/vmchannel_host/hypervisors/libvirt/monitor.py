# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's word of one execution of a domain, as the monitor of its process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

from vmchannel_host.hypervisors.libvirt.link import Link, MonitorEvent
from vmchannel_host.hypervisors.libvirt.words import DomainRecord
from vmchannel_host.hypervisors.monitors import CommandRefused, MonitorClosed
from vmchannel_host.model import Migration, RunState, VmUuid

T = TypeVar("T")


class Asking(Protocol):
    """The connection, as a monitor needs it."""

    @property
    def uri(self) -> str: ...

    async def state_of(self, vm: VmUuid, *, timeout_s: float) -> tuple[RunState, Migration]:
        """Ask libvirt and QEMU; all events before were told when this returns. MonitorError: no answer."""
        ...

    async def is_resettable(self, vm: VmUuid, *, timeout_s: float) -> bool:
        """Ask libvirt. MonitorError: no answer."""
        ...

    async def call_link(self, name: str, function: Callable[[Link], None], *, timeout_s: float) -> None:
        """Make one call to libvirt. MonitorError: it failed, or did not return in time."""
        ...


class LibvirtMonitor:
    """Implements `InstanceMonitor`."""

    def __init__(self, asking: Asking, record: DomainRecord, wall_clock: Callable[[], float]) -> None:
        self.vm_uuid = record.vm_uuid
        self.domain_id = record.id
        self._asking = asking
        self._wall_clock = wall_clock
        self._closed = asyncio.Event()
        self._resets: list[MonitorEvent] = []
        self._reset_arrived = asyncio.Event()
        self._tapped = False

    @property
    def path(self) -> str:
        return self._asking.uri

    @property
    def open(self) -> bool:
        return not self._closed.is_set()

    @property
    def ends_with_process(self) -> bool:
        """No: libvirtd may hang, or be restarted."""
        return False

    def close(self) -> None:
        """Nothing more is told: the domain has stopped, or the connection is lost."""
        self._closed.set()
        self._reset_arrived.set()

    def hear(self, event: MonitorEvent) -> None:
        """Take an event of this execution."""
        if event.name == "RESET" and self._tapped and len(self._resets) < 64:
            self._resets.append(event)
            self._reset_arrived.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def quit(self, *, timeout_s: float) -> None:
        """libvirt's processes are asked by SIGTERM (`Endings`), which needs no libvirt."""
        raise CommandRefused(f"{self.path}: has no way to have QEMU quit")

    async def run_state(self, *, timeout_s: float) -> tuple[RunState, Migration]:
        return await self._while_open(self._asking.state_of(self.vm_uuid, timeout_s=timeout_s))

    async def resettable(self, *, timeout_s: float) -> bool:
        return await self._while_open(self._asking.is_resettable(self.vm_uuid, timeout_s=timeout_s))

    async def reset(self, *, timeout_s: float) -> None:
        """See `InstanceMonitor.reset`. QEMU stamps events: an earlier reset's is older."""
        vm, began = self.vm_uuid, self._wall_clock()
        self._resets.clear()
        self._reset_arrived.clear()
        self._tapped = True
        try:
            await self._asking.call_link("reset", lambda link: link.reset(vm), timeout_s=timeout_s)
            async with asyncio.timeout(timeout_s):
                while not any(event.at >= began and _by_a_command(event.data) for event in self._resets):
                    self._reset_arrived.clear()
                    if not self.open:
                        raise MonitorClosed(f"{self.path}: the domain stopped before its RESET event")
                    await self._reset_arrived.wait()
        finally:
            self._tapped = False

    async def _while_open(self, answer: Awaitable[T]) -> T:
        result = await answer
        if not self.open:
            raise MonitorClosed(f"{self.path}: the domain has stopped, or the connection is lost")
        return result


def _by_a_command(data: Mapping[str, object]) -> bool:
    return data.get("reason") == "host-qmp-system-reset" and data.get("guest") is False
