# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the admin API shows and asks: the Protocol that the daemon implements, and its frozen answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fence_vmchannel.messages import FenceAction, FenceAnswer, FenceCode, FenceProgress
from vmchannel_host.hot_plug import PlugOrder, PlugOutcome
from vmchannel_host.journal.types import VerifyResult


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon in one look."""

    host: str
    version: str
    state: str  # "ready", "starting", "stopping"
    pid: int
    uptime_s: float
    bus: str  # "local", "corosync"
    vms: int
    ports: int
    ports_connected: int
    operations_running: int
    journal: str  # "ok", or what is wrong with it
    journal_seq: int
    problems: tuple[str, ...] = ()  # one line each: what stops fencing now


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One process of a VM."""

    host: str
    pid: int
    start_time: int  # clock ticks after boot
    executable: str
    run_state: str
    migration: str
    monitor: str  # path of the QMP socket that answers; "" when none does


@dataclass(frozen=True, slots=True)
class VmView:
    """A VM, as the registry and the policy see it."""

    uuid: str
    name: str  # untrusted text
    power: str  # "on", "gone" (no process of it is left here, as last watched; no claim), "unknown"
    instances: tuple[InstanceView, ...] = ()
    groups: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    connected: bool = False  # a session of its hub is open
    operation: str = ""  # the destructive operation that runs on it
    problem: str = ""  # a conflict (S9), an unproven end, ...


@dataclass(frozen=True, slots=True)
class DefinedVm:
    """A VM that a libvirt defines, whether it runs or not."""

    uuid: str
    name: str  # untrusted text


@dataclass(frozen=True, slots=True)
class DefinitionsView:
    """The VMs that are defined on this host."""

    vms: tuple[DefinedVm, ...]
    problems: tuple[str, ...]  # what may define further ones, and does not tell


@dataclass(frozen=True, slots=True)
class PortView:
    """A virtio-serial port that the daemon serves, or would serve."""

    vm_uuid: str
    vm_name: str
    name: str
    path: str  # of the chardev's unix socket
    guest_open: bool
    connected: bool  # the greeting is done
    session: str = ""
    channels: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TrafficView:
    """What the hub refused since the daemon began, and how full its queues are. For metrics."""

    refused: Mapping[str, int]  # by kind, one of a few fixed words
    full_to_guests: int  # channels whose reader in the guest has no room left: our writers wait
    full_from_guests: int  # channels whose reader here has no room left: the guest's writers wait
    unsent_bytes: int  # queued for guests, or sent and not acknowledged


@dataclass(frozen=True, slots=True)
class HostView:
    """A host that could hold an instance (S3)."""

    name: str
    member: bool
    synced: bool
    instances: int
    last_word_s: float | None = None  # seconds ago; None: this host, or never heard
    problem: str = ""


@dataclass(frozen=True, slots=True)
class OperationStep:
    """One journal record of an operation, for people."""

    at: float  # wall time, seconds
    text: str


@dataclass(frozen=True, slots=True)
class OperationView:
    """A fence operation, running or past."""

    id: str
    action: str
    vm_uuid: str
    vm_name: str
    requester: str  # VM name or UUID; "operator"
    host: str  # the coordinator
    running: bool
    phase: str
    code: str  # FenceCode name in lower case; "" while it runs
    ok: bool
    reason: str
    begun_at: float  # wall time, seconds
    elapsed_ms: int
    evidence: tuple[str, ...] = ()
    steps: tuple[OperationStep, ...] = ()  # filled by op(), empty in ops()


@dataclass(frozen=True, slots=True)
class CanView:
    """Would this fence be allowed, and could it be proven now? Changes nothing."""

    allowed: bool
    provable: bool
    vm: str  # the requester, as asked
    action: str
    plug: str
    target_uuid: str = ""
    target_name: str = ""
    reason: str = ""  # names the rule, or what could not be proven
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class ConfirmView:
    """What became of an operator's word that a VM is off."""

    ok: bool
    code: FenceCode  # DONE, ALREADY, or why the word was not taken
    reason: str
    vm_uuid: str = ""
    vm_name: str = ""  # untrusted text
    lines: tuple[str, ...] = ()  # the ends that it covers


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`."""

    level: str  # "error", "warning", or "note": nothing is wrong
    subject: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class AdminEvent:
    """Something that happened, for live views."""

    at: float  # wall time, seconds
    kind: str  # dotted word: "vm.seen", "vm.ended", "port.connected", "operation.done", ...
    text: str
    vm_uuid: str = ""
    vm_name: str = ""
    operation: str = ""


@dataclass(frozen=True, slots=True)
class FenceOrder:
    """An operator's fence, as POST /v1/fence takes it."""

    request_id: bytes  # 16 bytes
    action: FenceAction
    vm: str  # UUID, name or alias; the policy resolves it
    timeout_s: float
    operator: str = ""  # who asks: the user of the socket's other end (SO_PEERCRED)


class AdminView(Protocol):
    """What the admin API needs of the daemon. Plain methods are snapshots of memory and do not block."""

    def status(self) -> DaemonStatus: ...

    def vms(self) -> Sequence[VmView]: ...

    def definitions(self) -> DefinitionsView: ...

    def ports(self) -> Sequence[PortView]: ...

    def hosts(self) -> Sequence[HostView]: ...

    def traffic(self) -> TrafficView: ...

    async def ops(self, limit: int) -> Sequence[OperationView]:
        """Newest first, running ones included."""
        ...

    async def op(self, operation: str) -> OperationView | None: ...

    async def can(self, vm: str, action: FenceAction, plug: str) -> CanView:
        """May VM `vm` do `action` to `plug`, and could it be proven now? Looks afresh."""
        ...

    async def doctor(self) -> Sequence[Finding]: ...

    async def fence(self, order: FenceOrder, progress: Callable[[FenceProgress], None]) -> FenceAnswer:
        """Carry out an operator's order; always answers within `order.timeout_s`, failure included.

        `progress` never blocks and never raises. Cancelling means that nobody waits any more; an intent goes
        on (S5).
        """
        ...

    async def confirm_off(self, vm: str, operator: str) -> ConfirmView:
        """Take the word of `operator` that the VM is off; durable before it counts. Looks afresh."""
        ...

    async def plug(self, order: PlugOrder) -> PlugOutcome:
        """Attach a port to a VM, or detach it; answers within the order's time and 2 s."""
        ...

    def events(self) -> AsyncIterator[AdminEvent]:
        """What happens from now on; an async generator is closed when the listener goes.

        The implementer bounds each subscriber's queue and drops the oldest.
        """
        ...

    async def verify_journal(self) -> VerifyResult: ...


__all__ = [
    "AdminEvent",
    "AdminView",
    "CanView",
    "ConfirmView",
    "DaemonStatus",
    "DefinedVm",
    "DefinitionsView",
    "FenceOrder",
    "Finding",
    "HostView",
    "InstanceView",
    "OperationStep",
    "OperationView",
    "PortView",
    "TrafficView",
    "VmView",
]
