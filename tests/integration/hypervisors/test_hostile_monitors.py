# SPDX-License-Identifier: LGPL-2.1-or-later
"""Monitors that stall, lie, flood or close in mid sentence: only their own VM becomes uncertain."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fakes.qmp_server import (
    OTHER_UUID,
    QmpServer,
    Reply,
    answer,
    close_mid_way,
    late,
    refuse,
    silence,
    truthful,
)
from tests.integration.hypervisors.qemu_rig import FAKE, Rig, boottime, of, watching
from vmchannel_host.hypervisors.monitors import CommandRefused, MonitorClosed, MonitorError, MonitorMute
from vmchannel_host.hypervisors.process import EXECUTABLES
from vmchannel_host.hypervisors.qmp_client import MAX_MESSAGE_BYTES
from vmchannel_host.hypervisors.qmp_monitor import MAX_UNANSWERED, Monitor
from vmchannel_host.model import EndCause, EndProof, IoState, RunState

UUID = "6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11"
BOTH = (*EXECUTABLES, FAKE)


def sock(directory: Path) -> str:
    return str(directory / "fake.sock")


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b'{"QMP": 1}\r\n',
        b"[]\r\n",
        b'{"QMP"',
        b"[" * 100_000 + b"\r\n",
        b"x" * (3 * MAX_MESSAGE_BYTES),
        b'{"event": "RESET"}\r\n',
        None,
    ],
    ids=["http", "number", "list", "half", "deep", "endless", "event", "nothing"],
)
async def test_what_is_no_greeting_is_refused_in_time(rig: Rig, greeting: bytes | None) -> None:
    async with QmpServer(sock(rig.directory), {}, greeting=greeting):
        with pytest.raises(MonitorError):
            await Monitor.connect(sock(rig.directory), timeout_s=0.5)


async def test_nobody_at_the_path_and_a_path_that_is_too_long_are_a_closed_monitor(rig: Rig) -> None:
    for path in (rig.directory / "none.sock", rig.directory / ("x" * 200)):
        with pytest.raises(MonitorClosed):
            await Monitor.connect(str(path), timeout_s=0.5)


async def connected(directory: Path) -> Monitor:
    return await Monitor.connect(sock(directory), timeout_s=5)


@pytest.mark.parametrize(
    ("reply", "error"),
    [(silence, MonitorMute), (close_mid_way, MonitorClosed), (refuse("no"), CommandRefused)],
)
async def test_each_way_not_to_answer_has_its_own_error(
    rig: Rig, reply: Reply, error: type[MonitorError]
) -> None:
    async with QmpServer(sock(rig.directory), {"query-status": reply}):
        monitor = await connected(rig.directory)
        with pytest.raises(error):
            await monitor.execute("query-status", timeout_s=0.3)
        await monitor.close()


async def test_a_late_answer_is_not_taken_for_the_next_one(rig: Rig) -> None:
    replies = {"query-status": late(0.4, "late"), "query-name": answer("prompt")}
    async with QmpServer(sock(rig.directory), replies):
        monitor = await connected(rig.directory)
        with pytest.raises(MonitorMute):
            await monitor.execute("query-status", timeout_s=0.1)
        assert await monitor.execute("query-name", timeout_s=5) == "prompt"
        await monitor.close()


async def test_a_mute_monitor_is_asked_no_more_than_a_few_times_but_quit_gets_through(rig: Rig) -> None:
    async with QmpServer(sock(rig.directory), {"query-status": silence, "quit": silence}) as server:
        monitor = await connected(rig.directory)
        for _ in range(MAX_UNANSWERED + 5):
            with pytest.raises(MonitorMute):
                await monitor.execute("query-status", timeout_s=0.02)
        with pytest.raises(MonitorMute):
            await monitor.execute("quit", timeout_s=0.1)
        assert server.received.count("query-status") == MAX_UNANSWERED
        assert server.received[-1] == "quit"
        await monitor.close()


async def test_events_are_handed_on_in_order_up_to_the_end_of_the_stream(rig: Rig) -> None:
    heard: list[object] = []
    async with QmpServer(sock(rig.directory), {}) as server:
        monitor = await connected(rig.directory)
        monitor.on_event(lambda name, data: heard.append((name, data.get("n"))))
        for number in range(500):
            server.sessions[0].event("STOP", n=number)
        server.sessions[0].hang_up()
        async with asyncio.timeout(5):
            await monitor.wait_closed()
        assert heard == [("STOP", number) for number in range(500)]
        await monitor.close()


async def test_a_message_without_an_end_closes_the_monitor_instead_of_filling_memory(rig: Rig) -> None:
    async with QmpServer(sock(rig.directory), {}) as server:
        monitor = await connected(rig.directory)
        server.sessions[0].raw(b'{"event": "' + b"x" * (4 * MAX_MESSAGE_BYTES))
        async with asyncio.timeout(5):
            await monitor.wait_closed()
        await monitor.close()


async def test_a_monitor_that_names_another_vm_is_a_conflict_and_both_are_silent(rig: Rig) -> None:
    liar, honest = rig.scripted("another-uuid"), rig.qemu("-S")
    async with watching(rig.directory, executables=BOTH) as host:
        await host.until(honest, lambda i: i.run_state is RunState.PRELAUNCH)
        look = await host.look()
        silent = {vm_uuid for vm_uuid, _ in look.silent}
        assert {liar.vm_uuid, OTHER_UUID} <= silent
        assert honest.vm_uuid not in silent
        assert any(OTHER_UUID in conflict and liar.vm_uuid in conflict for conflict in look.conflicts)
        (instance,) = of(look, liar)
        assert instance.run_state is RunState.UNKNOWN
        await host.off(instance.identity, quit_timeout_s=0.1)
        async with asyncio.timeout(10):
            while OTHER_UUID in {vm_uuid for vm_uuid, _ in look.silent}:
                look = await host.look()


async def test_a_monitor_of_a_program_that_is_no_qemu_makes_its_vm_silent(rig: Rig) -> None:
    path = str(rig.directory / "proxy.qmp")
    async with QmpServer(path, truthful(UUID)), watching(rig.directory) as host:
        look = await host.look()
        assert UUID in {vm_uuid for vm_uuid, _ in look.silent}
        assert any(path in conflict for conflict in look.conflicts)
        assert all(instance.vm_uuid != UUID for instance in look.instances)


HEIR = """
import json, os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
if os.fork():
    os._exit(0)
