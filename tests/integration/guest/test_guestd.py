# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannel-guestd: needs nothing, serves everybody, tells the host the node's name, stops cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

from fence_vmchannel.errors import LinkError
from fence_vmchannel.messages import FENCE_SERVICE, Announce, FenceAction
from fence_vmchannel.supervisor import Supervisor
from tests.fakes.fence_service import FakeFenceService
from tests.fakes.hub_pair import VM, hub_pair
from tests.integration.guest.guest_rig import GuestSite, guest_site, guestd, in_thread, soon, until
from vmchannel_guest.fencing import FencingClient
from vmchannel_guest.main import GuestOptions, parse_options, serve
from vmchannel_guest.naming import NodeNaming
from vmchannel_guest.notify import Notifier
from vmchannel_guest.reach import GuestReach

CHECKOUT = Path(__file__).parents[3]
NODE1 = Announce("node1", "hostname")


def connected(site: GuestSite) -> bool:
    return any(peer.connected for peer in site.host.status().peers)


async def test_the_nodes_name_is_announced_when_the_session_opens(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site):
        await until(lambda: site.service.announced == [NODE1])


async def test_it_is_announced_again_after_the_host_daemon_was_replaced(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site):
        await until(lambda: site.service.announced == [NODE1])
        site.host.detach(VM)
        site.host.attach(VM, site.port)
        await until(lambda: site.service.announced == [NODE1, NODE1])


async def test_a_changed_name_is_announced_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    names = iter(["a", "a", "b", "b", "b"])
    async with hub_pair(tmp_path) as hubs, Supervisor() as tasks:
        service = FakeFenceService()
        hubs.host.offer(FENCE_SERVICE, service.serve)
        naming = NodeNaming(hubs.guest, lambda: Announce(next(names, "c"), "corosync"), poll_s=0.01)
        tasks.start(naming.run(), "naming")
        await until(lambda: len(service.announced) >= 3)
        await asyncio.sleep(0.1)
    assert [one.node_name for one in service.announced] == ["a", "b", "c"]


async def test_a_refused_name_is_announced_until_the_host_takes_it(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs, Supervisor() as tasks:
        service = FakeFenceService(name_refused="vm3 has it")
        hubs.host.offer(FENCE_SERVICE, service.serve)
        tasks.start(NodeNaming(hubs.guest, lambda: NODE1, poll_s=0.01).run(), "naming")
        await until(lambda: len(service.announced) >= 3)
        service.name_refused = ""
        taken = len(service.announced)
        await until(lambda: len(service.announced) > taken)
        await asyncio.sleep(0.1)
        assert len(service.announced) <= taken + 2


async def test_a_host_without_the_service_is_told_once_it_offers_it(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs, Supervisor() as tasks:
        tasks.start(NodeNaming(hubs.guest, lambda: NODE1, poll_s=0.01).run(), "naming")
        await asyncio.sleep(0.1)
        service = FakeFenceService()
        hubs.host.offer(FENCE_SERVICE, service.serve)
        await until(lambda: service.announced == [NODE1])


async def test_everybody_may_connect_to_the_socket(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site):
        mode = os.stat(site.socket).st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o666


async def test_a_fence_goes_through_the_hub(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site):
        reach = GuestReach(socket=site.socket, paths=site.port.paths)
        await in_thread(lambda: _monitor(reach))
        assert len(site.service.requests) == 1


async def test_only_the_named_ports_are_served(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site, ports=("org.vmchannel.7",)):
        await asyncio.sleep(0.3)
        assert not connected(site)
    async with guest_site(tmp_path / "again") as site, guestd(site, ports=(VM.port,)):
        await until(lambda: connected(site))


async def test_a_second_hub_on_the_same_socket_is_refused(tmp_path: Path) -> None:
    async with guest_site(tmp_path) as site, guestd(site):
        with pytest.raises(LinkError, match="another hub serves"):
            await serve(
                GuestOptions(socket=site.socket), Notifier({}, pid=1), site.sources, stop=asyncio.Event()
            )


async def test_the_program_is_ready_serves_and_stops_at_sigterm(tmp_path: Path) -> None:
    path, notify = tmp_path / "run" / "guest.sock", str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(notify)
        process = await _program(path, NOTIFY_SOCKET=notify)
        async with asyncio.timeout(20):
            ready = await asyncio.get_running_loop().sock_recv(manager, 500)
            assert ready.startswith(b"READY=1\n")
            assert path.is_socket()
            process.send_signal(signal.SIGTERM)
            out, _ = await process.communicate()
            assert await asyncio.get_running_loop().sock_recv(manager, 500) == b"STOPPING=1"
    assert process.returncode == 0, out
    assert not path.exists()
    assert b"Traceback" not in out


async def test_a_socket_that_cannot_be_served_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "guest.sock").write_text("a file")
    process = await _program(tmp_path / "guest.sock")
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"is no socket" in out
    assert b"Traceback" not in out


@pytest.mark.parametrize("arguments", [["--port", ""], ["--colour"], ["--log-level", "loud"]])
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(arguments)
    assert end.value.code == 2


def test_a_port_may_be_named_several_times() -> None:
    options = parse_options(["--port", "b", "--port", "a", "--port", "b", "--socket", "/s"])
    assert options == GuestOptions("/s", ("b", "a"))


def _monitor(reach: GuestReach) -> None:
    with FencingClient(reach) as client:
        assert client.ask(FenceAction.MONITOR, deadline=soon()).ok


async def _program(path: Path, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "vmchannel_guest.main", "--socket", str(path)),
        stdout=PIPE,
        stderr=STDOUT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'guest'}", **environment},
    )
