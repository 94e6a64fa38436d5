# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real two-node cluster in two guests of one host: corosync, Pacemaker and pcs, started at every boot."""

from __future__ import annotations

import asyncio
import time
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.rig.cluster_files import cluster_files
from tests.rig.guest import Completed, Guest
from tests.rig.kernel import RigError
from tests.rig.vm import Vm
from tests.system.site import Site

ONLINE_S = 600
"""From power-on to both nodes in the cluster; 45 s on a quiet machine."""

DEVICE = "vmfence"

_COMMAND_S = 300  # of one command of the cluster in a guest; pcs takes 15 to 25 s there
_POLL_S = 3.0  # one question costs the guest a second of its one processor
_NO_SUCH_OBJECT = 105  # of cibadmin: CRM_EX_NOSUCH
_LOG = "/var/log/pacemaker/pacemaker.log"

CLUSTER_FILES = cluster_files({"node1": "10.9.0.1", "node2": "10.9.0.2"})
"""What the image of a node holds besides the product."""


def start_node(site: Site, number: int) -> Vm:
    """Start node 1 or 2: a VM called vmN in the host's eyes, and nodeN in the cluster's."""
    wires = [site.folder / f"wire{n}.sock" for n in (1, 2)]
    here, there = wires[number - 1], wires[2 - number]
    network = f"dgram,id=net,local.type=unix,local.path={here},remote.type=unix,remote.path={there}"
    card = f"virtio-net-pci,id=card,netdev=net,mac=52:54:00:00:09:0{number}"
    return site.vm(
        f"vm{number}",
        hostname=f"node{number}",
        memory_mib=512,
        kernel_line=f"net.ifnames=0 rig_start=plain rig_cluster=yes rig_address=10.9.0.{number}/24",
        extra=("-netdev", network, "-device", card),
    )


@dataclass(frozen=True, slots=True)
class FenceEvent:
    """One entry of Pacemaker's fencing history."""

    action: str
    target: str
    status: str  # success, failed, pending
    delegate: str  # the node that carried it out
    client: str  # who asked: a program and its pid
    completed: str


class Cluster:
    """The cluster as a test sees it, from node 1, which no test breaks."""

    def __init__(self, site: Site, node1: Guest, node2: Guest) -> None:
        self.site = site
        self.node1 = node1
        self.node2 = node2

    async def run(self, *command: str) -> Completed:
        """Run a command on node 1."""
        return await self.node1.run(*command, timeout_s=_COMMAND_S)

    async def pcs(self, *arguments: str) -> str:
        """`pcs ARGUMENTS` on node 1: its output.

        Raises:
            RigError: it fails.
        """
        return (await self.run("pcs", *arguments)).check().stdout

    async def configured(self, xpath: str) -> bool:
        """Whether the cluster's configuration has that, far cheaper than `pcs stonith config`."""
        done = await self.run("cibadmin", "--query", "--no-children", "--xpath", xpath)
        if done.code not in (0, _NO_SUCH_OBJECT):
            done.check()
        return done.code == 0

    async def history(self, target: str = "node2") -> list[FenceEvent]:
        """Pacemaker's history of fencing a node, newest first."""
        done = await self.run("stonith_admin", "--history", target, "--verbose", "--output-as=xml")
        return [
            FenceEvent(*(event.get(name, "") for name in FenceEvent.__slots__))
            for event in ET.fromstring(done.check().stdout).iter("fence_event")
        ]

    async def log(self) -> str:
        """The end of Pacemaker's log on node 1."""
        return (await self.run("tail", "--bytes=200000", _LOG)).check().stdout

    async def online(self) -> set[str]:
        """The nodes that node 1 sees in the cluster and clean."""
        nodes = (await self._status()).iterfind("./nodes/node")
        return {n.get("name", "") for n in nodes if (n.get("online"), n.get("pending")) == ("true", "false")}

    async def started(self) -> set[str]:
        """The fence devices that run somewhere and have not failed."""
        found = (await self._status()).iterfind("./resources/resource")
        return {r.get("id", "") for r in found if (r.get("role"), r.get("failed")) == ("Started", "false")}

    async def until_online(self) -> None:
        """Wait until both nodes are in the cluster."""

        async def both() -> bool:
            return await self.online() == {"node1", "node2"}

        await self.until(both, "cluster of two nodes", ONLINE_S)

    async def until(
        self, condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 400
    ) -> None:
        """Wait until something is so; a node that does not answer yet counts as no.

        Raises:
            RigError: it is not in time; the message carries what the cluster says.
        """
        deadline = time.monotonic() + timeout_s
        while not await _so(condition):
            if time.monotonic() > deadline:
                said = [await self.run("crm_mon", "-1", "-f"), await self.run("tail", "-n", "40", _LOG)]
                raise RigError(f"no {what} in {timeout_s} s\n" + "\n".join(one.stdout for one in said))
            await asyncio.sleep(_POLL_S)

    async def _status(self) -> ET.Element:
        done = await self.run("crm_mon", "-1", "--output-as=xml")
        return ET.fromstring(done.check().stdout)


async def _so(condition: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await condition()
    except RigError:
        return False  # Pacemaker starts, or the guest does
