# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ports are told of the definitions of a libvirt that is made up: it refuses, hangs and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, cast

from vmchannel_host.hypervisors.libvirt.defined_ports import DefinedPorts
from vmchannel_host.hypervisors.libvirt.link import DomainTexts, LibvirtError, Link, NoSuchDomain
from vmchannel_host.model import DefinedPort, PortName, VmUuid

T = TypeVar("T")

VM1 = VmUuid("11111111-1111-4111-8111-111111111111")
VM2 = VmUuid("22222222-2222-4222-8222-222222222222")
NAME = PortName("org.vmchannel.0")


def xml(*paths: str, mode: str = "connect") -> str:
    channels = "".join(
        f"<channel type='unix'><source mode='{mode}' path='{path}'/>"
        f"<target type='virtio' name='{NAME}'/></channel>"
        for path in paths
    )
    return f"<domain><devices>{channels}</devices></domain>"


class MadeUpDefinitions:
    """As much of a libvirt as definitions take; it keeps what was told."""

    def __init__(self) -> None:
        self.texts: dict[VmUuid, str | None] = {}
        self.refuses: set[VmUuid] = set()
        self.reads = 0
        self.told: list[tuple[DefinedPort, ...]] = []

    async def call(
        self, name: str, function: Callable[[Link], T], *, timeout_s: float, on_return: Callable[[], None]
    ) -> T:
        self.reads += 1
        on_return()
        return function(cast("Link", self))

    def definitions(self, vm: VmUuid) -> DomainTexts:
        if vm in self.refuses:
            raise LibvirtError("not now")
        if vm not in self.texts:
            raise NoSuchDomain(vm)
        return DomainTexts(None, self.texts[vm], managed_save=False)

    async def until(self, *wanted: DefinedPort) -> None:
        """Wait until exactly these ports are told."""
        async with asyncio.timeout(20):
            while self.told[-1] != wanted:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def following(made: MadeUpDefinitions, *, poll_s: float = 600.0) -> AsyncGenerator[DefinedPorts, None]:
    ports = DefinedPorts(made.call, poll_s=poll_s)
    ports.follow(made.told.append)
    running = asyncio.create_task(ports.run())
    try:
        yield ports
    finally:
        running.cancel()
        await asyncio.wait((running,))


def port(vm: VmUuid, name: str, path: str) -> DefinedPort:
    return DefinedPort(vm, name, NAME, path)


async def test_ports_whose_qemu_will_connect_are_told_at_each_change_of_their_definition() -> None:
    made = MadeUpDefinitions()
    made.texts = {VM1: xml("/run/a"), VM2: xml("/run/b", mode="bind")}
    async with following(made) as ports:
        assert made.told == [()]
        ports.listed({VM1: "vm1", VM2: "vm2"})
        await made.until(port(VM1, "vm1", "/run/a"))
        made.texts[VM2] = xml("/run/b", "/run/c")
        ports.changed(VM2)
        await made.until(port(VM1, "vm1", "/run/a"), port(VM2, "vm2", "/run/b"), port(VM2, "vm2", "/run/c"))
        made.texts[VM2] = None  # it runs, and is defined no more
        ports.changed(VM2)
        await made.until(port(VM1, "vm1", "/run/a"))
        ports.listed({VM2: "vm2"})
        assert made.told[-1] == ()


async def test_a_list_that_tells_nothing_new_has_nothing_read_and_nothing_told() -> None:
    made = MadeUpDefinitions()
    made.texts = {VM1: xml("/run/a")}
    async with following(made) as ports:
        ports.listed({VM1: "vm1"})
        await made.until(port(VM1, "vm1", "/run/a"))
        before = made.reads, len(made.told)
        ports.listed({VM1: "vm1"})
        ports.changed(VM2)  # whose end comes after whatever was to be read before it
        ports.changed(VM1)
        made.texts[VM1] = xml("/run/b")
        await made.until(port(VM1, "vm1", "/run/b"))
        assert (made.reads, len(made.told)) == (before[0] + 2, before[1] + 1)


async def test_a_change_without_an_event_is_found_in_time() -> None:
    made = MadeUpDefinitions()
    made.texts = {VM1: xml()}
    async with following(made, poll_s=0.01) as ports:
        ports.listed({VM1: "vm1"})
        made.texts[VM1] = xml("/run/a")
        await made.until(port(VM1, "vm1", "/run/a"))


async def test_a_definition_that_cannot_be_read_keeps_what_was_known_and_holds_up_no_other() -> None:
    made = MadeUpDefinitions()
    made.texts = {VM1: xml("/run/a"), VM2: xml()}
    async with following(made) as ports:
        ports.listed({VM1: "vm1", VM2: "vm2"})
        await made.until(port(VM1, "vm1", "/run/a"))
        made.refuses.add(VM1)
        made.texts[VM2] = xml("/run/b")
        ports.changed(VM1)
        ports.changed(VM2)
        await made.until(port(VM1, "vm1", "/run/a"), port(VM2, "vm2", "/run/b"))
        made.refuses.clear()
        made.texts[VM1] = xml("/run/c")
        await made.until(port(VM1, "vm1", "/run/c"), port(VM2, "vm2", "/run/b"))
