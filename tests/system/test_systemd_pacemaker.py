# SPDX-License-Identifier: LGPL-2.1-or-later
"""Under systemd, with the units that we ship, the hub is ready before Pacemaker starts its fence device."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.cluster_files import CIB_PATH, cluster_files
from tests.rig.cpio import Entry, link, regular
from tests.rig.debian_image import build_debian_image
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import default_cache, require_tools
from tests.system.channel_rig import until
from tests.system.site import Site, open_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEVICE = """
<primitive id="vmfence" class="stonith" type="fence_vmchannel">
  <operations><op id="vmfence-monitor" name="monitor" interval="60s"/></operations>
</primitive>
"""
NETWORK = """\
[Unit]
Description=A network that comes late
DefaultDependencies=no
Before=network-online.target
After=vmchannel-guestd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/sleep 3
ExecStart=/usr/sbin/ip address add 10.9.0.7/32 dev lo

[Install]
WantedBy=network-online.target
"""
UNITS = "/etc/systemd/system"
FILES: dict[str, Entry] = {
    **cluster_files({"alpha": "10.9.0.7"}, DEVICE),
    "/etc/tmpfiles.d/rig.conf": regular(f"z {CIB_PATH} 0600 hacluster haclient\n".encode()),
    f"{UNITS}/late-network.service": regular(NETWORK.encode()),
    f"{UNITS}/network-online.target.wants/late-network.service": link("../late-network.service"),
    f"{UNITS}/multi-user.target.wants/corosync.service": link("/lib/systemd/system/corosync.service"),
    f"{UNITS}/multi-user.target.wants/pacemaker.service": link("/lib/systemd/system/pacemaker.service"),
}


@pytest.fixture(scope="module")
def site(accel: str, shared_rig_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster of one node called alpha, on a machine of another name; a peer that it may fence."""
    require_tools()
    image = build_debian_image(default_cache(), tmp_path_factory.mktemp("image"), FILES)
    with open_site(shared_rig_dir, image, accel) as site:
        site.vm("alone", hostname="elsewhere", memory_mib=512, guestd=False, kernel_line="rig_start=systemd")
        site.vm("peer", image=None, machine="none", ports=())
        site.group("all", *site.vms)
        site.serve()
        yield site


@pytest.fixture
async def guest(site: Site, attach: Attach) -> Guest:
    return await attach(site.vms[0])


async def time_of(guest: Guest, unit: str, name: str) -> int:
    """When the unit reached it, in microseconds since boot; 0 for not yet."""
    done = await guest.run("systemctl", "show", "--value", f"--property={name}TimestampMonotonic", unit)
    return int(done.check().stdout)


async def test_the_hub_is_ready_before_pacemaker_begins_and_the_fence_device_starts_without_a_failure(
    site: Site, guest: Guest
) -> None:
    async def started() -> bool:
        await asyncio.sleep(3)  # the question costs the guest a second of its one processor
        said = (await guest.run("crm_mon", "-1", "--output-as=xml")).stdout
        return 'id="vmfence"' in said and 'role="Started"' in said

    await until(started, "started fence device", timeout_s=480)
    ready = await time_of(guest, "vmchannel-guestd.service", "ActiveEnter")
    begun = await time_of(guest, "pacemaker.service", "ExecMainStart")
    assert 0 < ready <= begun
    failures = (await guest.run("crm_mon", "-1", "--failcounts", "--output-as=xml")).check().stdout
    assert "fail-count" not in failures
    assert "<failure " not in failures


async def test_the_node_name_is_announced_though_the_network_comes_after_the_hub(
    site: Site, guest: Guest
) -> None:
    async def named() -> bool:
        [vm] = [one for one in await site.ask("vms") if one["uuid"] == guest.spec.uuid]
        return bool(vm["aliases"])

    await until(named, "announced name")
    hub = await time_of(guest, "vmchannel-guestd.service", "ActiveEnter")
    assert hub < await time_of(guest, "late-network.service", "ActiveEnter")
    log = (await guest.run("journalctl", "--unit=vmchannel-guestd", "--no-pager", "--output=cat")).stdout
    assert "announced node name alpha (corosync)" in log
    assert "elsewhere" not in log  # a host name would have replaced what the host knew of this VM
