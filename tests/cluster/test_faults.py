# SPDX-License-Identifier: LGPL-2.1-or-later
"""A node breaks in four ways; the other fences it, and it comes back. The fence device has no parameter."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from tests.cluster.nodes import DEVICE, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]


@asynccontextmanager
async def fenced_and_back(cluster: Cluster) -> AsyncGenerator[None, None]:
    """What the block does to node 2 makes node 1 fence it, once; it boots again and is in the cluster.

    Pacemaker's history, its log and the host's journal tell the same of it.
    """
    vm1, vm2 = cluster.site.vms
    boot = await cluster.node2.boot_id()
    events, operations = len(await cluster.history()), len(await cluster.site.operations(vm2))
    yield

    async def another_fence() -> bool:
        found = await cluster.history()
        return len(found) > events and found[0].status != "pending"

    await cluster.until(another_fence, "fencing of node2")
    event = (await cluster.history())[0]
    assert (event.action, event.status, event.delegate) == ("reboot", "success", "node1"), event
    assert event.client.startswith("pacemaker-controld"), event
    await cluster.node2.wait_ready()
    await cluster.until_online()
    assert await cluster.node2.boot_id() != boot
    [operation] = (await cluster.site.operations(vm2))[operations:]
    assert (operation["action"], operation["ok"]) == ("reboot", True), operation
    assert operation["requester"] in (vm1.spec.uuid, vm1.spec.name), operation
    assert f"op={operation['id']} host=hv1" in await cluster.log()


@pytest.mark.in_ci
async def test_a_node_whose_kernel_panics_is_fenced_with_no_parameter_and_comes_back(
    cluster: Cluster,
) -> None:
    assert not await cluster.configured(f"//primitive[@id='{DEVICE}']/instance_attributes/nvpair")
    async with fenced_and_back(cluster):
        await cluster.node2.start("sh", "-c", "echo c > /proc/sysrq-trigger")


async def test_a_node_that_hangs_is_fenced_and_comes_back(cluster: Cluster) -> None:
    async with fenced_and_back(cluster):
        cluster.node2.vm.signal(signal.SIGSTOP)


async def test_a_node_whose_corosync_dies_is_fenced_and_comes_back(cluster: Cluster) -> None:
    async with fenced_and_back(cluster):
        await cluster.node2.run("killall", "-KILL", "corosync")


async def test_a_node_that_is_cut_off_is_fenced_and_comes_back(cluster: Cluster) -> None:
    """Both fence the other when the network goes: a delay for node 1 says who wins, as two nodes need."""
    vm2 = cluster.site.vms[1]
    before = len(await cluster.site.operations(vm2))

    async def fenced() -> bool:
        found = await cluster.site.operations(vm2)
        return len(found) > before and found[-1]["ok"]

    await cluster.pcs("stonith", "update", DEVICE, "pcmk_delay_base=node1:30s")
    try:
        async with fenced_and_back(cluster):
            await cluster.node2.qmp("set_link", name="card", up=False)
            await cluster.until(fenced, "fence in the host's journal")
            await cluster.node2.qmp("set_link", name="card", up=True)
    finally:
        await cluster.pcs("stonith", "update", DEVICE, "pcmk_delay_base=")
