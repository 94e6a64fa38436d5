# SPDX-License-Identifier: LGPL-2.1-or-later
"""`off` on real QEMU processes, in every state they can be in."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import (
    QEMU,
    HeldMonitor,
    Host,
    Qemu,
    Rig,
    command,
    make_host,
    migrate_away,
    of,
    watching,
)
from vmchannel_host.hypervisors import HypervisorError
from vmchannel_host.hypervisors.proc_stat import parse_stat
from vmchannel_host.hypervisors.process import read_boot_id, read_pid_namespace
from vmchannel_host.model import (
    BootId,
    EndCause,
    EndProof,
    Instance,
    IoState,
    Migration,
    ProcessIdentity,
    RunState,
    VmUuid,
)

QUIT_S = 0.5


def disk(directory: Path, options: str = "") -> tuple[str, str]:
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, 1 << 20)
    return ("-drive", f"file={image},format=raw,if=virtio{options}")


async def ready(host: Host, qemu: Qemu, run_state: RunState = RunState.RUNNING) -> Instance:
    return await host.until(qemu, lambda instance: instance.run_state is run_state)


async def test_a_running_qemu_quits_and_has_drained(rig: Rig) -> None:
    qemu = rig.qemu(*disk(rig.directory))
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        evidence = await host.off(instance.identity)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.QUIT)
        assert evidence.io is IoState.DRAINED
        assert not evidence.departed
        assert evidence == await host.until_ended(qemu)
        assert of(await host.look(), qemu) == []


@pytest.mark.parametrize(
    ("arguments", "run_state"),
    [(("-S",), RunState.PRELAUNCH), (("-incoming", "defer"), RunState.INMIGRATE)],
)
async def test_a_qemu_that_does_not_run_its_guest_is_ended_alike(
    rig: Rig, arguments: tuple[str, ...], run_state: RunState
) -> None:
    qemu = rig.qemu(*arguments)
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu, run_state)
        evidence = await host.off(instance.identity)
        assert (evidence.cause, evidence.departed) == (EndCause.QUIT, False)


async def test_an_incoming_qemu_is_told_apart(rig: Rig) -> None:
    qemu = rig.qemu("-incoming", "defer")
    async with watching(rig.directory) as host:
        assert (await ready(host, qemu, RunState.INMIGRATE)).migration is Migration.INCOMING


async def test_a_stopped_qemu_is_killed_once_the_quit_timeout_is_over(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        qemu.stop()
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S)
        assert (evidence.proof, evidence.cause, evidence.io) == (EndProof.PIDFD, EndCause.KILL, IoState.NONE)
        assert not evidence.departed
        assert evidence.elapsed_ms >= QUIT_S * 1000


async def test_after_a_kill_the_image_locks_prove_that_writes_have_settled(rig: Rig) -> None:
    qemu = rig.qemu(*disk(rig.directory))
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        qemu.stop()
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S)
        assert (evidence.cause, evidence.io) == (EndCause.KILL, IoState.SETTLED)


@pytest.mark.parametrize("with_disk", [True, False])
async def test_only_the_kill_of_a_qemu_with_an_image_open_is_noted(rig: Rig, with_disk: bool) -> None:
    noted: list[bool] = []

    async def note() -> None:
        noted.append(True)

    qemu = rig.qemu(*disk(rig.directory)) if with_disk else rig.qemu()
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        qemu.stop()
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S, before_kill=note)
        assert evidence.io is (IoState.SETTLED if with_disk else IoState.NONE)
    assert len(noted) == with_disk


async def test_an_image_without_locks_leaves_writes_unproven(rig: Rig) -> None:
    qemu = rig.qemu(*disk(rig.directory, ",file.locking=off"))
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        qemu.stop()
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S)
        assert evidence.io is IoState.UNPROVEN


async def test_a_connection_that_qemu_opened_leaves_writes_unproven(rig: Rig) -> None:
    path = rig.directory / "listener.sock"

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(hold, path)
    qemu = await asyncio.to_thread(rig.qemu, "-chardev", f"socket,id=c,path={path},server=off")
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        qemu.stop()
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S)
        assert evidence.io is IoState.UNPROVEN
    for writer in connections:
        writer.close()
    server.close()
    await asyncio.sleep(0)


async def test_a_monitor_held_by_another_client_does_not_stop_off(rig: Rig) -> None:
    qemu = rig.qemu()
    held = HeldMonitor(qemu)
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: True)
        evidence = await host.off(instance.identity, quit_timeout_s=QUIT_S)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.KILL)
    held.close()


async def test_a_hypervisor_that_watches_nothing_can_still_end_a_recorded_process(rig: Rig) -> None:
    qemu = rig.qemu()
    host = make_host(rig.directory)
    (instance,) = of(await host.look(), qemu)
    evidence = await host.off(instance.identity)
    assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.KILL)


async def test_off_twice_gives_the_first_evidence_again(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await ready(host, qemu)
        async with asyncio.TaskGroup() as tasks:
            both = [tasks.create_task(host.off(instance.identity)) for _ in range(2)]
        first, second = (task.result() for task in both)
        assert first == second == await host.off(instance.identity)


async def test_a_process_that_ended_before_is_proven_absent_by_a_new_daemon(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    (instance,) = of(await make_host(rig.directory).look(), qemu)
    qemu.close()
    host = make_host(rig.directory)
    evidence = await host.off(instance.identity)
    assert (evidence.proof, evidence.cause, evidence.io) == (EndProof.ABSENT, EndCause.NONE, IoState.UNPROVEN)
    assert evidence == await host.hypervisor.ended(instance.identity)


async def test_an_end_that_its_parent_has_not_noticed_is_an_end(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    (instance,) = of(await make_host(rig.directory).look(), qemu)
    qemu.kill_without_reaping()
    host = make_host(rig.directory)
    assert (await host.off(instance.identity)).proof is EndProof.ABSENT
    assert of(await host.look(), qemu) == []


async def test_a_living_process_is_not_reported_as_ended(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    host = make_host(rig.directory)
    (instance,) = of(await host.look(), qemu)
    assert await host.hypervisor.ended(instance.identity) is None
    assert await make_host(rig.directory).hypervisor.ended(instance.identity) is None


async def test_a_recycled_pid_is_never_touched(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    host = make_host(rig.directory)
    (instance,) = of(await host.look(), qemu)
    earlier = replace(instance.identity, start_time=instance.identity.start_time - 1)
    assert (await host.off(earlier)).proof is EndProof.ABSENT
    assert qemu.process.poll() is None


async def test_a_process_of_another_boot_is_proven_by_the_boot_and_not_touched(rig: Rig) -> None:
    qemu = rig.qemu(machine="none")
    host = make_host(rig.directory)
    (instance,) = of(await host.look(), qemu)
    before = replace(instance.identity, boot_id=BootId("an-earlier-boot"))
    assert (await host.off(before)).proof is EndProof.OTHER_BOOT
    assert qemu.process.poll() is None


async def test_a_process_that_is_another_vm_is_refused_and_not_touched(rig: Rig) -> None:
    qemu, other = rig.qemu(machine="none"), rig.qemu(machine="none")
    for host in (make_host(rig.directory), make_host(rig.directory)):
        (instance,) = of(await host.look(), qemu)
        wrong = replace(instance.identity, vm_uuid=other.vm_uuid)
        with pytest.raises(HypervisorError, match="is named, but"):
            await host.off(wrong)
    assert qemu.process.poll() is None


async def test_the_vm_of_another_program_with_that_pid_is_refused() -> None:
    with open("/proc/self/stat") as stat:  # noqa: ASYNC230 - it cannot block
        start_time = parse_stat(stat.read()).start_time
    uuid = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
    this = ProcessIdentity(os.getpid(), start_time, QEMU, uuid, read_boot_id(), read_pid_namespace())
    with pytest.raises(HypervisorError, match="not a QEMU"):
        await make_host(Path("/nonexistent")).off(this)


async def test_a_migrated_source_is_ended_as_departed(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await ready(host, qemu)
        await migrate_away(second, rig.directory / "memory")
        instance = await ready(host, qemu, RunState.POSTMIGRATE)
        assert instance.migration is Migration.COMPLETED
        evidence = await host.off(instance.identity)
        assert (evidence.cause, evidence.departed) == (EndCause.QUIT, True)


async def test_a_source_that_is_killed_before_anybody_asked_it_has_departed(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await ready(host, qemu)
        await migrate_away(second, rig.directory / "memory")
        qemu.kill()
        assert (await host.until_ended(qemu)).departed


async def test_a_source_that_was_reset_after_its_migration_is_still_departed(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await ready(host, qemu)
        await migrate_away(second, rig.directory / "memory")
        await command(second, "system_reset", "cont")
        instance = await host.until(
            qemu, lambda i: i.run_state is RunState.RUNNING and i.migration is Migration.COMPLETED
        )
        assert (await host.off(instance.identity)).departed


async def test_a_destination_that_took_over_is_no_source(rig: Rig) -> None:
    memory, second = rig.directory / "memory", rig.directory / "second.sock"
    source = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await ready(host, source)
        await migrate_away(second, memory)
        destination = rig.qemu("-incoming", f"exec:cat {memory}", vm_uuid=source.vm_uuid)
        instance = await ready(host, destination)
        assert instance.migration is Migration.NONE
        look = await host.look()
        assert {(i.run_state, i.migration) for i in of(look, source)} == {
            (RunState.POSTMIGRATE, Migration.COMPLETED),
            (RunState.RUNNING, Migration.NONE),
        }
        assert not (await host.off(instance.identity)).departed


async def test_a_failed_migration_is_no_departure(rig: Rig) -> None:
    second = rig.directory / "second.sock"
    qemu = rig.qemu("-qmp", f"unix:{second},server=on,wait=off")
    async with watching(rig.directory) as host:
        await ready(host, qemu)
        with pytest.raises(AssertionError, match="failed"):
            await migrate_away(second, rig.directory / "no such directory" / "memory")
        instance = await host.until(
            qemu, lambda i: i.run_state is RunState.RUNNING and i.migration is Migration.NONE
        )
        assert not (await host.off(instance.identity)).departed
