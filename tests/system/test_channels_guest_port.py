# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's link over a real virtio_console port: a host that is away, slow or gone, a port unplugged."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from tests.rig.fixtures import Attach, BootShared
from tests.rig.guest import Guest, Job
from tests.rig.qemu import PORT
from tests.rig.vm import Vm
from tests.system.channel_rig import WAIT_S, until_said

SECOND = "org.vmchannel.1"
THIRD = "org.vmchannel.2"

OPEN = f"""
import select, time
from fence_vmchannel.discovery import open_port
from fence_vmchannel.errors import LinkError
port = open_port(NAME)
poll = select.poll()
poll.register(port.fileno(), select.POLLIN)

def step(pause_s={WAIT_S}):
    ready = bool(poll.poll(pause_s * 1000))
    if ready:
        port.refresh()
    return ready

def say(*words):
    print(*words, flush=True)
"""

COME_AND_GO = """
say("present" if port.present else "away", port.receive())
wakes = sum(step(0.1) and (port.receive() or True) for _ in range(10))
say("wakes", wakes)
for _ in range(2):
    while not port.present:
        assert step()
    say("present")
    while port.present:
        assert step()
        while port.receive():
            pass
    say("away")
"""

COLLECT = """
import os
say("ready")
while not os.path.exists("/run/go"):
    time.sleep(0.01)
data, left = b"", False
while not left:
    assert step()
    while piece := port.receive():
        assert len(piece) <= 4096
        data += piece
    left = bool(data) and not port.present
say(len(data), data == bytes(range(256)) * (len(data) // 256))
"""

FILL = """
while not port.present:
    assert step()
taken = 0
while sent := port.send(memoryview(bytes(40_000))):
    assert sent <= 32_768
    taken += sent
say("full", taken)
wakes = sum(step(0.1) for _ in range(5))
say("wakes", wakes)
while not port.send(memoryview(b"again")):
    assert step()
say("woken")
"""

FILL_UNTIL_UNPLUGGED = """
while not port.present:
    assert step()
while port.send(memoryview(bytes(32_768))):
    pass
say("full")
try:
    while True:
        assert step()
except LinkError as error:
    say(error)
"""

UNPLUGGED = """
say("ready")
try:
    while True:
        assert step()
        port.receive()
except LinkError as error:
    say(error)
"""


@pytest.fixture(scope="module")
def vm(boot_shared: BootShared) -> Vm:
    return boot_shared("port", ports=(PORT, SECOND))


@pytest.fixture
async def guest(vm: Vm, attach: Attach) -> Guest:
    return await attach(vm)


def source(program: str, name: str = PORT) -> str:
    return f"NAME = {name!r}\n{OPEN}\n{program}"


@contextmanager
def host(vm: Vm, port: str = PORT) -> Generator[socket.socket, None, None]:
    """A program of the host at the other end of the port; no hub runs here."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(vm.spec.port_socket(port)))
        yield sock


def unsent(sock: socket.socket) -> int:
    """Bytes that the other end has not read."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


async def plug_third(guest: Guest) -> None:
    """Add a port to the running VM, with a socket of its own."""
    socket_of = {"type": "unix", "data": {"path": str(guest.spec.folder / "third.sock")}}
    backend = {"type": "socket", "data": {"addr": socket_of, "server": True, "wait": False}}
    await guest.qmp("chardev-add", id="third", backend=backend)
    await guest.qmp(
        "device_add", driver="virtserialport", bus="vserial.0", chardev="third", id="vthird", name=THIRD
    )
    async with asyncio.timeout(WAIT_S):
        while THIRD not in (await guest.sh("cat /sys/class/virtio-ports/*/name")).stdout.split():
            await asyncio.sleep(0.05)


