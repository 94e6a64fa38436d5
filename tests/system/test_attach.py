# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmchannelctl attach` and `detach` on running guests: the guest's hub finds the port and fences over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.counts import Count
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import GuestWatch, guest_watch, hub_pid, port_view, until
from tests.system.site import Site, open_site
from tests.system.test_channels import connections, open_files

pytestmark = pytest.mark.slow

WATCHERS = 2
"""Sockets and epolls of the test's own watcher in the guest."""


STATUS = """
import sys, time
from fence_vmchannel.messages import FenceAction
from vmchannel_guest.fencing import FencingClient
from vmchannel_guest.reach import GuestReach
with FencingClient(GuestReach()) as client:
    answer = client.ask(FenceAction.STATUS, PLUG, deadline=time.monotonic() + 60)
print(answer.state.name)
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vms(site: Site) -> dict[str, Vm]:
    slot = ("-device", "pcie-root-port,id=slot1")
    vms = {
        "portless": site.vm("portless", ports=()),
        "bare": site.vm("bare", ports=(), controller=False, extra=slot),
        "full": site.vm("full"),
    }
    site.group("all", *vms.values())
    site.serve()
    return vms


async def is_gone(site: Site, uuid: str) -> bool:
    """Whether the daemon serves no port of that VM."""
    return uuid not in {port["vm_uuid"] for port in await site.ask("ports")}


async def attached(site: Site, guest: Guest, inside: GuestWatch) -> None:
    """Attach the port, and fence from inside over it."""
    told = await site.ctl_json("attach", guest.spec.name)
    assert (told["code"], told["ports"]) == ("done", [PORT]), told
    # The hub tries a port that was there before by itself, and may open it before it hears that it is back.
    await inside.each("port-added", "peer-connected", port=PORT)
    status = (await guest.python(f"PLUG = {site.name('full')!r}\n{STATUS}")).check()
    assert status.stdout == "ON\n"


async def detached(site: Site, guest: Guest, inside: GuestWatch) -> None:
    """Detach it; both sides notice."""
    told = await site.ctl_json("detach", guest.spec.name)
    assert (told["code"], told["ports"]) == ("done", [PORT]), told
    await inside.next("port-removed", PORT)
    await until(lambda: is_gone(site, guest.spec.uuid), "end of the port")


@pytest.mark.counted
@pytest.mark.timeout(1_800)
async def test_a_running_guest_gets_a_port_fences_over_it_and_loses_it_again_and_again(
    site: Site, vms: dict[str, Vm], attach: Attach, count: Count
) -> None:
    guest = await attach(vms["portless"])
    hub = await hub_pid(guest)

    async def open_now() -> tuple[int, int]:
        there = (await guest.sh(f"ls -l /proc/{hub}/fd")).check().stdout
        return connections(there), connections(open_files(site.daemon.pid))

    inside = await guest_watch(guest)
    before = await open_now()
    for _ in range(count(2, 100, "attach and detach rounds")):
        await attached(site, guest, inside)
        await detached(site, guest, inside)
    after = await open_now()
    assert after[0] <= before[0] + WATCHERS
    assert after[1] <= before[1] + WATCHERS
    assert not list((site.folder / "run" / "ports").iterdir())


async def test_a_guest_without_a_controller_gets_one_that_stays_for_the_next_port(
    site: Site, vms: dict[str, Vm], attach: Attach
) -> None:
    guest = await attach(vms["bare"])
    inside = await guest_watch(guest)
    subject = f"VM {guest.spec.name}"
    [finding] = [one for one in await site.ask("doctor") if one["subject"] == subject]
    assert f"`vmchannelctl attach {guest.spec.name}`" in finding["remedy"]
    await attached(site, guest, inside)
    assert not [one for one in await site.ask("doctor") if one["subject"] == subject]
    await detached(site, guest, inside)
    await attached(site, guest, inside)
    devices = await guest.qmp("qom-list", path="/machine/peripheral")
    assert [one["name"] for one in devices if "serial" in one["name"]] == ["vmchannel-serial"]


async def test_an_attached_port_outlives_the_daemon_and_is_detached_by_the_next_one(
    site: Site, vms: dict[str, Vm], attach: Attach
) -> None:
    guest = await attach(vms["portless"])
    inside = await guest_watch(guest)
    await attached(site, guest, inside)
    site.daemon.kill()
    await inside.next("peer-disconnected", PORT)
    site.daemon.start()
    await inside.next("peer-connected", PORT)
    assert (await site.ctl("attach", guest.spec.name)).stdout.splitlines()[0].startswith("already: ")
    await detached(site, guest, inside)


async def test_detach_all_takes_away_what_attach_made_and_leaves_what_vms_were_started_with(
    site: Site, vms: dict[str, Vm], attach: Attach
) -> None:
    guest = await attach(vms["portless"])
    await site.until_connected(vms["full"])
    assert (await site.ctl("attach", guest.spec.name)).code == 0
    await site.until_connected(guest.vm)
    refused = await site.ctl("detach", vms["full"].spec.name)
    assert (refused.code, "was started with that port" in refused.stderr) == (1, True), refused
    done = await site.ctl("detach", "--all")
    assert done.code == 0, done
    assert f"{guest.spec.name}: port {PORT} detached" in done.stdout
    assert vms["full"].spec.name not in done.stdout
    await until(lambda: is_gone(site, guest.spec.uuid), "end of the port")
    full = await port_view(site, vms["full"].spec.uuid)
    assert full is not None
    assert full["connected"]
