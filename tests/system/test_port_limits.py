# SPDX-License-Identifier: LGPL-2.1-or-later
"""`ports.overrides` with a real guest: what one port may hold, both ways, and what is kept while it is
away."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fence_vmchannel import Channel, ChannelClosed, CloseCode, MessageTooLarge
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    WAIT_S,
    echo,
    end_hub,
    host_client,
    offered,
    port_view,
    start_hub,
    until,
    until_said,
)
from tests.system.site import Site, open_site

NARROW = "org.vmchannel.1"
OVERRIDES = {NARROW: {"byte_limit": "64KiB", "guest_byte_limit": "48KiB", "cache_buffers": False}}
FITS, TOO_LARGE = 40_000, 60_000  # of the smaller limit; the larger one would take both

SIZES = f"""
import time
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.errors import MessageTooLarge
deadline = time.monotonic() + 60
with BlockingClient.connect(deadline=deadline) as client:
    for address in ("org.example.echo", "{NARROW}:org.example.echo"):
        for size in ({FITS}, {TOO_LARGE}):
            with client.open(address, deadline=deadline) as channel:
                try:
                    print(len(channel.request(bytes(size), deadline=deadline)))
                except MessageTooLarge:
                    print("too large")
"""

FILL = f"""
import time
from fence_vmchannel.blocking.client import BlockingClient
from fence_vmchannel.errors import DeadlineExceeded
with BlockingClient.connect(deadline=time.monotonic() + 60) as client:
    for address, seconds in (("org.example.stall", 60), ("{NARROW}:org.example.stall", 5)):
        sent = 0
        with client.open(address, deadline=time.monotonic() + 60) as channel:
            try:
                while sent < 100_000:
                    channel.send(bytes(4_000), deadline=time.monotonic() + seconds)
                    sent += 4_000
            except DeadlineExceeded:
                pass
        print(sent)
"""

TAKE = """
import os, time
from fence_vmchannel.blocking.client import BlockingClient
deadline = time.monotonic() + 200
service = "org.example.take." + os.environ["NUMBER"]
with BlockingClient.connect(deadline=deadline, resume_s=120) as client:
    with client.offer(service, deadline=deadline) as offer:
        print("offered", flush=True)
        with offer.next(deadline=deadline) as channel:
            try:
                while (message := channel.receive(deadline=deadline)) is not None:
                    print(len(message), flush=True)
            except Exception as error:
                print(error.code.name if hasattr(error, "code") else error, flush=True)
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        opened.config["ports"] = {"overrides": OVERRIDES}
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("narrow", ports=(PORT, NARROW))
    site.serve()
    return vm


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await until(lambda: both_connected(site, vm.spec.uuid, True), "greeting on both ports")
    return guest


async def both_connected(site: Site, uuid: str, wanted: bool) -> bool:
    views = [await port_view(site, uuid, port) for port in (PORT, NARROW)]
    return all(view is not None and view["connected"] is wanted for view in views)


async def test_a_message_beyond_the_smaller_limit_of_its_port_is_refused_to_its_sender(
    site: Site, guest: Guest
) -> None:
    async with offered(site, "org.example.echo", echo):
        said = (await guest.python(SIZES, timeout_s=100)).check().stdout.split("\n")
    assert said == [str(FITS), str(TOO_LARGE), str(FITS), "too large", ""]


async def test_what_a_guest_can_queue_for_a_reader_that_stalls_is_the_limit_of_its_port(
    site: Site, guest: Guest
) -> None:
    async def stall(channel: Channel) -> None:
        await channel.accept()
        await channel.wait_closed()

    async with offered(site, "org.example.stall", stall):
        said = (await guest.python(FILL, timeout_s=200)).check().stdout.split()
    wide, narrow = map(int, said)
    assert wide == 100_000
    assert 0 < narrow <= 48 * 1_024


async def test_what_waits_for_a_guest_that_is_away_is_kept_on_one_port_and_dropped_on_the_other(
    site: Site, guest: Guest
) -> None:
    reader = {number: await guest.start_python(TAKE, env={"NUMBER": number}) for number in "01"}
    for one in reader.values():
        await until_said(one, lambda said: "offered" in said)
    async with host_client(site) as client:
        kept = await client.open(f"{guest.spec.name}/org.example.take.0", timeout_s=WAIT_S)
        dropped = await client.open(f"{guest.spec.name}/{NARROW}:org.example.take.1", timeout_s=WAIT_S)
        with pytest.raises(MessageTooLarge):
            await dropped.send(bytes(TOO_LARGE))
        await dropped.send(bytes(FITS))
        await until_said(reader["1"], lambda said: str(FITS) in said)
        await end_hub(guest, signal.SIGTERM)
        await until(lambda: both_connected(site, guest.spec.uuid, False), "end of both links")
        async with asyncio.timeout(WAIT_S):
            await kept.send(bytes(TOO_LARGE))
            with pytest.raises(ChannelClosed) as told:
                await dropped.receive()
        assert told.value.code is CloseCode.PEER_GONE
        await start_hub(guest)
        assert str(TOO_LARGE) in await until_said(reader["0"], lambda said: str(TOO_LARGE) in said)
        said = await until_said(reader["1"], lambda said: "PEER_GONE" in said)
        assert str(TOO_LARGE) not in said
        kept.close()
    (await reader["0"].wait()).check()
    (await reader["1"].wait()).check()
