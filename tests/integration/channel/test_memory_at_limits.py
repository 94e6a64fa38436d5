# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writers that outrun readers: the memory of both hubs stays where the limits say."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fence_vmchannel import Client, connect
from fence_vmchannel.channel import Channel
from fence_vmchannel.core.frames import FrameType
from tests.fakes.raw_guest import RawGuest, opening

ROOT = Path(__file__).parents[3]
KIB, MIB = 1024, 1024 * 1024

BYTE_LIMIT = 256 * KIB
STALLED = 7
"""Channels whose readers grant 1 GiB and read nothing. Without limits the hubs take 4 MiB of each."""

MARGIN = 10 * MIB
"""What the hubs' memory may grow from idle: 7 times the limit is 1.75 MiB, and the rest is for the buffers of
sockets and interpreter (measured: 1.5 MiB in all)."""

DRIFT = 4 * MIB
"""What it may grow while 48 MiB more pass through beside the stalled channels."""


@asynccontextmanager
async def hubs(directory: Path) -> AsyncGenerator[int]:
    """Both hubs; their process's id."""
    command = (sys.executable, "-m", "tests.fakes.hub_process", str(directory), str(BYTE_LIMIT))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def resident_bytes(pid: int) -> int:
    """VmRSS."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Flood:
    """A service that writes as fast as it may; counts what each of its channels was let write."""

    def __init__(self) -> None:
        self.written: dict[bytes, int] = {}

    async def serve(self, channel: Channel) -> None:
        while True:
            await channel.send(bytes(30_000))
            self.written[channel.payload] = self.written.get(channel.payload, 0) + 30_000


async def read(client: Client, size: int) -> None:
    """Take so much from the flood."""
    channel = await client.open("vm1/org.example.flood", payload=b"honest", timeout_s=10)
    async with channel:
        while size > 0:
            message = await channel.receive()
            assert message is not None
            size -= len(message)


async def test_memory_stays_at_the_limits_while_writers_outrun_readers(tmp_path: Path) -> None:
    flood = Flood()
    async with (
        hubs(tmp_path) as pid,
        connect(str(tmp_path / "guest.sock")) as guest,
        connect(str(tmp_path / "host.sock")) as host,
        guest.offer("org.example.flood", flood.serve),
    ):
        await read(host, MIB)
        idle = resident_bytes(pid)
        mute = [await RawGuest.connect(str(tmp_path / "host.sock")) for _ in range(STALLED)]
        for number, reader in enumerate(mute):
            await reader.greet()
            target = "vm1/org.example.flood"
            reader.send(FrameType.OPEN, opening(target, 2**30, b"mute %d" % number), channel=1)
            assert (await reader.answer(1)).type == FrameType.ACCEPT
        await read(host, 8 * MIB)
        stalled = {name: size for name, size in flood.written.items() if name != b"honest"}
        full = resident_bytes(pid)
        await read(host, 48 * MIB)
        after = resident_bytes(pid)
        now = {name: size for name, size in flood.written.items() if name != b"honest"}
        assert now == stalled, "a writer whose reader is stalled wrote on"
        assert len(stalled) == STALLED
        assert max(stalled.values()) <= BYTE_LIMIT
        assert full - idle <= MARGIN, f"{full - idle} bytes"
        assert after - full <= DRIFT, f"{after - full} bytes"
        for reader in mute:
            await reader.close()
