# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannel-guestd and `vmchannel` in a real guest: who may do what, who holds the port, and exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    echo,
    end_hub,
    guest_watch,
    hub_log,
    hub_pid,
    offered,
    start_hub,
    until,
    until_said,
)
from tests.system.site import Site, open_site

NOBODY = 65534
HOLD = "import os, time; os.open('/dev/vport0p1', os.O_RDWR); print('held', flush=True); time.sleep(600)"

AS_NOBODY = f"""
import os, time
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
from fence_vmchannel import BlockingClient, ServiceRefused
deadline = time.monotonic() + 60
with BlockingClient.connect(deadline=deadline) as client:
    print(client.request("org.example.echo", b"anybody", deadline=deadline).decode())
    try:
        client.open("org.vmchannel.fence", deadline=deadline)
    except ServiceRefused as error:
        print(error.code.name, error.reason, sep="\\n")
    try:
        client.offer("org.vmchannel.fence", deadline=deadline)
    except ServiceRefused as error:
        print(error.code.name, error.reason, sep="\\n")
try:
    os.open("/dev/vport0p1", os.O_RDWR)
except PermissionError:
    print("the port itself is root's")
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("hub")
    site.serve()
    return vm


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await site.until_connected(vm)
    return guest


async def test_an_unprivileged_user_opens_an_ordinary_service_but_not_the_fence_service(
    site: Site, guest: Guest
) -> None:
    async with offered(site, "org.example.echo", echo):
        done = (await guest.python(AS_NOBODY)).check()
    answer, code, reason, offer_code, offer_reason, port = done.stdout.splitlines()
    assert answer == "ydobyna"
    assert code == offer_code == "NOT_PERMITTED"
    assert f"uid {NOBODY}" in reason
    assert "may not open 'org.vmchannel.fence'" in reason
    assert "may not offer 'org.vmchannel.fence'" in offer_reason
    assert port == "the port itself is root's"


async def test_a_user_who_may_not_fence_gets_exit_code_3_and_the_reason(site: Site, guest: Guest) -> None:
    done = await guest.run("vmchannel", "fence", "status", guest.spec.name, uid=NOBODY)
    assert (done.code, done.stdout) == (3, "")
    assert "may not open 'org.vmchannel.fence'" in done.stderr


async def test_the_fencers_group_may_fence(site: Site, guest: Guest) -> None:
    site.group("all", guest.vm)
    await site.reload()
    haclient = 189
    done = await guest.run("vmchannel", "fence", "status", guest.spec.name, uid=haclient)
    assert done.code == 0, done
    assert "on" in done.stdout


async def test_a_port_that_another_program_holds_is_named_with_its_holder_and_taken_when_it_is_free(
    site: Site, guest: Guest
) -> None:
    await end_hub(guest, signal.SIGTERM)
    holder = await guest.start("python3", "-I", "-c", HOLD)
    await until_said(holder, lambda said: said == "held\n")
    said_before = len(await hub_log(guest))
    await start_hub(guest)
    named = f"is held by pid {holder.pid} (python3 -I -c import os, time"

    async def logged() -> bool:
        return named in (await hub_log(guest))[said_before:]

    await until(logged, f"line {named!r} in the hub's log")
    status = await guest.run("vmchannel", "status")
    assert status.code == 1
    assert f"port {PORT}: not connected: port {PORT} (/dev/vport0p1) {named}" in status.stdout
    await holder.signal(signal.SIGKILL)
    await site.until_connected(guest.vm)

    async def connected() -> bool:
        return (await guest.run("vmchannel", "status")).code == 0

    await until(connected, "connection over the freed port")


async def test_status_of_a_connected_hub_is_0_in_words_and_in_json(site: Site, guest: Guest) -> None:
    words = (await guest.run("vmchannel", "status")).check().stdout.splitlines()
    facts = json.loads((await guest.run("vmchannel", "status", "--json")).check().stdout)
    assert words[0].startswith("hub: vmchannel-guestd ")
    assert words[1].startswith(f"port {PORT}: connected to vmchanneld ")
    assert facts["boot_id"] == await guest.boot_id()
    [peer] = facts["peers"]
    assert (peer["peer"], peer["port"], peer["kind"]) == ("host", PORT, "host")
    assert (peer["present"], peer["connected"], peer["detail"]) == (True, True, "")


async def test_status_without_a_host_is_1_and_says_that_the_host_is_away(site: Site, guest: Guest) -> None:
    watch = await guest_watch(guest)
    site.daemon.end()
    await watch.next("peer-disconnected", PORT)
    status = await guest.run("vmchannel", "status")
    site.daemon.start()
    await watch.next("peer-connected", PORT)
    assert status.code == 1
    assert f"port {PORT}: not connected: the other end of the link is not connected" in status.stdout


async def test_watch_shows_what_is_there_then_changes_and_ends_with_4_when_the_hub_goes(
    site: Site, guest: Guest
) -> None:
    watch = await guest.start("vmchannel", "watch")
    said = await until_said(watch, lambda said: "synced" in said)
    lines = said.splitlines()
    assert f"port-added port={PORT} peer=host" in lines
    assert any(line.startswith(f"peer-connected peer=host port={PORT} session=") for line in lines)
    site.daemon.end()
    await until_said(watch, lambda said: f"peer-disconnected peer=host port={PORT}" in said)
    site.daemon.start()
    await until_said(watch, lambda said: said.count("peer-connected") == 2)
    await end_hub(guest, signal.SIGTERM)
    done = await watch.wait()
    await start_hub(guest)
    assert done.code == 4
    assert done.stderr.startswith("vmchannel: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["status"], ["watch"]])
async def test_without_a_hub_the_exit_code_is_4_with_one_line_that_says_so(
    guest: Guest, command: list[str]
) -> None:
    done = await guest.run("vmchannel", "--socket", "/run/nobody.sock", *command)
    assert (done.code, done.stdout) == (4, "")
    assert done.stderr == "vmchannel: no hub answers on /run/nobody.sock: No such file or directory\n"


async def test_misuse_is_2(guest: Guest) -> None:
    assert (await guest.run("vmchannel", "dance")).code == 2
    assert (await guest.run("vmchannel-guestd", "--port", "")).code == 2


async def test_a_second_hub_in_a_guest_is_refused_and_the_first_one_goes_on(site: Site, guest: Guest) -> None:
    first = await hub_pid(guest)
    second = await guest.run("vmchannel-guestd")
    assert second.code == 1
    assert "another hub" in second.stderr
    assert await hub_pid(guest) == first
    await site.until_connected(guest.vm)
