# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hubs that are stopped, killed or lose their port under load in both directions, on a real guest.

Every message is counted on both sides: a restart in order loses and doubles none; a kill is told to both
applications, and then there is service again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import fence_vmchannel
from fence_vmchannel import Channel, ChannelClosed, CloseCode
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest, Job
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    WAIT_S,
    echo,
    end_hub,
    hub_log,
    hub_pid,
    offered,
    start_hub,
    until,
)
from tests.system.site import Site, open_site

BATCH = 20
"""After so many messages the reader sends one back: it is counted too, and says when it is enough."""

UP = f"""
import time
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.errors import ChannelClosed
deadline = time.monotonic() + 280
with BlockingClient.connect(deadline=deadline, resume_s=100) as client:
    with client.open("org.example.up", deadline=deadline) as channel:
        sent = answers = 0
        answer = b""
        try:
            while not answer.endswith(b"enough"):
                for _ in range({BATCH}):
                    channel.send(b"%d|" % sent + bytes(sent * 37 % 20000), deadline=deadline)
                    sent += 1
                answer = channel.receive(deadline=deadline)
                assert answer.startswith(b"%d|" % answers), (answer, answers)
                answers += 1
        except ChannelClosed as error:
            print(error.code.name, flush=True)
        else:
            print("sent", sent, flush=True)
"""

DOWN = f"""
import time
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.errors import ChannelClosed
deadline = time.monotonic() + 280
with BlockingClient.connect(deadline=deadline, resume_s=100) as client:
    with client.open("org.example.down", deadline=deadline) as channel:
        got = 0
        try:
            while not (message := channel.receive(deadline=deadline)).startswith(b"enough"):
                assert message.startswith(b"%d|" % got), (message[:20], got)
                got += 1
                if got % {BATCH} == 0:
                    channel.send(b"%d|" % (got // {BATCH} - 1), deadline=deadline)
        except ChannelClosed as error:
            print(error.code.name, flush=True)
        else:
            print("got", got, flush=True)
"""

AGAIN = """
import time
from fence_vmchannel.blocking.client import BlockingClient
deadline = time.monotonic() + 100
with BlockingClient.connect(deadline=deadline) as client:
    print(client.request("org.example.echo", b"again", deadline=deadline).decode())
"""


HALF_A_FRAME = """
from fence_vmchannel.core.frames import FrameType, encode_frame
with open("/dev/vport0p1", "r+b", buffering=0) as port:
    port.write(encode_frame(FrameType.DATA, bytes(30_000), epoch=7, channel=1, sequence=1)[:1000])
"""

UNBIND = """
cd /sys/bus/virtio/drivers/virtio_console
for device in virtio*; do echo $device > unbind; done
"""


class Counts:
    """The host's side of the load: two services, each with one program of the guest."""

    def __init__(self) -> None:
        self.up = self.down = 0  # messages that came, messages that went
        self.enough = False
        self.ends: list[CloseCode] = []

    async def receive_up(self, channel: Channel) -> None:
        """Fails on the first message that is missing, twice there or out of order."""
        answers = 0
        try:
            while (message := await channel.receive()) is not None:
                assert message.startswith(b"%d|" % self.up)
                self.up += 1
                if self.up % BATCH == 0:
                    await channel.send(b"%d|" % answers + (b"enough" if self.enough else b""))
                    answers += 1
        except ChannelClosed as error:
            self.ends.append(error.code)

    async def send_down(self, channel: Channel) -> None:
        """Messages until it is enough; the reader's answers are counted too."""
        answers = 0
        try:
            while not self.enough:
                for _ in range(BATCH):
                    await channel.send(b"%d|" % self.down + bytes(self.down * 41 % 20_000))
                    self.down += 1
                assert await channel.receive() == b"%d|" % answers
                answers += 1
            await channel.send(b"enough")
            await channel.receive()  # until the program closes
        except ChannelClosed as error:
            self.ends.append(error.code)


class Load:
    """Two programs in a guest that talk with two services of one application of the host."""

    def __init__(self, counts: Counts, up: Job, down: Job) -> None:
        self.counts = counts
        self.jobs = up, down

    async def flows(self) -> None:
        """Wait until more messages have come both ways."""
        counts = self.counts
        up, down = counts.up, counts.down

        async def more() -> bool:
            return counts.up > up + BATCH and counts.down > down + BATCH

        await until(more, "messages both ways")

    async def end(self) -> None:
        """Let it end by itself: each side must have all that the other has sent."""
        self.counts.enough = True
        up, down = [(await job.wait(WAIT_S)).check().stdout.split() for job in self.jobs]
        assert up == ["sent", str(self.counts.up)]
        assert down == ["got", str(self.counts.down)]
        assert self.counts.ends == []

    async def was_reset(self) -> None:
        """Both programs, and both services, have been told that the session was reset."""
        for job in self.jobs:
            assert (await job.wait(WAIT_S)).check().stdout == "SESSION_RESET\n"

        async def told() -> bool:
            return self.counts.ends == [CloseCode.SESSION_RESET] * 2

        await until(told, "resets in the host's application")


