# SPDX-License-Identifier: LGPL-2.1-or-later
"""One daemon with 10, 100 and 1,000 VMs, and one VM's fencing beside others that flood.

The VMs are peers (`benchmarks.peers`): processes with a monitor, a port and a session each. Targets: 150 MB
resident at 1,000 VMs, idle under 2 % of a core, p99 of `status` under 20 ms at 1,000 requests a second; p99
of one VM's fencing while 100 others flood at most twice idle plus 5 ms, and while ten bulk channels fill its
own port at most three times idle.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fence_vmchannel
from benchmarks.curves import Curve
from benchmarks.figures import Figure, figure
from benchmarks.host_fencing import connected
from benchmarks.peers import BULK, Peers, running_peers
from fence_vmchannel import Channel
from tests.system.site import Site, open_site

ASKERS: Final = 10
RATE: Final = 1000
"""Requests per second, of all askers together."""

FLOODERS: Final = 100
NOW_AND_THEN: Final = 5
"""Requests per second of the one VM: under its fair share among those that flood."""
_UNIT: Final = Path(__file__).parents[1] / "host/systemd/vmchanneld.service"
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Size:
    """What one daemon costs and does with so many VMs."""

    vms: int
    rss_mb: float
    idle_percent: float
    status_ms: list[float]


def growth(sizes: tuple[int, ...], idle_s: float, load_s: float) -> Iterator[Size]:
    """Measure a daemon of each size, one after the other."""
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
            yield asyncio.run(_grow(Path(folder), size, idle_s, load_s))


def rows(size: Size) -> Iterator[Figure]:
    """The figures of one size."""
    vms = f"{size.vms:,} VMs"
    yield figure(f"{vms}: resident memory of the daemon", "MB", [size.rss_mb])
    yield figure(f"{vms}: processor time, idle", "% core", [size.idle_percent])
    yield figure(f"{vms}: status at {RATE:,} requests/s", "ms", size.status_ms)


def curves(sizes: Sequence[Size]) -> list[Curve]:
    """How the daemon grows, with the goals at 1,000 VMs."""
    return [
        Curve("resident memory, MB", tuple((one.vms, one.rss_mb) for one in sizes), 150),
        Curve("idle, % of a core", tuple((one.vms, one.idle_percent) for one in sizes), 2),
        Curve(
            f"status at {RATE:,}/s, p99, ms",
            tuple((one.vms, figure("", "ms", one.status_ms).p99) for one in sizes),
            20,
        ),
    ]


def crowded(count: int) -> Iterator[Figure]:
    """One VM's fencing: alone, while others flood, and over its own full port."""
    with tempfile.TemporaryDirectory(prefix="vmc-bench-", dir="/tmp") as folder:
        found = asyncio.run(_crowd(Path(folder), count))
    yield figure("fencing of one VM, others idle", "ms", found["idle"])
    yield figure(f"the same while {FLOODERS} others flood", "ms", found["flooded"])
    yield figure("the same while ten bulk channels fill its port", "ms", found["bulk"])


@asynccontextmanager
async def _served(folder: Path, count: int) -> AsyncGenerator[tuple[Site, Peers], None]:
    site_folder = folder / "site"
    site_folder.mkdir()
    with (
        redirect_stdout(sys.stderr),  # the site shows the daemon's log
        open_site(site_folder) as site,
        running_peers(site_folder, count) as peers,
    ):
        site.group("all", *peers.uuids)
        site.serve()
        _as_its_unit_says(site.daemon.pid)
        await connected(site, count)
        yield site, peers


def _as_its_unit_says(daemon: int) -> None:
    """The daemon goes before what floods it: `Nice=` of its unit, for each of its threads."""
    (nice,) = re.findall(r"^Nice=(-?\d+)$", _UNIT.read_text(), re.MULTILINE)
    for thread in os.listdir(f"/proc/{daemon}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), int(nice))


async def _grow(folder: Path, vms: int, idle_s: float, load_s: float) -> Size:
    async with _served(folder, vms) as (site, peers):
        await asyncio.sleep(5)  # what the start left to do
        before = _cpu_s(site.daemon.pid)
        await asyncio.sleep(idle_s)
        idle = (_cpu_s(site.daemon.pid) - before) / idle_s * 100
        rss = _rss_mb(site.daemon.pid)
        asked = await asyncio.gather(
            *(
                peers.ask(
                    number,
                    "status",
                    peers.uuids[-1 - number],
                    count=round(RATE / ASKERS * load_s),
                    rate=RATE / ASKERS,
                )
                for number in range(min(ASKERS, vms))
            )
        )
    return Size(vms, rss, idle, [took for one in asked for took in one])


async def _crowd(folder: Path, count: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    async with _served(folder, FLOODERS + 2) as (site, peers):
        victim = peers.uuids[1]
        found["idle"] = await peers.ask(0, "status", victim, count=count, rate=NOW_AND_THEN)
        async with (
            fence_vmchannel.connect(str(site.folder / "run" / "host.sock")) as client,
            client.offer(BULK, _take),
        ):
            await peers.flood(0, "bulk", channels=10)
            found["bulk"] = await peers.ask(0, "status", victim, count=count, rate=NOW_AND_THEN)
            await peers.calm(0)
        await asyncio.gather(*(peers.flood(2 + number, "status") for number in range(FLOODERS)))
        await asyncio.sleep(2)
        found["flooded"] = await peers.ask(0, "status", victim, count=count, rate=NOW_AND_THEN)
        await asyncio.gather(*(peers.calm(2 + number) for number in range(FLOODERS)))
    return found


async def _take(channel: Channel) -> None:
    while await channel.receive() is not None:
        pass


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime


def _rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
