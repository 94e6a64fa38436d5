# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence agent in a real guest without a network card: every action, every input way, every plug."""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Completed, Guest
from tests.rig.image import Image
from tests.rig.qemu import VmSpec
from tests.rig.vm import Vm
from tests.system.site import Site, agent, open_site

pytestmark = pytest.mark.slow

REASON = re.compile(r"(?:ERROR|WARNING|INFO): (?P<reason>.+) op=(?P<op>[0-9a-f]{16}|-) host=(?P<host>hv1|-)$")


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """web1 asks, web2 is its peer; both are guests. web3, web4 and web5 run none: they start in no time."""
    with open_site(shared_rig_dir, image, accel) as site:
        for word in ("web1", "web2"):
            site.vm(word)
        for word in ("web3", "web4", "web5"):
            site.vm(word, **BARE)
        for vm in site.vms[1:]:
            site.restartable(vm)
        site.group("web", *site.vms)
        site.serve()
        yield site


BARE = {"image": None, "machine": "none", "ports": ()}


def named(site: Site, word: str) -> Vm:
    return next(vm for vm in site.vms if vm.spec.name == site.name(word))


@pytest.fixture
async def web1(site: Site, attach: Attach) -> AsyncIterator[Guest]:
    """The guest that asks; every VM is on and the usual policy in force."""
    guest = await attach(named(site, "web1"))
    await site.until_connected(guest.vm)
    yield guest
    for vm in site.vms[1:]:
        if not vm.running:
            vm.start()


@pytest.fixture
async def web2(site: Site, web1: Guest, attach: Attach) -> Guest:
    """The peer, connected, so that its node name is known."""
    guest = await attach(named(site, "web2"))
    await site.until_connected(guest.vm)
    return guest


def reason_of(done: Completed) -> re.Match[str]:
    """The last line on stderr: the reason, with the operation and the host."""
    found = REASON.search(done.stderr.splitlines()[-1])
    assert found, done.stderr
    return found


# --- every action, each told in one way; in every way: integration/agents/test_actions.py


async def test_status_off_on_and_reboot_go_to_the_host_and_come_back_with_proof(
    site: Site, web1: Guest
) -> None:
    vm = named(site, "web3")
    plug, pid = vm.spec.name, vm.pid
    assert (await agent(web1, "status", plug)).code == 0
    done = await agent(web1, "off", plug)
    assert (done.code, done.stdout) == (0, "Success: Powered OFF\n"), done
    assert f"pid {pid} on hv1 gone after" in done.stderr
    assert (reason_of(done)["reason"], reason_of(done)["host"]) == (f"{plug}: off", "hv1")
    assert not vm.running
    assert (await agent(web1, "status", plug)).code == 2
    done = await agent(web1, "on", plug)
    assert (done.code, done.stdout) == (0, "Success: Powered ON\n"), done
    assert reason_of(done)["reason"].startswith(f"{plug}: on: pid {vm.pid} ")
    done = await agent(web1, "reboot", plug)
    assert (done.code, done.stdout) == (0, "Success: Rebooted\n"), done
    assert reason_of(done)["reason"].startswith(f"{plug}: reset: pid {vm.pid} ")


async def test_off_of_what_is_off_and_on_of_what_is_on_succeed_and_say_already(
    site: Site, web1: Guest
) -> None:
    vm = named(site, "web4")
    done = await agent(web1, "on", vm.spec.name)
    assert (done.code, done.stdout) == (0, "Success: Already ON\n"), done
    assert (await site.fence("off", vm))["ok"]
    done = await agent(web1, "off", vm.spec.name)
    assert (done.code, done.stdout) == (0, "Success: Already OFF\n"), done
    assert "look by hv1: no instance" in done.stderr
    assert reason_of(done)["reason"] == f"{vm.spec.name}: already off"


async def test_a_reboot_that_only_ends_the_vm_is_a_success_that_says_so(site: Site, web1: Guest) -> None:
    vm = named(site, "web5")
    start = site.start.pop(vm.spec.name)
    await site.reload()
    try:
        vm.signal(signal.SIGSTOP)
        done = await agent(web1, "reboot", vm.spec.name)
    finally:
        site.start[vm.spec.name] = start
        await site.reload()
    assert (done.code, done.stdout, vm.running) == (0, "Success: Rebooted\n", False), done
    assert "off is proven, but it was not started" in reason_of(done)["reason"]


