# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMU processes come, change and go; the hypervisor follows and needs no restart."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest

from tests.integration.hypervisors.qemu_rig import (
    FAKE,
    HeldMonitor,
    Rig,
    command,
    make_host,
    of,
    watching,
)
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.follower import Timings
from vmchannel_host.hypervisors.process import EXECUTABLES
from vmchannel_host.hypervisors.qmp_monitor import Monitor
from vmchannel_host.model import EndCause, EndProof, IoState, Migration, Port, PortName, RunState


async def test_a_running_qemu_is_found_with_its_name_uuid_process_and_ports(rig: Rig) -> None:
    port = rig.directory / "port,0.sock"
    qemu = rig.qemu(
        *("-device", "virtio-serial"),
        *("-chardev", f"socket,id=c0,path={str(port).replace(',', ',,')},server=on,wait=off"),
        *("-device", "virtserialport,chardev=c0,name=org.vmchannel.0,id=p0"),
        *("-chardev", "null,id=c1", "-device", "virtserialport,chardev=c1,name=org.vmchannel.1"),
        name="guest=web 1,,a",
    )
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        assert instance.vm_uuid == qemu.vm_uuid
        assert instance.identity.pid == qemu.pid
        assert instance.identity.executable == os.readlink(f"/proc/{qemu.pid}/exe")
        assert instance.name == "web 1,a"
        assert instance.migration is Migration.NONE
        assert instance.ports == (Port(PortName("org.vmchannel.0"), str(port), guest_open=False),)
        assert instance.resettable
        assert instance.monitor == str(qemu.socket)


async def test_a_guest_that_opens_or_closes_a_port_without_an_id_is_noticed_though_qemu_is_silent(
    rig: Rig,
) -> None:
    qemu = rig.scripted("opens-and-closes-its-port-in-silence")
    only_ports = Timings(poll_s=600.0, port_poll_s=0.05)
    async with watching(rig.directory, executables=(*EXECUTABLES, FAKE), timings=only_ports) as host:
        await host.until(qemu, lambda i: any(port.guest_open for port in i.ports))
        await host.until(qemu, lambda i: not any(port.guest_open for port in i.ports))


async def test_a_port_that_somebody_else_plugs_in_is_found_though_qemu_is_silent(rig: Rig) -> None:
    own = rig.directory / "own.sock"
    qemu = rig.qemu(
        *("-device", "virtio-serial", "-qmp", f"unix:{own},server=on,wait=off"),
        *("-chardev", f"socket,id=c0,path={rig.directory}/port.sock,server=on,wait=off"),
    )
    async with watching(rig.directory, timings=Timings(poll_s=0.1)) as host:
        assert not (await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)).ports
        monitor = await Monitor.connect(str(own), timeout_s=10)
        try:
            port = {"driver": "virtserialport", "chardev": "c0", "name": "org.vmchannel.0"}
            await monitor.execute("device_add", port, timeout_s=10)
            await host.until(qemu, lambda i: [port.name for port in i.ports] == ["org.vmchannel.0"])
        finally:
            await monitor.close()


async def test_ports_are_looked_at_when_asked_for(rig: Rig) -> None:
    qemu = rig.scripted("opens-and-closes-its-port-in-silence")
    never = Timings(poll_s=600.0, port_poll_s=600.0)
    async with watching(rig.directory, executables=(*EXECUTABLES, FAKE), timings=never) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        while not any(port.guest_open for port in instance.ports):
            host.hypervisor.look_at_ports(instance.identity)
            with suppress(TimeoutError):
                instance = await host.until(qemu, lambda i: i.ports[0].guest_open, timeout_s=0.2)


async def test_a_look_right_after_the_start_of_the_daemon_finds_states_not_unknowns(rig: Rig) -> None:
    qemu = rig.qemu("-S")
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: True)
        (instance,) = of(await host.look(), qemu)
        assert instance.run_state is RunState.PRELAUNCH


async def test_stop_and_cont_by_another_client_are_seen(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        await command(second, "stop")
        await host.until(qemu, lambda i: i.run_state is RunState.PAUSED)
        await command(second, "cont")
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)


async def test_a_qemu_without_any_monitor_of_ours_is_an_instance_of_unknown_state(rig: Rig) -> None:
    qemu = rig.qemu(name="lonely")
    async with watching(rig.directory, sockets="none/*.qmp") as host:
        (instance,) = of(await host.look(), qemu)
        assert instance.run_state is RunState.UNKNOWN
        assert instance.migration is Migration.UNKNOWN
        assert instance.name == ""  # whoever may run a process here must not take a VM's name
        assert not instance.configured
        assert not instance.resettable


async def test_a_qemu_whose_command_line_names_our_socket_is_ours_though_the_socket_is_gone(rig: Rig) -> None:
    qemu = rig.qemu(name="vm1")
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
    for path in rig.directory.glob("*.qmp"):
        path.unlink()
    async with watching(rig.directory) as host:
        (instance,) = of(await host.look(), qemu)
        assert (instance.run_state, instance.name, instance.configured) == (RunState.UNKNOWN, "vm1", True)


async def test_a_look_needs_no_running_watcher(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    host = make_host(rig.directory)
    assert len(of(await host.look(), qemu)) == 1


async def test_a_monitor_held_by_another_client_makes_the_state_unknown_until_it_is_free(rig: Rig) -> None:
    qemu = rig.qemu()
    held = HeldMonitor(qemu)
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.UNKNOWN)
        (instance,) = of(await host.look(), qemu)
        assert instance.run_state is RunState.UNKNOWN
        held.close()
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)


