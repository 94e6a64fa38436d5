# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains of real libvirtds: seen as instances, with their state, their ports and their names."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace

import pytest

from fence_vmchannel.links.stream import peer_credentials, try_connect
from tests.fakes.nobody import run_as_nobody
from tests.integration.hypervisors.qemu_rig import Rig
from tests.integration.libvirt.libvirt_rig import (
    PORT,
    a_domain,
    off_loop,
    silent_of,
    vm_of,
    watching,
)
from tests.rig.kernel import RigError
from tests.rig.libvirtd import Domain, Libvirtd
from vmchannel_host.hypervisors import CannotStart, HypervisorError
from vmchannel_host.hypervisors.peer import QemuPeers, WrongPeer
from vmchannel_host.model import EndCause, EndProof, IoState, Look, Migration, RunState

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("which", ["libvirtd", "system_libvirtd"])
async def test_a_domain_is_seen_ended_and_booted_again(which: str, request: pytest.FixtureRequest) -> None:
    libvirtd: Libvirtd = request.getfixturevalue(which)
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        before = await host.until_running(domain)
        assert before.monitor == libvirtd.uri
        assert (before.name, before.migration, before.configured) == (domain.name, Migration.NONE, True)
        assert [(port.name, port.chardev_path) for port in before.ports] == [(PORT, str(domain.ports[0][1]))]

        end = await host.off(before.identity)
        proof = (end.proof, end.cause, end.io, end.departed)
        assert proof == (EndProof.PIDFD, EndCause.TERM, IoState.DRAINED, False)
        assert await host.instances(domain) == []
        assert silent_of(await host.look(vm=vm_of(domain)), domain) == []
        # "crashed" where libvirtd, short of time, has read the end of the monitor before QEMU's last event.
        booked = await host.until_look(domain, lambda _: _booked(libvirtd, domain))
        assert booked in ("shut off (shutdown)", "shut off (crashed)")

        assert host.hypervisor.can_start(vm_of(domain), "another name")
        await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)
        after = await host.until_running(domain)
        assert after.identity != before.identity


def _booked(libvirtd: Libvirtd, domain: Domain) -> str | None:
    said = libvirtd.virsh("domstate", "--reason", domain.uuid)
    return said if said.startswith("shut off") else None


def _count(look: Look, domain: Domain) -> int:
    return sum(one.vm_uuid == domain.uuid for one in look.instances)


