# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that libvirt runs: one fences the other from inside, over the channels that libvirt made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import own_mounts
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.libvirt_vm import LibvirtVm
from tests.rig.libvirtd import Libvirtd, running_libvirtd
from tests.system.site import Site, agent, open_site


@pytest.fixture(scope="module")
def libvirtd(shared_rig_dir: Path) -> Iterator[Libvirtd]:
    if reason := own_mounts.why_not():
        pytest.skip(reason)
    folder = shared_rig_dir / "lv"
    folder.mkdir()
    with running_libvirtd(folder, system=True) as running:
        yield running


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path, libvirtd: Libvirtd) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as site:
        for word in ("web1", "web2"):
            vm = LibvirtVm(site.spec(word), libvirtd)
            site.vms.append(vm)
            vm.start()
        site.config = {"hypervisors": [libvirtd.entry]}
        site.group("web", *site.vms)
        site.serve()
        yield site


async def boot_id(guest: Guest) -> str:
    return (await guest.run("cat", "/proc/sys/kernel/random/boot_id")).check().stdout


async def test_a_guest_fences_another_guest_over_libvirts_channels(site: Site, attach: Attach) -> None:
    web1, web2 = [await attach(vm) for vm in site.vms]
    await site.until_connected(*site.vms)
    name, pids = web2.spec.name, web2.vm.pids()

    assert (await agent(web1, "status", name)).code == 0
    assert (await agent(web1, "off", name)).code == 0
    assert web2.vm.pids() == []
    assert (await agent(web1, "status", name)).code == 2
    await web2.disconnect()

    assert (await agent(web1, "on", name)).code == 0
    assert len(web2.vm.pids()) == 1
    assert web2.vm.pids() != pids
    await web2.wait_ready()
    await site.until_connected(*site.vms)

    # By the name of its node, which its hub has told.
    process, before = web2.vm.pids(), await boot_id(web2)
    await web2.disconnect()
    assert (await agent(web1, "reboot", "node-web2")).code == 0
    await web2.wait_ready()
    assert await boot_id(web2) != before
    assert web2.vm.pids() == process
