# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports attached to domains of real libvirtds, running and defined, and detached again."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from fence_vmchannel.links.stream import peer_credentials, try_connect
from tests.integration.hypervisors.qemu_rig import Rig
from tests.integration.libvirt.libvirt_rig import (
    PORT,
    WAIT_S,
    LibvirtHost,
    a_domain,
    off_loop,
    vm_of,
    watching,
)
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.hypervisors import PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.libvirt.plug_words import ALIAS, read_devices
from vmchannel_host.hypervisors.peer import QemuPeers
from vmchannel_host.model import Instance, PortName

NAME = PortName(PORT)
CONTROLLER = "<controller type='virtio-serial'/>"
HOSTILE = PortName("org.vmchannel.a b,c=d<&>'\"é%s")


def portless(libvirtd: Libvirtd, devices: str = CONTROLLER) -> Domain:
    return replace(a_domain(libvirtd, devices=devices), ports=())


async def attach(
    host: LibvirtHost, domain: Domain, port: PortName = NAME, *, timeout_s: float = 60
) -> Plugged:
    return await host.hypervisor.attach_port(vm_of(domain), port, timeout_s=timeout_s)


async def detach(
    host: LibvirtHost, domain: Domain, port: PortName | None = NAME, *, force: bool = False
) -> Plugged:
    return await host.hypervisor.detach_port(vm_of(domain), port, force=force, timeout_s=60)


async def problem(host: LibvirtHost, domain: Domain, *, timeout_s: float = 60) -> PlugProblem:
    """Why an attach is refused."""
    with pytest.raises(PlugError) as caught:
        await attach(host, domain, timeout_s=timeout_s)
    return caught.value.problem


def aliases(libvirtd: Libvirtd, domain: Domain, *, config: bool) -> dict[str, str]:
    """The ports of what runs, or of the definition, with their aliases."""
    text = libvirtd.virsh("dumpxml", domain.uuid, *(("--inactive",) if config else ()))
    return {one.name: one.alias for one in read_devices(text).channels}


async def both(libvirtd: Libvirtd, domain: Domain) -> tuple[list[str], list[str]]:
    """The names of the ports that are ours: of what runs, and of the definition."""

    def ours(config: bool) -> list[str]:
        found = aliases(libvirtd, domain, config=config)
        return sorted(name for name, alias in found.items() if alias.startswith(ALIAS))

    return await asyncio.to_thread(ours, False), await asyncio.to_thread(ours, True)


def has(*names: str) -> Callable[[Instance], bool]:
    """Whether an instance is seen to have exactly these ports."""
    return lambda one: one.monitor != "" and sorted(port.name for port in one.ports) == sorted(names)


async def defined(host: LibvirtHost, domain: Domain) -> None:
    """Wait until a domain that does not run is known."""
    deadline = time.monotonic() + WAIT_S
    while domain.uuid not in host.hypervisor.definitions().names:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("which", ["libvirtd", "system_libvirtd"])
