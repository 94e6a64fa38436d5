# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent against what goes wrong: it ends in time, with exit code 1 and the reason in its last line."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.messages import FENCE_SERVICE, FenceAction, PowerState
from fence_vmchannel.peers import HOST_PEER
from tests.fakes.fence_service import FakeFenceService, PaperVm
from tests.fakes.hub_pair import HOST, VM, FakePort, hub_pair
from tests.integration.agents.agent_rig import Agent, Site, install_agent

pytestmark = pytest.mark.slow


def rewritten(agent: Agent, old: str, new: str) -> Agent:
    """The same agent with another line in its script."""
    script = Path(agent.path)
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))
    return agent


PACEMAKER = {"PCMK_service": "pacemaker-fenced"}


@pytest.mark.parametrize("environment", [{}, PACEMAKER], ids=["by hand", "from Pacemaker"])
@pytest.mark.parametrize("action", ["off", "reboot", "status", "list", "monitor"])
async def test_a_silent_host_is_a_failure_within_the_deadline(
    place: Site, action: str, environment: dict[str, str]
) -> None:
    place.service.silent = True
    ran = await place.agent.lines(f"action={action}", "plug=vm2", "timeout=2", environment=environment)
    assert (ran.code, ran.out) == (1, "")
    assert 2 <= ran.took_s < 8  # the upper bound is far from what it needs: the machine may be busy
    assert "no answer" in ran.reason


async def test_a_silent_host_is_named_with_the_operation_that_it_began(place: Site) -> None:
    place.service.silent = True
    ran = await place.agent.lines("action=off", "plug=vm2", "timeout=2")
    assert ran.reason.endswith("op=op-1 host=hv1"), ran.err
    assert place.service.cancelled == [place.service.requests[0].request_id]


async def test_a_lost_channel_is_asked_again_with_the_same_id_and_acts_once(place: Site) -> None:
    place.service.vms = [PaperVm("vm2")]
    place.service.losses = 3
    ran = await place.agent.lines("action=off", "plug=vm2")
    assert (ran.code, ran.out) == (0, "Success: Powered OFF\n"), ran.err
    assert len(place.service.requests) == 4
    assert len({request.request_id for request in place.service.requests}) == 1
    assert len(place.service.acted) == 1


async def test_a_host_daemon_that_is_replaced_in_mid_request_gets_the_same_id(place: Site) -> None:
    place.service.vms = [PaperVm("vm2")]
    place.service.silent = True
    running = asyncio.create_task(place.agent.lines("action=off", "plug=vm2"))
    await place.service.heard.wait()
    place.service.silent = False
    place.hubs.host.detach(VM)  # the session ends with it
    place.hubs.port.cut()
    place.hubs.host.attach(VM, place.hubs.port.host)
    ran = await running
    assert (ran.code, ran.out) == (0, "Success: Powered OFF\n"), ran.err
    assert len(place.service.requests) > 1
    assert len({request.request_id for request in place.service.requests}) == 1


async def test_neither_hub_nor_port_is_named_within_the_deadline(tmp_path: Path) -> None:
    agent = install_agent(tmp_path, str(tmp_path / "nobody.sock"))
    ran = await agent.lines("action=off", "plug=vm2", "timeout=2", "port_name=org.vmchannel.none")
    assert (ran.code, ran.out) == (1, "")
    assert "no port 'org.vmchannel.none'" in ran.reason
    assert "nobody.sock" in ran.reason
    assert ran.reason.endswith("op=- host=-")
    assert ran.took_s < 8


async def test_monitor_waits_for_a_hub_that_is_still_starting(tmp_path: Path) -> None:
    agent = install_agent(tmp_path, str(tmp_path / "guest.sock"))
    running = asyncio.create_task(agent.lines("action=monitor", "port_name=org.vmchannel.0"))
    await asyncio.sleep(1)
    service = FakeFenceService([PaperVm("vm2")])
    async with hub_pair(tmp_path) as hubs:
        hubs.host.offer(FENCE_SERVICE, service.serve)
        ran = await running
    assert ran.code == 0, ran.err
    assert ran.took_s > 1


async def test_without_a_host_session_monitor_fails_and_says_so(tmp_path: Path) -> None:
    agent, port = install_agent(tmp_path, str(tmp_path / "guest.sock")), FakePort()
    async with Hub(PeerIdentity("guest-boot", "test guest"), default_peer=HOST_PEER) as hub:
        hub.serve(agent.socket)
        hub.attach(HOST, port.guest, role=Role.GUEST)
        ran = await agent.lines("action=monitor", "timeout=2")
    port.close()
    assert ran.code == 1
    assert "no session with the host" in ran.reason
    assert ran.took_s < 8


async def test_a_hub_without_a_port_is_no_way_to_the_host(tmp_path: Path) -> None:
    agent = install_agent(tmp_path, str(tmp_path / "guest.sock"))
    async with Hub(PeerIdentity("guest-boot", "test guest"), default_peer=HOST_PEER) as hub:
        hub.serve(agent.socket)
        ran = await agent.lines("action=status", "plug=vm2", "timeout=2")
    assert ran.code == 1
    assert "has no port" in ran.reason


