# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels between a program of a real guest and one of its host, beside a raw port and a serial line.

A request goes program, guest's hub, port, QEMU, host's hub, program, and back; over the raw port and the line
one program at each end and no protocol. All in one guest and one run, the same messages, so that the ratios
mean something on a machine that others use too.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import fence_vmchannel
from benchmarks.figures import Figure, figure, ratio
from fence_vmchannel import Channel
from tests.rig.guest import Guest
from tests.rig.image import Image, build_image, default_cache, require_tools
from tests.rig.qemu import PORT
from tests.system.site import open_site

MESSAGE = 32_768
RUN = 8 << 20
"""Bytes of one bulk run."""

_RAW = "org.example.raw"
_LINE = "/dev/ttyS2"
_QUESTION = 64
_MIB = 1 << 20
_LIMIT_S = 300

_PROGRAM = f"""
import json, os, time, tty
from fence_vmchannel import BlockingClient
from fence_vmchannel.discovery import find_port
deadline = time.monotonic() + {_LIMIT_S}
question, message, count = b"q" * 64, bytes({MESSAGE}), {RUN // MESSAGE}
found = {{}}

def measured(name, work, *arguments):
    began = time.perf_counter()
    work(*arguments)
    found.setdefault(name, []).append(time.perf_counter() - began)

def read_all(fd, left):
    while left:
        left -= len(os.read(fd, min(left, 65_536)))

def ask_raw(fd):
    os.write(fd, question)
    read_all(fd, len(question))

def take_raw(fd):
    os.write(fd, b"g")
    read_all(fd, {RUN})

def give_raw(fd):
    for _ in range(count):
        assert os.write(fd, message) == len(message)
    assert os.read(fd, 3) == b"all"

def ask(channel):
    assert channel.request(question, deadline=deadline) == question

def take(channel):
    for _ in range(count):
        assert len(channel.receive(deadline=deadline)) == len(message)

def give(channel):
    for _ in range(count):
        channel.send(message, deadline=deadline)
    assert channel.receive(deadline=deadline) == b"all"

raw = os.open(find_port({_RAW!r}).node, os.O_RDWR)
for _ in range(TRIPS):
    measured("raw", ask_raw, raw)
for _ in range(RUNS):
    measured("raw up", give_raw, raw)
    measured("raw down", take_raw, raw)

with BlockingClient.connect(deadline=deadline) as client:
    with client.open("org.example.echo", deadline=deadline) as channel:
        for _ in range(TRIPS):
            measured("channel", ask, channel)
    for _ in range(RUNS):
        with client.open("org.example.take", deadline=deadline) as channel:
            measured("channel up", give, channel)
        with client.open("org.example.give", deadline=deadline) as channel:
            measured("channel down", take, channel)

line = os.open("{_LINE}", os.O_RDWR | os.O_NOCTTY)
tty.setraw(line)
for _ in range(TRIPS):
    measured("line", ask_raw, line)
print(json.dumps(found))
"""


def channels(trips: int, runs: int) -> Iterator[Figure]:
    """Round trips in microseconds, bulk in MiB/s, measured in the guest: raw, then the channel, the ratio."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        image = build_image(default_cache(), Path(folder))
        site = Path(folder) / "site"
        site.mkdir()
        found = asyncio.run(_measure(site, image, trips, runs))
    trip = {
        name: figure(f"64 bytes and back, {name}", "us", [each * 1e6 for each in found[name]])
        for name in ("raw", "line", "channel")
    }
    yield from trip.values()
    yield ratio("64 bytes and back, channel to raw", trip["channel"], trip["raw"])
    for way, what in (("up", "guest to host"), ("down", "host to guest")):
        raw, channel = (
            figure(f"32 KiB, {what}, {name}", "MiB/s", [RUN / _MIB / each for each in found[f"{name} {way}"]])
            for name in ("raw", "channel")
        )
        yield from (raw, channel, ratio(f"32 KiB, {what}, channel to raw", channel, raw))


async def _measure(folder: Path, image: Image, trips: int, runs: int) -> dict[str, list[float]]:
    line = folder / "line.sock"
    with redirect_stdout(sys.stderr), open_site(folder, image) as site:  # it shows the daemon's log
        vm = site.vm("bench", ports=(PORT, _RAW), extra=_serial_line(line))
        site.serve()
        guest = Guest(vm)
        await guest.wait_ready()
        await site.until_connected(vm)
        with _peer(vm.spec.port_socket(_RAW), trips, runs), _peer(line, trips, 0):
            async with (
                fence_vmchannel.connect(str(folder / "run" / "host.sock")) as client,
                client.offer("org.example.echo", _echo),
                client.offer("org.example.take", _take),
                client.offer("org.example.give", _give),
            ):
                program = f"TRIPS, RUNS = {trips}, {runs}\n{_PROGRAM}"
                done = (await guest.python(program, timeout_s=_LIMIT_S)).check()
        await guest.disconnect()
    return dict(json.loads(done.stdout))


def _serial_line(path: Path) -> tuple[str, ...]:
    """Another emulated serial port: behind console and control it is the third."""
    chardev = f"socket,id=line,path={path},server=on,wait=off"
    return ("-chardev", chardev, "-serial", "chardev:line")


@contextmanager
def _peer(path: Path, trips: int, runs: int) -> Generator[None]:
    """The host's end of a raw port or serial line: one thread that answers what `_PROGRAM` does there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.settimeout(_LIMIT_S)
        peer = threading.Thread(target=_answer_raw, args=(sock, trips, runs), name=path.name, daemon=True)
        peer.start()
        yield
        sock.shutdown(socket.SHUT_RDWR)
        peer.join()


def _answer_raw(sock: socket.socket, trips: int, runs: int) -> None:
    for _ in range(trips):
        for piece in _read_raw(sock, _QUESTION):  # a serial line gives a few bytes at a time
            sock.sendall(piece)
    for _ in range(runs):
        deque(_read_raw(sock, RUN), maxlen=0)
        sock.sendall(b"all")
        deque(_read_raw(sock, 1), maxlen=0)
        for _ in range(RUN // MESSAGE):
            sock.sendall(bytes(MESSAGE))


def _read_raw(sock: socket.socket, size: int) -> Iterator[bytes]:
    """`size` bytes as they come; fewer when the other end has gone."""
    while size and (piece := sock.recv(min(size, 65_536))):
        size -= len(piece)
        yield piece


async def _echo(channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await channel.send(message)


async def _take(channel: Channel) -> None:
    for _ in range(RUN // MESSAGE):
        await channel.receive()
    await channel.send(b"all")
    await channel.receive()


async def _give(channel: Channel) -> None:
    for _ in range(RUN // MESSAGE):
        await channel.send(bytes(MESSAGE))
    await channel.receive()