@contextmanager
def third(guest: Guest) -> Generator[socket.socket, None, None]:
    """A program of the host at the other end of the third port."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(guest.spec.folder / "third.sock"))
        yield sock


async def until_counted(program: Job, word: str, number: int) -> None:
    await until_said(program, lambda said: said.count(word) == number)


async def test_a_host_that_is_away_is_no_end_and_costs_no_wakeups_and_its_return_is_seen(
    vm: Vm, guest: Guest
) -> None:
    program = await guest.start_python(source(COME_AND_GO), timeout_s=100)
    said = await until_said(program, lambda said: "wakes" in said)
    first, wakes = said.splitlines()
    assert first == "away b''"
    assert int(wakes.split()[1]) <= 1  # the first edge, which tells that the host is away
    for number in (1, 2):
        with host(vm):
            await until_counted(program, "\npresent", number)
        await until_counted(program, "\naway", number)
    (await program.wait()).check()


async def test_what_the_host_wrote_before_it_left_is_delivered_before_its_absence(
    vm: Vm, guest: Guest
) -> None:
    program = await guest.start_python(source(COLLECT), timeout_s=100)
    await until_said(program, lambda said: said == "ready\n")
    with host(vm) as sock:
        sock.sendall(bytes(range(256)) * 8)
        while unsent(sock):  # what QEMU has not taken when we leave is lost
            await asyncio.sleep(0.01)
    await guest.push("/run/go", b"")
    size, right = (await program.wait()).check().stdout.splitlines()[1].split()
    assert (int(size), right) == (2048, "True")


async def test_a_full_port_takes_no_more_and_wakes_its_writer_when_the_host_reads(
    vm: Vm, guest: Guest
) -> None:
    with host(vm) as sock:
        program = await guest.start_python(source(FILL), timeout_s=100)
        said = await until_said(program, lambda said: "wakes" in said)
        full, wakes = (int(line.split()[1]) for line in said.splitlines())
        assert 128 * 4096 < full < 16 << 20
        assert wakes <= 1
        left = full
        while left > 0:
            left -= len(sock.recv(min(left, 1 << 20)))
        assert (await program.wait()).check().stdout.splitlines()[-1] == "woken"
        assert sock.recv(5) == b"again"


async def test_a_port_that_is_unplugged_is_an_error_that_says_so(vm: Vm, guest: Guest) -> None:
    program = await guest.start_python(source(UNPLUGGED, SECOND), timeout_s=100)
    with host(vm, SECOND):
        await until_said(program, lambda said: said == "ready\n")
        await guest.qmp("device_del", id="vport1")
        done = (await program.wait()).check()
    assert done.stdout.splitlines()[-1] == f"port {SECOND} was unplugged"


async def test_a_port_with_unread_data_both_ways_is_unplugged_and_its_name_can_be_plugged_again(
    vm: Vm, guest: Guest
) -> None:
    """What QEMU holds for a host that does not read must not outlive the port."""
    await plug_third(guest)
    with third(guest) as sock:
        program = await guest.start_python(source(FILL_UNTIL_UNPLUGGED, THIRD), timeout_s=100)
        await until_said(program, lambda said: "full" in said)
        sock.sendall(bytes(50_000))
        async with guest.monitor() as monitor:
            with monitor.listener("DEVICE_DELETED") as deleted:
                await monitor.execute("device_del", {"id": "vthird"})
                async with asyncio.timeout(WAIT_S):
                    await deleted.get()
            done = (await program.wait()).check()
            assert done.stdout.splitlines()[-1] == f"port {THIRD} was unplugged"
            await monitor.execute("chardev-remove", {"id": "third"})
        while sock.recv(1 << 20):  # what was on the way is ours to read, then comes the end
            pass
    await plug_third(guest)
    with third(guest) as sock:
        program = await guest.start_python(source(COLLECT, THIRD), timeout_s=100)
        sock.sendall(bytes(range(256)))
        while unsent(sock):
            await asyncio.sleep(0.01)
        await guest.push("/run/go", b"")
        await until_said(program, lambda said: "ready" in said)
    assert (await program.wait()).check().stdout.splitlines()[1] == "256 True"
