# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon over a real libvirtd: what is asked, what is answered, and what stands in the journal."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from tests.integration.host.libvirt_site import WAIT_S, libvirtd, shared_rig_dir, site
from tests.integration.libvirt.libvirt_rig import a_domain, off_loop
from tests.rig.libvirtd import Domain, Libvirtd
from tests.system.site import Site

__all__ = ["libvirtd", "shared_rig_dir", "site"]

pytestmark = pytest.mark.slow


@pytest.fixture
async def domain(site: Site, libvirtd: Libvirtd) -> Domain:
    """One that runs and is known."""
    made = a_domain(libvirtd)
    await off_loop(lambda: libvirtd.create(made))
    await until_seen(site, made)
    return made


async def until_seen(site: Site, domain: Domain, state: str = "running") -> None:
    async with asyncio.timeout(WAIT_S):
        while await run_states(site, domain) != [state]:
            await asyncio.sleep(0.05)


async def run_states(site: Site, domain: Domain) -> list[str]:
    return [
        str(instance["run_state"])
        for vm in await site.ask("vms")
        if vm["uuid"] == domain.uuid
        for instance in vm["instances"]
    ]


def assert_answer(answer: dict[str, Any], code: str, state: str) -> None:
    ok = code in ("done", "already")
    assert (answer["ok"], answer["code"], answer["state"]) == (ok, code, state), answer


