# SPDX-License-Identifier: LGPL-2.1-or-later
"""The user's tool in a guest: what it prints, and its exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fence_vmchannel.access import guest_rules
from fence_vmchannel.core.events import PeerIdentity
from fence_vmchannel.errors import CloseCode, ServiceRefused
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.messages import FENCE_SERVICE, FenceCode, PowerState
from fence_vmchannel.peers import HOST_PEER
from tests.fakes.fence_line import FakeHost, Trouble, VirtualTime
from tests.fakes.fence_service import FakeFenceService, PaperVm, refused
from tests.fakes.hub_pair import VM, HubPair, hub_pair
from tests.integration.guest.guest_rig import in_thread
from vmchannel_guest.cli import Exit, run

CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Ran:
    """One command line's effect."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def vmchannel(socket: str, *arguments: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    code = await in_thread(lambda: run(["--socket", socket, *arguments], out=out, err=err))
    return Ran(code, out.getvalue(), err.getvalue())


def offer(hubs: HubPair, *vms: PaperVm) -> FakeFenceService:
    service = FakeFenceService(list(vms))
    hubs.host.offer(FENCE_SERVICE, service.serve)
    return service


async def test_status_shows_the_port_and_is_0_while_the_host_is_connected(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs:
        text, facts = [await vmchannel(hubs.guest_path, "status", *more) for more in ([], ["--json"])]
    assert text.code == facts.code == 0
    assert f"port {VM.port}: connected to test host" in text.out
    assert (facts.json["peers"][0]["port"], facts.json["peers"][0]["connected"]) == (VM.port, True)


async def test_status_without_a_host_is_1(tmp_path: Path) -> None:
    path = str(tmp_path / "guest.sock")
    async with Hub(PeerIdentity("guest-boot", "lone hub"), default_peer=HOST_PEER) as hub:
        hub.serve(path)
        ran = await vmchannel(path, "status")
    assert ran.code == 1
    assert "no port named org.vmchannel.*" in ran.out


@pytest.mark.parametrize("arguments", [["status"], ["watch"]])
async def test_without_a_hub_it_is_4_and_says_so(tmp_path: Path, arguments: list[str]) -> None:
    ran = await vmchannel(str(tmp_path / "nobody.sock"), *arguments)
    assert (ran.code, ran.out) == (4, "")
    assert "no hub answers" in ran.err


async def test_a_fence_without_hub_and_port_is_4(tmp_path: Path) -> None:
    arguments = ("fence", "off", "vm2", "--timeout", "1", "--port", "org.vmchannel.none")
    ran = await vmchannel(str(tmp_path / "nobody.sock"), *arguments)
    assert ran.code == 4
    assert "no port 'org.vmchannel.none'" in ran.err


async def test_a_fence_prints_evidence_reason_operation_and_host(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2"))
        ran = await vmchannel(hubs.guest_path, "fence", "off", "vm2")
    assert ran.code == 0
    assert ran.out == "  pid 7 has ended (pidfd)\nvm2: proven by pidfd op=op-1 host=hv1\n"
    assert "begun" in ran.err  # progress


async def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2"))
        ran = await vmchannel(hubs.guest_path, "fence", "off", "vm2", "--json")
    assert ran.err == ""
    assert (ran.json["done"], ran.json["state"], ran.json["code"]) == (True, "off", "done")


@pytest.mark.parametrize(("state", "word"), [(PowerState.ON, "on"), (PowerState.OFF, "off")])
async def test_status_of_a_vm_is_0_when_it_is_known(tmp_path: Path, state: PowerState, word: str) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2", state))
        ran = await vmchannel(hubs.guest_path, "fence", "status", "vm2", "--json")
    assert (ran.code, ran.json["state"]) == (0, word)


async def test_list_and_monitor_take_no_plug(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2", aliases=("node2",)))
        listed = await vmchannel(hubs.guest_path, "fence", "list")
        monitor = await vmchannel(hubs.guest_path, "fence", "monitor")
        wrong = await vmchannel(hubs.guest_path, "fence", "list", "vm2")
        missing = await vmchannel(hubs.guest_path, "fence", "off")
    assert (listed.code, listed.out) == (0, "vm2 (node2): on\n")
    assert monitor.code == 0
    assert (wrong.code, missing.code) == (2, 2)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (one, Exit.REFUSED if one in (FenceCode.REFUSED, FenceCode.VOID) else Exit.FAILED)
        for one in sorted(set(FenceCode) - {FenceCode.STALE, FenceCode.UNAVAILABLE})
    ],
)
async def test_each_failure_has_its_exit_code(tmp_path: Path, code: FenceCode, exit_code: Exit) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2", refusal=refused("the reason", code, "op-5")))
        ran = await vmchannel(hubs.guest_path, "fence", "off", "vm2")
    assert (ran.code, ran.out) == (exit_code, "")
    assert ran.err.splitlines()[-1] == "the reason op=op-5 host=hv1"


async def test_hostile_text_stays_on_its_line(tmp_path: Path) -> None:
    async with hub_pair(tmp_path) as hubs:
        offer(hubs, PaperVm("vm2", refusal=refused("a\nb\x1b[2J")))
        ran = await vmchannel(hubs.guest_path, "fence", "off", "vm2")
    assert ran.err.splitlines()[-1].startswith("a\\nb\\x1b[2J op=")


def test_a_user_who_may_not_fence_gets_3(tmp_path: Path) -> None:
    host = FakeHost(VirtualTime())
    host.troubles.append(Trouble(ServiceRefused(CloseCode.NOT_PERMITTED, "uid 1000 may not open it")))
    err = io.StringIO()
    code = run(["fence", "off", "vm2"], out=io.StringIO(), err=err, reach=lambda _, __: host)
    assert (code, err.getvalue()) == (3, "vmchannel: uid 1000 may not open it\n")


@pytest.mark.parametrize(
    "arguments", [[], ["fence"], ["fence", "explode", "vm2"], ["fence", "off", "vm2", "--timeout", "0"]]
)
def test_misuse_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(arguments, out=io.StringIO(), err=io.StringIO())
    assert end.value.code == 2


@pytest.mark.parametrize("as_json", [False, True])
async def test_watch_prints_a_snapshot_then_each_change(tmp_path: Path, as_json: bool) -> None:
    async with hub_pair(tmp_path, guest_access=guest_rules()) as hubs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "vmchannel_guest.cli", "--socket", hubs.guest_path, "watch"),
            *(["--json"] if as_json else []),
            stdout=PIPE,
            stderr=PIPE,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'guest'}"},
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            lines = [await process.stdout.readline() for _ in range(3)]
            hubs.guest.offer("org.example.clip", _nothing)
            lines.append(await process.stdout.readline())
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    assert err == b""
    kinds = ["port-added", "peer-connected", "synced", "service-offered"]
    if as_json:
        assert [json.loads(line)["event"] for line in lines] == kinds
        assert json.loads(lines[-1])["service"] == "org.example.clip"
    else:
        assert [line.split()[0].decode() for line in lines] == kinds
        assert b"service=org.example.clip" in lines[-1]


async def _nothing(_: object) -> None: ...