async def test_a_hub_that_accepts_and_never_greets_does_not_hold_the_agent(tmp_path: Path) -> None:
    def stay(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    agent = install_agent(tmp_path, str(tmp_path / "guest.sock"))
    server = await asyncio.start_unix_server(stay, agent.socket)
    ran = await agent.lines("action=off", "plug=vm2", "timeout=2", environment=PACEMAKER)
    for writer in writers:
        writer.close()
    server.close()
    assert ran.code == 1
    assert "does not answer in time" in ran.reason
    assert ran.took_s < 8


async def test_a_hub_that_hangs_up_is_a_failure_and_no_traceback(tmp_path: Path) -> None:
    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    agent = install_agent(tmp_path, str(tmp_path / "guest.sock"))
    server = await asyncio.start_unix_server(hang_up, agent.socket)
    ran = await agent.lines("action=off", "plug=vm2", "timeout=2")
    server.close()
    assert ran.code == 1
    assert "hung up" in ran.reason


async def test_sigterm_leaves_a_reason(place: Site) -> None:
    place.service.silent = True
    options = ("-o", "off", "-n", "vm2", "--socket", place.agent.socket)
    async with place.agent.started(*options) as process:
        await place.service.heard.wait()
        process.terminate()
        async with asyncio.timeout(20):
            _, err = await process.communicate()
    assert process.returncode == 1
    assert re.search(rb"terminated .* op=- host=-$", err.strip())


async def test_a_missing_library_is_one_clear_line(tmp_path: Path) -> None:
    agent = rewritten(install_agent(tmp_path, ""), "main()", f"main({str(tmp_path / 'nowhere')!r})")
    ran = await agent.run("-o", "monitor")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "fence-agents" in ran.reason


async def test_a_library_whose_own_needs_are_missing_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "fencing.py").write_text("import pycurl_is_not_here\n")
    agent = rewritten(install_agent(tmp_path, ""), "main()", f"main({str(tmp_path)!r})")
    ran = await agent.run(stdin=b"action=metadata\n")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "pycurl_is_not_here" in ran.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("timeout=soon", "not a valid time"),
        ("timeout=0", "timeout is 0"),
        ("timeout=-3", "timeout is -3"),
        ("delay=-1", "delay"),
        ("separator=", "separator is empty"),
        ("plug_separator=", "plug_separator is empty"),
        ("port_name=", "port_name is empty"),
        ("plug=", "names nothing"),
        ("plug=vm2,,vm3", "empty part"),
        ("plug=" + "x" * 300, "300 characters"),
        ("action=nonsense", "Unrecognised action"),
    ],
)
async def test_wrong_input_is_refused_and_nothing_is_asked(place: Site, line: str, reason: str) -> None:
    ran = await place.agent.lines("action=off", "plug=vm2", line)
    assert (ran.code, ran.out) == (1, "")
    assert reason in ran.reason
    assert ran.reason.endswith("op=- host=-")
    assert not place.service.requests


async def test_a_plug_that_is_no_text_is_refused(place: Site) -> None:
    ran = await place.agent.run(
        stdin=b"action=off\nplug=vm\xff\nsocket=" + place.agent.socket.encode() + b"\n"
    )
    assert ran.code == 1
    assert "UTF-8" in ran.reason
    assert not place.service.requests


@pytest.mark.parametrize(("action", "at_least_s"), [("off", 2), ("reboot", 2), ("status", 0)])
async def test_delay_comes_before_a_fence_and_is_no_part_of_its_deadline(
    place: Site, action: str, at_least_s: float
) -> None:
    place.service.vms = [PaperVm("vm2")]
    ran = await place.agent.lines(f"action={action}", "plug=vm2", "delay=2", "timeout=1")
    assert ran.code == 0, ran.err
    assert ran.took_s >= at_least_s
    assert place.service.requests[0].within_ms <= 1000


async def test_no_delay_is_needed_to_ask(place: Site) -> None:
    place.service.vms = [PaperVm("vm2", PowerState.OFF)]
    ran = await place.agent.lines("action=status", "plug=vm2", "delay=30")
    assert ran.code == 2
    assert ran.took_s < 20
    assert place.service.requests[0].action is FenceAction.STATUS


async def test_the_agent_imports_nothing_that_would_make_it_slow(place: Site, tmp_path: Path) -> None:
    place.service.vms = [PaperVm("vm2")]
    told = tmp_path / "modules"
    tell = f"code = main()\nopen({str(told)!r}, 'w').write(' '.join(sys.modules))\nsys.exit(code)"
    ran = await rewritten(place.agent, "sys.exit(main())", tell).lines("action=off", "plug=vm2")
    assert ran.code == 0, ran.err
    modules = told.read_text().split()
    assert "fence_vmchannel.blocking.client" in modules
    assert not {"asyncio", "ssl", "dataclasses", "inspect"} & set(modules)
