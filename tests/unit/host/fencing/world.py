# SPDX-License-Identifier: LGPL-2.1-or-later
"""One host daemon's fencing with a fake hypervisor and journal, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from itertools import count

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceProgress, FenceRequest
from tests.fakes.fence_journal import FakeJournal
from tests.fakes.hypervisors import BOOT, HOST, FakeHypervisor
from vmchannel_host.bus.local import LocalBus
from vmchannel_host.config.model import Group
from vmchannel_host.fencing.coordinator import Coordinator
from vmchannel_host.fencing.evidence import Rules
from vmchannel_host.fencing.instances import Instances
from vmchannel_host.fencing.ordered import Ordered
from vmchannel_host.fencing.requester import Requester
from vmchannel_host.fencing.run import FenceSettings, Shell
from vmchannel_host.fencing.service import FenceService
from vmchannel_host.fencing.tasks import Tasks
from vmchannel_host.model import BootId, ProcessIdentity, VmUuid
from vmchannel_host.policy.aliases import AliasTable
from vmchannel_host.policy.policy import Policy
from vmchannel_host.registry.registry import VmRegistry

VM1 = VmUuid("6f1c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d11")
VM2 = VmUuid("0b2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d22")
VM3 = VmUuid("ab2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2d33")
STRANGER = VmUuid("ff2c1f9e-8a55-4c2e-9f0f-0d6e0a4c2dff")
WEB = Group("web", (VM1, VM2, VM3))
ASKER = Requester(VM1, "vm1", None, "guest-boot-1")
OPERATOR = Requester(None, "root")

_ids = count(1)


def now() -> float:
    """The virtual clock, as CLOCK_BOOTTIME, seconds."""
    return asyncio.get_running_loop().time()


def new_id() -> bytes:
    """A request id."""
    return next(_ids).to_bytes(16, "big")


class World:
    """The daemon. Make another one with the same journal and hypervisor for a restart."""

    def __init__(
        self,
        hypervisor: FakeHypervisor | None = None,
        journal: FakeJournal | None = None,
        *,
        rules: Rules | None = None,
        groups: tuple[Group, ...] = (WEB,),
        aliases: dict[str, str] | None = None,
        timeout_s: float = 40.0,
    ) -> None:
        rules = rules or Rules()
        self.hypervisor = hypervisor or FakeHypervisor(now)
        self.journal = journal or FakeJournal(now, BOOT)
        self.tasks = Tasks()
        self.registry = VmRegistry(
            HOST, standalone=rules.standalone, defined=lambda: self.hypervisor.definitions().names
        )
        self.names = AliasTable()
        self.bus: LocalBus[Ordered] = LocalBus(HOST)
        self.policy = Policy(groups, aliases or {})
        self.instances = Instances(
            host=HOST,
            registry=self.registry,
            hypervisor=self.hypervisor,
            absence=self.hypervisor.absence,
            store=self.journal,
            clock=now,
        )
        shell = Shell(self.bus, self.hypervisor, self.instances, self.journal, now, self.tasks)
        self.coordinator = Coordinator(shell, FenceSettings(rules, 1.0, timeout_s), BOOT)
        self.service = FenceService(
            host=HOST,
            boot_id=BOOT,
            coordinator=self.coordinator,
            instances=self.instances,
            watching=self.hypervisor,
            policy=lambda: self.policy,
            names=self.names,
            journal=self.journal,
            tasks=self.tasks,
            clock=now,
            wall_clock=now,
            random_bytes=lambda size: next(_ids).to_bytes(size, "big"),
        )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[World]:
        """The daemon runs inside; leaving kills it, as SIGKILL would."""
        await self.instances.restore()
        tasks = [
            asyncio.create_task(self.tasks.run(), name="tasks"),
            asyncio.create_task(self.instances.run(), name="instances"),
        ]
        try:
            await self.coordinator.resume()
            await asyncio.sleep(0.1)
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def request(
        self,
        action: FenceAction,
        plug: str = "vm2",
        *,
        request_id: bytes | None = None,
        within_s: float = 20.0,
        tick: float | None = None,
        boot_id: BootId = BOOT,
    ) -> FenceRequest:
        """What a client asks."""
        tick_ms = int((now() if tick is None else tick) * 1000)
        return FenceRequest(
            request_id or new_id(), action, plug, boot_id, tick_ms, within_ms=int(within_s * 1000)
        )

    async def ask(
        self,
        action: FenceAction,
        plug: str = "vm2",
        *,
        requester: Requester = ASKER,
        within_s: float = 20.0,
        progress: Callable[[FenceProgress], None] | None = None,
    ) -> FenceAnswer:
        """Ask and wait for the answer; it comes within its deadline."""
        request = self.request(action, plug, within_s=within_s)
        begun = now()
        answer = await self.service.answer(request, requester, progress)
        assert now() <= begun + within_s, "the answer came after its deadline"
        assert answer.request_id == request.request_id
        return answer

    def vm(self, vm: VmUuid = VM2, name: str = "vm2", **how: object) -> ProcessIdentity:
        """A running VM."""
        return self.hypervisor.add(vm, name, **how)  # type: ignore[arg-type]

    async def vm_off(self, vm: VmUuid = VM2, name: str = "vm2") -> None:
        """A VM that ran and has ended."""
        identity = self.vm(vm, name)
        await settled()
        self.hypervisor.vanish(identity, watched=True)
        await settled()


async def settled() -> None:
    """Let events reach the registry."""
    await asyncio.sleep(0.05)