async def test_a_stopped_process_becomes_unknown_in_a_look_and_returns_when_it_goes_on(rig: Rig) -> None:
    qemu, other = rig.qemu(), rig.qemu("-S")
    async with watching(rig.directory) as host:
        for one in (qemu, other):
            await host.until(one, lambda i: i.run_state is not RunState.UNKNOWN)
        qemu.stop()
        look = await host.look()
        assert of(look, qemu)[0].run_state is RunState.UNKNOWN
        assert of(look, other)[0].run_state is RunState.PRELAUNCH
        qemu.resume()
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)


async def test_a_look_for_one_vm_sees_all_processes_and_asks_its_monitors_only(rig: Rig) -> None:
    qemu, other = rig.qemu(), rig.qemu("-S")
    async with watching(rig.directory) as host:
        for one in (qemu, other):
            await host.until(one, lambda i: i.run_state is not RunState.UNKNOWN)
        other.stop()
        look = await host.look(vm=qemu.vm_uuid)
        assert of(look, qemu)[0].run_state is RunState.RUNNING
        assert of(look, other)[0].run_state is RunState.PRELAUNCH  # as it was heard last
        look = await host.look(vm=other.vm_uuid)
        assert of(look, other)[0].run_state is RunState.UNKNOWN
        other.resume()


async def test_a_qemu_that_is_killed_is_reported_with_proof(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        qemu.kill()
        evidence = await host.until_ended(qemu)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.NONE)
        assert evidence.io is IoState.UNPROVEN
        assert not evidence.departed
        assert of(await host.look(), qemu) == []


async def test_the_end_of_a_qemu_without_a_monitor_is_seen_too(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    async with watching(rig.directory, sockets="none/*.qmp") as host:
        await host.until(qemu, lambda i: True)
        qemu.kill()
        assert (await host.until_ended(qemu)).proof is EndProof.PIDFD


async def test_a_qemu_that_leaves_by_itself_has_drained(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        await command(second, "quit")
        evidence = await host.until_ended(qemu)
        assert (evidence.cause, evidence.io) == (EndCause.NONE, IoState.DRAINED)


async def test_a_qemu_that_restarts_on_the_same_socket_path_is_a_new_instance(rig: Rig) -> None:
    first = rig.qemu(socket_name="same.qmp")
    async with watching(rig.directory) as host:
        await host.until(first, lambda i: i.run_state is RunState.RUNNING)
        first.kill()
        await host.until_ended(first)
        second = rig.qemu("-S", socket_name="same.qmp", vm_uuid=first.vm_uuid)
        instance = await host.until(second, lambda i: i.run_state is RunState.PRELAUNCH)
        assert instance.identity.pid == second.pid


async def test_a_second_qemu_that_takes_the_socket_path_hides_nobody(rig: Rig) -> None:
    first = rig.qemu(socket_name="same.qmp")
    async with watching(rig.directory) as host:
        await host.until(first, lambda i: i.run_state is RunState.RUNNING)
        os.unlink(first.socket)
        second = rig.qemu("-S", socket_name="same.qmp")
        look = await host.look()
        assert of(look, first)[0].run_state is RunState.RUNNING  # its connection still stands
        assert len(of(look, second)) == 1


async def test_an_unlinked_socket_changes_nothing_and_a_new_daemon_still_finds_the_process(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        os.unlink(qemu.socket)
        assert of(await host.look(), qemu)[0].run_state is RunState.RUNNING
    async with watching(rig.directory) as host:
        assert of(await host.look(), qemu)[0].run_state is RunState.UNKNOWN


async def test_a_qemu_without_a_uuid_is_a_conflict_and_no_instance(rig: Rig) -> None:
    qemu = rig.qemu(with_uuid=False, name="nameless")
    async with watching(rig.directory) as host:
        look = await host.look()
        assert any(f"pid {qemu.pid} " in conflict and "no -uuid" in conflict for conflict in look.conflicts)
        assert all(instance.identity.pid != qemu.pid for instance in look.instances)


async def test_two_monitors_of_one_process_are_one_instance_and_the_second_stands_in(rig: Rig) -> None:
    qemu = rig.qemu("-qmp", f"unix:{rig.directory}/spare.qmp,server=on,wait=off")
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        assert len(of(await host.look(), qemu)) == 1
        assert instance.monitor


async def test_a_socket_of_a_program_that_is_no_monitor_is_left_alone(rig: Rig) -> None:
    qemu = rig.qemu()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.directory / "other.qmp"))
        listener.listen()
        async with watching(rig.directory) as host:
            await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
            assert of(await host.look(), qemu)[0].run_state is RunState.RUNNING


async def test_resets_and_continuations_are_counted_though_they_are_over_at_once(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        before = host.hypervisor.interruptions(instance.identity)
        await command(second, "stop", "cont", "stop", "cont", "system_reset")
        await host.hypervisor.catch_up(instance.identity, timeout_s=10)
        assert host.hypervisor.interruptions(instance.identity) == before + 3
        await host.until(qemu, lambda i: i.interruptions == before + 3)


async def test_a_monitor_that_was_away_may_have_missed_something(rig: Rig) -> None:
    qemu = rig.scripted("hangs-up")
    async with watching(rig.directory, executables=(*EXECUTABLES, FAKE)) as host:
        await host.until(qemu, lambda i: i.interruptions > 0)


async def test_a_mute_monitor_tells_not_what_happened(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        qemu.stop()
        with pytest.raises(HypervisorError):
            await host.hypervisor.catch_up(instance.identity, timeout_s=0.2)
        qemu.resume()
        await host.hypervisor.catch_up(instance.identity, timeout_s=10)
