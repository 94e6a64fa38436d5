# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host daemon that is upgraded, away or frozen while guests ask it to fence: nothing twice (S5), nothing
late (S6), and no answer that is not of its own time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fence_vmchannel.hub.hub import boot_clock
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest, Job
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import end_hub, start_hub, until_said
from tests.system.site import Site, open_site
from vmchannel_host.hypervisors.process import read_boot_id

pytestmark = pytest.mark.slow

QUIT_S = 5
"""How long an `off` waits for a hung QEMU before it kills it: time to restart something."""

ASK = """
import json, os, time
from fence_vmchannel.messages import FenceAction
from vmchannel_guest.fencing import FencingClient, FencingError
from vmchannel_guest.reach import GuestReach
with FencingClient(GuestReach()) as client:
    client.ask(FenceAction.LIST, deadline=time.monotonic() + 60)  # the line is open
    print("ready", flush=True)
    while not os.path.exists({go!r}):
        time.sleep(0.05)
    os.unlink({go!r})
    try:
        answer = client.ask(FenceAction.OFF, {plug!r}, deadline=time.monotonic() + {within_s},
                            request_id=bytes.fromhex({request_id!r}))
        said = [answer.ok, answer.code.name, answer.reason, answer.operation]
    except FencingError as error:
        said = [False, type(error).__name__, error.reason, error.operation]
print(json.dumps(said))
"""

WRITE_BLINDLY = """
import os, time
from fence_vmchannel.core.frames import FrameType, encode_frame
from fence_vmchannel.messages import FenceAction, FenceRequest, encode_message
request = encode_message(
    FenceRequest(os.urandom(16), FenceAction.OFF, {plug!r}, {boot_id!r}, {tick_ms}, 3_600_000)
)
frames = b"".join(
    encode_frame(FrameType.DATA, request, epoch=epoch, channel=channel, sequence=number)
    for number, (epoch, channel) in enumerate([(1, 1), (2, 3), (2**63, 5)], start=1)
)
with open("/dev/vport0p1", "r+b", buffering=0) as port:
    port.write(frames)
print("written", flush=True)
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """A guest that asks, and a VM without a guest that is fenced."""
    with open_site(shared_rig_dir, image, accel) as site:
        site.vm("ask1")
        site.vm("peer1", image=None, machine="none", ports=())
        site.group("all", *site.vms)
        site.config["fencing"] = {"quit_timeout": f"{QUIT_S}s"}
        site.serve()
        yield site


@pytest.fixture
async def guest(site: Site, attach: Attach) -> Guest:
    guest = await attach(site.vms[0])
    await site.until_connected(guest.vm)
    return guest


@pytest.fixture
async def peer(site: Site) -> AsyncIterator[Vm]:
    vm = site.vms[1]
    if not vm.running:
        vm.start()
    await site.until_run_state(vm, "running")
    yield vm
    if vm.running:
        vm.signal(signal.SIGCONT)


async def offs(site: Site, peer: Vm) -> list[dict[str, Any]]:
    """The journal's operations that were to end the VM, oldest first."""
    return [one for one in await site.operations(peer) if one["action"] == "off"]


class Asking:
    """A program of the guest whose line to the fence service is open, and that waits for its sign to ask."""

    GO = "/run/go"

    def __init__(self, guest: Guest, job: Job) -> None:
        self._guest = guest
        self._job = job

    async def go(self) -> None:
        """Let it ask."""
        (await self._guest.sh(f"touch {self.GO}; while [ -e {self.GO} ]; do usleep 10000; done")).check()

    async def answer(self) -> tuple[bool, str, str, str]:
        """(ok, code or kind of error, reason, operation)."""
        done = (await self._job.wait(120)).check()
        ok, code, reason, operation = json.loads(done.stdout.splitlines()[-1])
        return ok, code, reason, operation


async def asking(guest: Guest, peer: Vm, within_s: float) -> Asking:
    source = ASK.format(go=Asking.GO, plug=peer.spec.name, within_s=within_s, request_id=os.urandom(16).hex())
    job = await guest.start_python(source, timeout_s=180)
    await until_said(job, lambda said: "ready" in said)
    return Asking(guest, job)


async def begun(site: Site, said: int, peer: Vm) -> None:
    line = f"vm={peer.spec.uuid} name={peer.spec.name!r} action=off "
    await site.until(lambda: line in site.daemon.log[said:], "begin of off")


