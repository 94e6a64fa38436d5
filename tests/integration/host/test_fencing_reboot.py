# SPDX-License-Identifier: LGPL-2.1-or-later
"""`reboot` of real QEMU processes without a guest: a proven reset, or off and on (S8)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.guest import qmp_client
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


async def test_a_running_vm_is_reset_in_the_same_process_with_the_event_as_evidence(site: Site) -> None:
    vm = site.vm("runs", machine="q35")
    await site.until_run_state(vm, "running")
    pid = vm.pid
    answer = await site.fence("reboot", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "on"), answer
    assert answer["reason"].startswith(f"reset: pid {pid} "), answer
    assert any(
        f"pid {pid} on hv1 reset after" in line and "RESET event" in line for line in answer["evidence"]
    )
    assert vm.pids() == [pid]


@pytest.mark.parametrize("state", ["hung", "paused", "noreboot"])
async def test_what_cannot_be_reset_with_proof_is_ended_and_started_again(site: Site, state: str) -> None:
    vm = site.vm(state, machine="q35", extra=("-no-reboot",) if state == "noreboot" else ())
    site.restartable(vm)
    await site.reload()
    await site.until_run_state(vm, "running")
    pid = vm.pid
    if state == "hung":
        vm.signal(signal.SIGSTOP)
    elif state == "paused":
        async with qmp_client(vm.spec) as monitor:
            await monitor.execute("stop")
        await site.until_run_state(vm, "paused")
    answer = await site.fence("reboot", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "on"), answer
    assert any(f"pid {pid} on hv1 gone" in line and "pidfd" in line for line in answer["evidence"]), answer
    assert vm.running
    assert pid not in vm.pids()
    assert await site.run_state(vm) == "running"


async def test_a_reboot_that_cannot_start_the_vm_again_is_a_proven_off_and_says_so(site: Site) -> None:
    vm = site.vm("nostart")
    await site.until_run_state(vm, "running")
    vm.signal(signal.SIGSTOP)
    answer = await site.fence("reboot", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "not_started", "off"), answer
    assert "off is proven, but it was not started" in answer["reason"]
    assert "configure `start`" in answer["reason"]
    assert not vm.running


async def test_a_reboot_of_a_vm_that_is_off_starts_it(site: Site) -> None:
    vm = site.vm("isoff")
    site.restartable(vm)
    await site.reload()
    await site.until_run_state(vm, "running")
    assert (await site.fence("off", vm))["ok"]
    answer = await site.fence("reboot", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "on"), answer
    assert vm.running


async def test_a_reboot_of_a_vm_that_was_migrated_away_is_never_claimed(site: Site) -> None:
    vm = site.vm("away", machine="q35")
    site.restartable(vm)
    await site.reload()
    await site.until_run_state(vm, "running")
    await site.migrate_away(vm)
    answer = await site.fence("reboot", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "migrated_away", "unknown"), answer
    assert not vm.running  # and nothing was started
