# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real guest that owns its kernel and attacks its host through its port, while others are served (S7)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.fixtures import Attach
from tests.rig.guest import Guest, Job
from tests.rig.image import Image
from tests.rig.vm import Vm
from tests.system.channel_rig import echo, offered, until_said
from tests.system.site import Site, agent, open_site
from tests.system.test_channels import host_memory

MEMORY = 24 << 20
"""What the attacks may cost the daemon, in bytes: a session's limits, and what allocators keep."""

LINES = 150
"""Lines in the daemon's log about the attacker, for all that it does in a minute or two."""

ECHOES = 100

ATTACK = '''
import os, random, select, struct, sys, time
from zlib import crc32
from fence_vmchannel.core.frames import FrameDecoder, FrameType, encode_frame, frames_only
from fence_vmchannel.core.greeting import NO_SESSION, Hello, Numbers, Offer
from fence_vmchannel.core.greeting import decode_challenge, encode_hello, encode_progress

NODE = "/dev/vport0p1"
ATTACK_S = 6
OTHER = "{other}"  # the boot id of another guest


class Peer:
    """The port, and a session that is right as long as nothing else is wanted."""

    greeted = 0

    def __init__(self):
        self.end = time.monotonic() + ATTACK_S
        self.fd = os.open(NODE, os.O_RDWR | os.O_NONBLOCK)
        self.decoder, self.epoch = FrameDecoder(), 0
        self.sequence = self.check = self.ack = self.ack_check = 0

    def write(self, data, patience=0.3):
        """As much as the host takes; returns how much."""
        view, end = memoryview(data), min(self.end, time.monotonic() + patience)
        while view and time.monotonic() < end:
            try:
                view = view[os.write(self.fd, view[:32768]):]
            except BlockingIOError:
                select.select([], [self.fd], [], 0.05)
        return len(data) - len(view)

    def send(self, kind, payload=b"", channel=0, **odd):
        sequence = self.sequence + 1 if kind >= FrameType.OPEN else 0
        fields = dict(epoch=self.epoch, ack=self.ack, ack_check=self.ack_check, sequence=sequence)
        data = encode_frame(kind, payload, channel=channel, flags=2, **(fields | odd))
        if sequence:
            self.sequence, self.check = sequence, crc32(data[4:28], self.check)
        return self.write(data)

    def frames(self, seconds=0.5):
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end and not found:
            select.select([self.fd], [], [], 0.05)
            try:
                found = list(frames_only(self.decoder.feed(os.read(self.fd, 65536))))
            except BlockingIOError:
                pass
        for frame in found:
            if frame.sequence == self.ack + 1:
                self.ack, self.ack_check = frame.sequence, crc32(frame.identity, self.ack_check)
        return found

    @property
    def over(self):
        return time.monotonic() > self.end

    def await_frame(self, kind, seconds):
        end = min(self.end, time.monotonic() + seconds)
        while time.monotonic() < end:
            for frame in self.frames():
                if frame.type == kind:
                    return frame
        return None

    def greet(self):
        """A session with the host that claims to be another guest. False: the host does not want to."""
        while not self.over:
            self.epoch = 0
            self.send(FrameType.KNOCK, ack=0, ack_check=0)
            challenge = self.await_frame(FrameType.CHALLENGE, 2)
            if challenge is None:
                continue
            self.sequence = self.check = self.ack = self.ack_check = 0
            nonce = decode_challenge(challenge.payload)
            offer = Offer(2**64 - 1, 2**32 - 1, 2**32 - 1, OTHER, "\\x1b[2J\\nvmchanneld" * 9)
            hello = encode_hello(Hello(Numbers(NO_SESSION, 0, 0, 0, 0, 0), offer, (1, 2, 255)))
            self.send(FrameType.HELLO, hello, epoch=nonce)
            if self.await_frame(FrameType.WELCOME, 2):
                self.epoch = nonce
                self.send(FrameType.ACK, encode_progress(0, 0))
                Peer.greeted += 1
                return True
        return False

    def open(self, channel, target=b"org.vmchannel.fence", window=2**63):
        self.send(FrameType.OPEN, struct.pack(">BQH", 1, window, len(target)) + target, channel)

    def close(self):
        os.close(self.fd)
        time.sleep(0.2)


def garbage(peer):
    peer.write(random.randbytes(2_000_000), 3)
    peer.write(b"\\xf5VMC" * 200_000, 3)


def half_frame(peer):
    peer.write(encode_frame(FrameType.DATA, bytes(65_536))[:-1])


def oversize(peer):
    frame = bytearray(encode_frame(FrameType.DATA, b"x"))
    frame[12:16] = b"\\xff" * 4
    frame[56:60] = struct.pack(">I", crc32(frame[:56]))
    peer.write(bytes(frame) * 20_000, 3)


def knocks(peer):
    peer.write(encode_frame(FrameType.KNOCK) * 50_000, 4)


def never_hello(peer):
    peer.send(FrameType.KNOCK)
    time.sleep(3)


def channels(peer):
    """More than the limit, with names that no service has; the answers are never read."""
    if peer.greet():
        for number in range(1, 6001, 2):
            if peer.over:
                return
            peer.open(number, b"no\\nsuch,/" * 30)


def fences(peer):
    """Fence channels beyond the limit, each with a message that claims another identity, and nonsense."""
    if peer.greet():
        for number in range(1, 200, 2):
            if peer.over:
                return
            peer.open(number)
            peer.send(FrameType.DATA, b"\\0\\1" + struct.pack(">HI", 3, 300) + b"," * 300, number)
            peer.frames(0.02)


def forged(peer):
    """Acknowledgements and credit for what was never sent."""
    for odd in ({{"ack": 10**9}}, {{"ack_check": 7}}, {{"sequence": 10**9}}):
        if peer.greet():
            peer.open(1)
            peer.send(FrameType.CREDIT, struct.pack(">QQ", 2**63, 2**64 - 1), 1)
            peer.send(FrameType.ACK, encode_progress(10**9, 3), **odd)


def replay(peer):
    """What an earlier session said, word for word, on a new link."""
    if peer.greet():
        peer.open(1)
    recorded = b"".join(
        encode_frame(FrameType.OPEN, b"\\1" + bytes(8) + b"\\0\\1x", channel=1, sequence=1, epoch=peer.epoch)
        for _ in range(1_000)
    )
    peer.close()
    peer.__init__()
    peer.write(recorded)


def session_flood(peer):
    """New sessions as fast as they are given, each thrown away."""
    for _ in range(12):
        if not peer.greet():
            return


ATTACKS = [garbage, half_frame, oversize, knocks, never_hello]
ATTACKS += [channels, fences, forged, replay, session_flood]
rounds = 0
while True:
    for attack in ATTACKS:
        peer = Peer()
        attack(peer)
        peer.close()
        print(attack.__name__, Peer.greeted, flush=True)
    rounds += 1
    print("round", rounds, flush=True)
'''
"""All attacks, again and again until it is ended. The guest's library makes the frames that must be right."""


