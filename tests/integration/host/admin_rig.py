# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of admin API and vmchannelctl share: a view in memory, served on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, FenceProgress, PowerState
from vmchannel_host.admin.metrics import Metrics
from vmchannel_host.admin.server import AdminLimits, AdminServer
from vmchannel_host.admin.view import (
    AdminEvent,
    CanView,
    ConfirmView,
    DaemonStatus,
    DefinitionsView,
    FenceOrder,
    Finding,
    HostView,
    InstanceView,
    OperationStep,
    OperationView,
    PortView,
    TrafficView,
    VmView,
)
from vmchannel_host.hot_plug import PlugOrder, PlugOutcome
from vmchannel_host.journal.types import VerifyResult

UUID1 = "aaaaaaaa-0000-4000-8000-000000000001"
UUID2 = "aaaaaaaa-0000-4000-8000-000000000002"
OP = "hv1-20261122-0001"

STATUS = DaemonStatus(
    host="hv1",
    version="0.1.0",
    state="ready",
    pid=4242,
    uptime_s=3723.0,
    bus="local",
    vms=2,
    ports=2,
    ports_connected=1,
    operations_running=0,
    journal="ok",
    journal_seq=17,
)
VM1 = VmView(
    UUID1,
    "vm1",
    "on",
    (
        InstanceView(
            "hv1", 4711, 123, "/usr/bin/qemu-system-x86_64", "running", "none", "/run/vms/vm1/qmp.sock"
        ),
    ),
    groups=("web",),
    aliases=("node1",),
    connected=True,
)
VM2 = VmView(UUID2, "vm2", "unknown", problem="pid 99 is not proven to have ended")
PORT1 = PortView(UUID1, "vm1", "org.vmchannel.0", "/run/vms/vm1/ch.sock", True, True, "s1", 3, 1_500_000, 900)
PORT2 = PortView(UUID2, "vm2", "org.vmchannel.0", "/run/vms/vm2/ch.sock", False, False, problem="guest away")
OPERATION = OperationView(
    id=OP,
    action="off",
    vm_uuid=UUID2,
    vm_name="vm2",
    requester="vm1",
    host="hv1",
    running=False,
    phase="ended",
    code="done",
    ok=True,
    reason="",
    begun_at=1_700_000_000.0,
    elapsed_ms=1234,
    evidence=("pid 99 on hv1 ended: quit, proven by its pidfd after 12 ms",),
    steps=(OperationStep(1_700_000_000.0, "intent: off vm2"), OperationStep(1_700_000_001.0, "done: ")),
)
DONE = FenceAnswer(
    request_id=bytes(16),
    ok=True,
    code=FenceCode.DONE,
    state=PowerState.OFF,
    host="hv1",
    reason="",
    operation=OP,
    vm_uuid=UUID2,
    vm_name="vm2",
    evidence=("pid 99 ended",),
    elapsed_ms=1234,
)


CONFIRMED = ConfirmView(
    True, FenceCode.DONE, "confirmed off by 'root'", UUID2, "vm2", ("pid 99 on hv1 gone",)
)


PLUGGED = PlugOutcome(
    "done",
    "port org.vmchannel.0 attached",
    vm_uuid=UUID2,
    vm_name="vm2",
    ports=("org.vmchannel.0",),
    advice=("add to its start command:", "-device virtserialport,name=org.vmchannel.0"),
)


def failed(code: FenceCode, reason: str = "because") -> FenceAnswer:
    """An answer that is no success."""
    return FenceAnswer(bytes(16), False, code, PowerState.UNKNOWN, "hv1", reason)


@dataclass
class FakeView:
    """Answers from its fields. `fence` reports two steps and waits for `go` before it answers."""

    status_now: DaemonStatus = STATUS
    vms_now: list[VmView] = field(default_factory=lambda: [VM1, VM2])
    ports_now: list[PortView] = field(default_factory=lambda: [PORT1, PORT2])
    traffic_now: TrafficView = field(default_factory=lambda: TrafficView({"garbage": 3}, 2, 1, 4096))
    operations: list[OperationView] = field(default_factory=lambda: [OPERATION])
    can_now: CanView = field(
        default_factory=lambda: CanView(True, True, "vm1", "off", "node2", UUID2, "vm2", "group web")
    )
    findings: list[Finding] = field(default_factory=list[Finding])
    answer: FenceAnswer | Exception = DONE
    journal: VerifyResult = field(default_factory=lambda: VerifyResult(True, 17, 1, 17, "ab" * 32, "cd" * 32))
    orders: list[FenceOrder] = field(default_factory=list[FenceOrder])
    answered: int = 0
    confirmed: ConfirmView = CONFIRMED
    confirmations: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    plugged: dict[str, PlugOutcome] = field(default_factory=dict[str, PlugOutcome])  # by VM as ordered
    defined: DefinitionsView = field(default_factory=lambda: DefinitionsView((), ()))
    plugs: list[PlugOrder] = field(default_factory=list[PlugOrder])
    asked_can: tuple[str, FenceAction, str] | None = None
    listeners: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)
    feed: asyncio.Queue[AdminEvent | None] = field(default_factory=lambda: asyncio.Queue(1000))
    progress_lines: int = 2

    def __post_init__(self) -> None:
        self.go.set()

    def status(self) -> DaemonStatus:
        return self.status_now

    def vms(self) -> Sequence[VmView]:
        return self.vms_now

    def definitions(self) -> DefinitionsView:
        return self.defined

    def ports(self) -> Sequence[PortView]:
        return self.ports_now

    def hosts(self) -> Sequence[HostView]:
        return [HostView("hv1", True, True, 2), HostView("hv2", False, False, 0, 93.0, "silent")]

    def traffic(self) -> TrafficView:
        return self.traffic_now

    async def ops(self, limit: int) -> Sequence[OperationView]:
        return self.operations[:limit]

    async def op(self, operation: str) -> OperationView | None:
        return next((one for one in self.operations if one.id == operation), None)

    async def can(self, vm: str, action: FenceAction, plug: str) -> CanView:
        self.asked_can = (vm, action, plug)
        return self.can_now

    async def doctor(self) -> Sequence[Finding]:
        return self.findings

    async def fence(self, order: FenceOrder, progress: Callable[[FenceProgress], None]) -> FenceAnswer:
        self.orders.append(order)
        for number in range(self.progress_lines):
            progress(FenceProgress(order.request_id, OP, f"step {number}", number))
        await self.go.wait()
        self.answered += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def confirm_off(self, vm: str, operator: str) -> ConfirmView:
        self.confirmations.append((vm, operator))
        return self.confirmed

    async def plug(self, order: PlugOrder) -> PlugOutcome:
        self.plugs.append(order)
        return self.plugged.get(order.vm, PLUGGED)

    async def events(self) -> AsyncGenerator[AdminEvent, None]:
        self.listeners += 1
        try:
            while (event := await self.feed.get()) is not None:
                yield event
        finally:
            self.listeners -= 1

    async def verify_journal(self) -> VerifyResult:
        return self.journal


@dataclass
class AdminRig:
    """A served view."""

    view: FakeView
    metrics: Metrics
    path: Path
    server: AdminServer


@asynccontextmanager
async def served(directory: Path, limits: AdminLimits | None = None) -> AsyncGenerator[AdminRig, None]:
    """Serve a fake view on a socket in this directory."""
    view, metrics, path = FakeView(), Metrics(), directory / "admin.sock"
    server = AdminServer(view, metrics, path, group="no-such-group", limits=limits or AdminLimits())
    await server.start()
    try:
        yield AdminRig(view, metrics, path, server)
    finally:
        view.go.set()
        await server.close()