async def test_s5_a_request_is_asked_again_across_an_upgrade_of_the_daemon_and_acts_once(
    site: Site, guest: Guest, peer: Vm
) -> None:
    """Stopped after the request's intent: the daemon lets it end, its channel ends with it, and the client
    asks the next daemon with the same id."""
    before, said = await offs(site, peer), len(site.daemon.log)
    peer.signal(signal.SIGSTOP)  # it takes until QUIT_S
    program = await asking(guest, peer, 100)
    await program.go()
    await begun(site, said, peer)
    site.daemon.restart(signal.SIGTERM)
    ok, code, reason, operation = await program.answer()
    assert (ok, code, peer.running) == (True, "DONE", False), reason
    [done] = (await offs(site, peer))[len(before) :]
    assert done["id"] == operation


async def test_s5_a_request_survives_an_upgrade_of_the_guests_hub_and_acts_once(
    site: Site, guest: Guest, peer: Vm
) -> None:
    before, said = await offs(site, peer), len(site.daemon.log)
    peer.signal(signal.SIGSTOP)
    program = await asking(guest, peer, 100)
    await program.go()
    await begun(site, said, peer)
    await end_hub(guest, signal.SIGTERM)
    await start_hub(guest)
    ok, code, reason, operation = await program.answer()
    assert (ok, code, peer.running) == (True, "DONE", False), reason
    [done] = (await offs(site, peer))[len(before) :]
    assert done["id"] == operation


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_s6_a_request_written_while_the_daemon_was_away_fails_in_time_and_never_acts_late(
    site: Site, guest: Guest, peer: Vm, number: int
) -> None:
    """Its line was open before, so the request waits in the hub's session; then its time passes."""
    before = await offs(site, peer)
    program = await asking(guest, peer, 6)
    site.daemon.end(number)
    await program.go()
    ok, code, reason, _ = await program.answer()
    assert (ok, code) == (False, "NoAnswer"), reason
    site.daemon.start()
    await nothing_acts(site, guest, peer, before)


async def test_s6_requests_that_stand_in_the_port_before_the_links_hello_are_discarded(
    site: Site, guest: Guest, peer: Vm
) -> None:
    """The daemon reads nothing while a program writes whole frames, with a request that would be valid for an
    hour, into the port; then comes the next hub, and the daemon wakes."""
    before = await offs(site, peer)
    os.kill(site.daemon.pid, signal.SIGSTOP)
    try:
        await end_hub(guest, signal.SIGKILL)
        tick_ms = int(boot_clock() * 1000)
        source = WRITE_BLINDLY.format(plug=peer.spec.name, boot_id=read_boot_id(), tick_ms=tick_ms)
        done = await guest.python(source)
        assert done.stdout == "written\n", done
        await start_hub(guest)
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)
    await nothing_acts(site, guest, peer, before)


async def test_s6_a_frozen_daemon_that_wakes_after_the_deadline_acts_on_nothing_and_answers_nothing(
    site: Site, guest: Guest, peer: Vm
) -> None:
    before = await offs(site, peer)
    program = await asking(guest, peer, 6)
    os.kill(site.daemon.pid, signal.SIGSTOP)
    try:
        await program.go()
        ok, code, reason, _ = await program.answer()
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)
    assert (ok, code) == (False, "NoAnswer"), reason
    await nothing_acts(site, guest, peer, before)


async def test_s2_a_daemon_that_was_frozen_in_an_operation_beyond_its_end_claims_nothing(
    site: Site, guest: Guest, peer: Vm
) -> None:
    """The proof may come after it wakes; success counts only before the intent's end."""
    before, said = await offs(site, peer), len(site.daemon.log)
    peer.signal(signal.SIGSTOP)
    program = await asking(guest, peer, 6)
    await program.go()
    await begun(site, said, peer)
    os.kill(site.daemon.pid, signal.SIGSTOP)
    try:
        ok, code, reason, _ = await program.answer()
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)
    assert (ok, code) == (False, "NoAnswer"), reason
    await ended(site, peer, len(before))
    [operation] = (await offs(site, peer))[len(before) :]
    assert not operation["ok"], operation


async def ended(site: Site, peer: Vm, known: int) -> None:
    """Wait until the one new operation on the VM has ended."""
    async with asyncio.timeout(60):
        while True:
            new = (await offs(site, peer))[known:]
            if new and all(one.get("code") for one in new):
                return
            await asyncio.sleep(0.1)


async def nothing_acts(site: Site, guest: Guest, peer: Vm, before: list[dict[str, Any]]) -> None:
    """The daemon and the guest talk again; what has come by then came before, and no operation began."""
    await site.until_connected(guest.vm)
    done = await guest.run("vmchannel", "fence", "status", peer.spec.name)
    assert done.code == 0, done
    assert peer.running
    assert await offs(site, peer) == before
