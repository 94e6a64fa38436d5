# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU tells of its virtio-serial ports and controllers, asked within one deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from vmchannel_host.hypervisors.chardev_words import Connecting
from vmchannel_host.hypervisors.monitors import CommandRefused, QmpSession
from vmchannel_host.hypervisors.plug_words import backend_of, parse_buses
from vmchannel_host.hypervisors.qmp_state import (
    NAMED,
    UNNAMED,
    Chardev,
    Device,
    parse_chardevs,
    parse_devices,
)
from vmchannel_host.model import PortName


@dataclass(frozen=True, slots=True)
class SerialPort:
    """A virtserialport of a VM."""

    device: Device
    name: str  # untrusted text
    label: str  # of its chardev; "" when it has none


class Qemu:
    """A monitor, and the time that is left for all that is asked of it."""

    def __init__(
        self,
        monitor: QmpSession,
        timeout_s: float,
        directory: str,
        connecting: Iterable[Connecting] = (),
    ) -> None:
        """
        Args:
            monitor: of the QEMU.
            timeout_s: the time, seconds.
            directory: the process's working directory, where its relative paths begin.
            connecting: what is known of its chardevs that connect.
        """
        self.monitor = monitor
        self._directory = directory
        self._connecting = tuple(connecting)
        self._deadline = asyncio.get_running_loop().time() + timeout_s

    @property
    def left_s(self) -> float:
        return max(self._deadline - asyncio.get_running_loop().time(), 0.01)

    def extend(self, seconds: float) -> None:
        """Have at least so much time."""
        self._deadline = max(self._deadline, asyncio.get_running_loop().time() + seconds)

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        return await self.monitor.execute(command, arguments, timeout_s=self.left_s)

    async def chardevs(self) -> dict[str, Chardev]:
        """Those at unix sockets, by label."""
        return parse_chardevs(await self.execute("query-chardev"), self._directory, self._connecting)

    async def devices(self) -> tuple[Device, ...]:
        found: list[Device] = []
        for parent in (NAMED, UNNAMED):
            found += parse_devices(parent, await self.execute("qom-list", {"path": parent}))
        return tuple(found)

    async def ports(self, name: PortName | None) -> list[SerialPort]:
        """Its virtio-serial ports; with `name` those of that name, on whatever bus."""
        found: list[SerialPort] = []
        for device in await self.devices():
            if not device.is_serial_port:
                continue
            try:
                called, label = [
                    await self.execute("qom-get", {"path": device.path, "property": key})
                    for key in ("name", "chardev")
                ]
            except CommandRefused:
                continue  # unplugged since it was listed
            if isinstance(called, str) and isinstance(label, str) and name in (None, called):
                found.append(SerialPort(device, called, label))
        return found

    async def buses(self) -> list[str]:
        """The buses of its virtio-serial controllers."""
        found: list[str] = []
        for device in await self.devices():
            if backend := backend_of(device):
                with suppress(CommandRefused):
                    found += parse_buses(await self.execute("qom-list", {"path": backend}))
        return found
