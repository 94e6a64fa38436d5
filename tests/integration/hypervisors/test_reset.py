# SPDX-License-Identifier: LGPL-2.1-or-later
"""`reset` and its proof, on real QEMU and on servers that lie (S8)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.fakes.qmp_server import (
    QmpServer,
    Reply,
    Session,
    answer,
    close_mid_way,
    refuse,
    silence,
    truthful,
    with_events,
)
from tests.integration.hypervisors.qemu_rig import HOST, Rig, boottime, command, migrate_away, watching
from vmchannel_host.hypervisors import HypervisorError, NotProven
from vmchannel_host.hypervisors.cmdline import CommandLine
from vmchannel_host.hypervisors.instances import Watched
from vmchannel_host.hypervisors.process import VerifiedProcess
from vmchannel_host.hypervisors.qmp_monitor import Monitor
from vmchannel_host.hypervisors.resetting import reset_instance
from vmchannel_host.model import BootId, InstanceReset, Migration, ProcessIdentity, RunState, VmUuid

UUID = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
OURS = {"guest": False, "reason": "host-qmp-system-reset"}
GUESTS = {"guest": True, "reason": "guest-reset"}


async def test_a_running_qemu_is_reset_with_proof_again_and_again(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        for _ in range(10):
            evidence = await host.hypervisor.reset(instance.identity, timeout_s=10)
            assert evidence == InstanceReset(HOST, instance.identity, evidence.elapsed_ms)


@pytest.mark.parametrize(
    ("arguments", "run_state"),
    [(("-S",), RunState.PRELAUNCH), (("-incoming", "defer"), RunState.INMIGRATE)],
)
async def test_a_qemu_that_does_not_run_its_guest_is_not_reset(
    rig: Rig, arguments: tuple[str, ...], run_state: RunState
) -> None:
    qemu = rig.qemu(*arguments)
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is run_state)
        with pytest.raises(HypervisorError, match="no reset in state"):
            await host.hypervisor.reset(instance.identity, timeout_s=10)


async def test_a_migrated_source_is_not_reset_even_if_it_runs_again(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        await migrate_away(second, rig.directory / "memory")
        await command(second, "cont")
        instance = await host.until(
            qemu, lambda i: i.run_state is RunState.RUNNING and i.migration is Migration.COMPLETED
        )
        with pytest.raises(HypervisorError, match="migration completed"):
            await host.hypervisor.reset(instance.identity, timeout_s=10)


async def test_a_qemu_that_would_leave_on_reset_is_not_reset(rig: Rig) -> None:
    qemu = rig.qemu("-no-reboot")
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        assert not instance.resettable
        with pytest.raises(HypervisorError, match="-no-reboot"):
            await host.hypervisor.reset(instance.identity, timeout_s=10)
        assert qemu.process.poll() is None


async def test_a_stopped_qemu_gives_no_proof_in_time(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        qemu.stop()
        with pytest.raises(HypervisorError):
            await host.hypervisor.reset(instance.identity, timeout_s=0.5)


async def test_an_unknown_process_is_not_reset(rig: Rig) -> None:
    async with watching(rig.directory) as host:
        identity = ProcessIdentity(1, 1, "/usr/bin/qemu-system-x86_64", UUID, BootId("boot"))
        with pytest.raises(HypervisorError, match="not watched"):
            await host.hypervisor.reset(identity, timeout_s=1)


@asynccontextmanager
async def scripted(directory: Path, **replies: Reply) -> AsyncGenerator[tuple[Watched, QmpServer], None]:
    """An instance whose monitor is scripted; its process is this one."""
    path = str(directory / "fake.qmp")
    script = truthful(UUID) | {name.replace("_", "-"): reply for name, reply in replies.items()}
    script |= {name: reply for name, reply in replies.items() if name == "system_reset"}
    async with QmpServer(path, script) as server:
        identity = ProcessIdentity(os.getpid(), 1, "/usr/bin/qemu-system-x86_64", UUID, BootId("boot"))
        watched = Watched(VerifiedProcess(identity, CommandLine((UUID,), "vm"), os.pidfd_open(os.getpid())))
        watched.monitor = await Monitor.connect(path, timeout_s=5)
        try:
            yield watched, server
        finally:
            await watched.monitor.close()
            watched.process.close()


async def reset(watched: Watched, *, timeout_s: float = 10.0) -> InstanceReset:
    return await reset_instance(watched, host=HOST, clock=boottime, timeout_s=timeout_s)


@pytest.mark.parametrize("before", [False, True])
async def test_the_event_counts_on_either_side_of_the_reply(rig: Rig, before: bool) -> None:
    """QEMU 7.2 writes it before the reply at times: the command is carried out before its reply is queued."""
    reply = with_events(("RESET", OURS), before=before)
    async with scripted(rig.directory, system_reset=reply) as (watched, _):
        assert (await reset(watched)).identity == watched.identity


async def test_the_state_is_the_last_thing_asked_before_and_after_the_reset(rig: Rig) -> None:
    """The commands of a question are sent at once: they must be carried out in their order all the same."""
    reply = with_events(("RESET", OURS), before=False)
    async with scripted(rig.directory, system_reset=reply) as (watched, server):
        await reset(watched)
        state = ["query-migrate", "query-status"]
        assert server.received[-5:] == [*state, "system_reset", *state]
        assert sorted(server.received[-8:-5]) == ["human-monitor-command", "qom-list", "qom-list"]


async def test_an_event_that_came_before_the_command_does_not_count(rig: Rig) -> None:
    async with scripted(rig.directory, system_reset=answer({})) as (watched, server):
        server.replies["query-status"] = with_stale_event(server.replies["query-status"])
        with pytest.raises(NotProven):
            await reset(watched, timeout_s=0.5)
        assert "system_reset" in server.received


def with_stale_event(reply: Reply) -> Reply:
    async def lie(session: Session, identifier: object) -> None:
        session.event("RESET", **OURS)
        await reply(session, identifier)

    return lie


async def test_a_reset_by_the_guest_does_not_count(rig: Rig) -> None:
    reply = with_events(("RESET", GUESTS), before=False)
    async with scripted(rig.directory, system_reset=reply) as (watched, _):
        with pytest.raises(NotProven):
            await reset(watched, timeout_s=0.5)


@pytest.mark.parametrize("reply", [silence, close_mid_way, refuse("no"), answer({})])
async def test_without_reply_and_event_nothing_is_proven(rig: Rig, reply: Reply) -> None:
    async with scripted(rig.directory, system_reset=reply) as (watched, _):
        with pytest.raises(HypervisorError):
            await reset(watched, timeout_s=0.5)


async def test_an_event_without_the_reply_proves_nothing(rig: Rig) -> None:
    async def event_only(session: Session, _identifier: object) -> None:
        session.event("RESET", **OURS)

    async with scripted(rig.directory, system_reset=event_only) as (watched, _):
        with pytest.raises(HypervisorError):
            await reset(watched, timeout_s=0.5)


async def test_a_vm_that_does_not_run_afterwards_is_not_proven_reset(rig: Rig) -> None:
    async with scripted(rig.directory) as (watched, server):

        async def reset_and_pause(session: Session, identifier: object) -> None:
            server.replies["query-status"] = answer({"status": "paused", "running": False})
            await with_events(("RESET", OURS), before=False)(session, identifier)

        server.replies["system_reset"] = reset_and_pause
        with pytest.raises(HypervisorError, match="state paused"):
            await reset(watched)


async def test_a_vm_that_migrates_afterwards_is_not_proven_reset(rig: Rig) -> None:
    async with scripted(rig.directory) as (watched, server):

        async def reset_and_migrate(session: Session, identifier: object) -> None:
            server.replies["query-migrate"] = answer({"status": "active", "ram": {}})
            await with_events(("RESET", OURS), before=False)(session, identifier)

        server.replies["system_reset"] = reset_and_migrate
        with pytest.raises(HypervisorError, match="migration outgoing"):
            await reset(watched)


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("qom-list", answer([{"name": "device[0]", "type": "child<vfio-pci>"}])),
        ("human-monitor-command", answer("net0: index=0,type=vhost-user,chardev=c")),
        ("human-monitor-command", refuse("not built in")),
        ("query-status", answer({"status": "levitating"})),
        ("query-migrate", answer("none")),
    ],
)
async def test_a_device_or_state_that_a_reset_does_not_cover_is_refused_before_it_is_tried(
    rig: Rig, name: str, reply: Reply
) -> None:
    async with scripted(rig.directory) as (watched, server):
        server.replies[name] = reply
        with pytest.raises(HypervisorError):
            await reset(watched, timeout_s=2)
        assert "system_reset" not in server.received


async def test_a_reset_ends_with_its_caller(rig: Rig) -> None:
    async with scripted(rig.directory, system_reset=silence) as (watched, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reset(watched, timeout_s=30)