async def test_a_paused_domain_is_on_and_its_end_is_proven(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        running = await host.until_running(domain)
        await off_loop(lambda: libvirtd.virsh("suspend", domain.uuid))
        paused = await host.until_state(domain, lambda one: one.run_state is RunState.PAUSED)
        assert paused.identity == running.identity
        end = await host.off(paused.identity)
        assert (end.proof, end.io) == (EndProof.PIDFD, IoState.DRAINED)


async def test_a_hung_qemu_is_unknown_is_killed_and_holds_up_no_other(libvirtd: Libvirtd) -> None:
    hung, well = a_domain(libvirtd), a_domain(libvirtd)
    for one in (hung, well):
        libvirtd.create(one)
    async with watching(libvirtd) as host:
        instance = await host.until_running(hung)
        await host.until_running(well)
        os.kill(instance.identity.pid, signal.SIGSTOP)
        await host.until_state(hung, lambda one: one.run_state is RunState.UNKNOWN)
        other = await host.until_running(well)
        await host.hypervisor.catch_up(other.identity, timeout_s=20)
        with pytest.raises(HypervisorError):
            await host.hypervisor.catch_up(instance.identity, timeout_s=1)
        end = await host.off(instance.identity, quit_timeout_s=0.5)
        assert (end.proof, end.cause) == (EndProof.PIDFD, EndCause.KILL)
        assert (await host.off(other.identity)).cause is EndCause.TERM


async def test_a_reset_is_proven_by_its_event_and_told_as_an_interruption(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        before = await host.until_state(domain, lambda one: one.resettable)
        told = host.hypervisor.interruptions(before.identity)
        reset = await host.hypervisor.reset(before.identity, timeout_s=60)
        assert reset.identity == before.identity
        await host.hypervisor.catch_up(before.identity, timeout_s=60)
        assert host.hypervisor.interruptions(before.identity) > told
        told = host.hypervisor.interruptions(before.identity)
        await off_loop(lambda: libvirtd.virsh("reset", domain.uuid))
        await host.hypervisor.catch_up(before.identity, timeout_s=60)
        # Not by how many: its firmware resets itself once more when it is reset early.
        assert host.hypervisor.interruptions(before.identity) > told
        await off_loop(lambda: libvirtd.virsh("suspend", domain.uuid))
        with pytest.raises(HypervisorError, match="no reset in state paused"):
            await host.hypervisor.reset(before.identity, timeout_s=60)


async def test_qemu_is_behind_the_socket_that_libvirt_made(libvirtd: Libvirtd) -> None:
    """libvirtd binds it and passes it on; QEMU calls listen() again, so the kernel names QEMU."""
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        instance = await host.until_running(domain)
        peers = QemuPeers(host.hypervisor.processes)
        link = try_connect(instance.ports[0].chardev_path)
        assert link is not None
        with link:
            pid = peer_credentials(link).pid
            assert pid == instance.identity.pid != libvirtd.pid
            peers.verify(pid, instance.identity)
        with pytest.raises(WrongPeer):
            peers.verify(libvirtd.pid, instance.identity)
        another = a_domain(libvirtd)
        await off_loop(lambda: libvirtd.create(another))
        other = await host.until_running(another)
        with pytest.raises(WrongPeer):
            peers.verify(pid, other.identity)


async def test_a_port_that_is_plugged_in_is_found_and_one_taken_out_is_gone(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    path = libvirtd.sockets / f"{domain.uuid[:8]}-2.sock"
    file = libvirtd.directory / f"{domain.uuid}-channel.xml"
    file.write_text(
        f"<channel type='unix'><source mode='bind' path='{path}'/>"
        "<target type='virtio' name='org.vmchannel.1'/></channel>"
    )
    async with watching(libvirtd) as host:
        await host.until_running(domain)
        await off_loop(lambda: libvirtd.virsh("attach-device", domain.uuid, str(file), "--live"))
        both = await host.until_state(domain, lambda one: len(one.ports) == 2)
        assert {port.name for port in both.ports} == {PORT, "org.vmchannel.1"}
        await off_loop(lambda: libvirtd.virsh("detach-device", domain.uuid, str(file), "--live"))
        await host.until_state(domain, lambda one: [port.name for port in one.ports] == [PORT])


async def test_a_stray_qemu_of_a_domains_uuid_is_an_instance_beside_it(libvirtd: Libvirtd, rig: Rig) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        own = await host.until_running(domain)
        stray = rig.qemu(vm_uuid=vm_of(domain))
        look = await host.until_look(domain, lambda look: look if _count(look, domain) == 2 else None)
        states = {one.identity.pid: one.run_state for one in look.instances if one.vm_uuid == domain.uuid}
        assert states == {own.identity.pid: RunState.RUNNING, stray.pid: RunState.UNKNOWN}
        assert (await host.off(own.identity)).cause is EndCause.TERM
        (left,) = await host.instances(domain)
        assert (await host.off(left.identity)).cause is EndCause.KILL
        assert await host.instances(domain) == []


async def test_a_leftover_definition_is_no_instance_and_no_evidence(libvirtd: Libvirtd, rig: Rig) -> None:
    """What libvirt calls shut off may run as a bare QEMU."""
    domain = a_domain(libvirtd)
    libvirtd.define(domain)
    async with watching(libvirtd, sockets=(str(rig.directory / "*.qmp"),)) as host:
        assert await host.instances(domain) == []
        bare = rig.qemu(vm_uuid=vm_of(domain), name=domain.name)
        instance = await host.until_running(domain)
        assert (instance.identity.pid, instance.monitor) == (bare.pid, str(bare.socket))
        assert libvirtd.virsh("domstate", domain.uuid) == "shut off"
        assert (await host.off(instance.identity)).cause is EndCause.QUIT


async def test_a_renamed_domain_bears_its_new_name(libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        before = await host.until_running(domain)
        await host.off(before.identity)
        await host.until_look(domain, lambda _: _booked(libvirtd, domain))
        await off_loop(lambda: libvirtd.virsh("domrename", domain.uuid, f"new-{domain.name}"))
        await host.hypervisor.start(vm_of(domain), "", timeout_s=60)
        after = await host.until_running(domain)
        assert after.name == f"new-{domain.name}"


async def test_what_two_libvirts_define_is_ended_in_both_and_started_in_neither(
    libvirtd: Libvirtd, system_libvirtd: Libvirtd
) -> None:
    """One UUID twice: an off ends all (S2); which of the two is meant by an `on` nobody can say (S9)."""
    domain = a_domain(libvirtd)
    twin = replace(domain, ports=((PORT, system_libvirtd.sockets / "twin.sock"),))
    libvirtd.create(domain)
    system_libvirtd.create(twin)
    async with watching(libvirtd, system_libvirtd) as host:
        look = await host.until_look(domain, lambda look: look if _count(look, domain) == 2 else None)
        for one in look.instances:
            if one.vm_uuid == domain.uuid:
                assert (await host.off(one.identity)).proof is EndProof.PIDFD
        assert await host.instances(domain) == []
        with pytest.raises(CannotStart, match="is defined in"):
            await host.hypervisor.start(vm_of(domain), domain.name, timeout_s=60)


async def test_two_vms_of_one_name_are_two_vms(libvirtd: Libvirtd, system_libvirtd: Libvirtd) -> None:
    first = a_domain(libvirtd)
    second = a_domain(system_libvirtd, name=first.name)
    libvirtd.create(first)
    system_libvirtd.create(second)
    async with watching(libvirtd, system_libvirtd) as host:
        one, two = await host.until_running(first), await host.until_running(second)
        assert (one.name, two.name) == (first.name, first.name)
        assert (await host.off(one.identity)).proof is EndProof.PIDFD
        assert (await host.until_running(second)).identity == two.identity


HOSTILE = {
    "an option": "-uuid",
    "all else": "a,guest=vm1,uuid=x,,b 'c\"d<name>&lt; e\tf %s{0}${HOME}`id` 虚拟机-\N{GRINNING FACE}",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_name_is_data(libvirtd: Libvirtd, name: str) -> None:
    domain = a_domain(libvirtd, name=name)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        instance = await host.until_running(domain)
        assert instance.name == name
        assert (await host.off(instance.identity)).proof is EndProof.PIDFD
        await host.hypervisor.start(vm_of(domain), name, timeout_s=60)
        again = await host.until_running(domain)
        assert (await host.off(again.identity)).proof is EndProof.PIDFD


async def test_names_that_libvirt_or_a_file_system_refuses_never_run(libvirtd: Libvirtd) -> None:
    for name in ("a\nb", "a/b", ""):
        with pytest.raises(RigError):
            libvirtd.define(replace(a_domain(libvirtd), name=name))
    with pytest.raises(RigError):
        libvirtd.create(a_domain(libvirtd, name="x" * 255))  # its definition's file would be NAME.xml


async def test_a_socket_that_the_daemon_may_not_open_or_that_another_serves_is_refused(
    libvirtd: Libvirtd,
) -> None:
    domain = a_domain(libvirtd)
    libvirtd.create(domain)
    async with watching(libvirtd) as host:
        instance = await host.until_running(domain)
        path = instance.ports[0].chardev_path
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as impostor:
            impostor.bind(path)
            impostor.listen()
            link = try_connect(path)
            assert link is not None
            with link, pytest.raises(WrongPeer):
                QemuPeers(host.hypervisor.processes).verify(peer_credentials(link).pid, instance.identity)
        os.chmod(path, 0)
        code = (
            "import sys; from fence_vmchannel.links.stream import try_connect\n"
            "try: try_connect(sys.argv[1])\nexcept PermissionError: sys.exit(13)"
        )
        tried = await off_loop(lambda: run_as_nobody(code, path))
        assert tried.returncode == 13, tried
        assert (await host.off(instance.identity)).proof is EndProof.PIDFD