async def test_a_port_is_there_at_once_and_after_the_next_start_until_it_is_detached(
    which: str, request: pytest.FixtureRequest
) -> None:
    libvirtd: Libvirtd = request.getfixturevalue(which)
    domain = portless(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        assert await attach(host, domain) == Plugged(True, (NAME,)), "no advice: it is for good"
        instance = await host.until_state(domain, has(PORT))
        path = (
            f"/proc/{instance.identity.pid}/root{instance.ports[0].chardev_path}"  # as its libvirtd sees it
        )
        link = try_connect(path)
        assert link is not None
        with link:
            QemuPeers(host.hypervisor.processes).verify(peer_credentials(link).pid, instance.identity)
        assert await attach(host, domain) == Plugged(False, (NAME,))
        assert await both(libvirtd, domain) == ([PORT], [PORT])

        await host.off(instance.identity)
        await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        await host.until_state(domain, has(PORT))
        assert await detach(host, domain) == Plugged(True, (NAME,))
        await host.until_state(domain, has())
        assert await both(libvirtd, domain) == ([], [])
        assert await detach(host, domain) == Plugged(False, ())


async def test_a_domain_that_is_off_gets_the_port_in_its_definition_with_a_controller(
    libvirtd: Libvirtd,
) -> None:
    domain = portless(libvirtd, devices="")
    libvirtd.define(domain)
    async with watching(libvirtd) as host:
        await defined(host, domain)
        done = await attach(host, domain)
        assert (done.changed, "next start" in done.advice[0]) == (True, True)
        await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        instance = await host.until_state(domain, has(PORT))
        await host.off(instance.identity)
        gone = await _until_off(libvirtd, host, domain)
        assert gone.ports == (NAME,)
        assert aliases(libvirtd, domain, config=True) == {}


async def _until_off(libvirtd: Libvirtd, host: LibvirtHost, domain: Domain) -> Plugged:
    def booked() -> bool | None:
        return libvirtd.virsh("domstate", domain.uuid).startswith("shut off") or None

    await host.until_look(domain, lambda _: booked())
    return await detach(host, domain, None)


async def test_what_is_in_one_place_only_is_completed(libvirtd: Libvirtd) -> None:
    domain = portless(libvirtd)
    libvirtd.create(domain)
    file = libvirtd.directory / f"{domain.uuid}-channel.xml"
    file.write_text(f"<channel type='unix'><target type='virtio' name='{PORT}'/></channel>")
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        for where in ("--live", "--config"):
            await asyncio.to_thread(libvirtd.virsh, "attach-device", domain.uuid, str(file), where)
            assert (await attach(host, domain)).changed
            added: tuple[list[str], list[str]] = ([], [PORT]) if where == "--live" else ([PORT], [])
            assert await both(libvirtd, domain) == added
            assert not (await attach(host, domain)).changed
            assert (await detach(host, domain, force=True)).changed
            assert await both(libvirtd, domain) == ([], [])
            await host.until_state(domain, has())


async def test_a_port_from_the_definition_is_taken_away_by_force_only_and_then_for_good(
    libvirtd: Libvirtd,
) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_state(domain, has(PORT))
        assert not (await attach(host, domain)).changed
        with pytest.raises(PlugError, match="defined with that port") as caught:
            await detach(host, domain)
        assert caught.value.problem is PlugProblem.NOT_OURS
        assert await detach(host, domain, None) == Plugged(False, ())
        await host.until_state(domain, has(PORT))
        assert (await detach(host, domain, force=True)).ports == (NAME,)
        await host.until_state(domain, has())
        assert aliases(libvirtd, domain, config=True) == {}


async def test_a_transient_domain_keeps_it_until_it_ends(libvirtd: Libvirtd) -> None:
    domain = portless(libvirtd)
    file = libvirtd.directory / f"{domain.uuid}.xml"
    file.write_text(domain.xml)
    libvirtd.virsh("create", str(file))
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        assert "transient" in (await attach(host, domain)).advice[0]
        await host.until_state(domain, has(PORT))
        assert (await detach(host, domain, None)).ports == (NAME,)


async def test_a_domain_that_runs_without_a_controller_is_left_as_it_was(libvirtd: Libvirtd) -> None:
    domain = portless(libvirtd, devices="")
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        before = await off_loop(lambda: libvirtd.virsh("dumpxml", domain.uuid, "--inactive"))
        assert await problem(host, domain) is PlugProblem.NO_SLOT
        assert await off_loop(lambda: libvirtd.virsh("dumpxml", domain.uuid, "--inactive")) == before


async def test_when_libvirt_cannot_write_the_definition_nothing_is_left_of_an_attach(
    libvirtd: Libvirtd,
) -> None:
    """libvirt itself leaves the port in what runs, and would lose it with the next start."""
    domain = portless(libvirtd)
    libvirtd.create(domain)
    definitions = libvirtd.directory / "config/libvirt/qemu"
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        definitions.chmod(0o555)
        try:
            assert await problem(host, domain) is PlugProblem.FAILED
        finally:
            definitions.chmod(0o755)
        assert await both(libvirtd, domain) == ([], [])
        assert (await attach(host, domain)).changed
        assert await both(libvirtd, domain) == ([PORT], [PORT])


async def test_a_libvirtd_that_hangs_is_told_in_time_and_the_same_order_again_is_safe(
    libvirtd: Libvirtd,
) -> None:
    domain = portless(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        libvirtd.pause()
        try:
            with pytest.raises(PlugError, match="no answer") as caught:
                await attach(host, domain, timeout_s=0.5)
            assert caught.value.problem is PlugProblem.DEADLINE
            assert "nothing was changed" in str(caught.value)
        finally:
            libvirtd.resume()
        await host.until_state(domain, has())
        assert (await attach(host, domain)).changed
        assert await both(libvirtd, domain) == ([PORT], [PORT])


async def test_a_hostile_name_is_data(libvirtd: Libvirtd) -> None:
    domain = replace(portless(libvirtd), name="a'b\"<&>,c")
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        await host.until_state(domain, has())
        assert (await attach(host, domain, HOSTILE)).changed
        await host.until_state(domain, has(HOSTILE))
        assert await both(libvirtd, domain) == ([HOSTILE], [HOSTILE])
        for name in ("org.vmchannel.../../x", "org.vmchannel." + "x" * 100):
            with pytest.raises(PlugError) as caught:
                await attach(host, domain, PortName(name))
            assert caught.value.remedy == "choose another name"
        assert (await detach(host, domain, HOSTILE)).ports == (HOSTILE,)
        await host.until_state(domain, has())


async def test_what_two_libvirts_define_is_plugged_into_in_neither(
    libvirtd: Libvirtd, system_libvirtd: Libvirtd
) -> None:
    domain = portless(libvirtd)
    libvirtd.create(domain)
    system_libvirtd.define(domain)
    async with watching(libvirtd, system_libvirtd) as host:
        await host.until_state(domain, has())
        deadline = time.monotonic() + WAIT_S
        while await problem_or_none(host, domain) is not PlugProblem.AMBIGUOUS:
            assert time.monotonic() < deadline
        with pytest.raises(PlugError, match="is defined in"):
            await detach(host, domain, None)


async def problem_or_none(host: LibvirtHost, domain: Domain) -> PlugProblem | None:
    """Why a detach of a port that is not there is refused, if it is."""
    try:
        await detach(host, domain)
    except PlugError as error:
        return error.problem
    return None


async def test_a_bare_qemu_of_a_defined_uuid_is_plugged_into_by_qmp(libvirtd: Libvirtd, rig: Rig) -> None:
    domain = portless(libvirtd)
    libvirtd.define(domain)
    ports = rig.directory / "ports"
    async with watching(libvirtd, sockets=(str(rig.directory / "*.qmp"),), ports=ports) as host:
        rig.qemu("-S", "-device", "virtio-serial", vm_uuid=vm_of(domain))
        await host.until_state(domain, has())
        assert "start command" in (await attach(host, domain)).advice[0]
        assert len(list(ports.iterdir())) == 1
        assert aliases(libvirtd, domain, config=True) == {}


@pytest.mark.parametrize("configured", [True, False])
async def test_a_qemu_of_libvirts_is_never_plugged_into_by_qmp(
    libvirtd: Libvirtd, rig: Rig, configured: bool
) -> None:
    """Also where a monitor of its own leads to it."""
    namespace = "http://libvirt.org/schemas/domain/qemu/1.0"
    rig.directory.chmod(0o777)
    command = ElementTree.Element(f"{{{namespace}}}commandline")
    for word in shlex.split(f"-qmp unix:{rig.directory}/1.qmp,server=on,wait=off"):
        ElementTree.SubElement(command, f"{{{namespace}}}arg", value=word)
    domain = replace(portless(libvirtd), extra=ElementTree.tostring(command, encoding="unicode"))
    libvirtd.create(domain)
    served, ports = (libvirtd,) if configured else (), rig.directory / "ports"
    async with watching(*served, sockets=(str(rig.directory / "*.qmp"),), ports=ports) as host:
        await host.until_state(domain)
        try:
            done = await attach(host, domain)
        except PlugError as error:  # with libvirt: its own word, or that monitor's, came first
            refused = PlugProblem.NO_MONITOR if configured else PlugProblem.UNSUPPORTED
            assert error.problem is refused  # noqa: PT017 - either end is good
            assert await both(libvirtd, domain) == ([], [])
        else:
            assert (configured, done.changed) == (True, True)
            assert await both(libvirtd, domain) == ([PORT], [PORT])
        assert not ports.exists()
