# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels between programs of a guest and programs of its host: many at once, large, and often."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fence_vmchannel import Channel
from tests.counts import Count
from tests.rig.fixtures import Attach
from tests.rig.guest import Guest
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import (
    WAIT_S,
    echo,
    host_client,
    hub_pid,
    offered,
    until,
    until_said,
)
from tests.system.site import Site, open_site

pytestmark = pytest.mark.slow

PROGRAMS = 20
RECORDS = 25
GROWTH = 8 * 1_048_576
"""What coming and going may leave in a hub's memory, bytes: allocators keep some; 1,000 leaks would show."""

MIB = 1 << 20
MESSAGE = 65_536
MEMORY = 8 * MIB
"""How much a hub may grow at its peak, in bytes: half of the smallest bulk; one MiB was seen."""

EACH_IN_A_PROCESS = f"""
import os, time
from fence_vmchannel.blocking.client import BlockingClient
deadline = time.monotonic() + 100

def each_in_a_process(program):
    children = []
    for number in range({PROGRAMS}):
        pid = os.fork()
        if pid == 0:
            try:
                program(number)
            except BaseException as error:
                print(number, repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    raise SystemExit(f"{{len(failed)}} failed" if failed else 0)
"""

ASK = (
    EACH_IN_A_PROCESS
    + f"""
def program(number):
    with BlockingClient.connect(deadline=deadline) as client:
        with client.open("org.example.many", payload=b"%d" % number, deadline=deadline) as channel:
            for record in range({RECORDS}):
                question = b"%d of %d" % (record, number)
                assert channel.request(question, deadline=deadline) == question[::-1]
each_in_a_process(program)
"""
)

ANSWER = (
    EACH_IN_A_PROCESS
    + """
def program(number):
    with BlockingClient.connect(deadline=deadline) as client:
        with client.offer(f"org.example.program.{number}", deadline=deadline) as offer:
            print("offered", flush=True)
            with offer.next(deadline=deadline) as channel:
                while (question := channel.receive(deadline=deadline)) is not None:
                    channel.send(b"%d: " % number + question[::-1], deadline=deadline)
each_in_a_process(program)
"""
)

BULK_PROGRAM = f"""
import hashlib, os, sys, time
from fence_vmchannel.blocking.client import BlockingClient
deadline = time.monotonic() + 600
noise = os.urandom({MESSAGE})

def up():
    digest = hashlib.sha256()
    with BlockingClient.connect(deadline=deadline) as client:
        with client.open("org.example.take", deadline=deadline) as channel:
            for number in range(BULK // {MESSAGE}):
                message = number.to_bytes(8, "big") + noise[8:]
                digest.update(message)
                channel.send(message, deadline=deadline)
            assert channel.receive(deadline=deadline).decode() == digest.hexdigest()

def down():
    digest, size = hashlib.sha256(), 0
    with BlockingClient.connect(deadline=deadline) as client:
        with client.open("org.example.give", deadline=deadline) as channel:
            while size < BULK:
                message = channel.receive(deadline=deadline)
                digest.update(message)
                size += len(message)
            assert size == BULK
            assert channel.request(digest.hexdigest().encode(), deadline=deadline) == b"equal"

def at_once(*works):
    children = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException as error:
                print(work.__name__, repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    raise SystemExit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""

COME_AND_GO = """
import time
from fence_vmchannel.blocking.client import BlockingClient
deadline = time.monotonic() + {seconds}
for number in range({cycles}):
    with BlockingClient.connect(deadline=deadline) as client:
        assert client.request("org.example.echo", b"%d" % number, deadline=deadline) == (b"%d" % number)[::-1]
"""

WHO_HAS_THE_PORT = """
import os
device = os.stat("/dev/vport0p1").st_rdev
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        held = [os.stat(f"/proc/{pid}/fd/{fd}").st_rdev for fd in os.listdir(f"/proc/{pid}/fd")]
    except FileNotFoundError:
        continue
    if device in held:
        print(pid)
