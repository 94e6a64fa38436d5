# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hub under a real systemd and a real udev: what starts it, what ends it, and what it is ready for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.system.channel_rig import until
from tests.system.site import Site, open_site

SYSTEMD = {"memory_mib": 512, "kernel_line": "rig_start=systemd", "guestd": False}
UNIT = "vmchannel-guestd.service"
SESSIONS = "/run/vmchannel/guest.sessions"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(debian: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """Two guests with systemd; the second has a controller and no port."""
    with open_site(shared_rig_dir, debian, accel) as site:
        site.vm("port", **SYSTEMD)
        site.vm("bare", ports=(), **SYSTEMD)
        site.group("all", *site.vms)
        site.serve()
        yield site


@pytest.fixture
async def guest(site: Site, attach: Attach) -> Guest:
    """The guest that has a port from its start."""
    guest = await attach(site.vms[0])
    await site.until_connected(guest.vm)
    return guest


async def active(guest: Guest) -> str:
    return (await guest.run("systemctl", "is-active", UNIT)).stdout.strip()


async def main_pid(guest: Guest) -> int:
    return int((await guest.run("systemctl", "show", "--value", "--property=MainPID", UNIT)).stdout)


def becomes(guest: Guest, state: str) -> Callable[[], Awaitable[bool]]:
    async def so() -> bool:
        return await active(guest) == state

    return so


async def test_the_port_starts_the_hub_at_boot_and_it_says_when_it_is_ready(site: Site, guest: Guest) -> None:
    await until(becomes(guest, "active"), "active hub")
    assert (await guest.run("systemctl", "is-enabled", UNIT)).stdout.strip() == "disabled"
    status = (await guest.run("systemctl", "status", UNIT)).check().stdout
    assert 'Status: "serving /run/vmchannel/guest.sock"' in status
    assert (await guest.run("fence_vmchannel", stdin="action=monitor\n")).code == 0
    assert (await guest.run("systemctl", "--failed", "--plain", "--no-legend")).stdout == ""


async def test_a_killed_hub_is_started_again(site: Site, guest: Guest) -> None:
    before = await main_pid(guest)
    await guest.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", UNIT)

    async def another() -> bool:
        return await active(guest) == "active" and await main_pid(guest) not in (0, before)

    await until(another, "second hub")
    assert (await guest.run("fence_vmchannel", stdin="action=monitor\n")).code == 0


async def test_a_hub_that_hangs_is_killed_by_the_watchdog_and_started_again(site: Site, guest: Guest) -> None:
    before = await main_pid(guest)
    await guest.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", UNIT)

    async def another() -> bool:
        return await active(guest) == "active" and await main_pid(guest) not in (0, before)

    await until(another, "second hub", timeout_s=120)
    said = (await guest.run("journalctl", "--unit", UNIT, "--no-pager", "--output=cat")).stdout
    assert "Watchdog timeout" in said


async def test_a_stopped_hub_leaves_its_session_and_the_next_goes_on_with_it(
    site: Site, guest: Guest
) -> None:
    session = await connected_session(site, guest)
    (await guest.run("systemctl", "stop", UNIT)).check()
    assert (await guest.run("test", "-s", SESSIONS)).code == 0
    (await guest.run("systemctl", "start", UNIT)).check()
    await site.until_connected(guest.vm)
    assert await connected_session(site, guest) == session
    assert (await guest.run("test", "-e", SESSIONS)).code == 1


async def test_an_unplugged_port_leaves_the_hub_waiting_and_it_serves_the_next(
    site: Site, guest: Guest
) -> None:
    before = await main_pid(guest)
    await unplug(guest)

    async def gone() -> bool:
        return (await guest.run("test", "-e", f"/dev/virtio-ports/{PORT}")).code == 1

    await until(gone, "end of the port")
    assert (await active(guest), await main_pid(guest)) == ("active", before)
    monitor = await guest.start("fence_vmchannel", stdin="action=monitor\n")  # it waits for the port
    await plug(guest, chardev="port0")
    done = await monitor.wait(60)
    assert done.code == 0, done
    assert (await active(guest), await main_pid(guest)) == ("active", before)


async def test_a_port_that_is_plugged_in_later_starts_the_hub(site: Site, attach: Attach) -> None:
    bare = await attach(site.vms[1])
    assert await active(bare) == "inactive"
    path = str(bare.spec.folder / "later.sock")
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "wait": False}}
    await bare.qmp("chardev-add", id="later", backend=backend)
    await plug(bare, chardev="later")
    await until(becomes(bare, "active"), "hub started by the hot-plugged port")
    await site.until_connected(bare.vm)
    done = await bare.run("fence_vmchannel", stdin="action=monitor\n")
    assert done.code == 0, done


async def plug(guest: Guest, *, chardev: str) -> None:
    await guest.qmp(
        "device_add", driver="virtserialport", bus="vserial.0", name=PORT, id="vport0", chardev=chardev
    )


async def unplug(guest: Guest) -> None:
    async with guest.monitor() as monitor, asyncio.timeout(60):
        with monitor.listener("DEVICE_DELETED") as deleted:
            await monitor.execute("device_del", {"id": "vport0"})
            await deleted.get()


async def connected_session(site: Site, guest: Guest) -> str:
    """The session that the host has with this guest."""
    [port] = [one for one in await site.ask("ports") if one["vm_uuid"] == guest.spec.uuid]
    return str(port["session"])
