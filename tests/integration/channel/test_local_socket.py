# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket that a hub serves: who may use it, what lies in its way, what hostile clients can do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fence_vmchannel import connect
from fence_vmchannel.access import AccessRule, AccessRules
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.errors import ChannelClosed, CloseCode, HubUnreachable, LinkError
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.links.local import LocalListener
from tests.fakes.hub_pair import eventually, hub_pair
from tests.fakes.nobody import run_as_nobody


async def echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def ask_as_nobody(path: str, service: str) -> str:
    """Run a blocking client as another user; returns what it printed."""
    program = (
        "import sys, time\n"
        "from fence_vmchannel import BlockingClient, ChannelError\n"
        "try:\n"
        "    with BlockingClient.connect(sys.argv[1], deadline=time.monotonic() + 10) as client:\n"
        "        print(client.request(sys.argv[2], b'x', deadline=time.monotonic() + 10))\n"
        "except ChannelError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = run_as_nobody(program, path, service)
    return done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")
async def test_a_service_is_refused_to_a_user_whom_no_rule_names(open_dir: Path) -> None:
    access = AccessRules(open={"org.vmchannel.fence": AccessRule()})
    async with hub_pair(open_dir, guest_access=access, mode=0o666) as pair:
        pair.host.offer("org.vmchannel.fence", echo)
        pair.host.offer("org.example.echo", echo)
        said = await asyncio.to_thread(ask_as_nobody, pair.guest_path, "org.vmchannel.fence")
        assert said.startswith("ServiceRefused channel closed: not permitted: uid 65534"), said
        assert await asyncio.to_thread(ask_as_nobody, pair.guest_path, "org.example.echo") == "b'x'\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")
async def test_a_user_whom_the_sockets_mode_shuts_out_is_told_so(open_dir: Path) -> None:
    async with hub_pair(open_dir, mode=0o600) as pair:
        said = await asyncio.to_thread(ask_as_nobody, pair.guest_path, "org.example.echo")
        assert said.startswith("HubUnreachable no hub answers on"), said
        assert "Permission denied" in said


async def test_no_hub_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HubUnreachable, match=r"no hub answers on .*: No such file"):
        async with connect(str(tmp_path / "nothing.sock")):
            pass


async def test_a_hub_that_never_greets_is_unreachable_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "mute.sock")
    listener = LocalListener(path)
    try:
        with pytest.raises(HubUnreachable, match="does not answer"):
            async with connect(path, timeout_s=0.1):
                pass
    finally:
        listener.close()


def test_a_full_backlog_is_no_error_at_once(tmp_path: Path) -> None:
    from fence_vmchannel.links.stream import try_connect

    path = str(tmp_path / "full.sock")
    listener = LocalListener(path, backlog=0)
    clients: list[socket.socket] = []
    try:
        while (client := try_connect(path)) is not None:
            clients.append(client)
            assert len(clients) < 100
    finally:
        listener.close()
        for client in clients:
            client.close()


def test_the_socket_has_the_mode_asked_for(tmp_path: Path) -> None:
    listener = LocalListener(str(tmp_path / "x.sock"), mode=0o640)
    assert stat.S_IMODE(os.stat(listener.path).st_mode) == 0o640
    listener.close()
    assert not os.path.exists(listener.path)


def test_two_hubs_cannot_serve_one_path(tmp_path: Path) -> None:
    first = LocalListener(str(tmp_path / "x.sock"))
    with pytest.raises(LinkError, match="another hub serves"):
        LocalListener(str(tmp_path / "x.sock"))
    first.close()
    LocalListener(str(tmp_path / "x.sock")).close()


def test_a_socket_that_a_killed_hub_left_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
        left.listen()
    assert os.path.exists(path)
    LocalListener(path).close()


def test_a_socket_on_which_another_program_listens_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(LinkError, match="another program listens"):
            LocalListener(path)
        assert os.path.exists(path)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(LinkError, match="is no socket"):
        LocalListener(str(path))
    assert path.read_text(encoding="utf-8") == "precious"


async def test_two_hundred_clients_connect_at_once(tmp_path: Path) -> None:
    async def one(path: str) -> None:
        async with connect(path, timeout_s=60) as client:
            await client.status(timeout_s=60)

    async with Hub(PeerIdentity("boot", "hub"), max_clients=256) as hub:
        path = str(tmp_path / "x.sock")
        hub.serve(path)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(200):
                tasks.create_task(one(path))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), b"\xff" * 300_000, b"{"])
async def test_a_client_that_sends_garbage_disturbs_nobody(tmp_path: Path, garbage: bytes) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        reader, writer = await asyncio.open_unix_connection(pair.guest_path)
        writer.write(garbage)
        async with connect(pair.guest_path) as client:
            assert await client.request("org.example.echo", b"x", timeout_s=5) == b"x"
        writer.close()
        await writer.wait_closed()
        assert reader is not None


async def test_a_client_that_never_greets_and_one_that_never_reads_disturb_nobody(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as pair:
        pair.host.offer("org.example.echo", echo)
        with socket.socket(socket.AF_UNIX) as mute:
            mute.connect(pair.guest_path)
            async with connect(pair.guest_path) as client:
                assert await client.request("org.example.echo", b"x", timeout_s=5) == b"x"
        assert await eventually(lambda: not pair.guest.clients)


async def test_a_killed_hub_ends_its_clients_calls_with_an_error(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from fence_vmchannel.hub.hub import Hub\n"
        "from fence_vmchannel.core.events import PeerIdentity\n"
        "async def mute(channel):\n"
        "    await channel.accept()\n"
        "    await channel.wait_closed()\n"
        "async def main():\n"
        "    async with Hub(PeerIdentity('boot', 'hub')) as hub:\n"
        "        hub.offer('org.example.mute', mute, to_local=True)\n"
        "        hub.serve(sys.argv[1])\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    path = str(tmp_path / "x.sock")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, path, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        async with connect(path, resume_s=0) as client:
            channel = await client.open("org.example.mute", timeout_s=5)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ChannelClosed) as closed:
                async with asyncio.timeout(5):
                    await channel.receive()
            assert closed.value.code is CloseCode.PEER_GONE
            with pytest.raises(HubUnreachable):
                await client.open("org.example.mute", timeout_s=5)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
