# SPDX-License-Identifier: LGPL-2.1-or-later
"""`on` by the real daemon and real start commands: done when one new instance is seen to run (S12)."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import shared_rig_dir
from tests.rig.qemu import qemu_command
from tests.rig.vm import Vm
from tests.system.site import Site, open_site, script

__all__ = ["shared_rig_dir"]

pytestmark = pytest.mark.slow

QEMU = shutil.which("qemu-system-x86_64") or ""


@pytest.fixture(scope="module")
def site(shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir) as site:
        site.serve()
        yield site


async def off(site: Site, vm: Vm, *start: str) -> None:
    """Give a running VM a start command and fence it off."""
    site.restartable(vm, *start)
    await site.reload()
    await site.until_run_state(vm, "running")
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"], vm.running) == (True, "off", False), answer


async def test_on_is_done_when_the_daemonized_qemu_is_the_only_instance_and_runs(site: Site) -> None:
    vm = site.vm("daemonizes")
    await off(site, vm)
    for _ in range(2):
        answer = await site.fence("on", vm)
        assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "on"), answer
        assert answer["reason"].startswith(f"on: pid {vm.pid} "), answer
        assert await site.status(vm) == "on"
        answer = await site.fence("off", vm)  # the parent that forked does not stand against it
        assert (answer["ok"], answer["code"], vm.running) == (True, "done", False), answer
        assert await site.status(vm) == "off"


async def test_on_by_a_command_that_is_qemu_itself_is_done_when_it_runs(site: Site) -> None:
    vm = site.vm("foreground")
    await off(site, vm, QEMU, *qemu_command(vm.spec)[1:])
    answer = await site.fence("on", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "done", "on"), answer
    assert answer["reason"].startswith(f"on: pid {vm.pid} "), answer


async def test_on_of_a_vm_that_runs_is_already_on_and_starts_nothing(site: Site) -> None:
    vm = site.vm("runs")
    site.restartable(vm, "/bin/false")
    await site.reload()
    await site.until_run_state(vm, "running")
    before = vm.pids()
    answer = await site.fence("on", vm)
    assert (answer["ok"], answer["code"], answer["state"]) == (True, "already", "on"), answer
    assert vm.pids() == before


async def test_a_start_command_that_exits_with_0_but_starts_nothing_fails_the_on(site: Site) -> None:
    vm = site.vm("nothing")
    await off(site, vm, "/bin/true")
    answer = await site.fence("on", vm, timeout_s=2)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "not_started", "unknown"), answer
    assert "no new instance was seen running in time" in answer["reason"]
    assert await site.status(vm) == "off"


async def test_a_start_command_that_fails_fails_the_on_with_its_last_words(site: Site) -> None:
    vm = site.vm("fails")
    say = "#!/bin/sh\necho first\necho 'no such disk: /dev/vg/web1' >&2\nexit 3\n"
    await off(site, vm, script(vm.spec.folder / "start", say))
    answer = await site.fence("on", vm)
    assert (answer["ok"], answer["code"]) == (False, "not_started"), answer
    assert "exit status 3" in answer["reason"]
    assert "no such disk: /dev/vg/web1" in answer["reason"]


async def test_a_start_command_that_does_not_exist_fails_the_on(site: Site) -> None:
    vm = site.vm("missing")
    await off(site, vm, "/nonexistent/start-vm")
    answer = await site.fence("on", vm)
    assert (answer["ok"], answer["code"]) == (False, "not_started"), answer
    assert "/nonexistent/start-vm" in answer["reason"]


async def test_a_started_vm_that_does_not_run_its_guest_is_not_on(site: Site) -> None:
    vm = site.vm("paused")
    paused = shlex.join([*qemu_command(vm.spec), "-S", "-daemonize"])
    await off(site, vm, script(vm.spec.folder / "start", f"#!/bin/sh\nexec {paused}\n"))
    answer = await site.fence("on", vm, timeout_s=4)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "not_started", "unknown"), answer
    assert vm.running
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"], vm.running) == (True, "off", False), answer


async def test_two_instances_that_stay_fail_the_on_and_off_ends_both(site: Site) -> None:
    vm = site.vm("twice")
    first = qemu_command(vm.spec)
    other = [word.replace(str(vm.spec.folder), f"{vm.spec.folder}b") for word in first]
    Path(f"{vm.spec.folder}b").mkdir()
    lines = [shlex.join([*first, "-S", "-daemonize"]), shlex.join([*other, "-daemonize"])]
    await off(site, vm, script(vm.spec.folder / "start", "#!/bin/sh\n" + "\n".join(lines) + "\n"))
    answer = await site.fence("on", vm, timeout_s=5)
    assert (answer["ok"], answer["code"], answer["state"]) == (False, "not_started", "unknown"), answer
    assert "more than one instance" in answer["reason"]
    answer = await site.fence("off", vm)
    assert (answer["ok"], answer["state"]) == (True, "off"), answer
    assert sum("pid " in line and " gone " in line for line in answer["evidence"]) >= 2, answer
    assert not vm.running


async def test_on_without_a_start_command_says_what_to_configure(site: Site) -> None:
    vm = site.vm("bare")
    await site.until_run_state(vm, "running")
    assert (await site.fence("off", vm))["ok"]
    answer = await site.fence("on", vm)
    assert (answer["ok"], answer["code"]) == (False, "not_started"), answer
    assert "configure `start`" in answer["reason"]
