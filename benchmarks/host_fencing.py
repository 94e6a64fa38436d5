# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host's part of a fence takes: a peer in place of the requester's QEMU asks the real daemon.

Targets: status of a running VM as fast as fence_virtd's (0.27 ms median, in C); `off` and `reboot` at most
10 ms above what the QEMU process itself takes, measured in the same run.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.figures import Figure, figure
from benchmarks.peers import running_peers
from tests.rig.guest import qmp_client
from tests.rig.vm import Vm
from tests.system.site import Site, open_site

_GREET_S = 120


def fencing(statuses: int, offs: int) -> Iterator[Figure]:
    """Milliseconds from the request on the port to the answer on it, beside QEMU's own part."""
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        found = asyncio.run(_measure(Path(folder), statuses, offs))
    names = {
        "status": "host: status of a running VM",
        "quit": "QEMU alone: quit to the process's end",
        "off": "host: off, request to proven",
        "reset": "QEMU alone: system_reset to its event",
        "reboot": "host: reboot, request to proven",
    }
    for key, name in names.items():
        yield figure(name, "ms", found[key])


async def connected(site: Site, count: int) -> None:
    """Wait until so many ports have greeted."""
    async with asyncio.timeout(_GREET_S):
        while sum(port["connected"] for port in await site.ask("ports")) < count:
            await asyncio.sleep(0.1)


async def _measure(folder: Path, statuses: int, offs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"quit": [], "off": [], "reset": []}
    site_folder = folder / "site"
    site_folder.mkdir()
    with (
        redirect_stdout(sys.stderr),  # the site shows the daemon's log
        open_site(site_folder) as site,
        running_peers(site_folder, 2) as peers,
    ):
        victim = site.vm("victim", machine="q35", ports=())
        site.group("all", victim, *peers.uuids)
        site.serve()
        await connected(site, 2)
        await site.until_run_state(victim, "running")
        found["status"] = await peers.ask(0, "status", peers.uuids[1], count=statuses)
        found["reboot"] = await peers.ask(0, "reboot", victim.spec.uuid, count=offs)
        for _ in range(offs):
            found["reset"].append(await _reset(victim))
        for _ in range(offs):
            found["quit"].append(await _quit(victim))
            victim.start()
            await site.until_run_state(victim, "running")
            found["off"] += await peers.ask(0, "off", victim.spec.uuid)
            victim.start()
            await site.until_run_state(victim, "running")
    return found


async def _quit(vm: Vm) -> float:
    pidfd = os.pidfd_open(vm.pid)
    try:
        async with qmp_client(vm.spec) as client:
            began = time.perf_counter()
            await client.execute("quit")
            ended, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], 20)
            took = time.perf_counter() - began
        assert ended
        return took * 1e3
    finally:
        os.close(pidfd)


async def _reset(vm: Vm) -> float:
    async with qmp_client(vm.spec) as client:
        with client.listener("RESET") as events:
            began = time.perf_counter()
            await client.execute("system_reset")
            await events.get()
            return (time.perf_counter() - began) * 1e3