@pytest.fixture(scope="module")
def site(image: Image, accel: str, shared_rig_dir: Path) -> Iterator[Site]:
    """An attacker without a hub, an honest guest, and a VM that the honest one fences."""
    with open_site(shared_rig_dir, image, accel) as site:
        attacker = site.vm("evil", guestd=False)
        honest = site.vm("good")
        victim = site.vm("prey", image=None, machine="none", ports=())
        site.restartable(victim)
        site.group("good", honest, victim)
        site.group("evil", attacker, victim, actions=["status"])
        site.serve()
        yield site


@pytest.fixture
async def attacker(site: Site, attach: Attach) -> Guest:
    return await attach(site.vms[0])


@pytest.fixture
async def honest(site: Site, attach: Attach) -> Guest:
    guest = await attach(site.vms[1])
    await site.until_connected(guest.vm)
    return guest


async def attacked(job: Job, rounds: int) -> None:
    """Wait until the attacker has been through all its attacks so often."""
    async with asyncio.timeout(200):
        while f"round {rounds}\n" not in (now := await job.peek()).stdout:
            assert now.code is None, f"the attack has ended: {now}"
            await asyncio.sleep(0.5)


async def test_a_vm_is_fenced_and_echoes_arrive_while_a_guest_attacks(
    site: Site, attacker: Guest, honest: Guest
) -> None:
    victim: Vm = site.vms[2]
    said = len(site.daemon.log)
    before = host_memory(site.daemon.pid, "VmRSS")
    job = await attacker.start_python(ATTACK.format(other=await honest.boot_id()), timeout_s=600)
    async with offered(site, "org.example.echo", echo):
        echoes = await honest.start_python(ECHO, timeout_s=300)
        await until_said(job, lambda told: "garbage" in told)
        for action, state in (("off", "off"), ("on", "on"), ("reboot", "on"), ("off", "off")):
            done = await agent(honest, action, victim.spec.name, timeout_s=90)
            assert done.code == 0, done
            assert await site.status(victim) == state
        await attacked(job, 1)
        assert (await echoes.wait(200)).check().stdout.split()[-1] == str(ECHOES)
    attacks = (await job.peek()).stdout.splitlines()
    print("\n".join(attacks))
    assert int(attacks[9].split()[1]) > 3, "the attacks inside a session were none"
    await job.signal(9)
    told = site.daemon.log[said:]
    about = [line for line in told.splitlines() if attacker.spec.name in line or attacker.spec.uuid in line]
    assert host_memory(site.daemon.pid, "VmHWM") < before + MEMORY
    print("\n".join(about))
    assert 0 < len(about) < LINES, f"{len(about)} lines:\n{about[:50]}"
    assert all(line.isprintable() for line in about)
    assert [one["requester"] for one in await site.operations(victim)] == [honest.spec.uuid] * 4


async def test_the_attacker_is_served_when_it_behaves_again(site: Site, attacker: Guest) -> None:
    (await attacker.run("sh", "-c", "vmchannel-guestd > /run/guestd.log 2>&1 &")).check()
    await site.until_connected(attacker.vm)


ECHO = f"""
import time
from fence_vmchannel import BlockingClient
deadline = time.monotonic() + 280
with BlockingClient.connect(deadline=deadline) as client:
    with client.open("org.example.echo", deadline=deadline) as channel:
        for number in range({ECHOES}):
            word = b"%d" % number
            channel.send(word, deadline=deadline)
            assert channel.receive(deadline=deadline) == word[::-1]
            time.sleep(0.1)
print({ECHOES})
"""
