# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's way to the host where something is missing or in the way: hub, port, host daemon."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Completed, Guest, Job
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.site import Site, agent, open_site

HOLD = """
import os, time
names = os.listdir("/sys/class/virtio-ports")
fd = os.open("/dev/" + names[0], os.O_RDWR)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """A guest without vmchannel-guestd, and a VM that it may fence."""
    with open_site(shared_rig_dir, image, accel) as site:
        site.vm("bare1", guestd=False)
        site.vm("peer1", image=None, machine="none", ports=())
        site.group("bare", *site.vms)
        site.serve()
        yield site


@pytest.fixture
async def guest(site: Site, attach: Attach) -> Guest:
    return await attach(site.vms[0])


@pytest.fixture
async def peer(site: Site) -> Vm:
    vm = site.vms[1]
    if not vm.running:
        vm.start()
    await site.until_run_state(vm, "running")
    return vm


async def until_said(job: Job, *words: str) -> None:
    """Wait until a program in the guest has written all these words."""
    async with asyncio.timeout(60):
        while True:
            seen = await job.peek()
            if all(word in seen.stdout + seen.stderr for word in words):
                return
            assert seen.code is None, f"it has ended before it said {words}: {seen}"
            await asyncio.sleep(0.1)


@asynccontextmanager
async def held(guest: Guest) -> AsyncGenerator[Job, None]:
    """Another program has the port open."""
    job = await guest.start_python(HOLD)
    await until_said(job, "held")
    try:
        yield job
    finally:
        if (await job.peek()).code is None:
            await job.signal(signal.SIGKILL)
            await job.wait()


def assert_failed(done: Completed, *words: str) -> None:
    """Exit code 1, no word on stdout, and the reason in the last line."""
    assert (done.code, done.stdout, done.timed_out) == (1, "", False), done
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in words), done.stderr


async def test_without_a_hub_the_agent_opens_the_port_itself(site: Site, guest: Guest, peer: Vm) -> None:
    assert (await agent(guest, "monitor")).code == 0
    assert peer.spec.name in (await agent(guest, "list")).check().stdout
    done = await agent(guest, "off", peer.spec.name)
    assert (done.code, done.stdout, peer.running) == (0, "Success: Powered OFF\n", False), done
    assert (await agent(guest, "status", peer.spec.name)).code == 2


async def test_without_a_hub_the_agent_tells_the_host_its_node_name(site: Site, guest: Guest) -> None:
    assert (await agent(guest, "monitor")).code == 0
    assert await site.status("node-bare1") == "on"


async def test_a_port_that_another_program_holds_is_an_error_that_names_it_in_time(
    guest: Guest, peer: Vm
) -> None:
    async with held(guest) as holder:
        began = time.monotonic()
        done = await agent(guest, "off", peer.spec.name, timeout="4", timeout_s=30)
        took_s = time.monotonic() - began
    assert_failed(done, f"pid {holder.pid}", "python3", "org.vmchannel.0")
    assert peer.running
    assert took_s < 4 + 10  # its own deadline, and a slow guest
    assert (await agent(guest, "off", peer.spec.name)).code == 0


async def test_without_a_host_daemon_the_agent_fails_in_time_and_says_so(
    site: Site, guest: Guest, peer: Vm
) -> None:
    site.daemon.end()
    try:
        for action in ("off", "monitor"):
            done = await agent(guest, action, peer.spec.name, timeout="3", timeout_s=30)
            assert_failed(done, "no host daemon greets on it (is vmchanneld running?)", "op=- host=-")
    finally:
        site.daemon.start()
    assert peer.running
    assert (await agent(guest, "off", peer.spec.name)).code == 0


async def test_a_host_daemon_that_starts_late_is_waited_for(site: Site, guest: Guest, peer: Vm) -> None:
    site.daemon.end()
    try:
        options = ("--verbose", "--action=off", f"--plug={peer.spec.name}")
        job = await guest.start("fence_vmchannel", *options, timeout_s=90)
        await until_said(job, "no host daemon greets on it")
    finally:
        site.daemon.start()
    done = await job.wait(90)
    assert (done.code, done.stdout.splitlines()[-1], peer.running) == (0, "Success: Powered OFF", False), done


async def test_monitor_waits_for_a_hub_that_is_still_starting(site: Site, guest: Guest) -> None:
    async with held(guest) as starting:  # the hub has opened its port, and serves no socket yet
        job = await guest.start("fence_vmchannel", "--verbose", "--action=monitor", timeout_s=90)
        await until_said(job, f"pid {starting.pid}")
        await starting.signal(signal.SIGKILL)
        await starting.wait()
        hub = await guest.start("vmchannel-guestd")
        try:
            done = await job.wait(90)
            # The agent may have gone to the port before the hub was up; a signal before that ends it at once.
            await guest.sh("while [ ! -S /run/vmchannel/guest.sock ]; do sleep 0.1; done", timeout_s=60)
            await site.until_connected(guest.vm)
            again = await agent(guest, "monitor")
        finally:
            await hub.signal(signal.SIGTERM)
            ended = await hub.wait()
    assert done.code == 0, done
    assert (again.code, ended.code) == (0, 0), ended
