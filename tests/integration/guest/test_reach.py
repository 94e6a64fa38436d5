# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways to the host: the hub where one runs, else the port itself; what is in the way is named."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fence_vmchannel.messages import Announce, FenceAction, FenceAnswer
from tests.fakes.fake_port import PtyPort, busy_opener
from tests.fakes.fence_service import FakeFenceService, PaperVm
from tests.fakes.hub_pair import VM
from tests.integration.guest.guest_rig import GuestSite, guest_site, guestd, in_thread, soon, until
from vmchannel_guest.fencing import FencingClient, HostUnreachable, NoAnswer
from vmchannel_guest.reach import GuestReach

pytestmark = pytest.mark.slow

NODE1 = Announce("node1", "hostname")


def reach_of(site: GuestSite) -> GuestReach:
    return GuestReach(socket=site.socket, paths=site.port.paths, announce=lambda: NODE1)


def off(reach: GuestReach, *, timeout_s: float = 15) -> FenceAnswer:
    with FencingClient(reach) as client:
        return client.ask(FenceAction.OFF, "vm2", deadline=soon(timeout_s))


async def test_without_a_hub_the_port_is_opened_and_the_name_announced_first(tmp_path: Path) -> None:
    async with guest_site(tmp_path, FakeFenceService([PaperVm("vm2")])) as site:
        answer = await in_thread(lambda: off(reach_of(site)))
    assert answer.ok
    assert site.service.announced == [NODE1]


async def test_through_the_hub_the_client_announces_nothing(tmp_path: Path) -> None:
    async with guest_site(tmp_path, FakeFenceService([PaperVm("vm2")])) as site, guestd(site):
        reach = GuestReach(
            socket=site.socket, paths=site.port.paths, announce=lambda: Announce("wrong", "hostname")
        )
        assert (await in_thread(lambda: off(reach))).ok
        assert all(one == NODE1 for one in site.service.announced)


async def test_a_refused_name_does_not_stop_a_fence_over_the_port(tmp_path: Path) -> None:
    service = FakeFenceService([PaperVm("vm2")], name_refused="vm3 has it")
    async with guest_site(tmp_path, service) as site:
        assert (await in_thread(lambda: off(reach_of(site)))).ok


async def test_a_port_that_another_program_holds_is_named_with_its_holder(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, VM.port)
    try:
        paths = replace(port.paths, open=busy_opener())
        reach = GuestReach(socket=str(tmp_path / "nobody.sock"), paths=paths)
        began = time.monotonic()
        with pytest.raises(HostUnreachable, match=f"held by pid {os.getpid()} .*no hub answers"):
            await in_thread(lambda: off(reach, timeout_s=3))
        assert time.monotonic() - began < 10
    finally:
        port.close()


async def test_a_port_without_a_host_daemon_says_so(tmp_path: Path) -> None:
    port = PtyPort(tmp_path, VM.port)
    try:
        reach = GuestReach(socket=str(tmp_path / "nobody.sock"), paths=port.paths)
        with pytest.raises(HostUnreachable, match="no host daemon greets"):
            await in_thread(lambda: off(reach, timeout_s=2))
    finally:
        port.close()


async def test_a_port_outside_the_hubs_prefix_is_opened_beside_it(tmp_path: Path) -> None:
    async with guest_site(tmp_path, FakeFenceService([PaperVm("vm2")])) as site:
        other = PtyPort(tmp_path / "other", "com.example.0")
        try:
            vm = replace(VM, port="com.example.0")
            site.host.attach(vm, other)
            async with guestd(site):
                reach = GuestReach(socket=site.socket, port="com.example.0", paths=other.paths)
                assert (await in_thread(lambda: off(reach))).ok
            site.host.detach(vm)
            await asyncio.sleep(0.05)
        finally:
            other.close()


async def test_a_hub_that_is_killed_in_mid_request_does_not_make_a_second_action(tmp_path: Path) -> None:
    service = FakeFenceService([PaperVm("vm2")], silent=True)
    async with guest_site(tmp_path, service) as site:
        async with guestd(site):
            asking = asyncio.create_task(in_thread(lambda: off(reach_of(site), timeout_s=20)))
            await until(lambda: bool(service.requests))
            service.silent = False
        answer = await asking  # over the port now
    assert answer.ok
    assert len({request.request_id for request in service.requests}) == 1
    assert len(service.acted) == 1


async def test_a_hub_that_is_being_restarted_is_waited_for_and_keeps_its_sessions(tmp_path: Path) -> None:
    """The port, which is free meanwhile, is left alone: the next hub goes on with the session it carries."""
    async with guest_site(tmp_path, FakeFenceService([PaperVm("vm2")])) as site:
        async with guestd(site):
            await until(lambda: site.host.status().peers[0].connected)
            session = site.host.status().peers[0].session
        asking = asyncio.create_task(in_thread(lambda: off(reach_of(site), timeout_s=20)))
        async with guestd(site):
            assert (await asking).ok
            assert site.host.status().peers[0].session == session


async def test_a_hub_that_does_not_come_back_is_not_waited_for_long(tmp_path: Path) -> None:
    async with guest_site(tmp_path, FakeFenceService([PaperVm("vm2")])) as site:
        async with guestd(site):
            session = site.host.status().peers[0].session
        reach = GuestReach(
            socket=site.socket,
            paths=site.port.paths,
            wall_clock=lambda: time.time() + 6,  # later
        )
        assert (await in_thread(lambda: off(reach))).ok
        assert site.host.status().peers[0].session != session


async def test_a_host_that_never_answers_is_no_answer_over_the_port_too(tmp_path: Path) -> None:
    async with guest_site(tmp_path, FakeFenceService(silent=True)) as site:
        with pytest.raises(NoAnswer) as caught:
            await in_thread(lambda: off(reach_of(site), timeout_s=2))
    assert (caught.value.host, caught.value.operation) == ("hv1", "op-1")
