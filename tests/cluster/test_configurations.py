# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways to set the fence device up, and what Pacemaker and pcs say of it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import vmchannel_agents
from tests.cluster.nodes import DEVICE, Cluster, FenceEvent

_PENDING = "193"  # PCMK_OCF_UNKNOWN: the operation has been begun
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

STORED = Path(vmchannel_agents.__file__).with_name("metadata.xml")


@asynccontextmanager
async def updated(cluster: Cluster, **options: str) -> AsyncGenerator[None, None]:
    """The device has these options while the block runs."""
    await cluster.pcs("stonith", "update", DEVICE, *(f"{name}={value}" for name, value in options.items()))
    try:
        yield
    finally:
        await cluster.pcs("stonith", "update", DEVICE, *(f"{name}=" for name in options))


async def fence(cluster: Cluster, *arguments: str) -> FenceEvent:
    """`pcs stonith fence node2`: what Pacemaker's history says then."""
    before = len(await cluster.history())
    await cluster.run("pcs", "stonith", "fence", "node2", *arguments)
    found = await cluster.history()
    assert len(found) == before + 1, found
    return found[0]


@pytest.fixture
async def back(cluster: Cluster) -> AsyncIterator[Cluster]:
    """The cluster; node 2 is in it again after the test."""
    yield cluster
    await cluster.node2.wait_ready()
    await cluster.until_online()


async def test_the_monitor_that_pacemaker_repeats_succeeds(cluster: Cluster) -> None:
    query = "//lrm_rsc_op[@operation='monitor' and @interval='60000']"

    async def results() -> set[str]:
        found = await cluster.run("cibadmin", "--query", "--xpath", query)
        return set(re.findall(r' rc-code="(\d+)"', found.stdout)) if found.code == 0 else set()

    async def ended() -> bool:
        return bool(await results() - {_PENDING})

    await cluster.until(ended, "repeated monitor")
    assert await results() == {"0"}


async def test_pacemaker_shows_the_metadata_that_the_agent_ships(cluster: Cluster) -> None:
    shown = (await cluster.run("crm_resource", "--show-metadata", "stonith:fence_vmchannel")).check().stdout
    names = [one.get("name") for one in ET.fromstring(shown).iter("parameter")]
    assert names == [one.get("name") for one in ET.parse(STORED).iter("parameter")]


async def test_agent_validation_refuses_a_wrong_value_with_our_reason(cluster: Cluster) -> None:
    command = ("pcs", "stonith", "create", "checked", "fence_vmchannel", "--agent-validation")
    done = await cluster.run(*command, "timeout=0")
    assert done.code == 1, done
    assert "timeout is 0; it must be 1 second or more" in done.stderr
    assert not await cluster.configured("//primitive[@id='checked']")


async def test_an_off_by_node_name_and_an_on_are_in_the_history(back: Cluster) -> None:
    event = await fence(back, "--off")
    assert (event.action, event.status, event.delegate) == ("off", "success", "node1"), event
    assert not back.node2.vm.running
    assert "node2" in await back.pcs("stonith", "history", "show", "node2")
    (await back.run("stonith_admin", "--unfence", "node2")).check()
    assert back.node2.vm.running


async def test_a_fence_that_the_policy_refuses_fails_with_our_reason_and_one_by_host_map_succeeds(
    back: Cluster,
) -> None:
    site, name = back.site, back.node2.spec.name
    async with updated(back, pcmk_host_map=f"node2:{name}"):
        site.group("cluster", site.vms[0])
        await site.reload()
        try:
            refused = await fence(back)
        finally:
            site.group("cluster", *site.vms)
            await site.reload()
        assert (refused.action, refused.status) == ("reboot", "failed"), refused
        [reason] = set(re.findall(rf"ERROR: ({re.escape(name)}: .*) op=- host=hv1", await back.log()))
        assert "group" in reason
        done = await fence(back)
        assert (done.action, done.status) == ("reboot", "success"), done


async def test_a_uuid_is_a_plug_and_pacemakers_random_delay_is_kept(back: Cluster) -> None:
    options = {
        "pcmk_host_map": f"node2:{back.node2.spec.uuid}",
        "pcmk_delay_base": "1s",
        "pcmk_delay_max": "3s",
    }
    async with updated(back, **options):
        event = await fence(back)
    assert (event.action, event.status) == ("reboot", "success"), event
    assert "Delaying 'reboot' action targeting node2 using vmfence" in await back.log()


async def test_a_second_level_fences_when_the_first_cannot_and_a_dynamic_list_finds_the_node(
    back: Cluster,
) -> None:
    broken = ("port_name=org.vmchannel.none", "timeout=5", "pcmk_host_list=node2")
    await back.pcs("stonith", "create", "broken", "fence_vmchannel", *broken)
    try:
        await back.pcs("stonith", "level", "add", "1", "node2", "broken")
        await back.pcs("stonith", "level", "add", "2", "node2", DEVICE)
        async with updated(back, pcmk_host_check="dynamic-list"):
            event = await fence(back)
        assert (event.action, event.status) == ("reboot", "success"), event
        log = await back.log()
        assert "targeting node2 using broken returned 1" in log
        assert "targeting node2 using vmfence returned 0" in log
    finally:
        await back.pcs("stonith", "level", "clear")
        await back.pcs("stonith", "delete", "broken")
