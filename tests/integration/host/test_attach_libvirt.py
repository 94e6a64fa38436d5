# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmchannelctl attach` and `detach` of domains of a real libvirtd, by a daemon that goes on running."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.integration.host.libvirt_site import WAIT_S, libvirtd, shared_rig_dir, site
from tests.integration.libvirt.libvirt_rig import PORT, a_domain, off_loop
from tests.rig.libvirtd import Domain, Libvirtd
from tests.system.site import Site
from vmchannel_host.hypervisors.libvirt.plug_words import read_devices

__all__ = ["libvirtd", "shared_rig_dir", "site"]

pytestmark = pytest.mark.slow


def portless(libvirtd: Libvirtd) -> Domain:
    return replace(a_domain(libvirtd, devices="<controller type='virtio-serial'/>"), ports=())


async def served(site: Site, domain: Domain) -> list[str]:
    return [str(one["name"]) for one in await site.ask("ports") if one["vm_uuid"] == domain.uuid]


async def until_served(site: Site, domain: Domain, *names: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await served(site, domain) != [*names]:
            await asyncio.sleep(0.05)


async def until_known(site: Site, domain: Domain) -> None:
    async with asyncio.timeout(WAIT_S):
        while all(one["uuid"] != domain.uuid for one in (await site.ask("definitions"))["vms"]):
            await asyncio.sleep(0.05)


async def until_seen(site: Site, domain: Domain) -> None:
    async with asyncio.timeout(WAIT_S):
        while not any(
            one["uuid"] == domain.uuid and [i["run_state"] for i in one["instances"]] == ["running"]
            for one in await site.ask("vms")
        ):
            await asyncio.sleep(0.05)


def defined(libvirtd: Libvirtd, domain: Domain) -> list[str]:
    """The ports in the definition."""
    text = libvirtd.virsh("dumpxml", "--inactive", domain.uuid)
    return [one.name for one in read_devices(text).channels]


async def test_a_port_is_served_as_soon_as_it_is_attached_and_all_go_at_once(
    site: Site, libvirtd: Libvirtd
) -> None:
    running, off = portless(libvirtd), replace(portless(libvirtd), name="a, 'b' <c>")
    await off_loop(lambda: libvirtd.create(running))
    await off_loop(lambda: libvirtd.define(off))
    await until_seen(site, running)
    await until_known(site, off)
    done = await site.ctl("attach", running.name)
    assert (done.code, done.stdout) == (0, f"done: {running.name}: port {PORT} attached\n"), done
    await until_served(site, running, PORT)
    done = await site.ctl_json("attach", off.name)
    assert (done["code"], done["vm_uuid"], done["ports"]) == ("done", off.uuid, [PORT]), done
    assert (await site.ctl_json("attach", running.name))["code"] == "already"
    assert await served(site, off) == []
    assert [defined(libvirtd, one) for one in (running, off)] == [[PORT], [PORT]]

    done = await site.ctl("detach", "--all")
    assert done.code == 0, done
    assert len(done.stdout.splitlines()) == 2, done
    await until_served(site, running)
    assert [defined(libvirtd, one) for one in (running, off)] == [[], []]
    assert (await site.ctl("detach", "--all")).stdout == "no VM has a port that was attached\n"


async def test_a_libvirtd_that_hangs_fails_the_order_in_its_time_and_stops_nothing_else(
    site: Site, libvirtd: Libvirtd
) -> None:
    domain = portless(libvirtd)
    await off_loop(lambda: libvirtd.create(domain))
    await until_seen(site, domain)
    libvirtd.pause()
    try:
        done = await site.ctl("attach", domain.name, "--timeout", "0.5")
        assert done.code == 1, done
        assert "no answer" in done.stderr, done
        assert "remedy: do it again: that is safe" in done.stderr, done
        done = await site.ctl("detach", "--all", "--timeout", "0.5")
        assert done.code == 1, done
        answer = await site.fence("off", domain.name)
        assert answer["ok"], answer
    finally:
        libvirtd.resume()
