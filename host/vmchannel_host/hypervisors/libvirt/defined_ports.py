# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ports a libvirt's domains will have whose QEMU connects: read from their definitions.

Somebody must listen before such a domain starts: without `<reconnect>` libvirt does not start it otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeVar

from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.libvirt import words
from vmchannel_host.hypervisors.libvirt.link import Link, NoSuchDomain
from vmchannel_host.model import DefinedPort, SocketMode, VmUuid

T = TypeVar("T")

READ_S: Final = 5.0
"""How long one definition may take to read, seconds."""

POLL_S: Final = 300.0
"""When all are read again, though no event came, seconds."""

RETRY_S: Final = 1.0
"""When libvirt is asked again that did not answer, seconds."""

Tell = Callable[[tuple[DefinedPort, ...]], None]
"""Gets all ports, each time that they have changed."""

log = logging.getLogger(__name__)


class CallLink(Protocol):
    """Makes a call to libvirt; see `plugging.Domains`."""

    async def __call__(
        self,
        name: str,
        function: Callable[[Link], T],
        *,
        timeout_s: float,
        on_return: Callable[[], None],
    ) -> T: ...


class DefinedPorts:
    """The ports of one libvirt's definitions. They are kept while it does not answer."""

    def __init__(self, call: CallLink, *, poll_s: float = POLL_S) -> None:
        """
        Args:
            call: makes a call to libvirt.
            poll_s: see POLL_S.
        """
        self._call = call
        self._poll_s = poll_s
        self._names: Mapping[VmUuid, str] = {}
        self._ports: dict[VmUuid, tuple[DefinedPort, ...]] = {}
        self._tell: Tell = lambda _: None
        self._told: tuple[DefinedPort, ...] = ()
        self._dirty: dict[VmUuid, None] = {}  # to be read, in this order
        self._news = asyncio.Event()
        # Set while no call of ours is under way: a second one would hang beside the first.
        self._idle = asyncio.Event()
        self._idle.set()

    def follow(self, tell: Tell) -> None:
        """Tell the ports from now on; once now. One listener."""
        self._tell = tell
        tell(self._told)

    def listed(self, names: Mapping[VmUuid, str]) -> None:
        """These are all domains that libvirt has, with their names."""
        for vm in names:
            if self._names.get(vm) != names[vm]:
                self.changed(vm)
        self._names = dict(names)
        for gone in self._ports.keys() - names.keys():
            del self._ports[gone]
        self._publish()

    def changed(self, vm: VmUuid) -> None:
        """That domain was defined anew, or is defined no more."""
        self._dirty[vm] = None
        self._news.set()

    async def run(self) -> None:
        """Read what has changed, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._news.wait()
            except TimeoutError:
                self._dirty |= dict.fromkeys(self._names)
            self._news.clear()
            while self._dirty:
                vm = next(iter(self._dirty))
                del self._dirty[vm]
                await self._read(vm)

    async def _read(self, vm: VmUuid) -> None:
        await self._idle.wait()
        self._idle.clear()
        try:
            texts = await self._call(
                "read definition",
                lambda link: link.definitions(vm),
                timeout_s=READ_S,
                on_return=self._idle.set,
            )
            ports = () if texts.config is None else self._ports_of(vm, texts.config)
        except NoSuchDomain:
            ports = ()
        except HypervisorError as error:
            log.debug("vm=%s definition not read: %s", vm, error)
            self._dirty[vm] = None  # after the others
            await asyncio.sleep(RETRY_S)
            return
        self._ports[vm] = ports
        self._publish()

    def _ports_of(self, vm: VmUuid, text: str) -> tuple[DefinedPort, ...]:
        ports = [channel.port for channel in words.read_domain_xml(text).channels]
        return tuple(
            DefinedPort(vm, self._names.get(vm, ""), port.name, port.chardev_path)
            for port in ports
            if port.mode is SocketMode.CONNECT
        )

    def _publish(self) -> None:
        found = tuple(port for vm in sorted(self._ports) for port in self._ports[vm])
        if found != self._told:
            self._told = found
            self._tell(found)
