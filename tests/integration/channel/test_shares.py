# SPDX-License-Identifier: LGPL-2.1-or-later
"""One user, one VM, cannot use up what others need of a hub."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import Limits, PeerIdentity, Role
from fence_vmchannel.errors import CloseCode, HubUnreachable, ServiceRefused
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.peers import HOST_PEER
from tests.fakes.hub_pair import HOST, VM, FakePort, eventually, hub_pair

NOBODY, SOMEBODY = 65_534, 65_533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as other users")


async def mute(channel: Channel) -> None:
    await channel.accept()
    await channel.wait_closed()


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def acting_as(uid: int) -> Generator[None]:
    """What connects meanwhile is this user's, to SO_PEERCRED."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
async def test_a_user_who_takes_all_places_he_can_leaves_some_to_other_users(open_dir: Path) -> None:
    async with hub_pair(open_dir, mode=0o666, max_clients=24) as pair:
        with ExitStack() as held:
            with acting_as(NOBODY):
                for _ in range(24):
                    sock = held.enter_context(socket.socket(socket.AF_UNIX))
                    sock.connect(pair.guest_path)
            assert await eventually(lambda: pair.guest.clients == 8)
            with acting_as(NOBODY), pytest.raises(HubUnreachable):
                async with connect(pair.guest_path):
                    pass
            pair.host.offer("org.example.mute", mute)
            with acting_as(SOMEBODY):
                async with connect(pair.guest_path) as other:
                    await other.open("org.example.mute", timeout_s=5)


@needs_root
async def test_a_user_who_opens_all_channels_he_can_leaves_some_to_other_users(open_dir: Path) -> None:
    limits = Limits(channels=32)
    async with hub_pair(open_dir, mode=0o666, limits=limits) as pair, AsyncExitStack() as programs:
        pair.host.offer("org.example.mute", mute)
        with acting_as(NOBODY):
            greedy = [await programs.enter_async_context(connect(pair.guest_path)) for _ in range(2)]
        for number in range(16):
            await greedy[number % 2].open("org.example.mute", timeout_s=5)
        with pytest.raises(ServiceRefused, match="his share") as refused:
            await greedy[0].open("org.example.mute", timeout_s=5)
        assert refused.value.code is CloseCode.LIMIT
        with acting_as(SOMEBODY):
            other = await programs.enter_async_context(connect(pair.guest_path))
        await other.open("org.example.mute", timeout_s=5)


@asynccontextmanager
async def two_vms(directory: Path, local_limits: Limits) -> AsyncGenerator[tuple[str, Hub, Hub]]:
    """A host's hub and the hubs of two VMs: where the host's applications connect, and the VMs' hubs."""
    ports = FakePort(), FakePort()
    identities = [PeerIdentity(f"boot {number}", "guest") for number in (1, 2)]
    try:
        async with (
            Hub(PeerIdentity("host-boot", "host"), local_limits=local_limits) as host,
            Hub(identities[0], default_peer=HOST_PEER) as one,
            Hub(identities[1], default_peer=HOST_PEER) as two,
        ):
            path = str(directory / "host.sock")
            host.serve(path)
            for vm, guest, port in ((VM, one, ports[0]), (replace(VM, name="vm2", key="2"), two, ports[1])):
                host.attach(vm, port.host)
                guest.attach(HOST, port.guest, role=Role.GUEST)
            yield path, one, two
    finally:
        for port in ports:
            port.close()


async def open_all(guest: Hub, service: str) -> int:
    """Open channels until one is refused; how many were opened."""
    opened = 0
    while True:
        try:
            await guest.open("", service)
        except ServiceRefused:
            return opened
        opened += 1


async def test_a_vm_that_opens_all_channels_it_can_leaves_an_application_some_for_others(
    tmp_path: Path,
) -> None:
    async with (
        two_vms(tmp_path, Limits(channels=65)) as (path, one, two),
        connect(path) as application,
        application.offer("org.example.mute", mute),  # a channel too
    ):
        assert await open_all(one, "org.example.mute") == 32
        await two.open("", "org.example.mute")


async def test_a_vm_that_takes_all_windows_it_can_leaves_an_application_some_for_others(
    tmp_path: Path,
) -> None:
    window = Limits().window_bytes
    async with (
        two_vms(tmp_path, Limits(session_bytes=9 * window)) as (path, one, two),
        connect(path) as application,
        application.offer("org.example.mute", mute),
    ):
        assert await open_all(one, "org.example.mute") == 4
        await two.open("", "org.example.mute")