"""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    with open_site(shared_rig_dir, image, accel) as opened:
        yield opened


@pytest.fixture(scope="module")
def vm(site: Site) -> Vm:
    vm = site.vm("chan")
    site.serve()
    return vm


@pytest.fixture
async def guest(site: Site, vm: Vm, attach: Attach) -> Guest:
    guest = await attach(vm)
    await site.until_connected(vm)
    return guest


async def test_twenty_programs_of_a_guest_talk_through_one_opener_of_the_port(
    site: Site, guest: Guest
) -> None:
    records: dict[int, list[bytes]] = {}
    all_open, go = asyncio.Event(), asyncio.Event()

    async def serve(channel: Channel) -> None:
        mine = records.setdefault(int(channel.payload), [])
        await channel.accept()
        if len(records) == PROGRAMS:
            all_open.set()
        await go.wait()
        while (question := await channel.receive()) is not None:
            mine.append(question)
            await channel.send(question[::-1])

    async with offered(site, "org.example.many", serve), asyncio.timeout(2 * WAIT_S):
        programs = await guest.start_python(ASK, timeout_s=100)
        await all_open.wait()
        holders = (await guest.python(WHO_HAS_THE_PORT)).check().stdout.split()
        go.set()
        (await programs.wait(100)).check()
    assert holders == [str(await hub_pid(guest))]
    assert records == {
        number: [b"%d of %d" % (record, number) for record in range(RECORDS)] for number in range(PROGRAMS)
    }


async def test_a_program_of_the_host_talks_to_twenty_programs_of_a_guest_at_once(
    site: Site, guest: Guest
) -> None:
    answers: dict[int, list[bytes]] = {}
    all_open = asyncio.Barrier(PROGRAMS)

    async def ask(number: int) -> None:
        address = f"{guest.spec.name}/org.example.program.{number}"
        async with await client.open(address, timeout_s=WAIT_S) as channel:
            await all_open.wait()
            answers[number] = [await channel.request(b"%d" % record) for record in range(RECORDS)]

    programs = await guest.start_python(ANSWER, timeout_s=100)
    await until_said(programs, lambda said: said.count("offered") == PROGRAMS)
    async with host_client(site) as client, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as asking:
        for number in range(PROGRAMS):
            asking.create_task(ask(number), name=f"ask {number}")
    (await programs.wait(100)).check()
    assert answers == {
        number: [b"%d: %s" % (number, (b"%d" % record)[::-1]) for record in range(RECORDS)]
        for number in range(PROGRAMS)
    }


@pytest.mark.counted
@pytest.mark.timeout(900)
async def test_bulk_each_way_at_once_arrives_unchanged_while_the_hubs_memory_stays_bounded(
    site: Site, guest: Guest, count: Count
) -> None:
    bulk = count(16, 64, "MiB each way at once") * MIB
    noise = hashlib.sha256(b"noise").digest() * (MESSAGE // 32)

    async def take(channel: Channel) -> None:
        digest, size = hashlib.sha256(), 0
        while size < bulk:
            message = await channel.receive()
            assert message is not None
            digest.update(message)
            size += len(message)
        assert size == bulk
        await channel.send(digest.hexdigest().encode())
        assert await channel.receive() is None

    async def give(channel: Channel) -> None:
        digest = hashlib.sha256()
        for number in range(bulk // MESSAGE):
            message = number.to_bytes(8, "big") + noise[8:]
            digest.update(message)
            await channel.send(message)
        theirs = await channel.receive()
        await channel.send(b"equal" if theirs == digest.hexdigest().encode() else b"different")
        assert await channel.receive() is None

    hub = await hub_pid(guest)
    before = await memory(guest, hub, "VmRSS"), host_memory(site.daemon.pid, "VmRSS")
    async with offered(site, "org.example.take", take), offered(site, "org.example.give", give):
        (await guest.python(f"BULK = {bulk}\n{BULK_PROGRAM}\nat_once(up, down)", timeout_s=600)).check()
    assert await memory(guest, hub, "VmHWM") < before[0] + MEMORY
    assert host_memory(site.daemon.pid, "VmHWM") < before[1] + MEMORY


@pytest.mark.counted
@pytest.mark.timeout(1_800)
async def test_clients_that_come_and_go_leave_no_descriptor_and_no_memory_behind(
    site: Site, guest: Guest, count: Count
) -> None:
    hub = await hub_pid(guest)
    cycles = count(50, 1_000, "connect cycles of clients on each side")

    async def open_now() -> tuple[int, int]:
        there = (await guest.sh(f"ls -l /proc/{hub}/fd")).check().stdout
        return connections(there), connections(open_files(site.daemon.pid))

    async def come_and_go(cycles: int) -> None:
        seconds = 60 + cycles
        program = COME_AND_GO.format(cycles=cycles, seconds=seconds)
        (await guest.python(program, timeout_s=seconds)).check()
        for _ in range(cycles):
            async with host_client(site) as client:
                await client.status(timeout_s=WAIT_S)

    async with offered(site, "org.example.echo", echo):
        await come_and_go(20)  # what is made once has been made
        before = await open_now()
        small = await memory(guest, hub, "VmRSS"), host_memory(site.daemon.pid, "VmRSS")
        assert min(before) > 0, "the count sees nothing"
        await come_and_go(cycles)

        async def no_more_than_before() -> bool:
            now = await open_now()
            return now[0] <= before[0] and now[1] <= before[1]

        await until(no_more_than_before, f"return to {before} descriptors")
        async with host_client(site) as client:
            peers = (await client.status(timeout_s=WAIT_S)).peers
    assert [peer.channels for peer in peers] == [0], "channels are left in the session"
    assert await memory(guest, hub, "VmRSS") < small[0] + GROWTH
    assert host_memory(site.daemon.pid, "VmRSS") < small[1] + GROWTH


def open_files(pid: int) -> str:
    """What a process of the host has open, a line each."""
    lines: list[str] = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed while we looked
            lines.append(str(entry.readlink()))
    return "\n".join(lines)


def connections(files: str) -> int:
    """How many of these are connections: a hub has a socket and an epoll for each. The daemon also has
    a pidfd for every QEMU of this machine, others' too: those do not count.
    """
    return sum("socket:[" in line or "[eventpoll]" in line for line in files.splitlines())


async def memory(guest: Guest, pid: int, what: str) -> int:
    """Resident memory of a process in the guest, in bytes: VmRSS now, VmHWM at its peak."""
    return _bytes((await guest.run("cat", f"/proc/{pid}/status")).check().stdout, what)


def host_memory(pid: int, what: str) -> int:
    """Resident memory of a process of the host, in bytes."""
    return _bytes(Path(f"/proc/{pid}/status").read_text(), what)


def _bytes(status: str, what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return int(found[1]) * 1024
