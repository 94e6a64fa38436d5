# SPDX-License-Identifier: LGPL-2.1-or-later
"""What everything with a guest costs at least: a boot, and the end of a QEMU process."""

from __future__ import annotations

import asyncio
import os
import select
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, figure
from tests.rig.guest import Guest, qmp_client
from tests.rig.image import Image, build_image, default_cache, require_tools
from tests.rig.qemu import VmSpec
from tests.rig.vm import running


def boots(count: int) -> Figure:
    """From the start of QEMU under TCG to a guest that answers, seconds."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        image = build_image(default_cache(), Path(folder))
        values = [asyncio.run(_boot(Path(folder) / str(n), image)) for n in range(count)]
    return figure("guest: QEMU's start to an answer, TCG", "s", values)


async def _boot(folder: Path, image: Image) -> float:
    began = time.perf_counter()
    with running(VmSpec("boot", folder, image=image)) as [vm]:
        guest = Guest(vm)
        await guest.wait_ready()
        took = time.perf_counter() - began
        await guest.disconnect()
    return took


def ends(count: int) -> Figure:
    """From QMP `quit` to the end of the QEMU process, milliseconds: the floor under every `off`."""
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        values = [asyncio.run(_end(Path(folder) / str(n))) for n in range(count)]
    return figure("QEMU: quit to the process's end", "ms", values)


async def _end(folder: Path) -> float:
    with running(VmSpec("end", folder, paused=True)) as [vm]:
        pidfd = os.pidfd_open(vm.pid)
        async with qmp_client(vm.spec) as client:
            began = time.perf_counter()
            await client.execute("quit")
            ended, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], 20)
            took = time.perf_counter() - began
        os.close(pidfd)
        assert ended
        return took * 1e3
