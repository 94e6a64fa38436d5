# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's ports as links of a hub: every port with the prefix is kept open, whenever it is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final

from fence_vmchannel.discovery import PortPaths, UeventListener, find_port, holder_of, port_busy, scan_ports
from fence_vmchannel.errors import LinkError, PortBusy
from fence_vmchannel.links.base import Link
from fence_vmchannel.links.guest_port import open_node

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

RESCAN_S: Final = 30.0
"""A scan without an event, in case one was lost."""

RESCAN_WITHOUT_EVENTS_S: Final = 1.0

MAX_PORTS: Final = 64
"""Ports that a hub keeps at once. A device has at most 30 (max_ports=31), so this is two devices full."""


class PortConnector:
    """Opens one port by its name, as often as the hub asks: its node may change."""

    def __init__(self, name: str, paths: PortPaths) -> None:
        self._name = name
        self._paths = paths

    async def connect(self) -> Link:
        """See `Connector`. Raises PortNotFound or PortBusy, which names the process that holds it."""
        port = find_port(self._name, self._paths)
        try:
            return open_node(port.node, self._name, self._paths.open)
        except PortBusy as error:
            holder = await asyncio.to_thread(holder_of, port.node, self._paths)
            raise port_busy(port, holder) from error


async def follow_ports(
    prefix: str, paths: PortPaths, changed: Callable[[frozenset[str]], None], rescan_s: float | None
) -> None:
    """Call `changed` with the names of all ports that begin with `prefix`: at once, and after each change."""
    known: frozenset[str] | None = None
    async with _uevents() as (event, pause_s):
        while True:
            names = sorted({port.name for port in scan_ports(paths) if port.name.startswith(prefix)})
            if len(names) > MAX_PORTS:
                log.warning(
                    "%d ports begin with %s; only the first %d are served", len(names), prefix, MAX_PORTS
                )
            found = frozenset(names[:MAX_PORTS])
            if found != known:
                known = found
                changed(found)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s if rescan_s is None else rescan_s):
                    await event.wait()
            event.clear()


@contextlib.asynccontextmanager
async def _uevents() -> AsyncGenerator[tuple[asyncio.Event, float]]:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    try:
        listener = UeventListener()
    except LinkError as error:
        log.warning("%s: ports are looked for every %.0f s", error, RESCAN_WITHOUT_EVENTS_S)
        yield event, RESCAN_WITHOUT_EVENTS_S
        return

    def on_ready() -> None:
        if listener.ports_changed():
            event.set()

    loop.add_reader(listener.fileno(), on_ready)
    try:
        yield event, RESCAN_S
    finally:
        loop.remove_reader(listener.fileno())
        listener.close()
