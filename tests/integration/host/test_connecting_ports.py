# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports of real QEMUs that connect to the daemon: whose connection it is, and what becomes of the socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.host.connecting_rig import (
    PORT,
    connect,
    connecting,
    is_connected,
    serving,
    start,
    until,
)
from tests.integration.hypervisors.qemu_rig import Rig, SecondMonitor
from vmchannel_host.model import SocketMode

LISTENERS = "vmchannel_host.port_sockets"


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Starts QEMUs; its directory has a short path, because a unix socket's is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        made = Rig(Path(directory))
        yield made
        made.close()


async def test_qemus_that_share_a_path_get_their_own_ports_and_a_stranger_gets_nothing(rig: Rig) -> None:
    path, refused = rig.directory / "shared.sock", list[str]()
    first = start(rig, path)
    async with serving(rig.directory, refused=lambda: refused.append("one")) as server:
        await server.until_linked(first.vm_uuid)
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())
        with connect(path) as stranger:
            assert await asyncio.to_thread(stranger.recv, 1) == b""
        assert refused == ["one"]

        second = start(rig, path)
        await server.until_linked(second.vm_uuid)
        assert {(port.vm_uuid, port.port.mode) for port in server.ports.served()} == {
            (one.vm_uuid, SocketMode.CONNECT) for one in (first, second)
        }

        first.kill()
        await server.until_gone(first.vm_uuid)
        assert path.exists()
        second.kill()
        await server.until_gone(second.vm_uuid)
        assert not path.exists()
    assert refused == ["one"]


async def test_a_port_outlives_the_daemon_and_each_end_of_its_socket(rig: Rig) -> None:
    path, monitor = rig.directory / "p.sock", SecondMonitor(rig.directory)
    qemu = start(rig, path, *monitor.arguments)
    async with serving(rig.directory) as server:
        await server.until_linked(qemu.vm_uuid)
        path.unlink()  # QEMU's connection goes on; another would not find the way
        await until(path.exists, "the socket made anew")
        assert await is_connected(monitor)
    assert not path.exists()
    path_of_a_dead_daemon = socket.socket(socket.AF_UNIX)
    path_of_a_dead_daemon.bind(str(path))
    path_of_a_dead_daemon.close()
    async with serving(rig.directory) as server:
        await server.until_linked(qemu.vm_uuid)


async def test_a_port_that_is_plugged_in_later_connects_too(rig: Rig) -> None:
    path, monitor = rig.directory / "later.sock", SecondMonitor(rig.directory)
    qemu = rig.qemu("-device", "virtio-serial", *monitor.arguments)
    async with serving(rig.directory) as server:
        await until(lambda: len(server.hypervisor.processes.listens_at(qemu.pid) or ()) == 2, "its monitors")
        address = {"type": "unix", "data": {"path": str(path)}}
        data = {"addr": address, "server": False, "reconnect": 1}
        await monitor.ask("chardev-add", id="c", backend={"type": "socket", "data": data})
        await monitor.ask("device_add", driver="virtserialport", id="p", chardev="c", name=PORT)
        server.look_at_ports(qemu.vm_uuid)
        await server.until_linked(qemu.vm_uuid)
        assert await is_connected(monitor, "c")
        await monitor.ask("device_del", id="p")
        await server.until_gone(qemu.vm_uuid)
        assert not path.exists()


async def test_a_path_where_another_program_listens_is_left_alone_until_it_is_free(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    path = rig.directory / "taken.sock"
    foreign = socket.socket(socket.AF_UNIX)
    foreign.bind(str(path))
    foreign.listen(64)
    inode = path.stat().st_ino
    qemu = start(rig, path)
    async with serving(rig.directory) as server:
        await until(lambda: bool(server.listeners.troubles()), "the problem")
        [trouble] = server.listeners.troubles()
        assert (trouble.claim.vm_uuid, trouble.claim.path) == (qemu.vm_uuid, str(path))
        assert trouble.reason == f"another program listens there (pid {os.getpid()})"
        assert path.stat().st_ino == inode
        foreign.close()
        await server.until_linked(qemu.vm_uuid)
        assert server.listeners.troubles() == ()
    told = [one.getMessage() for one in caplog.records if one.name.startswith(LISTENERS)]
    assert sum("another program listens there" in one for one in told) == 1, told
    assert any(one.levelno == logging.ERROR and qemu.vm_uuid in one.getMessage() for one in caplog.records)


async def test_a_port_outside_the_allowed_directories_is_told_with_the_key_that_allows_it(rig: Rig) -> None:
    elsewhere = rig.directory / "elsewhere"
    elsewhere.mkdir()
    qemu = start(rig, elsewhere / "p.sock")
    async with serving(rig.directory) as server:
        await until(lambda: bool(server.listeners.troubles()), "the problem")
        [trouble] = server.listeners.troubles()
        assert "ports.listen_in" in trouble.reason
        assert list(elsewhere.iterdir()) == []
        await until(
            lambda: "ports.listen_in" in getattr(server.peer(qemu.vm_uuid), "detail", ""), "it at the port"
        )


async def test_two_ports_of_one_vm_at_one_path_are_both_refused(rig: Rig) -> None:
    path = rig.directory / "twins.sock"
    qemu = rig.qemu(*connecting(path), *connecting(path, name="org.vmchannel.1", number=1))
    async with serving(rig.directory) as server:
        await until(
            lambda: "cannot be told" in getattr(server.peer(qemu.vm_uuid), "detail", ""), "the problem"
        )
        assert not any(peer.endpoint.linked for peer in server.hub.peers)
        assert [one.claim.port for one in server.listeners.troubles()] == [PORT, "org.vmchannel.1"]
