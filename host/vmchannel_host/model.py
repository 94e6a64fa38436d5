# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the host side: ids, processes, instances of VMs and what proves that one has ended.

Plain frozen data; no I/O and no rules. A VM's identity is its UUID; an instance's identity is its process
(pid, start time, executable, UUID, kernel boot id): never a pid alone (safety rule S9).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

VmUuid = NewType("VmUuid", str)
"""Lower-case canonical text of a VM's UUID."""

HostName = NewType("HostName", str)
BootId = NewType("BootId", str)
"""/proc/sys/kernel/random/boot_id of one boot of one kernel."""

OperationId = NewType("OperationId", str)
PortName = NewType("PortName", str)

NIL_UUID = VmUuid("00000000-0000-0000-0000-000000000000")
"""What QEMU reports without `-uuid`: no identity (S9)."""


PidNamespace = NewType("PidNamespace", int)
"""Inode of /proc/self/ns/pid of whoever saw a pid: only there does it name that process."""

NO_NAMESPACE = PidNamespace(0)
"""Of a record that says nothing of it: journals kept none at first."""


@dataclass(frozen=True, slots=True, order=True)
class ProcessIdentity:
    """One process that runs, or ran, a VM."""

    pid: int
    start_time: int  # /proc/PID/stat field 22: clock ticks after boot
    executable: str  # target of /proc/PID/exe
    vm_uuid: VmUuid  # from the command line, checked while a pidfd was open
    boot_id: BootId  # of the host's kernel
    pid_namespace: PidNamespace = field(default=NO_NAMESPACE, compare=False)  # where `pid` is its number

    def __str__(self) -> str:
        return f"pid {self.pid} (start {self.start_time}, {self.executable})"


class RunState(Enum):
    """QEMU's run state (qapi/run-state.json), or UNKNOWN when no monitor answers."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"
    UNKNOWN = "unknown"  # the monitor is mute or absent: on, for all that we know


class Migration(Enum):
    """The part of an instance in a live migration, as last seen (query-migrate)."""

    NONE = "none"
    OUTGOING = "outgoing"  # setup, active, device, pre-switchover, postcopy-*, cancelling
    INCOMING = "incoming"  # waits for, or takes in, another instance's state
    COMPLETED = "completed"  # it was the source and has handed the VM over
    UNKNOWN = "unknown"  # the monitor is mute or absent


class SocketMode(Enum):
    """Who listens on the unix socket of a port's chardev; the values are libvirt's words."""

    BIND = "bind"  # QEMU does, we connect
    CONNECT = "connect"  # we do, QEMU connects


@dataclass(frozen=True, slots=True)
class Port:
    """A virtio-serial port of an instance, as its hypervisor describes it."""

    name: PortName
    chardev_path: str  # unix socket of its chardev
    guest_open: bool  # the guest has the port open (frontend-open)
    mode: SocketMode = SocketMode.BIND
    reconnects: bool = True  # CONNECT: QEMU connects again after an end; False: it is known not to


@dataclass(frozen=True, slots=True)
class DefinedPort:
    """A port that a VM will have once it starts, and whose QEMU will connect."""

    vm_uuid: VmUuid
    vm_name: str  # untrusted text
    port: PortName  # untrusted text
    path: str  # of the unix socket


@dataclass(frozen=True, slots=True)
class Instance:
    """One QEMU process of a VM, with what is known of it now."""

    identity: ProcessIdentity
    name: str  # "" when unknown; untrusted text
    run_state: RunState
    migration: Migration
    ports: tuple[Port, ...] = ()
    resettable: bool = False  # no vfio or vhost-user device: `system_reset` may prove a reboot (S8)
    monitor: str = ""  # path of the QMP socket that answers; "" when none does
    configured: bool = True
    """Whether the configuration leads to it: one of its QMP sockets is ours. Another QEMU of this host
    matters only as an instance of a VM that we know by its UUID (S0): it bears no name, so that nobody who
    may run a process here can take a VM's name from it."""
    interruptions: int = 0
    """How often its guest was reset, or may have been restored, since we watch it (S5). QEMU tells a restore
    (`loadvm`) by nothing but its RESUME, as it tells the end of a pause: every one counts."""

    version: str = ""  # of its QEMU, as "7.2.11"; "" when not told

    @property
    def vm_uuid(self) -> VmUuid:
        return self.identity.vm_uuid


class EndProof(Enum):
    """How we know that a process has ended (S1). Nothing else counts."""

    PIDFD = "pidfd"  # a pidfd opened while the process was identified became readable
    ABSENT = "absent"  # no process of that pid and start time exists in this boot of the kernel
    OTHER_BOOT = "other-boot"  # the kernel has booted since


class EndCause(Enum):
    """What we did to the process."""

    QUIT = "quit"  # QMP quit: QEMU drained its I/O and left
    TERM = "term"  # SIGTERM through the pidfd: QEMU drained its I/O and left
    KILL = "kill"  # SIGKILL through the pidfd
    NONE = "none"  # it ended without us


class IoState(Enum):
    """What is known of writes that were under way when the process ended (S1, *gone is not written*)."""

    DRAINED = "drained"  # it left by itself through quit
    NONE = "none"  # it had no file or device open for writing
    SETTLED = "settled"  # no image lock of the dead process remains
    UNPROVEN = "unproven"


@dataclass(frozen=True, slots=True)
class InstanceEnded:
    """Evidence: one instance's process has ended."""

    host: HostName
    identity: ProcessIdentity
    proof: EndProof
    cause: EndCause
    io: IoState
    departed: bool  # a migration was active, begun or completed when last watched: the VM may live elsewhere
    elapsed_ms: int  # from the first attempt to the proof


@dataclass(frozen=True, slots=True)
class InstanceReset:
    """Evidence: `system_reset` took effect on the one running instance (S8)."""

    host: HostName
    identity: ProcessIdentity
    elapsed_ms: int


@dataclass(frozen=True, slots=True)
class InstanceRunning:
    """Evidence: a new instance was seen in run state `running` after an `on`."""

    host: HostName
    identity: ProcessIdentity
    elapsed_ms: int


@dataclass(frozen=True, slots=True)
class UnknownProcess:
    """A process that may be an instance of any VM but those named: it could not be identified."""

    reason: str
    not_of: frozenset[VmUuid]  # they had a verified instance beside it, and it serves none of their sockets


@dataclass(frozen=True, slots=True)
class Look:
    """A fresh scan of one host's processes and hypervisors (S1, *a look*).

    `silent` names VMs whose state this host could not establish, with the reason: for these the look
    proves nothing. Nor does it for those of which an `unknown` process may be an instance.
    """

    host: HostName
    at_boottime: float  # CLOCK_BOOTTIME when the scan began, seconds
    instances: tuple[Instance, ...]
    silent: tuple[tuple[VmUuid, str], ...] = ()
    conflicts: tuple[str, ...] = ()  # one UUID with two names, a nil UUID, ...: each a sentence (S9)
    unknown: tuple[UnknownProcess, ...] = ()


Evidence = InstanceEnded | InstanceReset | InstanceRunning | Look