@asynccontextmanager
async def load_on(site: Site, guest: Guest) -> AsyncGenerator[Load]:
    """Load in both directions; the application of the host waits long for a daemon."""
    counts = Counts()
    path = str(site.folder / "run" / "host.sock")
    async with (
        fence_vmchannel.connect(path, timeout_s=WAIT_S, resume_s=WAIT_S) as client,
        client.offer("org.example.up", counts.receive_up, timeout_s=WAIT_S),
        client.offer("org.example.down", counts.send_down, timeout_s=WAIT_S),
    ):
        load = Load(counts, await guest.start_python(UP), await guest.start_python(DOWN))
        await load.flows()
        yield load


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("load")
    site.serve()
    return vm


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    if not await hub_pid(guest):
        await start_hub(guest)
    await site.until_connected(vm)
    return guest


async def service_again(site: Site, guest: Guest) -> None:
    """A program of the guest reaches an application of the host."""
    await site.until_connected(guest.vm)
    async with offered(site, "org.example.echo", echo):
        done = (await guest.python(AGAIN, timeout_s=WAIT_S)).check()
    assert done.stdout == "niaga\n"


async def restart_daemon(site: Site, number: int) -> None:
    """End it while everything else goes on, and start it again."""
    await asyncio.to_thread(site.daemon.end, number)
    site.daemon.start()  # not in a thread: the daemon would end with it


async def restart_hub(guest: Guest, number: int) -> None:
    await end_hub(guest, number)
    await start_hub(guest)


async def test_restarts_of_either_hub_under_load_lose_and_double_no_message(site: Site, guest: Guest) -> None:
    async with load_on(site, guest) as load:
        for _ in range(2):
            await restart_hub(guest, signal.SIGTERM)
            await load.flows()
            await restart_daemon(site, signal.SIGTERM)
            await load.flows()
        await end_hub(guest, signal.SIGTERM)  # and both at once
        await restart_daemon(site, signal.SIGTERM)
        await start_hub(guest)
        await load.flows()
        await load.end()
    assert "sessions of the process before go on" in await hub_log(guest)


@pytest.mark.parametrize("which", ["guest hub", "host daemon"])
async def test_a_kill_under_load_is_told_to_both_applications_and_there_is_service_again(
    site: Site, guest: Guest, which: str
) -> None:
    async with load_on(site, guest) as load:
        if which == "guest hub":
            await restart_hub(guest, signal.SIGKILL)
        else:
            await restart_daemon(site, signal.SIGKILL)
        await load.was_reset()
    await service_again(site, guest)


async def test_a_guest_that_is_reset_under_load_is_a_session_reset_and_then_serves_again(
    site: Site, guest: Guest
) -> None:
    async with load_on(site, guest) as load:
        before = await guest.boot_id()
        await guest.qmp("system_reset")
        await guest.disconnect()

        async def told() -> bool:
            return load.counts.ends == [CloseCode.SESSION_RESET] * 2

        await until(told, "resets in the host's application")
        await guest.wait_ready()
        assert await guest.boot_id() != before
    await service_again(site, guest)


async def test_a_driver_that_is_unloaded_and_loaded_again_under_load_loses_no_message(
    site: Site, guest: Guest
) -> None:
    """The port goes while the hub has it open, and comes back: the same session goes on."""
    async with load_on(site, guest) as load:
        (await guest.sh(UNBIND)).check()

        async def unloaded() -> bool:  # the hub closes the port first
            return (await guest.sh("rmmod virtio_console")).code == 0

        await until(unloaded, "unloaded driver")
        (await guest.sh("insmod $(grep virtio_console /rig/modules)")).check()
        await load.flows()
        await load.end()


async def test_a_hub_that_is_killed_in_mid_frame_costs_its_session_only(site: Site, guest: Guest) -> None:
    """The next hub's bytes come behind a frame that lacks most of what its head announces."""
    async with load_on(site, guest) as load:
        await end_hub(guest, signal.SIGKILL)
        (await guest.python(HALF_A_FRAME)).check()
        await start_hub(guest)
        await load.was_reset()
    await service_again(site, guest)


async def test_a_restart_after_another_keeps_what_nobody_has_claimed_yet(site: Site, guest: Guest) -> None:
    """Two upgrades in a row: the second process has not yet seen all of the first one's peers."""
    async with load_on(site, guest) as load:
        os.kill(guest.vm.pid, signal.SIGSTOP)  # nobody comes back meanwhile
        try:
            await restart_daemon(site, signal.SIGTERM)
            await restart_daemon(site, signal.SIGTERM)
        finally:
            os.kill(guest.vm.pid, signal.SIGCONT)
        await load.flows()
        await load.end()
