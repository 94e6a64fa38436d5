# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose socket is it? Proxies, heirs of a listening socket, several QEMUs at one path (S9)."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.hypervisors.qemu_rig import Host, Qemu, Rig, of, watching
from vmchannel_host.model import EndCause, EndProof, Look, RunState

_PIDFD_GETFD = 438  # of every architecture


async def look_until(host: Host, wanted: Callable[[Look], bool]) -> Look:
    async with asyncio.timeout(30):
        while not wanted(look := await host.look()):
            pass
    return look


def silent(look: Look, qemu: Qemu) -> bool:
    return qemu.vm_uuid in {vm_uuid for vm_uuid, _ in look.silent}


PROXY = """
import os, socket, sys, threading
if os.fork():
    os._exit(0)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()

def pump(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_RDWR)

while True:
    client, _ = listener.accept()
    qemu = socket.socket(socket.AF_UNIX)
    qemu.connect(sys.argv[2])
    for pair in ((client, qemu), (qemu, client)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""
"""Listens at a path for a QEMU that listens elsewhere, as `socat` does; it ends with that QEMU."""


async def test_a_qemu_behind_a_proxy_is_told_by_its_process_and_its_monitor_is_not_believed(rig: Rig) -> None:
    qemu, other = rig.qemu(socket_name="hidden.sock"), rig.qemu()
    path = rig.directory / "proxy.qmp"
    async with watching(rig.directory) as host:
        await host.until(other, lambda i: i.run_state is RunState.RUNNING)
        rig.background(PROXY, str(path), str(qemu.socket))
        look = await look_until(host, lambda look: silent(look, qemu))
        (instance,) = of(look, qemu)
        assert (instance.run_state, instance.monitor) == (RunState.UNKNOWN, "")
        assert any(str(path) in text and "not a QEMU" in text for text in look.conflicts)
        assert not silent(look, other)
        evidence = await host.off(instance.identity, quit_timeout_s=0.5)
        assert (evidence.proof, evidence.cause) == (EndProof.PIDFD, EndCause.KILL)
        look = await look_until(host, lambda look: not silent(look, qemu))
        assert of(look, qemu) == []


def listening_socket(qemu: Qemu) -> socket.socket:
    """A copy of the socket at which a QEMU listens: this process becomes its heir."""
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
    inodes = {row[6] for row in rows if row[-1] == str(qemu.socket) and row[3] == "00010000"}
    files = Path(f"/proc/{qemu.pid}/fd")
    (number,) = [
        one for one in os.listdir(files) if os.readlink(files / one) in {f"socket:[{i}]" for i in inodes}
    ]
    pidfd = os.pidfd_open(qemu.pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, int(number), 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
            pytest.skip("this machine does not let us copy a descriptor (pidfd_getfd)")
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return socket.socket(fileno=copy)


async def test_an_heir_of_the_listening_socket_that_says_nothing_does_not_keep_the_vm_on(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        instance = await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        with listening_socket(qemu):  # connections wait in its backlog, and nobody accepts them
            qemu.kill()
            assert (await host.until_ended(qemu)).proof is EndProof.PIDFD
            look = await host.look()
            assert (of(look, qemu), silent(look, qemu)) == ([], False)
            assert (await host.off(instance.identity)).proof is EndProof.PIDFD


async def test_an_heir_that_answers_as_the_dead_qemu_makes_its_vm_silent(rig: Rig) -> None:
    qemu = rig.qemu()
    async with watching(rig.directory) as host:
        await host.until(qemu, lambda i: i.run_state is RunState.RUNNING)
        with listening_socket(qemu) as heir:
            qemu.close()
            await host.until_ended(qemu)
            serving = asyncio.create_task(answer_as(qemu, heir))
            look = await look_until(host, lambda look: silent(look, qemu))
            assert of(look, qemu) == []
            assert any("does not exist" in text for text in look.conflicts)
            serving.cancel()
            await asyncio.wait((serving,))


async def answer_as(qemu: Qemu, listener: socket.socket) -> None:
    """Serve a monitor that tells of a running VM. Without listen(), which would make us its owner."""
    answers = {
        "query-uuid": {"UUID": qemu.vm_uuid},
        "query-status": {"status": "running", "running": True},
    }
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        client, _ = await loop.sock_accept(listener)
        with client:
            await loop.sock_sendall(client, b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            while data := await loop.sock_recv(client, 65536):
                asked = json.loads(data)
                reply = {"return": answers.get(asked["execute"], {}), "id": asked.get("id")}
                await loop.sock_sendall(client, json.dumps(reply).encode() + b"\r\n")


async def test_a_second_qemu_of_a_hung_vm_at_the_same_path_is_a_second_instance_and_both_are_ended(
    rig: Rig,
) -> None:
    first = rig.qemu(socket_name="same.qmp")
    async with watching(rig.directory) as host:
        await host.until(first, lambda i: i.run_state is RunState.RUNNING)
        first.stop()
        second = rig.qemu("-S", socket_name="same.qmp", vm_uuid=first.vm_uuid)
        look = await host.look()
        assert {instance.identity.pid for instance in of(look, first)} == {first.pid, second.pid}
        for instance in of(look, first):
            evidence = await host.off(instance.identity, quit_timeout_s=0.5)
            assert evidence.proof is EndProof.PIDFD
        look = await host.look()
        assert (of(look, first), silent(look, first)) == ([], False)
