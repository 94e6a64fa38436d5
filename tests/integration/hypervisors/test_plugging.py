# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports plugged into real QEMUs and out of them, and what is left when that fails."""

from __future__ import annotations

import os
import shlex
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import FAKE, Host, Rig, SecondMonitor, watching
from vmchannel_host.hypervisors import PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.plug_words import port_id
from vmchannel_host.hypervisors.process import EXECUTABLES
from vmchannel_host.hypervisors.qmp_monitor import Monitor
from vmchannel_host.model import Instance, PortName, VmUuid

PORT = PortName("org.vmchannel.0")
SECOND = PortName("org.vmchannel.1")
STRANGE = PortName("org.vmchannel.../../a b,c=d\n\"'\u00fc")
SERIAL = ("-device", "virtio-serial-pci,id=serial")
SLOT = ("-device", "pcie-root-port,id=slot1")


def ready(instance: Instance) -> bool:
    return bool(instance.monitor)


def has(*names: str) -> Callable[[Instance], bool]:
    """Whether an instance has exactly these ports."""
    return lambda instance: sorted(port.name for port in instance.ports) == sorted(names)


def peer_of(path: str) -> int:
    """The process that listens on a socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


async def attach(host: Host, vm: VmUuid, port: PortName = PORT, *, timeout_s: float = 20) -> Plugged:
    return await host.hypervisor.attach_port(vm, port, timeout_s=timeout_s)


async def detach(host: Host, vm: VmUuid, port: PortName | None = PORT, *, force: bool = False) -> Plugged:
    return await host.hypervisor.detach_port(vm, port, force=force, timeout_s=20)


async def problem(host: Host, vm: VmUuid, port: PortName = PORT) -> PlugProblem:
    """Why an attach is refused."""
    with pytest.raises(PlugError) as caught:
        await attach(host, vm, port)
    return caught.value.problem


async def ours(mine: SecondMonitor) -> set[str]:
    """The devices and chardevs of a QEMU that bear ids of ours, controllers not counted."""
    devices = await mine.ask("qom-list", path="/machine/peripheral")
    chardevs = await mine.ask("query-chardev")
    names = [*(one["name"] for one in devices), *(one["label"] for one in chardevs)]
    return {name for name in names if name.startswith("vmchannel-port")}


def sockets(rig: Rig) -> list[str]:
    """The files in our directory of sockets."""
    directory = rig.directory / "ports"
    return os.listdir(directory) if directory.exists() else []


@pytest.fixture
def mine(rig: Rig) -> SecondMonitor:
    return SecondMonitor(rig.directory)


@pytest.mark.parametrize(
    ("machine", "arguments", "controllers"),
    [
        ("q35", SERIAL, {"serial"}),
        ("q35", SLOT, {"vmchannel-serial", "slot1"}),
        ("pc", (), {"vmchannel-serial"}),
        ("pc", ("-device", "virtio-serial-pci"), set[str]()),
    ],
)
async def test_a_port_is_plugged_in_and_out_and_in_again(
    rig: Rig, mine: SecondMonitor, machine: str, arguments: tuple[str, ...], controllers: set[str]
) -> None:
    qemu = rig.qemu("-S", *mine.arguments, *arguments, machine=machine)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        for _ in range(2):
            done = await attach(host, qemu.vm_uuid)
            assert (done.changed, done.ports) == (True, (PORT,))
            [port] = (await host.until(qemu, has(PORT))).ports
            assert Path(port.chardev_path).parent == rig.directory / "ports"
            assert peer_of(port.chardev_path) == qemu.pid, "QEMU itself listens"
            gone = await detach(host, qemu.vm_uuid)
            assert gone == Plugged(True, (PORT,))
            await host.until(qemu, has())
            assert (await ours(mine), sockets(rig)) == (set(), [])
        names = {one["name"] for one in await mine.ask("qom-list", path="/machine/peripheral")}
        assert names - {"type"} == controllers, "a controller that was plugged in stays"


async def test_the_directory_of_the_sockets_is_for_us_alone_and_qemu_needs_no_right_there(
    rig: Rig, mine: SecondMonitor
) -> None:
    unprivileged = ("-runas", "nobody") if os.geteuid() == 0 else ()
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL, *unprivileged)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        assert (await attach(host, qemu.vm_uuid)).changed
        [port] = (await host.until(qemu, has(PORT))).ports
        assert (rig.directory / "ports").stat().st_mode & 0o777 == 0o700
        assert peer_of(port.chardev_path) == qemu.pid
        assert (await detach(host, qemu.vm_uuid)).changed
        assert sockets(rig) == [], "where QEMU may not remove its socket, we do"


async def test_what_is_so_already_is_said_and_left_alone(rig: Rig, mine: SecondMonitor) -> None:
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        assert await detach(host, qemu.vm_uuid) == Plugged(False, ())
        first = await attach(host, qemu.vm_uuid)
        again = await attach(host, qemu.vm_uuid)
        assert (first.changed, again.changed, again.ports) == (True, False, (PORT,))
        assert again.advice == first.advice, "it is still lost at the VM's end"
        assert await ours(mine) == {port_id(PORT)}


async def test_a_vm_without_a_place_for_a_port_is_told_so_and_nothing_is_left(
    rig: Rig, mine: SecondMonitor
) -> None:
    qemu = rig.qemu("-S", *mine.arguments)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        with pytest.raises(PlugError, match="no virtio-serial controller") as caught:
            await attach(host, qemu.vm_uuid)
        assert caught.value.problem is PlugProblem.NO_SLOT
        assert "-device virtio-serial" in caught.value.remedy
        assert (await ours(mine), sockets(rig)) == (set(), [])


async def test_a_full_controller_gets_a_second_one_beside_it(rig: Rig, mine: SecondMonitor) -> None:
    full = ("-device", "virtio-serial-pci,id=serial,max_ports=2")
    qemu = rig.qemu("-S", *mine.arguments, *full, *SLOT)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        for port in (PORT, SECOND):
            assert (await attach(host, qemu.vm_uuid, port)).changed
        await host.until(qemu, has(PORT, SECOND))
        names = {one["name"] for one in await mine.ask("qom-list", path="/machine/peripheral")}
        assert "vmchannel-serial" in names
        gone = await detach(host, qemu.vm_uuid, None)
        assert sorted(gone.ports) == [PORT, SECOND]
        await host.until(qemu, has())


async def test_a_name_of_any_kind_is_never_part_of_a_path(rig: Rig, mine: SecondMonitor) -> None:
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        assert (await attach(host, qemu.vm_uuid, STRANGE)).changed
        [port] = (await host.until(qemu, has(STRANGE))).ports
        assert sockets(rig) == [os.path.basename(port.chardev_path)]
        assert os.path.basename(port.chardev_path).startswith(qemu.vm_uuid)
        assert (await detach(host, qemu.vm_uuid, STRANGE)).ports == (STRANGE,)


@pytest.mark.parametrize("ident", ["", ",id=given"])
async def test_a_port_that_the_vm_was_started_with_is_taken_away_by_force_only(
    rig: Rig, mine: SecondMonitor, ident: str
) -> None:
    listening = f"socket,id=its,path={rig.directory}/its.sock,server=on,wait=off"
    port = ("-chardev", listening, "-device", f"virtserialport,chardev=its,name={PORT}{ident}")
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL, *port)
    async with watching(rig.directory) as host:
        await host.until(qemu, has(PORT))
        assert await attach(host, qemu.vm_uuid) == Plugged(False, (PORT,)), "no advice: it is for good"
        with pytest.raises(PlugError, match="was started with") as caught:
            await detach(host, qemu.vm_uuid)
        assert caught.value.problem is PlugProblem.NOT_OURS
        assert await detach(host, qemu.vm_uuid, None) == Plugged(False, ())
        await host.until(qemu, has(PORT))
        gone = await detach(host, qemu.vm_uuid, force=True)
        assert gone.ports == (PORT,)
        assert "start command" in gone.advice[0]
        await host.until(qemu, has())


async def test_a_port_of_that_name_that_cannot_be_served_is_named_and_left(
    rig: Rig, mine: SecondMonitor
) -> None:
    port = ("-chardev", "null,id=its", "-device", f"virtserialport,chardev=its,name={PORT},id=its")
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL, *port)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        assert await problem(host, qemu.vm_uuid) is PlugProblem.UNSUITABLE
        names = {one["name"] for one in await mine.ask("qom-list", path="/machine/peripheral")}
        assert "its" in names


async def test_an_attach_that_was_cut_short_is_finished_by_the_next_one_or_cleaned_up(
    rig: Rig, mine: SecondMonitor
) -> None:
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL)
    address = {"type": "unix", "data": {"path": str(rig.directory / "half")}}
    half = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        await mine.ask("chardev-add", id=port_id(PORT), backend=half)
        assert (await attach(host, qemu.vm_uuid)).changed
        [port] = (await host.until(qemu, has(PORT))).ports
        assert Path(port.chardev_path).parent == rig.directory / "ports"
        await detach(host, qemu.vm_uuid)
        await mine.ask("chardev-add", id=port_id(PORT), backend=half)
        assert not (await detach(host, qemu.vm_uuid)).changed
        assert await ours(mine) == set()


async def test_a_vm_that_does_not_run_here_cannot_be_plugged_into(rig: Rig) -> None:
    nobody = VmUuid("aaaaaaaa-0000-4000-8000-000000000001")
    async with watching(rig.directory) as host:
        assert await problem(host, nobody) is PlugProblem.NOT_RUNNING


async def test_two_processes_of_a_vm_are_a_doubt(rig: Rig) -> None:
    first = rig.qemu("-S")
    second = rig.qemu("-S", vm_uuid=first.vm_uuid)
    async with watching(rig.directory) as host:
        await host.until(first, ready)
        await host.until(second, ready)
        assert await problem(host, first.vm_uuid) is PlugProblem.BUSY


async def test_nothing_is_plugged_into_either_end_of_a_migration(rig: Rig, mine: SecondMonitor) -> None:
    source = rig.qemu("-S", *mine.arguments, *SERIAL)
    waiting = rig.qemu("-incoming", "defer", *SERIAL)
    async with watching(rig.directory) as host:
        await host.until(source, ready)
        await host.until(waiting, ready)
        assert await problem(host, waiting.vm_uuid) is PlugProblem.MIGRATING
        await mine.ask("migrate-set-parameters", **{"max-bandwidth": 1})
        await mine.ask("migrate", uri="exec:cat > /dev/null")
        assert await problem(host, source.vm_uuid) is PlugProblem.MIGRATING
        with pytest.raises(PlugError, match="migrates"):
            await detach(host, source.vm_uuid)


async def test_a_hung_qemu_holds_up_for_the_given_time_and_the_same_order_again_mends_it(
    rig: Rig, mine: SecondMonitor
) -> None:
    qemu = rig.qemu("-S", *mine.arguments, *SERIAL)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        qemu.stop()
        with pytest.raises(PlugError) as caught:
            await attach(host, qemu.vm_uuid, timeout_s=0.3)
        assert caught.value.problem in (PlugProblem.DEADLINE, PlugProblem.NO_MONITOR)
        qemu.resume()
        await host.until(qemu, ready)
        assert PORT in (await attach(host, qemu.vm_uuid)).ports
        await host.until(qemu, has(PORT))
        assert await ours(mine) == {port_id(PORT)}


async def test_a_qemu_that_stalls_in_the_middle_is_left_without_what_was_added(rig: Rig) -> None:
    qemu = rig.scripted("stalls-when-plugged-into")
    async with watching(rig.directory, executables=(*EXECUTABLES, FAKE)) as host:
        await host.until(qemu, ready)
        with pytest.raises(PlugError, match="no answer to device_add") as caught:
            await attach(host, qemu.vm_uuid, timeout_s=0.5)
        assert caught.value.problem is PlugProblem.DEADLINE
        monitor = await Monitor.connect(str(qemu.socket), timeout_s=20)
        assert await monitor.execute("query-chardev", timeout_s=20) == []
        await monitor.close()
        assert sockets(rig) == []


async def test_the_arguments_that_are_told_give_the_port_for_good(rig: Rig) -> None:
    qemu = rig.qemu("-S", *SLOT)
    async with watching(rig.directory) as host:
        await host.until(qemu, ready)
        said = (await attach(host, qemu.vm_uuid, STRANGE)).advice[-1]
        qemu.kill()
        await host.until_ended(qemu)
        again = rig.qemu("-S", *shlex.split(said), vm_uuid=qemu.vm_uuid)
        await host.until(again, has(STRANGE))
        assert not (await attach(host, again.vm_uuid, STRANGE)).changed
