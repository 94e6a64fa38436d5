# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host daemon's configuration as frozen values: what `host.yaml` and `policy.d/*.yaml` say, converted.

Every field has the default that the key has in the file (DESIGN section 6). Plain data; no I/O and no checks:
`config.load_config` makes checked ones, tests may make them by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fence_vmchannel.messages import FenceAction
from vmchannel_host.model import HostName, PortName

_KIB = 1024
_MIB = 1024 * _KIB
_DAY_S = 86_400.0


GROUP_ACTIONS: Mapping[str, FenceAction] = MappingProxyType(
    {
        "off": FenceAction.OFF,
        "on": FenceAction.ON,
        "reboot": FenceAction.REBOOT,
        "status": FenceAction.STATUS,
        "list": FenceAction.LIST,
    }
)
"""The words of a group's `actions`. `monitor` needs no right of its own."""


class EvidenceRule(Enum):
    """Whether a silent host may be left out because one process was the VM's only instance (S3)."""

    SOLE = "sole"  # it may, by S3 (b)
    STRICT = "strict"  # never: S3 (b) is off


class MinorityRule(Enum):
    """What a partition without quorum may report (S4)."""

    NONE = "none"  # nothing
    SOLE = "sole"  # success by S3 (b), from its own unbroken knowledge


class AfterKill(Enum):
    """What an `off` waits for after SIGKILL (S1, *gone is not written*)."""

    SETTLE = "settle"  # until no image lock of the dead process remains; refuse where that cannot be probed
    ACCEPT = "accept"  # the process's end is enough; the evidence says `io: unproven`


class BusKind(Enum):
    """What joins the hosts."""

    LOCAL = "local"  # nothing: this host alone


class LogLevel(Enum):
    """Lowest level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What may wait of one channel, in each direction."""

    byte_limit: int = _MIB  # bytes here
    guest_byte_limit: int = _MIB  # bytes in the guest; kept from here, by the windows that it is granted
    cache_buffers: bool = True  # what waits for a guest that is away is kept

    @property
    def window(self) -> int:
        """What may wait anywhere: credit is end to end, so the smaller of the two bounds both sides."""
        return min(self.byte_limit, self.guest_byte_limit)


WIDEST: Final = PortLimits(4 * _MIB, 4 * _MIB)
"""What narrows nothing: the defaults of one service's entry."""


@dataclass(frozen=True, slots=True)
class PortsConfig:
    """Which ports are served, and how."""

    prefix: str = "org.vmchannel."  # every port whose name begins so is served
    limits: PortLimits = PortLimits()  # byte_limit, guest_byte_limit, cache_buffers of the section itself
    overrides: Mapping[PortName, PortLimits] = field(default_factory=lambda: MappingProxyType({}))  # complete
    services: Mapping[str, PortLimits] = field(default_factory=lambda: MappingProxyType({}))  # narrow only
    raw: tuple[PortName, ...] = ()  # ports of other programs, offered as raw streams
    listen_in: tuple[str, ...] | None = None  # directories for the sockets of QEMUs that connect; None: usual

    def limits_of(self, name: PortName) -> PortLimits:
        """The limits of one port: its override, or those of the section."""
        return self.overrides.get(name, self.limits)


@dataclass(frozen=True, slots=True)
class QmpConfig:
    """Bare QEMU, found by its QMP sockets."""

    sockets: tuple[str, ...] = ("/run/vms/*/qmp.sock",)  # absolute globs
    start: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )  # VM name or UUID: argv


SYSTEM_SAVES: Final = Path("/var/lib/libvirt/qemu/save")
"""Where the libvirtd of the system keeps managed saves."""


@dataclass(frozen=True, slots=True)
class LibvirtConfig:
    """QEMU run by libvirt."""

    uri: str = "qemu:///system"
    saves: Path = SYSTEM_SAVES  # its managed saves, read when it does not answer (S0)


HypervisorConfig = QmpConfig | LibvirtConfig
"""One entry of `hypervisors`."""


@dataclass(frozen=True, slots=True)
class Group:
    """VMs that may fence one another."""

    name: str
    members: tuple[str, ...] = ()  # VM names or UUIDs (UUIDs in lower case)
    actions: frozenset[FenceAction] = frozenset(GROUP_ACTIONS.values())
    self_fence: bool = False  # `self: true`: a member may act on itself (S12)
    evidence: EvidenceRule = EvidenceRule.SOLE  # the group's own, else the policy's


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Who may do what to whom. No group, no right: default deny."""

    groups: Mapping[str, Group] = field(default_factory=lambda: MappingProxyType({}))
    evidence: EvidenceRule = EvidenceRule.SOLE
    minority: MinorityRule = MinorityRule.NONE


@dataclass(frozen=True, slots=True)
class FencingConfig:
    """How long fencing waits, and for what."""

    quit_timeout_s: float = 1.0  # QMP quit gets this long before SIGKILL
    timeout_s: float = 40.0  # one operation, from intent to answer
    after_kill: AfterKill = AfterKill.SETTLE


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Bounds of the daemon as a whole."""

    channels: int = 1024  # open channels of one peer
    clients: int = 256  # local applications connected at a time
    requests: int = 250  # channels and messages of one VM to the fence service, a second


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The other hosts."""

    bus: BusKind = BusKind.LOCAL
    standalone: bool = False  # the operator's word that no other host can run these VMs (S1, *already off*)


@dataclass(frozen=True, slots=True)
class JournalConfig:
    """The durable record of operations."""

    keep_s: float = 400 * _DAY_S


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged."""

    level: LogLevel = LogLevel.INFO


@dataclass(frozen=True, slots=True)
class PathsConfig:
    """Where the daemon keeps its files."""

    state: Path = Path("/var/lib/vmchannel")  # survives a boot
    run: Path = Path("/run/vmchannel")  # does not

    @property
    def host_socket(self) -> Path:
        """Where local applications reach the hub."""
        return self.run / "host.sock"

    @property
    def admin_socket(self) -> Path:
        """Where the operator's tools reach the daemon."""
        return self.run / "admin.sock"


@dataclass(frozen=True, slots=True)
class HostConfig:
    """All that the files say, checked and converted."""

    host: HostName
    ports: PortsConfig = PortsConfig()
    hypervisors: tuple[HypervisorConfig, ...] = (QmpConfig(),)
    policy: PolicyConfig = PolicyConfig()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # plug: VM name or UUID
    fencing: FencingConfig = FencingConfig()
    limits: LimitsConfig = LimitsConfig()
    cluster: ClusterConfig = ClusterConfig()
    journal: JournalConfig = JournalConfig()
    log: LogConfig = LogConfig()
    paths: PathsConfig = PathsConfig()

    @property
    def qmp(self) -> tuple[QmpConfig, ...]:
        """The entries of bare QEMU."""
        return tuple(one for one in self.hypervisors if isinstance(one, QmpConfig))

    @property
    def libvirt(self) -> tuple[LibvirtConfig, ...]:
        """The entries of libvirt."""
        return tuple(one for one in self.hypervisors if isinstance(one, LibvirtConfig))
