# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt in memory with one domain, as plugging needs it: it refuses, hangs or is lost when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar, cast
from xml.etree import ElementTree

from vmchannel_host.hypervisors.libvirt.link import DomainTexts, LibvirtError, Link, NoSuchDomain
from vmchannel_host.hypervisors.monitors import MonitorClosed, MonitorMute
from vmchannel_host.model import Migration, ProcessIdentity, RunState, VmUuid

T = TypeVar("T")

Half = dict[str, str]  # a channel's name and its XML


class FakeDomain:
    """Implements `Domains`, and as much of `Link` as plugging uses."""

    uri = "qemu:///fake"
    problem = ""

    def __init__(self, vm: VmUuid, *, live: bool = True, config: bool = True, name: str = "vm1") -> None:
        self.vm = vm
        self.name = name
        self.live: Half | None = {} if live else None
        self.config: Half | None = {} if config else None
        self.saved = False
        self.controller = True
        self.state: tuple[RunState, Migration] = (RunState.RUNNING, Migration.NONE)
        self.refuses: dict[str, int] = {}  # "attach live", ...: how many such calls are still carried out
        self.mute: set[str] = set()  # calls, by name, that return when `answer` is called
        self.lost_after: str = ""  # the call after which the connection is lost
        self.lets_go = True  # QEMU gives up a port when it is told to
        self.changes: list[str] = []
        self._lost = False
        self._answers = asyncio.Event()

    def answer(self) -> None:
        """Let what hangs return."""
        self._answers.set()

    # Domains

    def defined(self) -> Mapping[VmUuid, str]:
        return {self.vm: self.name}

    def follows(self, identity: ProcessIdentity) -> bool:
        return identity.vm_uuid == self.vm

    async def state_of(self, vm: VmUuid, *, timeout_s: float) -> tuple[RunState, Migration]:
        if "state" in self.mute:
            await asyncio.sleep(timeout_s)
            raise MonitorMute("no answer")
        return self.state

    async def call_link(
        self,
        name: str,
        function: Callable[[Link], T],
        *,
        timeout_s: float,
        on_return: Callable[[], None] = lambda: None,
    ) -> T:
        if self._lost:
            on_return()
            raise MonitorClosed("not connected")
        if name not in self.mute:
            on_return()
            result = function(cast("Link", self))
            self._lost = name == self.lost_after
            return result

        async def later() -> None:
            await self._answers.wait()
            function(cast("Link", self))
            on_return()

        self._late = asyncio.create_task(later(), name="late call")
        await asyncio.sleep(timeout_s)
        raise MonitorMute(f"{name}: no answer")

    # Link

    def definitions(self, vm: VmUuid) -> DomainTexts:
        if vm != self.vm:
            raise NoSuchDomain("no such domain")
        return DomainTexts(self._text(self.live), self._text(self.config), self.saved)

    def attach_device(self, vm: VmUuid, xml: str, *, live: bool, config: bool) -> None:
        name = _name_of(xml)
        if live:  # as libvirt does: what runs first, then the file
            self._take("attach live")
            assert self.live is not None
            self.live[name] = xml
        if config:
            self._take("attach config")
            assert self.config is not None
            self.config[name] = xml

    def detach_device(self, vm: VmUuid, xml: str, *, live: bool) -> None:
        half = self.live if live else self.config
        self._take(f"detach {'live' if live else 'config'}")
        assert half is not None
        if self.lets_go or not live:
            del half[_name_of(xml)]

    def _take(self, change: str) -> None:
        left = self.refuses.get(change)
        if left == 0:
            raise LibvirtError(f"{change} is refused")
        if left is not None:
            self.refuses[change] = left - 1
        self.changes.append(change)

    def _text(self, half: Half | None) -> str | None:
        controller = "<controller type='virtio-serial'/>" if self.controller else ""
        if half is None:
            return None
        return f"<domain><devices>{controller}{''.join(half.values())}</devices></domain>"


def _name_of(xml: str) -> str:
    target = ElementTree.fromstring(xml).find("target")
    assert target is not None
    return target.get("name", "")
