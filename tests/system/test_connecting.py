# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests whose QEMUs connect to the daemon: one fences the other, and its session outlives a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.image import Image
from tests.system.channel_rig import port_view
from tests.system.site import Site, agent, open_site


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        vms = [opened.vm(word, connects=True) for word in ("web1", "web2")]
        opened.group("web", *vms)
        opened.serve()
        yield opened


async def test_a_guest_fences_another_over_ports_that_connect_to_the_daemon(
    site: Site, attach: Attach
) -> None:
    web1 = await attach(site.vms[0])
    await site.until_connected(*site.vms)
    named = [one for one in await site.ask("doctor") if one["subject"].startswith("VM web")]
    assert named == []
    name = site.vms[1].spec.name
    assert (await agent(web1, "status", name)).code == 0

    before = await port_view(site, web1.spec.uuid)
    site.daemon.restart()
    await site.until_connected(*site.vms)
    after = await port_view(site, web1.spec.uuid)
    assert before is not None
    assert after is not None
    assert after["session"] == before["session"] != ""

    assert (await agent(web1, "off", name)).code == 0
    assert site.vms[1].pids() == []
    assert (await agent(web1, "status", name)).code == 2
    assert not site.vms[1].spec.port_socket().exists()
    assert site.vms[0].spec.port_socket().is_socket()