async def test_list_list_status_and_monitor_tell_what_this_guest_may_fence(
    site: Site, web1: Guest, web2: Guest
) -> None:
    listed = (await agent(web1, "list", by="long")).check().stdout.split()
    assert {site.name("web2"), f"{site.name('web2')},node-web2"} & set(listed), listed
    assert site.name("web1") not in " ".join(listed)  # fencing oneself needs `self: true`
    states = (await agent(web1, "list-status", by="long")).check().stdout.splitlines()
    assert any(site.name("web2") in line and line.lower().endswith("on") for line in states), states
    assert (await agent(web1, "monitor", by="long")).code == 0


async def test_metadata_and_validate_all_need_no_plug(web1: Guest) -> None:
    metadata = (await agent(web1, "metadata", by="short")).check().stdout
    assert metadata.startswith("<?xml")
    assert 'resource-agent name="fence_vmchannel"' in metadata
    assert (await agent(web1, "validate-all", by="short")).code == 0


async def test_reboot_of_a_running_guest_brings_another_boot_of_its_kernel_in_the_same_process(
    web1: Guest, web2: Guest
) -> None:
    pid, before = web2.vm.pid, await web2.boot_id()
    done = await agent(web1, "reboot", web2.spec.name)
    assert (done.code, done.stdout) == (0, "Success: Rebooted\n"), done
    assert "RESET event" in done.stderr
    await web2.wait_ready()
    assert await web2.boot_id() != before
    assert web2.vm.pids() == [pid]


async def test_a_guest_whose_kernel_panicked_is_not_off_and_is_fenced_and_boots_again_after_on(
    web1: Guest, web2: Guest
) -> None:
    pid, before = web2.vm.pid, await web2.boot_id()
    await web2.start("sh", "-c", "echo c > /proc/sysrq-trigger")
    assert (await agent(web1, "status", web2.spec.name)).code == 0
    done = await agent(web1, "off", web2.spec.name)
    assert (done.code, web2.vm.running) == (0, False), done
    assert (await agent(web1, "on", web2.spec.name)).code == 0
    assert web2.vm.pid != pid
    await web2.wait_ready()
    assert await web2.boot_id() != before


async def test_pacemakers_environment_changes_no_deadline_and_no_result(site: Site, web1: Guest) -> None:
    vm = named(site, "web3")
    env = {"PCMK_service": "pacemaker-fenced"}
    done = await agent(web1, "off", vm.spec.name, env=env)
    assert (done.code, done.stdout) == (0, "Success: Powered OFF\n"), done
    assert not vm.running
    assert (await agent(web1, "monitor", env=env)).code == 0


async def test_a_guest_that_powered_itself_off_is_already_off(site: Site, web1: Guest, web2: Guest) -> None:
    await web2.start("sh", "-c", "echo o > /proc/sysrq-trigger")
    await site.until(lambda: not web2.vm.running, "power-off")
    assert (await agent(web1, "status", web2.spec.name)).code == 2
    done = await agent(web1, "off", web2.spec.name)
    assert (done.code, done.stdout) == (0, "Success: Already OFF\n"), done
    assert "by itself" in done.stderr


# --- several plugs, and plugs that are wrong


async def test_several_plugs_in_one_call_are_all_fenced(site: Site, web1: Guest) -> None:
    vms = [named(site, word) for word in ("web3", "web4", "web5")]
    plugs = ",".join(vm.spec.name for vm in vms)
    done = await agent(web1, "off", plugs)
    assert (done.code, done.stdout) == (0, "Success: Powered OFF\n"), done
    assert not any(vm.running for vm in vms)
    done = await agent(web1, "on", plugs.replace(",", "+"), by="long", plug_separator="+")
    assert (done.code, done.stdout) == (0, "Success: Powered ON\n"), done
    assert all(vm.running for vm in vms)


async def test_one_wrong_plug_among_several_fails_the_call_but_not_the_others(
    site: Site, web1: Guest
) -> None:
    vms = [named(site, word) for word in ("web3", "web4")]
    done = await agent(web1, "off", f"{vms[0].spec.name},nobody,{vms[1].spec.name}")
    assert (done.code, done.stdout) == (1, ""), done
    assert reason_of(done)["reason"].startswith("nobody: no VM, alias or node is called 'nobody'")
    assert not any(vm.running for vm in vms)


@pytest.mark.parametrize("action", ["off", "status"])
async def test_an_unknown_plug_is_an_error_with_a_suggestion_and_never_off(
    site: Site, web1: Guest, action: str
) -> None:
    right = site.name("web3")
    done = await agent(web1, action, right.replace("web", "wep"))
    assert (done.code, done.stdout) == (1, ""), done
    reason = reason_of(done)
    assert f"did you mean '{right}'" in reason["reason"] or repr(right) in reason["reason"], done.stderr
    assert reason["host"] == "hv1"


