# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real QEMU whose command line cannot be read: other VMs are fenced, it may be any of the rest (S1, S7)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.integration.hypervisors.made_up_proc import MadeUpProc, made_up_proc
from tests.integration.hypervisors.qemu_rig import Host, Qemu, Rig, boottime, make_host, of, watching
from vmchannel_host.fencing.evidence import silent_reasons
from vmchannel_host.model import EndCause, EndProof, IoState, Look, RunState, VmUuid

STRANGER = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")


@pytest.fixture
def proc(rig: Rig) -> Iterator[MadeUpProc]:
    with made_up_proc(rig.directory) as made:
        yield made


async def look_until(host: Host, wanted: Callable[[Look], bool]) -> Look:
    async with asyncio.timeout(30):
        while not wanted(look := await host.look()):
            pass
    return look


def silent(look: Look, qemu: Qemu) -> bool:
    return bool(silent_reasons(look, qemu.vm_uuid))


async def test_s7_another_vm_is_fenced_in_its_time_while_a_qemu_cannot_be_identified(
    rig: Rig, proc: MadeUpProc
) -> None:
    good, hung = rig.qemu(), rig.qemu(socket_name="hung.sock")
    proc.show(good)
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        instance = await host.until(good, lambda i: i.run_state is RunState.RUNNING)
        look = await host.look()
        assert not silent(look, good)
        assert any(f"pid {hung.pid} " in conflict for conflict in look.conflicts)
        began = boottime()
        evidence = await host.off(instance.identity)
        proc.hide(good)
        look = await host.look()
        assert boottime() - began < 5
        assert evidence.cause is EndCause.QUIT
        assert (of(look, good), silent(look, good)) == ([], False)


async def test_s1_what_cannot_be_identified_may_be_a_vm_that_was_not_running_beside_it(
    rig: Rig, proc: MadeUpProc
) -> None:
    good, hung = rig.qemu(), rig.qemu(socket_name="hung.sock")
    proc.show(good)
    async with watching(rig.directory, processes=proc.table()) as host:
        instance = await host.until(good, lambda i: i.run_state is RunState.RUNNING)
        await host.off(instance.identity)
        proc.hide(good)
        proc.hang(hung)
        look = await host.look()
        assert silent(look, good)  # it may be its next start
        assert silent(look, hung)
        assert silent_reasons(look, STRANGER)


async def test_s1_what_serves_a_socket_of_a_vm_may_be_it_though_both_live(rig: Rig, proc: MadeUpProc) -> None:
    good, other = rig.qemu(), rig.qemu()
    hung = rig.qemu(socket_name=good.socket.name)  # as a second start of the same command would
    proc.show(good)
    proc.show(other)
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        await host.until(other, lambda i: i.run_state is RunState.RUNNING)
        look = await host.look()
        assert silent(look, good)
        assert not silent(look, other)


async def test_a_monitor_that_answers_for_it_makes_the_vm_silent_that_it_names(
    rig: Rig, proc: MadeUpProc
) -> None:
    hung = rig.qemu()
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        look = await look_until(host, lambda look: hung.vm_uuid in {vm_uuid for vm_uuid, _ in look.silent})
        assert of(look, hung) == []


async def test_it_is_adopted_and_fenced_as_soon_as_it_can_be_identified(rig: Rig, proc: MadeUpProc) -> None:
    hung = rig.qemu()
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        look = await host.look()
        assert (of(look, hung), silent(look, hung)) == ([], True)
        proc.wake(hung)
        instance = await host.until(hung, lambda i: i.run_state is RunState.RUNNING)
        look = await look_until(host, lambda look: not look.unknown)
        assert not silent(look, hung)
        assert (await host.off(instance.identity)).cause is EndCause.QUIT


async def test_one_that_an_earlier_daemon_recorded_is_fenced_though_it_cannot_be_identified_again(
    rig: Rig, proc: MadeUpProc
) -> None:
    hung = rig.qemu(socket_name="hung.sock")
    proc.show(hung)
    (instance,) = of(await make_host(rig.directory, processes=proc.table()).look(), hung)
    proc.hide(hung)
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        assert of(await host.look(), hung) == []
        evidence = await host.off(instance.identity)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.KILL)
        assert evidence.io is IoState.UNPROVEN  # its command line may name storage that cannot be probed
        assert hung.process.wait(10) == -signal.SIGKILL


async def test_one_that_ends_unidentified_is_forgotten(rig: Rig, proc: MadeUpProc) -> None:
    hung = rig.qemu(socket_name="hung.sock")
    proc.hang(hung)
    async with watching(rig.directory, processes=proc.table()) as host:
        assert silent(await host.look(), hung)
        hung.close()
        look = await look_until(host, lambda look: not look.unknown)
        assert silent_reasons(look, STRANGER) == []
