# SPDX-License-Identifier: LGPL-2.1-or-later
"""One cluster for all these tests: it takes a minute to come up. Each test finds it whole."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import CLUSTER_FILES, DEVICE, ONLINE_S, Cluster, start_node
from tests.rig.debian_image import build_debian_image
from tests.rig.fixtures import Attach, accel, attach, image, make_rig_dir
from tests.rig.image import default_cache, require_tools
from tests.system.site import Site, open_site


@pytest.fixture(scope="package")
def site(accel: str) -> Iterator[Site]:
    """The host of the two nodes: its daemon, and a group of both."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-image-") as folder, make_rig_dir() as rig:
        nodes = build_debian_image(default_cache(), Path(folder), CLUSTER_FILES)
        with open_site(rig, nodes, accel) as site:
            for number in (1, 2):
                site.restartable(start_node(site, number))
            site.group("cluster", *site.vms)
            site.serve()
            yield site


@pytest.fixture
async def cluster(site: Site, attach: Attach) -> AsyncIterator[Cluster]:
    """Both nodes online, and the fence device of the issue: made with no parameter at all."""
    cluster = Cluster(site, *[await attach(vm) for vm in site.vms])
    await cluster.until_online()
    await site.until_connected(*site.vms)
    if not await cluster.configured(f"//primitive[@id='{DEVICE}']"):
        await cluster.pcs("stonith", "create", DEVICE, "fence_vmchannel")

    async def device_runs() -> bool:
        return DEVICE in await cluster.started()

    await cluster.until(device_runs, f"{DEVICE} started", ONLINE_S)
    yield cluster
    print(f"--- pacemaker.log of node1\n{(await cluster.log())[-6000:]}")  # shown when the test failed


__all__ = ["accel", "attach", "cluster", "image", "site"]
