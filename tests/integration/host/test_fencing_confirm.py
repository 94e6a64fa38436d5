# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl confirm-off, against a real daemon and VMs that were migrated away or killed (S1)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

__all__ = ["shared_rig_dir"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


async def departed(site: Site, vm: Vm) -> None:
    """The VM's only process has handed it over and has ended."""
    await site.until_run_state(vm, "running")
    await site.migrate_away(vm)
    await site.until_run_state(vm, "postmigrate")
    assert (await site.fence("off", vm))["code"] == "migrated_away"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_s1_a_departed_vm_is_off_by_the_operators_word_also_after_a_restart_and_until_it_departs_again(
    site: Site, number: signal.Signals
) -> None:
    vm = site.vm(f"away{number.value}", machine="q35")
    await departed(site, vm)
    told = await site.ctl("confirm-off", vm.spec.name, "--yes")
    assert told.code == 0, told
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "already", "off"), answer
    assert any(line.startswith("confirmed off by 'root': pid ") for line in answer["evidence"]), answer
    site.daemon.restart(number)
    assert await site.status(vm) == "off"
    vm.start()
    await departed(site, vm)
    assert await site.status(vm) == "unknown"


async def test_s1_a_killed_vm_whose_writes_cannot_be_probed_is_off_by_the_operators_word(site: Site) -> None:
    disk = site.folder / "unlocked.img"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    drive = f"file={disk},format=raw,if=virtio,file.locking=off"
    vm = site.vm("unlocked", machine="q35", extra=("-drive", drive))
    await site.until_run_state(vm, "running")
    vm.signal(signal.SIGSTOP)
    refused = await site.fence("off", vm)
    assert (refused["ok"], refused["code"]) == (False, "failed"), refused
    assert "confirm-off" in refused["reason"]
    assert not vm.running
    [shown] = [one for one in await site.ask("vms") if one["uuid"] == vm.spec.uuid]
    assert (shown["power"], "not proven to have settled" in shown["problem"]) == ("unknown", True), shown
    site.daemon.restart(signal.SIGKILL)
    assert await site.status(vm) == "unknown"
    assert (await site.ctl("confirm-off", vm.spec.name, "--yes")).code == 0
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["code"]) == (True, "already"), answer
    assert any("confirmed off by 'root'" in line and "I/O unproven" in line for line in answer["evidence"])


async def test_s1_the_word_is_refused_while_a_process_of_the_vm_runs(site: Site) -> None:
    vm = site.vm("alive")
    await site.until_run_state(vm, "running")
    told = await site.ctl("confirm-off", vm.spec.name, "--yes")
    assert told.code == 1, told
    assert f"pid {vm.pid} " in " ".join(told.stdout.split()), told
    assert vm.running
    assert await site.status(vm) == "on"


async def test_a_vm_that_nobody_knows_cannot_be_confirmed_and_without_a_word_nothing_is(site: Site) -> None:
    assert (await site.ctl("confirm-off", "nobody", "--yes")).code == 1
    asked = await site.ctl("confirm-off", "nobody")
    assert asked.code == 2, asked
    assert "--yes" in asked.stderr
