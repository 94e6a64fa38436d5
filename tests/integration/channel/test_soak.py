# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hubs for a long time: their link is cut, the host's hub is replaced, records are counted.

Time is virtual: an hour takes as long as its work does. The hubs are joined by socket pairs in this process,
so what one writes the other can read at once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tracemalloc
from dataclasses import dataclass, field

import pytest

from fence_vmchannel.channel import Channel
from fence_vmchannel.core.events import PeerIdentity, Role
from fence_vmchannel.errors import ChannelClosed, CloseCode
from fence_vmchannel.hub.hub import Hub
from fence_vmchannel.peers import HOST_PEER
from tests.counts import Count
from tests.fakes.hub_pair import HOST, VM, FakePort
from tests.fakes.virtual_time import virtual_time

LOST = (CloseCode.SESSION_RESET, CloseCode.SHUTDOWN, CloseCode.PEER_GONE)
"""How a channel may end when the host's hub is replaced."""


@dataclass
class Tally:
    """What the applications saw."""

    sent: int = 0
    answered: int = 0
    told: int = 0  # ends of channels that the guest's application was told of
    served: int = 0
    wrong: list[str] = field(default_factory=list[str])


class World:
    """A guest's hub that stays, a host's hub that is replaced, the port between them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.rng = random.Random(7)
        self.port = FakePort()
        self.guest = Hub(
            PeerIdentity("guest-boot", "guest"),
            default_peer=HOST_PEER,
            clock=self.loop.time,
            random_bytes=self.rng.randbytes,
        )
        self.tally = Tally()
        self.over = asyncio.Event()
        self.replace = asyncio.Event()
        self.hosts = self.cuts = 0

    async def host(self) -> None:
        """One host's hub after another."""
        while not self.over.is_set():
            self.hosts += 1
            async with Hub(
                PeerIdentity("host-boot", f"host {self.hosts}"),
                clock=self.loop.time,
                random_bytes=self.rng.randbytes,
            ) as hub:
                hub.offer("org.example.count", self.serve)
                hub.attach(VM, self.port.host)
                self.replace.clear()
                await self.replace.wait()
            await asyncio.sleep(self.rng.uniform(0, 20))

    async def serve(self, channel: Channel) -> None:
        """Answers; the records of a channel are 0, 1, 2, ... and nothing else."""
        expected = 0
        while (record := await channel.receive()) is not None:
            if record.split(b".")[0] != b"%d" % expected:
                self.tally.wrong.append(f"{record[:20]!r} is not {expected}")
            expected += 1
            self.tally.served += 1
            await channel.send(record)

    async def talk(self) -> None:
        """An application of the guest: asks, now and then, and opens another channel when one has ended."""
        tally, rng = self.tally, self.rng
        while not self.over.is_set():
            number = 0
            try:
                async with await self.guest.open("", "org.example.count") as channel:
                    while not self.over.is_set():
                        record = b"%d" % number + b"." * rng.choice((0, 10, 1_000, 60_000))
                        tally.sent += 1
                        if await channel.request(record) != record:
                            tally.wrong.append(f"another answer to {number}")
                        tally.answered += 1
                        number += 1
                        await asyncio.sleep(rng.choice((0, 0.1, 1, 8)))
            except ChannelClosed as error:
                tally.told += 1
                if error.code not in LOST:
                    tally.wrong.append(str(error))
                await asyncio.sleep(0.5)

    async def trouble(self, until_s: float) -> None:
        """Cuts of the link, and at times another host's hub, until that time."""
        while self.loop.time() < until_s:
            await asyncio.sleep(self.rng.uniform(1, 40))
            self.cuts += 1
            self.port.cut()
            if self.rng.random() < 0.1:
                self.replace.set()
        await asyncio.sleep(60)  # what is under way arrives
        self.over.set()
        self.replace.set()


@pytest.mark.counted
@virtual_time
async def test_two_hubs_for_a_long_time_lose_and_double_nothing_without_saying_so(count: Count) -> None:
    seconds = count(240, 3_600, "virtual seconds of two hubs")
    world = World()
    try:
        async with world.guest as guest, asyncio.TaskGroup() as tasks:
            guest.attach(HOST, world.port.guest, role=Role.GUEST)
            tasks.create_task(world.host(), name="host")
            for _ in range(3):
                tasks.create_task(world.talk(), name="application")
            await world.trouble(world.loop.time() + seconds)
    finally:
        world.port.close()
    tally = world.tally
    assert not tally.wrong
    assert tally.answered > seconds / 3
    assert tally.sent - tally.answered <= tally.told, "a record was lost and nobody told"
    assert tally.answered <= tally.served <= tally.sent
    assert world.cuts > seconds / 60


@pytest.mark.counted
@virtual_time
async def test_links_that_come_and_go_leave_no_descriptor_and_no_memory_behind(count: Count) -> None:
    cycles = count(60, 1_000, "connect cycles of a port")
    world = World()
    world.guest.offer("org.example.unused", world.serve)
    open_files: list[int] = []
    memory: list[int] = []
    async with world.guest as guest, asyncio.TaskGroup() as tasks:
        guest.attach(HOST, world.port.guest, role=Role.GUEST)
        tasks.create_task(world.host(), name="host")
        channel = await guest.open("", "org.example.count")
        for number in range(cycles):
            world.port.cut()
            assert await channel.request(b"%d" % number) == b"%d" % number
            if number in (cycles // 2, cycles - 1):
                gc.collect()
                open_files.append(len(os.listdir("/proc/self/fd")))
                memory.append(tracemalloc.get_traced_memory()[0])
            if number == cycles // 4:  # what is kept for ever has been made
                tracemalloc.start()
        tracemalloc.stop()
        channel.close()
        world.over.set()
        world.replace.set()
    world.port.close()
    assert world.tally.served == cycles
    assert open_files[0] == open_files[1]
    assert memory[1] - memory[0] < 100_000