async def test_a_domain_is_fenced_and_started_again_by_its_name(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    answer = await site.fence("off", domain.name)
    assert_answer(answer, "done", "off")
    assert any("pidfd, by SIGTERM, I/O drained" in line for line in answer["evidence"]), answer
    assert libvirtd.qemus(domain) == []
    assert await site.status(domain.name) == "off"
    assert_answer(await site.fence("on", domain.name), "done", "on")
    assert len(libvirtd.qemus(domain)) == 1
    assert_answer(await site.fence("on", domain.name), "already", "on")
    (vm,) = [one for one in await site.ask("vms") if one["uuid"] == domain.uuid]
    assert vm["instances"][0]["monitor"] == libvirtd.uri


async def test_a_domain_that_never_ran_here_is_known_by_its_name(site: Site, libvirtd: Libvirtd) -> None:
    domain = a_domain(libvirtd)
    await off_loop(lambda: libvirtd.define(domain))
    async with asyncio.timeout(WAIT_S):
        while all(vm["uuid"] != domain.uuid for vm in await site.ask("vms")):
            await asyncio.sleep(0.05)
    (vm,) = [one for one in await site.ask("vms") if one["uuid"] == domain.uuid]
    assert (vm["name"], vm["instances"], vm["power"]) == (domain.name, [], "gone")
    refused = await site.fence("off", domain.name)
    assert "never seen here: name its UUID in a policy group" in refused["reason"]


async def test_a_reboot_resets_the_domain_in_its_process(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    before = libvirtd.qemus(domain)
    answer = await site.fence("reboot", domain.name)
    assert_answer(answer, "done", "on")
    assert any("RESET event" in line for line in answer["evidence"]), answer
    assert libvirtd.qemus(domain) == before


async def until_saved(site: Site, domain: Domain) -> None:
    """Wait until the daemon knows that the domain has ended and that libvirt keeps its memory.

    Before that it may have been saved anywhere, and counts as departed.
    """
    async with asyncio.timeout(WAIT_S):
        while "keeps a managed save" not in (await site.fence("on", domain.name))["reason"]:
            await asyncio.sleep(0.1)
        while await site.status(domain.name) != "unknown":  # until its end is known it counts as on
            await asyncio.sleep(0.1)


async def test_s0_saved_memory_is_removed_before_off_is_said_and_that_is_recorded(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    await off_loop(lambda: libvirtd.virsh("managedsave", domain.uuid))
    await until_saved(site, domain)
    assert await site.status(domain.name) == "unknown"
    refused = await site.fence("on", domain.name)
    assert not refused["ok"]
    assert "keeps a managed save of it" in refused["reason"]
    answer = await site.fence("off", domain.name)
    assert_answer(answer, "already", "off")
    assert any("managed save removed from libvirt" in line for line in answer["evidence"]), answer
    assert list(libvirtd.saves.glob("*.save")) == []
    (last, *_) = [one for one in await site.ask("ops", limit="10") if one["vm_uuid"] == domain.uuid]
    assert any("managed save removed" in line for line in last["evidence"]), last


async def test_a_reboot_of_a_saved_domain_boots_it_and_continues_nothing(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    await off_loop(lambda: libvirtd.virsh("managedsave", domain.uuid))
    await until_saved(site, domain)
    answer = await site.fence("reboot", domain.name)
    assert_answer(answer, "done", "on")
    assert any("managed save removed from libvirt" in line for line in answer["evidence"]), answer
    assert libvirtd.virsh("domstate", "--reason", domain.uuid) == "running (booted)"


async def test_a_domain_that_was_saved_to_a_file_may_live_elsewhere(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    file = str(libvirtd.directory / "config" / f"{domain.uuid}.memory")
    await off_loop(lambda: libvirtd.virsh("save", domain.uuid, file))
    answer = await site.fence("off", domain.name)
    assert (answer["ok"], answer["code"]) == (False, "migrated_away"), answer
    await off_loop(lambda: libvirtd.virsh("restore", file))
    await until_seen(site, domain)
    assert_answer(await site.fence("off", domain.name), "done", "off")


async def test_a_libvirtd_that_hangs_stops_no_fence_but_nothing_with_saved_memory_is_off(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    saved = a_domain(libvirtd)
    await off_loop(lambda: libvirtd.create(saved))
    await until_seen(site, saved)
    await off_loop(lambda: libvirtd.virsh("managedsave", saved.uuid))
    await until_saved(site, saved)
    libvirtd.pause()
    try:
        assert_answer(await site.fence("off", domain.name), "done", "off")
        refused = await site.fence("off", saved.name)
        assert not refused["ok"]
        assert "does not answer, and keeps a managed save of it" in refused["reason"]
    finally:
        libvirtd.resume()
    await off_loop(libvirtd.wait_ready)
    async with asyncio.timeout(WAIT_S):
        while not (answer := await site.fence("off", saved.name))["ok"]:
            await asyncio.sleep(0.1)
    assert_answer(answer, "already", "off")


async def test_a_libvirtd_that_is_restarted_in_the_middle_of_a_fence_changes_nothing(
    site: Site, libvirtd: Libvirtd, domain: Domain
) -> None:
    (pid,) = libvirtd.qemus(domain)
    os.kill(pid, signal.SIGSTOP)  # so that it takes its time
    async with asyncio.TaskGroup() as tasks:
        fence = tasks.create_task(site.fence("off", domain.name))
        await off_loop(libvirtd.kill)
        await off_loop(libvirtd.start)
    assert_answer(fence.result(), "done", "off")
    assert libvirtd.qemus(domain) == []
    assert await site.status(domain.name) == "off"


async def test_s9_a_name_that_two_domains_bear_is_no_plug(site: Site, libvirtd: Libvirtd) -> None:
    """In one libvirtd no two domains bear one name, but a bare QEMU may bear it too."""
    first = a_domain(libvirtd)
    await off_loop(lambda: libvirtd.create(first))
    await until_seen(site, first)
    assert_answer(await site.fence("off", first.name), "done", "off")
    await off_loop(lambda: libvirtd.virsh("undefine", first.uuid))
    second = replace(a_domain(libvirtd), name=first.name)
    await off_loop(lambda: libvirtd.create(second))
    await until_seen(site, second)
    answer = await site.fence("off", first.name)
    assert (answer["ok"], answer["code"]) == (False, "ambiguous"), answer
    assert first.uuid in answer["reason"]
    assert second.uuid in answer["reason"]
    assert_answer(await site.fence("off", second.uuid), "done", "off")


@pytest.mark.parametrize("name", ["a,guest=vm1,,b'c\"d<name>&lt; mémoire-虚拟机", "x" * 200])
async def test_a_hostile_name_is_a_plug_like_any_other(site: Site, libvirtd: Libvirtd, name: str) -> None:
    made = replace(a_domain(libvirtd), name=name)
    await off_loop(lambda: libvirtd.create(made))
    await until_seen(site, made)
    assert_answer(await site.fence("off", name), "done", "off")
    assert_answer(await site.fence("on", name), "done", "on")
    assert_answer(await site.fence("off", made.uuid), "done", "off")