answers = {"query-uuid": {"UUID": sys.argv[2]}, "query-status": {"status": "running"}}
while True:
    client, _ = listener.accept()
    client.sendall(json.dumps({"QMP": {"version": {}, "capabilities": []}}).encode() + b"\\n")
    while data := client.recv(65536):
        command = json.loads(data)
        reply = {"return": answers.get(command["execute"], {}), "id": command.get("id")}
        client.sendall(json.dumps(reply).encode() + b"\\n")
"""


async def test_a_monitor_inherited_from_a_dead_process_makes_its_vm_silent(rig: Rig) -> None:
    path = rig.directory / "heir.qmp"
    heir = rig.background(HEIR, str(path), UUID)
    async with watching(rig.directory) as host:
        look = await host.look()
        assert UUID in {vm_uuid for vm_uuid, _ in look.silent}
        assert any(str(path) in conflict and "does not exist" in conflict for conflict in look.conflicts)
    assert heir.poll() == 0  # the process that called listen() has ended before


@pytest.mark.parametrize("script", ["mute-after-greeting", "garbage", "flood"])
async def test_one_bad_monitor_does_not_delay_another_vm(rig: Rig, script: str) -> None:
    bad, good = rig.scripted(script), rig.qemu()
    async with watching(rig.directory, executables=BOTH) as host:
        instance = await host.until(good, lambda i: i.run_state is RunState.RUNNING)
        look = await host.look(timeout_s=10)
        assert of(look, good)[0].run_state is RunState.RUNNING
        assert len(of(look, bad)) == 1
        began = boottime()
        assert (await host.off(instance.identity)).cause is EndCause.QUIT
        assert boottime() - began < 5


@pytest.mark.parametrize(
    "script", ["mute-after-greeting", "garbage", "flood", "deaf-to-quit", "another-uuid"]
)
async def test_whatever_the_monitor_does_off_ends_the_process(rig: Rig, script: str) -> None:
    bad = rig.scripted(script)
    async with watching(rig.directory, executables=BOTH) as host:
        instance = await host.until(bad, lambda i: True)
        await host.look()
        evidence = await host.off(instance.identity, quit_timeout_s=0.3)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.KILL)
        assert evidence.io in (IoState.NONE, IoState.UNPROVEN)


async def test_the_stream_is_read_to_its_end_after_the_kill(rig: Rig) -> None:
    source = rig.scripted("migrates-when-told-to-quit")
    async with watching(rig.directory, executables=BOTH) as host:
        instance = await host.until(source, lambda i: i.run_state is RunState.RUNNING)
        evidence = await host.off(instance.identity, quit_timeout_s=0.3)
        assert (evidence.cause, evidence.departed) == (EndCause.KILL, True)


async def test_no_vm_hides_the_monitor_of_another_by_naming_its_path_for_a_port(rig: Rig) -> None:
    path = rig.directory / "victim.qmp"
    hostile = rig.qemu(
        *("-device", "virtio-serial", "-device", "virtserialport,chardev=c0,name=org.vmchannel.0,id=p0"),
        *("-chardev", f"socket,id=c0,path={path},server=off,reconnect=3600"),
    )
    async with watching(rig.directory) as host:
        await host.until(hostile, lambda one: [port.chardev_path for port in one.ports] == [str(path)])
        victim = rig.qemu(socket_name=path.name)
        found = await host.until(victim, lambda one: one.run_state is RunState.RUNNING)
        assert found.monitor == str(path)
