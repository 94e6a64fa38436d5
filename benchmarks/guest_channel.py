# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels between a program of a real guest and one of its host, beside a raw port of the same guest.

A request goes program, guest's hub, port, QEMU, host's hub, program, and back. Under TCG the guest's part is
what costs.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import fence_vmchannel
from benchmarks.figures import Figure, figure
from fence_vmchannel import Channel
from tests.rig.guest import Guest
from tests.rig.image import Image, build_image, default_cache, require_tools
from tests.rig.qemu import PORT
from tests.system.site import open_site

MESSAGE = 32_768
RUN = 8 << 20
"""Bytes of one bulk run."""

_RAW = "org.example.raw"
_MIB = 1 << 20
_LIMIT_S = 300

_PROGRAM = f"""
import json, os, time
from fence_vmchannel import BlockingClient
from fence_vmchannel.discovery import find_port
deadline = time.monotonic() + {_LIMIT_S}
found = {{"channel": [], "raw": [], "up": [], "down": []}}
question = b"q" * 64

with BlockingClient.connect(deadline=deadline) as client:
    with client.open("org.example.echo", deadline=deadline) as channel:
        for _ in range(TRIPS):
            began = time.perf_counter()
            assert channel.request(question, deadline=deadline) == question
            found["channel"].append(time.perf_counter() - began)
    for _ in range(RUNS):
        with client.open("org.example.take", deadline=deadline) as channel:
            message = bytes({MESSAGE})
            began = time.perf_counter()
            for _ in range({RUN // MESSAGE}):
                channel.send(message, deadline=deadline)
            assert channel.receive(deadline=deadline) == b"all"
            found["up"].append(time.perf_counter() - began)
        with client.open("org.example.give", deadline=deadline) as channel:
            began = time.perf_counter()
            for _ in range({RUN // MESSAGE}):
                assert len(channel.receive(deadline=deadline)) == {MESSAGE}
            found["down"].append(time.perf_counter() - began)

raw = os.open(find_port({_RAW!r}).node, os.O_RDWR)
for _ in range(TRIPS):
    began = time.perf_counter()
    os.write(raw, question)
    size = 0
    while size < 64:
        size += len(os.read(raw, 64))
    found["raw"].append(time.perf_counter() - began)
print(json.dumps(found))
"""


def channels(trips: int, runs: int) -> Iterator[Figure]:
    """Round trips in microseconds, bulk in MiB/s, measured in the guest."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        image = build_image(default_cache(), Path(folder))
        site = Path(folder) / "site"
        site.mkdir()
        found = asyncio.run(_measure(site, image, f"TRIPS, RUNS = {trips}, {runs}\n{_PROGRAM}"))
    yield figure("guest: 64 bytes and back over a raw port", "us", [one * 1e6 for one in found["raw"]])
    yield figure("guest: 64 bytes and back over a channel", "us", [one * 1e6 for one in found["channel"]])
    bulk = RUN / _MIB
    yield figure("guest to host: 32-KiB messages", "MiB/s", [bulk / one for one in found["up"]])
    yield figure("host to guest: 32-KiB messages", "MiB/s", [bulk / one for one in found["down"]])


async def _measure(folder: Path, image: Image, program: str) -> dict[str, Any]:
    with redirect_stdout(sys.stderr), open_site(folder, image) as site:  # it shows the daemon's log
        vm = site.vm("bench", ports=(PORT, _RAW))
        site.serve()
        guest = Guest(vm)
        await guest.wait_ready()
        await site.until_connected(vm)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(vm.spec.port_socket(_RAW)))
            threading.Thread(target=_echo_raw, args=(raw,), name="raw port", daemon=True).start()
            async with (
                fence_vmchannel.connect(str(folder / "run" / "host.sock")) as client,
                client.offer("org.example.echo", _echo),
                client.offer("org.example.take", _take),
                client.offer("org.example.give", _give),
            ):
                done = (await guest.python(program, timeout_s=_LIMIT_S)).check()
            raw.shutdown(socket.SHUT_RDWR)
        await guest.disconnect()
    return dict(json.loads(done.stdout))


def _echo_raw(raw: socket.socket) -> None:
    while data := raw.recv(4096):
        raw.sendall(data)


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