async def test_two_vms_of_one_name_are_ambiguous_and_both_are_named(site: Site, web1: Guest) -> None:
    twins = [Vm(VmSpec(site.name("twin"), site.folder / f"vmt{n}", machine="none", ports=())) for n in (1, 2)]
    for twin in twins:
        twin.start()
        site.vms.append(twin)
    try:
        site.group("web", *site.vms)
        await site.reload()
        for twin in twins:
            await site.until_run_state(twin, "running")
        done = await agent(web1, "off", site.name("twin"))
        assert (done.code, done.stdout) == (1, ""), done
        assert all(twin.spec.uuid in reason_of(done)["reason"] for twin in twins)
        assert all(twin.running for twin in twins)
        done = await agent(web1, "off", twins[0].spec.uuid)
        assert (done.code, [twin.running for twin in twins]) == (0, [False, True]), done
    finally:
        for twin in twins:
            twin.stop()
            site.vms.remove(twin)


async def test_an_action_that_no_group_allows_is_refused_with_its_rule(site: Site, web1: Guest) -> None:
    vm = named(site, "web3")
    site.group("web", *site.vms, actions=["reboot", "status", "list"])
    await site.reload()
    try:
        done = await agent(web1, "off", vm.spec.name)
    finally:
        site.group("web", *site.vms)
        await site.reload()
    assert (done.code, done.stdout, vm.running) == (1, "", True), done
    assert "off" in reason_of(done)["reason"]
    assert "web" in reason_of(done)["reason"]


async def test_a_vm_outside_the_askers_groups_is_refused(site: Site, web1: Guest) -> None:
    vm = named(site, "web3")
    site.group("web", *(one for one in site.vms if one is not vm))
    await site.reload()
    try:
        done = await agent(web1, "off", vm.spec.name)
        by_uuid = await agent(web1, "off", vm.spec.uuid)
    finally:
        site.group("web", *site.vms)
        await site.reload()
    assert (done.code, by_uuid.code, vm.running) == (1, 1, True), done
    assert "group" in reason_of(done)["reason"]


async def test_a_guest_that_is_in_no_group_may_do_nothing_and_its_monitor_fails(
    site: Site, web1: Guest
) -> None:
    site.group("web", *site.vms[1:])
    await site.reload()
    try:
        for action, plug in (("off", site.name("web3")), ("status", site.name("web3")), ("monitor", "")):
            done = await agent(web1, action, plug)
            assert (done.code, done.stdout) == (1, ""), done
            assert "group" in reason_of(done)["reason"], done.stderr
    finally:
        site.group("web", *site.vms)
        await site.reload()
    assert named(site, "web3").running


# --- node names


async def test_a_node_name_that_a_guest_announced_is_a_plug_also_when_it_hangs_and_after_a_restart(
    site: Site, web1: Guest, web2: Guest
) -> None:
    pid = web2.vm.pid
    web2.vm.signal(signal.SIGSTOP)
    site.daemon.restart()
    await site.until_connected(web1.vm)
    assert (await agent(web1, "status", "node-web2")).code == 0  # not off, for all that is known
    done = await agent(web1, "reboot", "node-web2")
    assert (done.code, done.stdout) == (0, "Success: Rebooted\n"), done
    assert f"pid {pid} on hv1 gone after" in done.stderr
    assert "pidfd, by SIGKILL" in done.stderr
    assert pid not in web2.vm.pids()
    await web2.wait_ready()


ANNOUNCE = """
import sys, time
from fence_vmchannel.messages import Announce, decode_message, encode_message
from vmchannel_guest.reach import GuestReach
deadline = time.monotonic() + 20
line = GuestReach()(deadline=deadline)
line.send(encode_message(Announce({name!r}, "hostname")), deadline=deadline)
print(decode_message(line.receive(deadline=deadline)))
"""


async def test_a_name_that_another_vm_claims_too_fails_until_it_is_pinned(
    site: Site, web1: Guest, web2: Guest
) -> None:
    try:
        said = (await web1.python(ANNOUNCE.format(name="node-web2"))).check().stdout
        assert "accepted=False" in said
        done = await agent(web1, "off", "node-web2")
        assert (done.code, done.stdout, web2.vm.running) == (1, "", True), done
        assert "pin" in reason_of(done)["reason"]
        site.config["aliases"] = {"node-web2": web2.spec.uuid}
        await site.reload()
        assert (await agent(web1, "status", "node-web2")).code == 0
    finally:
        site.config.pop("aliases", None)
        await site.reload()
        said = (await web1.python(ANNOUNCE.format(name="node-web1"))).check().stdout
    assert "accepted=True" in said
